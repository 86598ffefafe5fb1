"""The run folder: what a training leaves behind, and how it is read again.

``config.yaml`` (options, which alone repeat the run), ``run.json`` (resolved values, data, versions, machine), ``split.csv`` (id,
fold, group, label), ``log.jsonl`` (one line an epoch), ``best.pt``, ``last.pt``, ``result.json`` (when it is finished), ``valid_probs.npz`` and ``last_probs.npz``
(:class:`Predictions` of the held-out side after the best and the last epoch). Each is written atomically, so a killed run leaves a
folder that can be resumed.

>>> run = Run.read("runs/photos"); run.oof.score("macro_f1"); run.predict("test.beton")
"""

from __future__ import annotations

import html
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from torch import nn

import fastload
from fastload.errors import DataError, UsageError
from fastload.train import checkpoint, metrics
from fastload.train.config import Config
from fastload.train.files import write_csv, write_json, write_text
from fastload.train.model import Given, build_model, pick_device
from fastload.train.predictions import VALID, Predictions

if TYPE_CHECKING:
    from fastload.dataset import Dataset

CONFIG, ABOUT, SPLIT, LOG, BEST, LAST, LAST_PROBS, RESULT = (
    "config.yaml", "run.json", "split.csv", "log.jsonl", "best.pt", "last.pt", "last_probs.npz", "result.json",
)  # fmt: skip
FILES = (CONFIG, ABOUT, SPLIT, LOG, BEST, LAST, VALID, LAST_PROBS, RESULT)


@dataclass(frozen=True)
class Run:
    """A training. ``best`` is the line of ``log.jsonl`` of the epoch whose weights are in ``best.pt``.

    If averaged weights (swa, soup) were better than any epoch's, it is a line of their own, with ``average`` in it.
    """

    folder: Path
    config: Config
    classes: list[str]
    history: list[dict[str, Any]]
    best: dict[str, Any]
    train_images: int
    valid_images: int

    @property
    def best_epoch(self) -> int:
        """Counted from 1."""
        return int(self.best["epoch"])

    @property
    def accuracy(self) -> float:
        """Of the best epoch on the validation side, in [0, 1]."""
        return float(self.best["accuracy"])

    @property
    def macro_f1(self) -> float:
        """Of the best epoch on the validation side, in [0, 1]."""
        return float(self.best["macro_f1"])

    @property
    def seconds(self) -> float:
        """Training and validation of all epochs."""
        return float(sum(line["seconds"] for line in self.history))

    @property
    def images_per_s(self) -> float:
        """Training images per second of training (validation not counted), median of the epochs."""
        return float(np.median([line["images_per_s"] for line in self.history]))

    @property
    def stall(self) -> float:
        """Share of the training time spent waiting for the loader, in [0, 1], median of the epochs."""
        return float(np.median([line["stall"] for line in self.history]))

    @property
    def oof(self) -> Predictions:
        """Probabilities of the held-out side after the best epoch."""
        return Predictions.load(self.folder / VALID)

    @property
    def score(self) -> float:
        """Of the best epoch, in the metric that chose it."""
        return float(self.best[column(self.config.metric)])

    def predict(self, data: Dataset | str | Path, **options: Any) -> Predictions:
        """Probabilities for new images: see :func:`fastload.train.predict`."""
        from fastload.train.predicting import predict

        return predict(self, data, **options)

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """The run in a folder, finished or not. UsageError: no run there, or not one epoch finished; DataError: damaged."""
        folder = Path(folder)
        cfg, about = Config.load(_marked(folder) / CONFIG), read_about(folder)
        history = read_log(folder)
        if not history or not (folder / BEST).is_file():
            raise UsageError(
                f"the run has not finished an epoch; resume it with --resume, got {str(folder)!r}"
            )
        line = (
            read_json(folder / RESULT)["best"]
            if (folder / RESULT).is_file()
            else best_line(history, cfg.metric)
        )
        data = about["data"]
        return cls(
            folder,
            cfg,
            list(data["classes"]),
            history,
            line,
            int(data["train_images"]),
            int(data["valid_images"]),
        )

    def _repr_html_(self) -> str:
        cells = {
            "run": str(self.folder), "model": self.config.model, "best epoch": f"{self.best_epoch} of {len(self.history)}",
            "accuracy": f"{self.accuracy:.4f}", "macro-F1": f"{self.macro_f1:.4f}", "images held out": f"{self.valid_images:,}",
            "images/s": f"{self.images_per_s:,.0f}", "waiting for data": f"{self.stall:.0%}",
        }  # fmt: skip
        rows = "".join(
            f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in cells.items()
        )
        return f"<table>{rows}</table>"

    def figures(self) -> dict[str, Any]:
        """The outcome as plain values, for JSON."""
        return {
            "run": str(self.folder), "model": self.config.model, "accuracy": self.accuracy, "macro_f1": self.macro_f1,
            "valid_loss": self.best["valid_loss"], "best_epoch": self.best_epoch, "epochs": len(self.history),
            "train_images": self.train_images, "valid_images": self.valid_images, "classes": len(self.classes),
            "images_per_s": self.images_per_s, "stall": self.stall, "seconds": self.seconds,
        }  # fmt: skip


def check_folder(folder: str | Path, *, resume: bool, overwrite: bool) -> Path:
    """The folder of a run, that may be written. UsageError if it holds something that must not be lost."""
    folder = Path(folder)
    if resume and overwrite:
        raise UsageError("resume goes on with a run and overwrite starts it anew; give one of them, got both")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the run folder must not be a file, got {str(folder)!r}")
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder
    ours = (folder / CONFIG).is_file()
    if not (ours and (resume or overwrite)):
        cure = "--resume goes on with it, --overwrite starts anew" if ours else "no run of fastload is in it"
        raise UsageError(
            f"the run folder is not empty ({cure}); give another one with -o, got {str(folder)!r}"
        )
    return folder


def clear(folder: Path) -> None:
    """Remove the files of an earlier run, and nothing else."""
    for path in [*(folder / name for name in FILES), *folder.glob("tta_*.npz")]:
        path.unlink(missing_ok=True)


def column(metric: str) -> str:
    """Name in a line of ``log.jsonl`` of the metric that chooses the best epoch."""
    return "valid_loss" if metric in ("loss", "log_loss") else metric


def best_line(history: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The line of the first epoch that no other beats."""
    name = column(metric)
    found = history[0]
    for line in history[1:]:
        if metrics.better(metric, line[name], found[name]):
            found = line
    return found


def describe(folder: Path, config: Config, about: dict[str, Any], rows: Any) -> None:
    """Write ``config.yaml``, ``run.json`` and ``split.csv``: what will be trained, on what, with which versions."""
    config.save(folder / CONFIG)  # first: it marks the folder as ours
    write_json(folder / ABOUT, {**about, "versions": versions(), "machine": machine()})
    write_csv(folder / SPLIT, ("id", "fold", "group", "label"), rows)


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    return {
        "fastload": fastload.__version__, "torch": torch.__version__, "timm": timm.__version__,
        "numpy": np.__version__, "python": platform.python_version(),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor and GPUs, as far as they can be told."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"system": platform.platform(), "cores": os.cpu_count(), "gpus": gpus}


def _marked(folder: Path) -> Path:
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"no run of fastload in the folder (no {CONFIG}); give one that 'fastload train' or 'cv' wrote, got {str(folder)!r}"
        )
    return folder


def read_about(folder: str | Path) -> dict[str, Any]:
    """``run.json`` of a run folder. UsageError: there is none; DataError: it is damaged."""
    return read_json(Path(folder) / ABOUT)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path.parent} is no complete run folder: {path.name} cannot be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); start the run anew with --overwrite") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged (no JSON object); start the run anew with --overwrite")
    return content


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of ``log.jsonl``, one a finished epoch; none where it is not there yet."""
    path = Path(folder) / LOG
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); start the run anew with --overwrite") from error


def write_log(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    write_text(folder / LOG, "".join(json.dumps(line) + "\n" for line in history))


@dataclass(frozen=True)
class LoadedRun:
    """A trained model in eval mode on ``device``, with all that is needed to feed it."""

    path: Path
    model: nn.Module
    config: Config
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epoch: int
    device: torch.device
    multilabel: bool


def load_run(
    run: Run | str | Path, which: str = "best", device: str | None = None, *, model: Given | None = None
) -> LoadedRun:
    """The model of a run: ``which`` is ``best`` or ``last``; ``run`` may also be the path of a checkpoint.

    Where weights were averaged, the averaged ones are used. ``device`` None is the best there is, whatever the training
    ran on. ``model`` is needed where the training was given a module of the user's own. UsageError: no such run; DataError:
    damaged checkpoint.
    """
    if which not in ("best", "last"):
        raise UsageError(f"which must be 'best' or 'last', got {which!r}")
    place = run.folder if isinstance(run, Run) else Path(run)
    path = place / f"{which}.pt" if place.is_dir() else place
    state = checkpoint.load(path)
    try:
        cfg = Config.from_dict(state["config"])
        classes, mean, std = list(state["classes"]), tuple(state["mean"]), tuple(state["std"])
        weights, epoch, several = (
            checkpoint.kept_weights(state),
            int(state["epoch"]),
            bool(state["multilabel"]),
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} lacks what a checkpoint must have ({error}); train again") from error
    chosen = pick_device(device)
    # The weights come from the checkpoint, not from where the training once had its start.
    bare = replace(cfg, pretrained=False, weights=None, grad_checkpointing=False)
    with torch.random.fork_rng(
        devices=[]
    ):  # the random start is overwritten: leave the caller's random state alone
        built = build_model(bare, len(classes), model)
    checkpoint.restore_weights(built, weights, path)
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    built = built.to(chosen).to(memory_format=layout).eval()
    return LoadedRun(path, built, cfg, classes, mean, std, epoch, chosen, several)
