"""What run folders hold, also those of a training that is not finished or was killed: what is there, and a note for what is not.

The trade-off: a damaged or missing file costs its part of the page, never the page.

>>> read("runs/photos").best.score("macro_f1")
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastload.errors import DataError, FastloadError, UsageError
from fastload.train import metrics, runs
from fastload.train.config import Config
from fastload.train.predictions import OOF, Predictions

MARKS = (runs.CONFIG, runs.ABOUT, runs.LOG)  # one of them makes a folder a run


@dataclass(frozen=True)
class Training:
    """One model: a single run, or one fold. ``best`` and ``last``: its held-out predictions at that epoch.

    ``kept``: the line of the log whose weights were kept, or of averaged weights; None before the first epoch is finished.
    """

    name: str
    history: list[dict[str, Any]]
    kept: dict[str, Any] | None
    finished: bool
    best: Predictions | None
    last: Predictions | None


@dataclass(frozen=True)
class Result:
    """A run folder as it was found. ``best`` and ``last`` are pooled over ``trainings``; ``notes``: what is missing and why."""

    name: str
    folder: Path
    kind: str
    options: dict[str, Any]
    info: dict[str, Any]
    scores: dict[str, Any]
    trainings: list[Training]
    best: Predictions | None
    last: Predictions | None
    notes: list[str] = field(default_factory=list)

    @property
    def metric(self) -> str:
        """What the best epoch was chosen by; accuracy where that metric is not known to this process."""
        return str(self.options["metric"])


def read(run: Any) -> Result:
    """Read a run or cv folder (path), or the folder of a Run or CvRun. UsageError where there is no run."""
    folder = Path(getattr(run, "folder", run))
    if not any((folder / mark).is_file() for mark in MARKS):
        raise UsageError(
            f"there is no run of fastload (no {' or '.join(MARKS)}); give the folder that was given to train or cv "
            f"with -o, got {str(folder)!r}"
        )
    notes: list[str] = []
    parts = sorted(
        (path for path in folder.glob("fold*") if path.is_dir() and path.name[4:].isdigit()),
        key=lambda path: int(path.name[4:]),
    )
    info = _json(folder / runs.ABOUT, notes)
    kind = str(info.get("kind", "cv" if parts or (folder / "folds.csv").is_file() else "run"))
    if parts:  # what is not said of all folds is said by the first
        first = _json(parts[0] / runs.ABOUT, notes)
        info = {**first, **info, "resolved": {**first.get("resolved", {}), **info.get("resolved", {})}}
    options = _options(folder / runs.CONFIG, notes)
    metric = str(options["metric"])
    trainings = [_training(path, metric, notes) for path in (parts if kind == "cv" else [folder])]
    if kind == "cv":
        best = _pooled(folder / OOF, [one.best for one in trainings], info, notes)
        last = _pooled(folder / "oof_last.npz", [one.last for one in trainings], info, [])
        scores = _json(folder / "scores.json", notes if (folder / OOF).is_file() else [])
    else:
        best, last, scores = trainings[0].best, trainings[0].last, {}
    for one in trainings:
        if not one.finished:
            what = f"{one.name} is not finished" if kind == "cv" else "Not finished"
            notes.append(f"{what}: {len(one.history)} of {options['epochs']} epochs are in the log.")
        elif not one.history:
            notes.append(f"{one.name} is finished, but there are no epochs in its {runs.LOG}.")
    if best is None:
        notes.append("There are no held-out probabilities yet, so nothing that is made from them is shown.")
    name = folder.resolve().name
    return Result(name, folder, kind, options, info, scores, trainings, best, last, notes)


def unique_names(results: list[Result]) -> list[Result]:
    """Results that are called alike get the folder above in their name, and a number where that is no help."""
    for rename in (
        lambda one, i: "/".join(one.folder.resolve().parts[-2:]),
        lambda one, i: f"{one.name} ({i + 1})",
    ):
        names = [one.name for one in results]
        results = [
            replace(one, name=rename(one, i)) if names.count(one.name) > 1 else one
            for i, one in enumerate(results)
        ]
    return results


def _training(folder: Path, metric: str, notes: list[str]) -> Training:
    best, last = (_predictions(folder / f"{which}_probs.npz", notes) for which in ("valid", "last"))
    history, finished = _log(folder / runs.LOG, notes), (folder / runs.RESULT).is_file()
    kept = _json(folder / runs.RESULT, notes).get("best") if finished else None
    name = runs.column(metric)
    if not isinstance(kept, dict) and history and all(name in line for line in history):
        kept = runs.best_line(history, metric)
    return Training(folder.name, history, kept, finished, best, last)


def _pooled(
    path: Path, parts: list[Predictions | None], info: dict[str, Any], notes: list[str]
) -> Predictions | None:
    """Out-of-fold predictions; before all folds are finished, those of the folds that are, an image once."""
    if path.is_file():
        return _predictions(path, notes)
    there = [part for part in parts if part is not None]
    if not there:
        return None
    count = info.get("folds", len(parts)) * info.get("repeats", 1)
    notes.append(
        f"Not all folds are finished: the scores are of the images held out in {len(there)} of {count} folds."
    )
    ids = [id for part in there for id in part.ids]
    labels = (
        None if any(part.labels is None for part in there) else np.concatenate([part.true for part in there])
    )
    groups = (
        None
        if any(part.groups is None for part in there)
        else np.concatenate([part.groups for part in there if part.groups is not None])
    )
    folds = np.repeat(np.arange(len(there)), [len(part) for part in there])
    whole = Predictions(
        ids, np.concatenate([part.probs for part in there]), there[0].classes, labels, groups, folds,
        multilabel=there[0].multilabel,
    )  # fmt: skip
    return whole.take(np.sort(np.unique(ids, return_index=True)[1]))


def _guarded(path: Path, parse: Callable[[str], Any], kind: type, notes: list[str]) -> Any:
    """``parse`` of a file's text, or an empty ``kind`` and a note."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
        if isinstance(found, kind):
            return found
        notes.append(f"{path.name} in {path.parent} holds something else than it should.")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing in {path.parent}.")
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path.name} in {path.parent} cannot be read ({error}).")
    return kind()


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = _guarded(path, json.loads, dict, notes)
    return found


def _options(path: Path, notes: list[str]) -> dict[str, Any]:
    """The options as they stand there, also of another version; those that are not there have their defaults."""
    options = {**Config().to_dict(), **_guarded(path, yaml.safe_load, dict, notes)}
    try:
        metrics.check_metric(str(options["metric"]))
    except UsageError:
        notes.append(f"The metric {options['metric']!r} is not known here; accuracy is shown in its place.")
        options["metric"] = "accuracy"
    return options


def _log(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []  # the first epoch is not finished, which the count of epochs says
    history = []
    for number, text in enumerate(_guarded(path, str.splitlines, list, notes), start=1):
        try:
            line = json.loads(text)
            history.append({**line, "epoch": int(line["epoch"])})
        except (ValueError, KeyError, TypeError) as error:
            notes.append(f"Line {number} of {path} cannot be read ({error}); the epochs before it are shown.")
            break
    return history


def _predictions(path: Path, notes: list[str]) -> Predictions | None:
    if not path.is_file():
        return None
    try:
        found = Predictions.load(path)
        if found.labels is None:
            raise DataError(f"{path} has no labels")
        return found
    except FastloadError as error:
        notes.append(f"{error}.")
        return None
