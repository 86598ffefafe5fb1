"""The loop: epochs of steps, a true score after each, and a folder from which the run can go on.

``Trainer(Config(model="resnet18")).fit("photos.beton", out="runs/photos")``. A run resumes at an epoch's boundary and
then ends with the very weights of a run that was never interrupted (on one kind of CPU, bit for bit): the order and the
augmentation of an epoch are functions of (seed, epoch), so only weights, optimizer, averages and random state are kept.
The trade-off: a run killed in the middle of an epoch repeats that epoch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from fastload.dataset import Dataset
from fastload.errors import DataError, UsageError
from fastload.loader import Loader
from fastload.train import checkpoint, metrics, runs
from fastload.train.config import Config, differences
from fastload.train.data import Split, eval_pipeline, make_split, train_pipeline
from fastload.train.infer import infer
from fastload.train.model import check_forward, create_model, normalisation, pick_device
from fastload.train.step import Step, make_step

LOOK_EVERY_S = 5.0  # how often the loss is looked at within an epoch: each look makes the device wait


@dataclass
class _Progress:
    """How far a run is. ``epoch``: epochs done; ``history``: one line each; ``best``: the best of the lines."""

    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None


class Trainer:
    """Trains one model as ``cfg`` says. Holds no state: :meth:`fit` may be called again."""

    def __init__(self, cfg: Config | None = None) -> None:
        self.cfg = cfg or Config()

    def fit(
        self,
        train: Dataset | str | Path,
        valid: Dataset | str | Path | None = None,
        out: str | Path = "runs/run",
        *,
        resume: bool = False,
        overwrite: bool = False,
        on_epoch: Callable[[dict[str, Any]], object] | None = None,
        progress: bool = True,
    ) -> runs.Run:
        """Train, write the run folder ``out``, and say how good the best epoch was.

        Without ``valid`` a part of ``train`` is held out, as the options say. ``resume`` goes on with the run in ``out``
        (from the start if it has not finished an epoch). ``on_epoch`` gets each line of the log as it is written.
        DataError: labels of no use, or a loss that is no number; UsageError: options that do not fit the data or device.
        """
        cfg = self.cfg
        device = pick_device(cfg.device)
        folder = runs.prepare(out, resume=resume, overwrite=overwrite)
        split = make_split(train, valid, cfg)
        state = checkpoint.load(folder / runs.LAST) if resume and (folder / runs.LAST).is_file() else None
        if state is not None:
            _check_same(state, cfg, split, folder)
        gpus = [device.index] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus), contextlib.ExitStack() as stack:
            torch.manual_seed(cfg.seed)
            model = create_model(cfg.model, len(split.classes), cfg.pretrained, cfg.size)
            check_forward(model, cfg.model, cfg.size)
            mean, std = normalisation(model)
            feed, check = self._loaders(split, mean, std, device, stack)
            if len(feed) == 0:
                raise UsageError(
                    f"no full batch in {len(split.train)} training images; lower --batch-size or leave drop_last out, "
                    f"got batch_size {cfg.batch_size}"
                )
            steps = math.ceil(len(feed) / cfg.accumulate)
            step = make_step(cfg, len(split.classes), device, model=model, steps_per_epoch=steps)
            kept = {"config": cfg.to_dict(), "classes": split.classes, "mean": list(mean), "std": list(std)}
            kept["split"] = split.digest()
            done = _Progress()
            if state is not None:
                done = _restore(state, step, device)
            resolved = {
                "device": str(device), "amp": step.amp, "lr": cfg.peak_lr, "warmup_epochs": cfg.warmup,
                "steps_per_epoch": steps, "mean": list(mean), "std": list(std), "groups": split.group_field,
            }  # fmt: skip
            sizes = {"train": str(split.train.path), "valid": str(split.valid.path)}
            counts = {
                "train_images": len(split.train),
                "valid_images": len(split.valid),
                "classes": split.classes,
            }
            runs.describe(folder, cfg, resolved, {**sizes, **counts}, split.rows())
            try:
                while done.epoch < cfg.epochs:
                    self._epoch(done, step, feed, check, split, kept, folder, progress)
                    if on_epoch is not None:
                        on_epoch(done.history[-1])
            except torch.OutOfMemoryError as error:
                raise UsageError(
                    f"{device} has no memory for batches of {cfg.batch_size} images of {cfg.size} px; the same training "
                    f"in less memory is --batch-size {max(1, cfg.batch_size // 2)} --accumulate {2 * cfg.accumulate}"
                ) from error
        if done.best is None:
            raise DataError(f"{folder} holds no finished epoch; start it anew with --overwrite")
        return runs.Run(
            folder, cfg, split.classes, done.history, done.best, len(split.train), len(split.valid)
        )

    def _loaders(
        self,
        split: Split,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        stack: contextlib.ExitStack,
    ) -> tuple[Loader, Loader]:
        """The loaders of the two sides, closed when ``stack`` is left."""
        cfg = self.cfg
        where = None if device.type == "cpu" else str(device)
        # Batch norm cannot learn from a batch of one image, so such a tail is left out.
        lonely = len(split.train) > cfg.batch_size and len(split.train) % cfg.batch_size == 1
        feed = Loader(
            split.train, cfg.batch_size, transforms=train_pipeline(cfg, mean, std), shuffle=True, seed=cfg.seed,
            threads=cfg.threads, drop_last=cfg.drop_last or lonely, device=where,
        )  # fmt: skip
        stack.callback(feed.close)
        check = Loader(
            split.valid,
            cfg.batch_size,
            transforms=eval_pipeline(cfg, mean, std),
            threads=cfg.threads,
            device=where,
        )
        stack.callback(check.close)
        return feed, check

    def _epoch(
        self,
        done: _Progress,
        step: Step,
        feed: Loader,
        check: Loader,
        split: Split,
        kept: dict[str, Any],
        folder: Path,
        progress: bool,
    ) -> None:
        """One epoch: learn, validate, write. ``last.pt`` comes last: a run killed before it repeats the epoch whole."""
        cfg, start = self.cfg, time.perf_counter()
        line: dict[str, Any] = {"epoch": done.epoch + 1, "lr": step.optimizer.param_groups[0]["lr"]}
        line |= _learn(step, feed, done.epoch, cfg.epochs, progress)
        probs = infer(
            step.best_model, check, step.device, total=len(split.valid), amp=step.amp, layout=step.layout,
            label="validate", progress=progress,
        )  # fmt: skip
        if not np.isfinite(probs).all():
            raise _diverged(done.epoch)
        score = metrics.summary(split.valid_labels, probs)
        line |= {"valid_loss": score["loss"], "accuracy": score["accuracy"], "macro_f1": score["macro_f1"]}
        line["seconds"] = time.perf_counter() - start
        done.epoch += 1
        done.history.append(line)
        if _better(line, done.best, cfg.metric):
            done.best = line
            runs.write_probs(folder, split.valid.ids, split.valid_labels, probs, split.classes)
            best = {**kept, "weights": step.best_model.state_dict(), "epoch": done.epoch, "scores": line}
            checkpoint.save(folder / runs.BEST, best)
        runs.write_log(folder, done.history)
        checkpoint.save(
            folder / runs.LAST,
            {
                **kept,
                "step": step.state_dict(),
                "random": _random_state(step.device),
                "epoch": done.epoch,
                "history": done.history,
                "best": done.best,
            },
        )


def _learn(step: Step, feed: Loader, epoch: int, epochs: int, progress: bool) -> dict[str, float]:
    """Train for one epoch (counted from 0). Mean loss, images per second, share of the time the loader was waited for."""
    feed.set_epoch(epoch)
    step.model.train()
    total = torch.zeros((), device=step.device)
    images = 0
    start = looked = time.perf_counter()
    label = f"epoch {epoch + 1}/{epochs}"
    with tqdm(
        total=feed.num_samples, desc=label, unit="img", leave=False, disable=not progress, mininterval=0.5
    ) as bar:
        for pixels, labels in feed:
            loss = step(pixels, labels)
            total += loss * len(pixels)
            images += len(pixels)
            bar.update(len(pixels))
            now = time.perf_counter()
            if now - looked > LOOK_EVERY_S:
                looked = now
                mean = _mean_loss(total, images, epoch)
                stall = feed.stats()["wait_s"] / (now - start)
                bar.set_postfix_str(f"loss {mean:.3f}, waits for data {stall:.0%}", refresh=False)
        step.flush()
        mean = _mean_loss(
            total, images, epoch
        )  # waits until the device has done everything, so the clock is true
    seconds = time.perf_counter() - start
    stall = min(1.0, feed.stats()["wait_s"] / seconds)
    return {"train_loss": mean, "images_per_s": images / seconds, "stall": stall}


def _mean_loss(total: torch.Tensor, images: int, epoch: int) -> float:
    mean = total.item() / images
    if not math.isfinite(mean):
        raise _diverged(epoch)
    return mean


def _diverged(epoch: int) -> DataError:
    return DataError(
        f"the loss is no longer a number in epoch {epoch + 1}: the training diverged; lower --lr, or try --amp off, or "
        "look for odd images with 'fastload verify'. The folder keeps the epochs before"
    )


def _better(line: dict[str, Any], best: dict[str, Any] | None, metric: str) -> bool:
    if best is None:
        return True
    if metric == "loss":
        return bool(line["valid_loss"] < best["valid_loss"])
    return bool(line[metric] > best[metric])


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore(state: dict[str, Any], step: Step, device: torch.device) -> _Progress:
    """Put a loaded ``last.pt`` into ``step`` and torch's random state."""
    step.load_state_dict(state["step"])
    torch.set_rng_state(state["random"]["cpu"])
    if device.type == "cuda" and "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"], device)
    return _Progress(state["epoch"], state["history"], state["best"])


def _check_same(state: dict[str, Any], cfg: Config, split: Split, folder: Path) -> None:
    """A run may only go on as what it was."""
    changed = differences(Config.from_dict(state["config"]), cfg)
    if changed:
        text = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
        raise UsageError(
            f"{folder} was started with other options ({text}); resume it with its own, or train into another folder"
        )
    if state["split"] != split.digest():
        raise DataError(
            f"{folder} was started on other images or labels than these; resume it with the data it began with, "
            "or train into another folder"
        )
