"""The run folder: what a training leaves behind, and how it is read again.

``config.json`` (options, resolved values, versions), ``split.csv`` (id, fold, group, label), ``log.jsonl`` (one line an
epoch), ``best.pt``, ``last.pt``, ``valid_probs.npz`` (ids, labels, probs, classes of the best epoch). Each is written
atomically, so a killed run leaves a folder that can be resumed.

>>> run = load_run("runs/photos"); run.model, run.classes
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import fastload
from fastload.errors import DataError, UsageError
from fastload.train import checkpoint
from fastload.train.config import Config
from fastload.train.files import write_atomic, write_csv, write_json, write_text
from fastload.train.model import create_model, pick_device

CONFIG, SPLIT, LOG, BEST, LAST, PROBS = (
    "config.json", "split.csv", "log.jsonl", "best.pt", "last.pt", "valid_probs.npz",
)  # fmt: skip
FILES = (CONFIG, SPLIT, LOG, BEST, LAST, PROBS)


@dataclass(frozen=True)
class Run:
    """A finished training. ``best`` is the line of ``log.jsonl`` of the epoch whose weights are in ``best.pt``."""

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
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def describe(folder: Path, config: Config, resolved: dict[str, Any], data: dict[str, Any], rows: Any) -> None:
    """Write ``config.json`` and ``split.csv``: what will be trained, on what, with which versions."""
    versions = {
        "fastload": fastload.__version__, "torch": torch.__version__, "timm": timm.__version__,
        "numpy": np.__version__, "python": platform.python_version(),
    }  # fmt: skip
    content = {"config": config.to_dict(), "resolved": resolved, "data": data, "versions": versions}
    write_json(folder / CONFIG, content)  # first: it marks the folder as ours
    write_csv(folder / SPLIT, ("id", "fold", "group", "label"), rows)


def read_config(folder: str | Path) -> Config:
    """The options of an earlier run, from its ``config.json``."""
    path = Path(folder) / CONFIG
    try:
        return Config.from_dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    except OSError as error:
        raise UsageError(
            f"{folder} is no run folder: {path.name} cannot be read ({error.strerror})"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise DataError(f"{path} is damaged ({error}); start the run anew with --overwrite") from error


def write_log(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    write_text(folder / LOG, "".join(json.dumps(line) + "\n" for line in history))


def write_probs(
    folder: Path, ids: Sequence[str], labels: np.ndarray, probs: np.ndarray, classes: Sequence[str]
) -> None:
    """``valid_probs.npz``: ids (N,) text, labels (N,) int64, probs (N, C) float32, classes (C,) text; needs no pickle."""
    arrays: dict[str, Any] = {
        "ids": np.array(list(ids), dtype=str),
        "labels": labels,
        "probs": probs,
        "classes": np.array(classes),
    }
    write_atomic(folder / PROBS, lambda file: np.savez_compressed(file, **arrays))


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


def load_run(run: Run | str | Path, which: str = "best", device: str | None = None) -> LoadedRun:
    """The model of a run: ``which`` is ``best`` or ``last``; ``run`` may also be the path of a checkpoint.

    Where weights were averaged, the averaged ones are used. ``device`` None is the best there is, whatever the training
    ran on. UsageError: no such run; DataError: damaged checkpoint.
    """
    if which not in ("best", "last"):
        raise UsageError(f"which must be 'best' or 'last', got {which!r}")
    place = run.folder if isinstance(run, Run) else Path(run)
    path = place / f"{which}.pt" if place.is_dir() else place
    state = checkpoint.load(path)
    try:
        cfg = Config.from_dict(state["config"])
        classes, mean, std = list(state["classes"]), tuple(state["mean"]), tuple(state["std"])
        weights, epoch = _kept_weights(state), int(state["epoch"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} lacks what a checkpoint must have ({error}); train again") from error
    chosen = pick_device(device)
    with torch.random.fork_rng(
        devices=[]
    ):  # the random start is overwritten: leave the caller's random state alone
        model = create_model(cfg.model, len(classes), size=cfg.size)
    checkpoint.restore_weights(model, weights, path)
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    model = model.to(chosen).to(memory_format=layout).eval()
    return LoadedRun(path, model, cfg, classes, mean, std, epoch, chosen)


def _kept_weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights to predict with: ``best.pt`` has only those, ``last.pt`` has all that the next step needs."""
    if "weights" in state:
        return dict(state["weights"])
    return dict(state["step"]["ema"] or state["step"]["model"])
