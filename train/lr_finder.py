"""A learning rate from one short run in which it rises until the training breaks (Smith 2017, "Cyclical learning rates").

The price is a hundred steps; what it gives is the order of magnitude, which is what a first guess gets wrong. The model is a
fresh one and is thrown away: nothing that was trained before is touched, nor the random state of the caller.

>>> curve = find_lr("photos.beton", Config(model="resnet18")); curve.suggestion; curve.plot("lr.png")
"""

from __future__ import annotations

import contextlib
import html
import io
import itertools
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from fastload.dataset import Dataset
from fastload.errors import DataError, UsageError
from fastload.loader import Loader
from fastload.train import imbalance, losses
from fastload.train.config import Config
from fastload.train.data import make_split, train_pipeline
from fastload.train.files import write_atomic
from fastload.train.loading import loading
from fastload.train.model import Given, build_model, check_forward, normalisation, pick_device
from fastload.train.step import make_step, no_memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING = 0.9  # share of the past in the smoothed loss
EXPLODED = 4.0  # times the lowest smoothed loss so far: the training is broken
LOOK_EVERY = 10  # steps between two looks at the losses: each look makes the device wait


@dataclass(frozen=True)
class LrCurve:
    """Losses of a run with a rising learning rate. ``lrs`` (S,) float64, rising evenly in the exponent; ``losses`` (S,) float64.

    ``exploded``: whether the run was stopped because the loss exploded, so that the curve ends before its last learning rate.
    ``default``: what would be used where nothing is said.
    """

    lrs: np.ndarray
    losses: np.ndarray
    exploded: bool
    default: float

    @property
    def smoothed(self) -> np.ndarray:
        """(S,) float64: exponential mean of the losses, freed of the weight of its start from 0 (as Adam frees its moments)."""
        return smooth(self.losses)

    @property
    def suggestion(self) -> float | None:
        """The learning rate at which the smoothed loss falls fastest; None where it never falls.

        The slope over the exponent of the learning rate is a difference over a tenth of the curve, between the first tenth of it
        (whose mean is still of few batches) and the lowest point. As a peak with warm-up this is a careful choice: the mean
        runs behind the losses, but so does the loss behind the learning rate that lowers it.
        """
        loss, count = self.smoothed, len(self.lrs)
        half = max(1, count // 20)
        middles = np.arange(2 * half, min(int(loss.argmin()), count - 1 - half) + 1)
        if not len(middles):
            return None
        slopes = loss[middles + half] - loss[middles - half]
        return float(self.lrs[middles[slopes.argmin()]]) if slopes.min() < 0 else None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "suggestion": self.suggestion, "default": self.default, "exploded": self.exploded, "lrs": self.lrs.tolist(),
            "losses": self.losses.tolist(), "smoothed": self.smoothed.tolist(),
        }  # fmt: skip

    def plot(self, path: str | Path) -> None:
        """Write a PNG of the loss over the learning rate. UsageError: the place cannot be written."""
        png = self._png()
        write_atomic(path, lambda file: file.write(png))

    def _png(self) -> bytes:
        file = io.BytesIO()
        self._figure().savefig(file, format="png", dpi=120)
        return file.getvalue()

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")  # not pyplot's: no state that others see
        axes = figure.subplots()
        axes.plot(self.lrs, self.losses, color="0.75", linewidth=1, label="loss of a step")
        axes.plot(self.lrs, self.smoothed, color="tab:blue", label="smoothed")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="tab:red", label=f"suggestion {self.suggestion:.2g}")
        axes.axvline(self.default, color="0.4", linestyle=":", label=f"default {self.default:.2g}")
        low, high = self.smoothed.min(), max(self.smoothed[0], self.smoothed.min())
        room = 0.25 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(low - room, high + 2 * room))
        axes.legend(frameon=False)
        return figure

    def summary(self) -> str:
        """The outcome as a sentence."""
        if self.suggestion is None:
            return (
                f"no learning rate from {self.lrs[0]:.2g} to {self.lrs[-1]:.2g} made the loss fall; look at the plot, take more "
                f"steps or another range (default: {self.default:.2g})"
            )
        ending = "where the loss explodes" if self.exploded else "the end"
        return (
            f"suggested learning rate {self.suggestion:.2g}: there the loss falls fastest, of {len(self.lrs)} steps from "
            f"{self.lrs[0]:.2g} to {self.lrs[-1]:.2g}, {ending} (default: {self.default:.2g})"
        )

    def _repr_html_(self) -> str:
        import base64

        picture = base64.b64encode(self._png()).decode()
        return f'<p>{html.escape(self.summary())}</p><img alt="loss over learning rate" src="data:image/png;base64,{picture}">'


def smooth(losses: np.ndarray) -> np.ndarray:
    """(S,) bias-corrected exponential mean of (S,) losses."""
    mean, means = 0.0, []
    for number, loss in enumerate(losses.tolist(), start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean / (1 - SMOOTHING**number))
    return np.array(means)


def find_lr(
    train: Dataset | str | Path | None = None,
    cfg: Config | None = None,
    *,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 100,
    model: Given | None = None,
    progress: bool = True,
) -> LrCurve:
    """Train a fresh model of ``cfg`` for ``steps`` optimizer steps, the learning rate rising from ``low`` to ``high``.

    The images are those that a training with ``cfg`` would learn from, batches, augmentation and loss too; only schedule, weight
    averaging and freezing are left out, and the last, smaller batch of an epoch. It ends early when the smoothed loss is four times
    its lowest, or no number. DataError: the first loss is no number; UsageError: options that do not fit.
    """
    cfg = replace(cfg or Config(), ema=0.0)
    source = train if train is not None else cfg.data
    if source is None:
        raise UsageError("there is nothing to train on; give the training data, got None")
    if not 0 < low < high:
        raise UsageError(f"the range must be 0 < low < high, got low {low!r} and high {high!r}")
    if steps < 20:
        raise UsageError(f"a curve needs at least 20 steps, got {steps!r}")
    device = pick_device(cfg.device)
    split = make_split(source, cfg.valid, cfg, checked=True)  # nothing is scored, so a leak does no harm
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []))
        torch.manual_seed(cfg.seed)
        classes = len(split.classes)
        net = build_model(cfg, classes, model)
        check_forward(net, cfg.model, cfg.size)
        weights = imbalance.class_weights(split.train_labels, classes, cfg.class_weights, cfg.effective_beta)
        weights_there = None if weights is None else torch.from_numpy(weights).to(device)
        loss = losses.make_loss(cfg, weights_there, split.multilabel)
        step = make_step(cfg, classes, device, model=net, loss=loss)
        where = None if device.type == "cpu" else str(device)
        feed = Loader(
            split.train, cfg.batch_size, transforms=train_pipeline(cfg, *normalisation(net)), shuffle=True,
            weights=imbalance.sample_weights(split.train_labels, cfg.sampling), seed=cfg.seed, device=where,
            drop_last=len(split.train) > cfg.batch_size, **loading(cfg, where, keep=False),
        )  # fmt: skip
        stack.callback(feed.close)
        lrs = np.geomspace(low, high, steps)
        found: list[float] = []
        waiting: list[torch.Tensor] = []  # losses of batches that nobody has looked at yet
        batches = _endless(feed)
        stack.callback(batches.close)
        for number, lr in enumerate(
            tqdm(lrs, desc="find-lr", unit="step", leave=False, disable=not progress)
        ):
            for group in step.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            for pixels, labels in itertools.islice(batches, cfg.accumulate):
                try:
                    waiting.append(step(pixels, labels))
                except torch.OutOfMemoryError as error:
                    raise no_memory(cfg, device, step.fitting(pixels, labels)) from error
            if number % LOOK_EVERY == 0 or number + 1 == steps:
                found += torch.stack(waiting).view(-1, cfg.accumulate).mean(dim=1).tolist()
                waiting.clear()
                if _end(found) < len(found):
                    break
    end = _end(found)
    if end == 0:
        raise DataError(
            "the loss of the first step is no number; try --amp off, or look for odd images with 'fastload verify', "
            f"got {found[0]}"
        )
    kept = np.array(found[:end])
    return LrCurve(lrs[:end], kept, exploded=_end(found) < steps, default=cfg.peak_lr)


def _endless(feed: Loader) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """Batches of one epoch after the other."""
    for epoch in itertools.count():
        feed.set_epoch(epoch)
        yield from feed


def _end(found: list[float]) -> int:
    """How many of the losses come before the training broke; the one that shows it is kept if it is a number."""
    losses = np.array(found)
    broken = np.flatnonzero(~np.isfinite(losses))
    sound = int(broken[0]) if len(broken) else len(losses)
    means = smooth(losses[:sound])
    exploded = np.flatnonzero(means > EXPLODED * np.minimum.accumulate(means))
    return int(exploded[0]) + 1 if len(exploded) else sound
