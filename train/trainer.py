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
        folder = runs.check_folder(out, resume=resume, overwrite=overwrite)
        split = make_split(train, valid, cfg)
        state = checkpoint.load(folder / runs.LAST) if resume and (folder / runs.LAST).is_file() else None
        if state is not None:
            _check_same(state, cfg, split, folder)
        gpus = [device.index] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus), contextlib.ExitStack() as stack:
            torch.manual_seed(cfg.seed)
            try:
                session = _Session(cfg, split, folder, device, stack, progress)
                if state is not None:
                    session.restore(state)
                if overwrite:  # not before everything that can be wrong with the call has been looked at
                    runs.clear(folder)
                session.describe()
                while session.epoch < cfg.epochs:
                    line = session.run_epoch()
                    if on_epoch is not None:
                        on_epoch(line)
            except torch.OutOfMemoryError as error:
                raise UsageError(
                    f"{device} has no memory for batches of {cfg.batch_size} images of {cfg.size} px; the same optimizer "
                    f"steps in less memory: --batch-size {max(1, cfg.batch_size // 2)} --accumulate {2 * cfg.accumulate}"
                ) from error
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UsageError(
                    f"{cfg.model} has batch norm layers, which cannot learn from a batch of {cfg.batch_size} at "
                    f"{cfg.size} px; raise --batch-size"
                ) from error
        best = session.best or {}
        return runs.Run(folder, cfg, split.classes, session.history, best, len(split.train), len(split.valid))


class _Session:
    """One run in progress. ``epoch``: epochs done; ``history``: a line for each; ``best``: the best of the lines."""

    def __init__(
        self,
        cfg: Config,
        split: Split,
        folder: Path,
        device: torch.device,
        stack: contextlib.ExitStack,
        progress: bool,
    ) -> None:
        """Weights come from torch's random state; the loaders are closed when ``stack`` is left."""
        self.cfg, self.split, self.folder, self.progress = cfg, split, folder, progress
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        model = create_model(cfg.model, len(split.classes), cfg.pretrained, cfg.size)
        check_forward(model, cfg.model, cfg.size)
        self.mean, self.std = normalisation(model)
        where = None if device.type == "cpu" else str(device)
        # Batch norm cannot learn from a batch of one image, so such a tail is left out.
        lonely = len(split.train) > cfg.batch_size and len(split.train) % cfg.batch_size == 1
        self.feed = Loader(
            split.train, cfg.batch_size, transforms=train_pipeline(cfg, self.mean, self.std), shuffle=True,
            seed=cfg.seed, threads=cfg.threads, drop_last=cfg.drop_last or lonely, device=where,
        )  # fmt: skip
        stack.callback(self.feed.close)
        self.check = Loader(
            split.valid, cfg.batch_size, transforms=eval_pipeline(cfg, self.mean, self.std), threads=cfg.threads,
            device=where,
        )  # fmt: skip
        stack.callback(self.check.close)
        if len(self.feed) == 0:
            raise UsageError(
                f"no full batch in {len(split.train)} training images; lower --batch-size or leave --drop-last out, "
                f"got batch_size {cfg.batch_size}"
            )
        self.steps = math.ceil(len(self.feed) / cfg.accumulate)
        self.step = make_step(cfg, len(split.classes), device, model=model, steps_per_epoch=self.steps)
        self.kept = {
            "config": cfg.to_dict(), "classes": split.classes, "mean": list(self.mean), "std": list(self.std),
            "split": split.digest(),
        }  # fmt: skip

    def describe(self) -> None:
        """Write what will be trained, on what."""
        cfg, split = self.cfg, self.split
        resolved = {
            "device": str(self.step.device), "amp": self.step.amp, "lr": cfg.peak_lr, "warmup_epochs": cfg.warmup,
            "steps_per_epoch": self.steps, "mean": list(self.mean), "std": list(self.std), "groups": split.group_field,
        }  # fmt: skip
        data = {
            "train": split.train.path, "valid": split.valid.path, "train_images": len(split.train),
            "valid_images": len(split.valid), "classes": split.classes,
        }  # fmt: skip
        runs.describe(self.folder, cfg, resolved, data, split.rows())

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a loaded ``last.pt``, with its weights and its random state."""
        self.step.load_state_dict(state["step"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.step.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.step.device)
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]

    def run_epoch(self) -> dict[str, Any]:
        """Learn, validate, write. ``last.pt`` comes last: a run killed before it repeats the epoch whole."""
        cfg, split, step, start = self.cfg, self.split, self.step, time.perf_counter()
        line: dict[str, Any] = {"epoch": self.epoch + 1, "lr": step.optimizer.param_groups[0]["lr"]}
        line |= _learn(step, self.feed, self.epoch, cfg.epochs, self.progress)
        probs = infer(
            step.best_model, self.check, step.device, total=len(split.valid), amp=step.amp, layout=step.layout,
            label="validate", progress=self.progress,
        )  # fmt: skip
        if not np.isfinite(probs).all():
            raise _diverged(self.epoch)
        score = metrics.summary(split.valid_labels, probs)
        line |= {"valid_loss": score["loss"], "accuracy": score["accuracy"], "macro_f1": score["macro_f1"]}
        line["seconds"] = time.perf_counter() - start
        self.epoch += 1
        self.history.append(line)
        if _better(line, self.best, cfg.metric):
            self.best = line
            runs.write_probs(self.folder, split.valid.ids, split.valid_labels, probs, split.classes)
            best = {**self.kept, "weights": step.best_model.state_dict(), "epoch": self.epoch, "scores": line}
            checkpoint.save(self.folder / runs.BEST, best)
        runs.write_log(self.folder, self.history)
        progress = {"epoch": self.epoch, "history": self.history, "best": self.best}
        state = {"step": step.state_dict(), "random": _random_state(step.device)}
        checkpoint.save(self.folder / runs.LAST, {**self.kept, **progress, **state})
        return line


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
