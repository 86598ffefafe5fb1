"""The loop: epochs of steps, a true score after each, and a folder from which the run can go on.

``Trainer(Config(model="resnet18")).fit("photos.beton", out="runs/photos")``. A run that was killed at any moment goes on from
its last checkpoint (one an epoch, and every few minutes inside of one) and ends with the very weights of a run that was never
interrupted, on one kind of CPU bit for bit: order and augmentation are functions of (seed, epoch, position), so weights,
optimizer, averages, random state and the position are all that is kept.

Read from :meth:`Trainer.fit` down: :class:`Session` is one run in progress.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from fastload.dataset import Dataset
from fastload.errors import DataError, UsageError
from fastload.loader import Loader
from fastload.train import checkpoint, imbalance, losses, metrics, runs
from fastload.train.average import Swa, greedy_soup, update_batch_norm
from fastload.train.callbacks import Callback
from fastload.train.config import Config, differences
from fastload.train.data import Split, eval_pipeline, make_split, train_pipeline
from fastload.train.distributed import Ranks, ranks
from fastload.train.files import write_json
from fastload.train.infer import infer
from fastload.train.loading import loading
from fastload.train.model import (
    Given,
    build_model,
    check_forward,
    deterministic,
    model_name,
    normalisation,
    pick_device,
)  # fmt: skip
from fastload.train.predictions import VALID, Predictions
from fastload.train.step import make_step, no_memory

LOOK_EVERY_S = 5.0  # how often the loss is looked at within an epoch: each look makes the device wait
AGREE_EVERY = 50  # batches after which several processes agree on whether to write a checkpoint


class Trainer:
    """Trains one model as ``cfg`` says. Holds no state: :meth:`fit` may be called again.

    ``model``: a module of your own, or a function that makes one from the number of classes, in place of ``cfg.model``.
    """

    def __init__(self, cfg: Config | None = None, *, model: Given | None = None) -> None:
        self.cfg, self.model = cfg or Config(), model
        if model is not None:
            self.cfg = replace(self.cfg, model=model_name(model))

    def fit(
        self,
        train: Dataset | str | Path | None = None,
        valid: Dataset | str | Path | None = None,
        out: str | Path = "runs/run",
        *,
        resume: bool = False,
        overwrite: bool = False,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
        checked: bool = False,
    ) -> runs.Run:
        """Train, write the run folder ``out``, and say how good the best epoch was.

        ``train`` and ``valid`` default to the files named in the options; without any ``valid`` a part of ``train`` is held out,
        or the fold of a saved split. ``resume`` goes on with the run in ``out`` (from the start if it has no checkpoint yet).
        ``checked``: the caller has looked for leaks. DataError: labels of no use, a split that leaks, or a loss that is no
        number; UsageError: options that do not fit the data or device.
        """
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(ranks())
            cfg = self._resolved(train, valid)
            device = pick_device(f"cuda:{group.local}" if _own_gpu(cfg, group) else cfg.device)
            folder = Path(out)
            if group.first:
                runs.check_folder(folder, resume=resume, overwrite=overwrite)
            state = checkpoint.load(folder / runs.LAST) if resume and (folder / runs.LAST).is_file() else None
            known = checked or state is not None or not group.first  # what was looked at once is known
            whole = str(cfg.data) if train is None else train
            split = make_split(whole, cfg.valid if valid is None else valid, cfg, checked=known)
            if state is not None:
                _check_same(state, cfg, split, folder)
            stack.enter_context(
                torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else [])
            )
            stack.enter_context(deterministic(cfg.deterministic))
            torch.manual_seed(cfg.seed)
            session = Session(cfg, split, folder, device, group, self.model, stack, progress)
            if state is not None:
                session.restore(state)
            if overwrite and group.first:
                runs.clear(folder)  # not before everything that can be wrong with the call has been looked at
            return session.run([*callbacks, *_trackers(cfg)] if group.first else [])

    def _resolved(self, train: Dataset | str | Path | None, valid: Dataset | str | Path | None) -> Config:
        """The options with the data that were given, so that the saved file says what was trained on."""
        cfg = self.cfg
        if train is None and cfg.data is None:
            raise UsageError("there is nothing to train on; give the training data, got None")
        named = {"data": train, "valid": valid}
        given = {
            name: str(Path(value.path if isinstance(value, Dataset) else value).resolve())
            for name, value in named.items()
            if value is not None
        }
        if "valid" in given and cfg.split is not None:
            raise UsageError(
                "validation data and a saved split exclude each other; give one of them, got both"
            )
        given |= {
            name: str(Path(path).resolve())  # the saved file must mean the same from anywhere
            for name, path in (("split", cfg.split), ("weights", cfg.weights))
            if path is not None
        }
        return cfg.with_values(given)


class Session:
    """One run in progress. ``epoch``: epochs done; ``history``: a line for each; ``best``: the best of the lines."""

    def __init__(
        self,
        cfg: Config,
        split: Split,
        folder: Path,
        device: torch.device,
        group: Ranks,
        given: Given | None,
        stack: contextlib.ExitStack,
        progress: bool,
    ) -> None:
        """Weights come from torch's random state; the loaders are closed when ``stack`` is left."""
        self.cfg, self.split, self.folder, self.ranks = cfg, split, folder, group
        self.progress = progress and group.first
        self.epoch, self.stop = 0, False
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.valid: Predictions | None = None
        self.inside: dict[str, Any] | None = None  # where in an epoch a killed run has to go on
        self.swa, self.soup = Swa(), []  # type: ignore[var-annotated]
        self.listeners: Sequence[Callback] = ()
        classes = len(split.classes)
        model = build_model(cfg, classes, given)
        check_forward(model, cfg.model, cfg.size)
        self.mean, self.std = normalisation(model)
        self.where = None if device.type == "cpu" else str(device)
        self.activation = losses.activation(cfg.loss, split.multilabel)
        self.stack, self.feeds = stack, {}  # type: ignore[var-annotated]
        self.per_rank = [group.share(len(split.train), rank) for rank in range(group.size)]
        # Batch norm cannot learn from a batch of one image, so such a tail is left out.
        lonely = any(n > cfg.batch_size and n % cfg.batch_size == 1 for n in self.per_rank)
        self.drop_last = cfg.drop_last or lonely
        if self.drop_last:
            self.per_rank = [min(self.per_rank) // cfg.batch_size * cfg.batch_size] * group.size
        self.check = Loader(
            split.valid, cfg.batch_size, transforms=eval_pipeline(cfg, self.mean, self.std), device=self.where,
            fields=[split.valid.image_field], rank=group.rank, world_size=group.size, **loading(cfg, self.where, keep=False),
        )  # fmt: skip
        stack.callback(self.check.close)
        self.batches = -(-max(self.per_rank) // cfg.batch_size)
        if self.batches == 0:
            raise UsageError(
                f"no full batch in {len(split.train)} training images; lower --batch-size or leave --drop-last out, "
                f"got batch_size {cfg.batch_size}"
            )
        self.steps = math.ceil(self.batches / cfg.accumulate)
        weights = imbalance.class_weights(split.train_labels, classes, cfg.class_weights, cfg.effective_beta)
        weights_there = None if weights is None else torch.from_numpy(weights).to(device)
        loss = losses.make_loss(cfg, weights_there, split.multilabel)
        self.step = make_step(
            cfg, classes, device, model=model, steps_per_epoch=self.steps, loss=loss, ranks=group
        )
        if (
            group.rank
        ):  # after the weights, which are the first process's: dropout must differ from process to process
            torch.manual_seed(cfg.seed + 7919 * group.rank)
        self.kept = {
            "config": cfg.to_dict(), "classes": split.classes, "mean": list(self.mean), "std": list(self.std),
            "split": split.digest(), "multilabel": split.multilabel,
        }  # fmt: skip

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(self, listeners: Sequence[Callback]) -> runs.Run:
        """All epochs that are missing, then averaged weights if they are asked for, then the result."""
        self.listeners = listeners
        if self.ranks.first:
            self._describe()
        self._tell("on_start")
        try:
            while self.epoch < self.cfg.epochs and not self._enough():
                line = self._one_epoch()
                self._tell("on_epoch", line)
                self.stop = self.ranks.agree(self.stop)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                f"{self.cfg.model} has batch norm layers, which cannot learn from a batch of {self.cfg.batch_size} at "
                f"{self.cfg.size} px; raise --batch-size"
            ) from error
        if not (self.folder / runs.RESULT).is_file():
            self._average()
            if self.ranks.first:
                write_json(self.folder / runs.RESULT, {"best": self.best, "last": self.history[-1]})
        self.ranks.wait()
        run = runs.Run.read(self.folder)
        self._tell("on_end", run)
        return run

    def _tell(self, name: str, *values: Any) -> None:
        for listener in self.listeners:
            getattr(listener, name)(self, *values)

    def _enough(self) -> bool:
        """Whether to stop before the last epoch: asked to, or no better score for ``early_stop`` epochs."""
        wait = self.cfg.early_stop
        late = bool(wait and self.best and self.epoch - self.best["epoch"] >= wait)
        return self.stop or late

    def _describe(self) -> None:
        """Write what will be trained, on what."""
        cfg, split = self.cfg, self.split
        about = {
            "kind": "run",
            "resolved": {
                "device": str(self.step.device), "amp": self.step.amp, "lr": cfg.peak_lr, "warmup_epochs": cfg.warmup,
                "steps_per_epoch": self.steps, "mean": list(self.mean), "std": list(self.std), "groups": split.group_field,
                "multilabel": split.multilabel, "processes": self.ranks.size,
            },
            "data": {
                "train": split.train.path, "valid": split.valid.path, "train_images": len(split.train),
                "valid_images": len(split.valid), "classes": split.classes,
            },
        }  # fmt: skip
        runs.describe(self.folder, cfg, about, split.rows())

    # -- one epoch -------------------------------------------------------------------------------------------------

    def _one_epoch(self) -> dict[str, Any]:
        """Learn, validate, write. ``last.pt`` comes last: a run killed before it repeats what came after the one before."""
        cfg, step, start = self.cfg, self.step, time.perf_counter()
        lr = step.optimizer.param_groups[0]["lr"] if self.inside is None else self.inside["lr"]
        line: dict[str, Any] = {"epoch": self.epoch + 1, "lr": lr, "size": cfg.size_at(self.epoch)}
        line |= self._learn(lr)
        self.valid = self._validate(step.best_model)
        line |= metrics.brief(self.valid.true, self.valid.probs, cfg.metric)
        line["seconds"] = time.perf_counter() - start
        self.epoch += 1
        self.history.append(line)
        score = float(line[runs.column(cfg.metric)])
        step.rescore(score if metrics.higher_is_better(cfg.metric) else -score)
        if cfg.average == "swa" and self.epoch > cfg.swa_start * cfg.epochs:
            self.swa.add(step.model.state_dict())
        if cfg.average == "soup":
            self._keep_for_soup(score)
        if self._is_best(line):
            self._keep_best(line, step.best_model.state_dict(), self.valid)
        if self.ranks.first:
            self.valid.save(self.folder / runs.LAST_PROBS)
            runs.write_log(self.folder, self.history)
        self.save()
        return line

    def _learn(self, lr: float) -> dict[str, float]:
        """One epoch of training, which began at ``lr``: mean loss, images per second, share of the time the loader was waited for."""
        cfg, step, size = self.cfg, self.step, self.cfg.batch_size
        feed = self._feed(cfg.size_at(self.epoch))
        feed.set_epoch(self.epoch)
        step.train_mode(frozen=self.epoch < cfg.freeze_epochs)
        total, batch, waited, before = torch.zeros((), device=step.device), 0, 0.0, 0.0
        if self.inside is not None:
            here, self.inside = self.inside, None
            feed.load_state_dict({**feed.state_dict(), "position": here["batch"] * size})
            total = here["loss"][self.ranks.rank].to(step.device)
            batch, waited, before = here["batch"], here["waited"], here["seconds"]
        begun = looked = saved = time.perf_counter()
        label = f"epoch {self.epoch + 1}/{cfg.epochs}"
        with tqdm(
            total=feed.num_samples, initial=batch * size, desc=label, unit="img", leave=False,
            disable=not self.progress, mininterval=0.5,
        ) as bar:  # fmt: skip
            for pixels, labels, ours in self._batches(feed, batch):
                everywhere = sum(min(max(n - batch * size, 0), size) for n in self.per_rank)
                batch += 1
                final = batch == self.batches
                loss = (
                    self._try(pixels, labels, everywhere, final)
                    if ours
                    else step.idle(pixels, everywhere, final)
                )
                total += loss * len(pixels)
                bar.update(len(pixels) if ours else 0)
                now = time.perf_counter()
                if now - looked > LOOK_EVERY_S:
                    looked = now
                    mean = self._finite(total.item() / min(batch * size, feed.num_samples))
                    stall = (waited + feed.stats()["wait_s"]) / (before + now - begun)
                    bar.set_postfix_str(f"loss {mean:.3f}, waits for data {stall:.0%}", refresh=False)
                if step.between:
                    self._tell("on_step", loss)
                    if self._time_to_save(now - saved, batch):
                        saved = now
                        self.save({
                            "batch": batch, "lr": lr, "loss": self.ranks.gather(total.cpu()),
                            "waited": waited + feed.stats()["wait_s"], "seconds": before + now - begun,
                        })  # fmt: skip
            # Waits until the device has done everything, so the clock is true.
            mean = self._finite(self.ranks.sum(total).item() / sum(self.per_rank))
        seconds = before + time.perf_counter() - begun
        stall = min(1.0, (waited + feed.stats()["wait_s"]) / seconds)
        return {"train_loss": mean, "images_per_s": sum(self.per_rank) / seconds, "stall": stall}

    def _batches(self, feed: Loader, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
        """Images and labels of each batch from ``start``, and whether they are to be learned from.

        As many in all processes: where one has no images left, its last ones come again and count nothing.
        """
        number = start
        for pixels, labels in feed:
            yield pixels, labels, True
            number += 1
        for _ in range(number, self.batches):
            yield pixels, labels, False

    def _try(self, pixels: torch.Tensor, labels: torch.Tensor, everywhere: int, final: bool) -> torch.Tensor:
        """One step; if memory runs out, an error that says which batch size would fit."""
        try:
            return self.step(pixels, labels, everywhere, final)
        except torch.OutOfMemoryError as error:
            fits = self.step.fitting(pixels, labels)
            raise no_memory(self.cfg, self.step.device, fits) from error

    def _feed(self, size: int) -> Loader:
        """The training loader at ``size`` pixels; loaders of other sizes are closed."""
        if size not in self.feeds:
            for other in self.feeds.values():
                other.close()
            cfg, split = self.cfg, self.split
            data = split.train
            if cfg.sampling == "bootstrap":
                chosen = np.random.default_rng(cfg.seed).integers(0, len(data), len(data))
                data = data.subset(np.sort(chosen))
            feed = Loader(
                data, cfg.batch_size, transforms=train_pipeline(cfg, self.mean, self.std, size), shuffle=True,
                weights=imbalance.sample_weights(split.train_labels, cfg.sampling), seed=cfg.seed, drop_last=self.drop_last,
                device=self.where, rank=self.ranks.rank, world_size=self.ranks.size, **loading(cfg, self.where, keep=True),
            )  # fmt: skip
            self.stack.callback(feed.close)
            self.feeds = {size: feed}
        return self.feeds[size]

    def _time_to_save(self, seconds: float, batch: int) -> bool:
        """Whether to write a checkpoint after ``batch`` batches: enough time is over, and all processes have more to do."""
        if batch * self.cfg.batch_size >= min(self.per_rank):
            return False
        due = seconds >= 60 * self.cfg.save_minutes
        if self.ranks.size == 1:
            return due
        return batch % AGREE_EVERY == 0 and bool(self.ranks.agree(due))

    def _validate(self, model: nn.Module) -> Predictions:
        """Probabilities of the whole held-out side, in all processes."""
        split, total = self.split, len(self.split.valid)
        part = infer(
            model, self.check, self.step.device, total=self.ranks.share(total), amp=self.step.amp,
            layout=self.step.layout, activation=self.activation, label="validate", progress=self.progress,
        )  # fmt: skip
        probs = self.ranks.join_rows(part, total)
        self._finite(float(probs.sum()))
        return Predictions(
            list(split.valid.ids), probs, split.classes, split.valid_labels, split.valid_groups,
            np.full(total, self.cfg.fold), multilabel=split.multilabel,
        )  # fmt: skip

    def _finite(self, value: float) -> float:
        if not math.isfinite(value):
            raise DataError(
                f"the loss is no longer a number in epoch {self.epoch + 1}: the training diverged; lower --lr, or try "
                "--amp off, or look for odd images with 'fastload verify'. The folder keeps the epochs before"
            )
        return value

    # -- what is kept ----------------------------------------------------------------------------------------------

    def _is_best(self, line: dict[str, Any]) -> bool:
        if self.best is None:  # even of a metric that has no value on these images
            return True
        name = runs.column(self.cfg.metric)
        return metrics.better(self.cfg.metric, line[name], self.best[name])

    def _keep_best(self, line: dict[str, Any], weights: dict[str, Any], valid: Predictions) -> None:
        self.best = line
        if self.ranks.first:
            valid.save(self.folder / VALID)
            best = {**self.kept, "weights": weights, "epoch": self.epoch, "scores": line}
            checkpoint.save(self.folder / runs.BEST, best)

    def _keep_for_soup(self, score: float) -> None:
        """The weights of the best epochs so far, best first; of equal ones the earlier."""
        sign = 1.0 if metrics.higher_is_better(self.cfg.metric) else -1.0
        weights = {k: v.detach().cpu().clone() for k, v in self.step.best_model.state_dict().items()}
        self.soup.append({"score": sign * score, "weights": weights})
        self.soup.sort(key=lambda one: -one["score"])
        del self.soup[self.cfg.soup_size :]

    def _average(self) -> None:
        """Weights averaged over epochs, if they are asked for; kept if they are better than those of any epoch."""
        cfg, model = self.cfg, self.step.model
        if cfg.average == "none" or self.history == []:
            return
        if cfg.average == "swa":
            if self.swa.count == 0:
                return
            weights, used = self.swa.weights, self.swa.count
            model.load_state_dict(weights)
            feed = self._feed(cfg.size)
            feed.set_epoch(cfg.epochs)
            full = (
                batch[0] for batch in feed if len(batch[0]) == min(cfg.batch_size, feed.num_samples)
            )  # all weigh alike
            update_batch_norm(model, full, self.step.device)
        else:
            weights, chosen = greedy_soup([one["weights"] for one in self.soup], self._score_of)
            used = len(chosen)
            model.load_state_dict(weights)
        valid = self._validate(model)
        line = {**self.history[-1], "average": f"{cfg.average} of {used}"}
        line |= metrics.brief(valid.true, valid.probs, cfg.metric)
        if self._is_best(line):
            self._keep_best(line, model.state_dict(), valid)

    def _score_of(self, weights: dict[str, torch.Tensor]) -> float:
        """Of a model with these weights, higher is better."""
        self.step.model.load_state_dict(weights)
        score = self._validate(self.step.model).score(self.cfg.metric)
        return score if metrics.higher_is_better(self.cfg.metric) else -score

    def save(self, inside: dict[str, Any] | None = None) -> None:
        """Write ``last.pt``; ``inside`` says where in an epoch that is begun. All processes must call it."""
        random = self.ranks.gather(checkpoint.random_state(self.step.device))
        if not self.ranks.first:
            return
        progress = {
            "epoch": self.epoch, "history": self.history, "best": self.best, "scores": self.step.scores, "inside": inside,
            "swa": self.swa.state_dict(), "soup": self.soup,
        }  # fmt: skip
        state = {"step": self.step.state_dict(), "random": random}
        checkpoint.save(self.folder / runs.LAST, {**self.kept, **progress, **state})

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a loaded ``last.pt``, with its weights and its random state."""
        if len(state["random"]) != self.ranks.size:
            raise UsageError(
                f"the run in {self.folder} was trained by {len(state['random'])} processes and goes on with as many; start "
                f"torchrun with --nproc-per-node {len(state['random'])}, got {self.ranks.size}"
            )
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]
        self.inside, self.soup = state["inside"], state["soup"]
        self.swa.load_state_dict(state["swa"])
        self.step.scores[:] = state["scores"]
        self.step.load_state_dict(state["step"])
        checkpoint.restore_random(state["random"][self.ranks.rank], self.step.device)


def _own_gpu(cfg: Config, group: Ranks) -> bool:
    """Whether each process takes the GPU of its number."""
    return group.size > 1 and cfg.device in (None, "cuda") and torch.cuda.device_count() > group.local


def _trackers(cfg: Config) -> list[Callback]:
    if not cfg.track:
        return []
    from fastload.train.track import make_trackers

    return make_trackers(cfg)


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
