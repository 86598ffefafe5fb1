"""Probabilities and what they belong to: the one thing that scores, ensembles, thresholds, reports and submissions work on.

Files are ``.npz`` (all that is known) or ``.csv`` (``id,prediction,p_<class>,...``, which any other program can write). The
trade-off: everything is held in memory, about 4 bytes for each image and class.

>>> oof = Predictions.load("runs/cv"); oof.score("macro_f1"); oof.write_csv("out.csv")
"""

from __future__ import annotations

import csv
import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from fastload.errors import DataError, UsageError
from fastload.train import metrics
from fastload.train.files import write_atomic, write_csv

OOF, VALID = (
    "oof.npz",
    "valid_probs.npz",
)  # pooled over the folds of a run; of the held-out side of one training
Metric = str | Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Predictions:
    """``probs`` (N, C) float32 in [0, 1], rows in the order of ``ids``, columns in the order of ``classes``.

    ``labels``, where known: (N,) int64 numbers of ``classes``, or (N, C) float32 of 0 and 1 where an image may have several.
    ``groups`` (N,) text and ``folds`` (N,) int64 say, where known, what belongs together and which fold's model (one that never
    saw the image) made the row. ``decided``: (N,) int64 or (N, C) bool, where something other than the largest probability
    (than 0.5 for several labels) decides. ``note``: why there are no labels, or what else a reader should know.
    """

    ids: list[str]
    probs: np.ndarray
    classes: list[str]
    labels: np.ndarray | None = None
    groups: np.ndarray | None = None
    folds: np.ndarray | None = None
    decided: np.ndarray | None = None
    multilabel: bool = False
    note: str = ""
    seconds: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        shape = (len(self.ids), len(self.classes))
        if self.probs.shape != shape:
            raise DataError(
                f"probabilities need one row for each of {shape[0]} ids and one column for each of {shape[1]} classes, "
                f"got shape {self.probs.shape}"
            )
        for name in ("labels", "groups", "folds", "decided"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.ids):
                raise DataError(f"{name} must have {len(self.ids)} rows as the ids have, got {len(value)}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def predicted(self) -> np.ndarray:
        """(N,) int64 class numbers, or (N, C) bool where an image may have several labels."""
        if self.decided is not None:
            return self.decided
        return self.probs > 0.5 if self.multilabel else self.probs.argmax(axis=1)

    @property
    def images_per_s(self) -> float:
        return len(self.ids) / self.seconds if self.seconds else 0.0

    def score(self, metric: Metric = "accuracy") -> float:
        """The value of ``metric``; UsageError where there are no labels."""
        return metrics.score(metric, self.true, self.probs, self.decided)

    def summary(self) -> dict[str, float]:
        """All scalar metrics by name; UsageError where there are no labels."""
        return metrics.summary(self.true, self.probs, self.decided)

    @property
    def true(self) -> np.ndarray:
        """``labels``, or a UsageError that says why there are none."""
        if self.labels is None:
            raise UsageError(
                f"there are no labels to compare with{f' ({self.note})' if self.note else ''}; give labelled data"
            )
        return self.labels

    @property
    def accuracy(self) -> float | None:
        """Share of right images (of right labels, where an image may have several), or None without labels."""
        return None if self.labels is None else self.score("accuracy")

    @property
    def macro_f1(self) -> float | None:
        return None if self.labels is None else self.score("macro_f1")

    @property
    def loss(self) -> float | None:
        return None if self.labels is None else self.score("log_loss")

    def take(self, rows: Any) -> Predictions:
        """The rows at ``rows`` (integers or a mask)."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        parts: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[rows]
            for name in ("labels", "groups", "folds", "decided")
        }
        return replace(self, ids=[self.ids[i] for i in rows.tolist()], probs=self.probs[rows], **parts)

    def aligned(self, ids: Sequence[str], classes: Sequence[str]) -> Predictions:
        """The same rows and columns in the order of ``ids`` and ``classes``.

        DataError where an id or class is missing here, or an id comes twice.
        """
        place = {id: i for i, id in enumerate(self.ids)}
        if len(place) != len(self.ids):
            raise DataError(
                f"{len(self.ids) - len(place)} ids come more than once; give every image an id of its own"
            )
        missing = [id for id in ids if id not in place]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(ids)} images have no prediction here; predict them too, got for example {missing[0]!r}"
            )
        if sorted(classes) != sorted(self.classes):
            odd = sorted(set(classes) ^ set(self.classes))
            raise DataError(
                f"predictions of different classes cannot be put together; got {', '.join(map(repr, odd[:5]))} on one side only"
            )
        rows = self if list(ids) == self.ids else self.take([place[id] for id in ids])
        if list(classes) == self.classes:
            return rows
        order = np.array([self.classes.index(name) for name in classes])
        number = np.argsort(order)  # new number of an old class
        turned = {}
        for name in ("labels", "decided"):
            value = getattr(rows, name)
            if value is not None:
                turned[name] = value[:, order] if value.ndim == 2 else number[value]
        return replace(rows, probs=rows.probs[:, order], classes=list(classes), **turned)

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write ``.npz``, atomically: arrays ids, probs, classes, multilabel, and labels, groups, folds, decided where known."""
        arrays: dict[str, Any] = {
            "ids": np.array(self.ids, dtype=str), "probs": self.probs.astype(np.float32),
            "classes": np.array(self.classes, dtype=str), "multilabel": np.array(self.multilabel),
        }  # fmt: skip
        for name in ("labels", "groups", "folds", "decided"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        write_atomic(path, lambda file: np.savez_compressed(file, **arrays))

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """Read ``.npz``, ``.csv``, or the out-of-fold (else validation) probabilities of a run folder.

        UsageError: nothing there; DataError: something else than predictions.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in (OOF, VALID) if (path / name).is_file()]
            if not found:
                raise UsageError(
                    f"no {OOF} or {VALID} in {path}; give the folder of a finished run, got {str(path)!r}"
                )
            path = found[0]
        if not path.is_file():
            raise UsageError(
                f"no predictions at {path}; give a run folder, an .npz or a .csv file, got {str(path)!r}"
            )
        return _read_csv(path) if path.suffix.lower() in (".csv", ".tsv") else _read_npz(path)

    def write_csv(self, path: str | Path) -> None:
        """Columns ``id``, ``prediction`` (class names, joined by a blank), then ``p_<class>`` for every class. Atomic."""
        write_csv(path, ["id", "prediction", *(f"p_{name}" for name in self.classes)], self._rows())

    def _rows(self) -> Iterator[list[Any]]:
        for id, text, row in zip(self.ids, self.predicted_names(), self.probs):
            yield [id, text, *(f"{p:.6g}" for p in row.tolist())]

    def predicted_names(self) -> list[str]:
        """The predicted class of each image by name; several, in the order of the classes, joined by a blank."""
        if self.multilabel:
            return [" ".join(self.classes[i] for i in np.flatnonzero(row)) for row in self.predicted]
        return [self.classes[i] for i in self.predicted.tolist()]

    def _repr_html_(self) -> str:
        score = "" if self.labels is None else f", accuracy {self.accuracy:.4f}, macro-F1 {self.macro_f1:.4f}"
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("id", "prediction"))
        rows = "".join(
            f"<tr><td>{html.escape(id)}</td><td>{html.escape(name)}</td></tr>"
            for id, name in zip(self.ids[:5], self.take(range(min(5, len(self)))).predicted_names())
        )
        return f"<p>{len(self):,} predictions of {len(self.classes)} classes{score}</p><table><tr>{head}</tr>{rows}</table>"


def _read_npz(path: Path) -> Predictions:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        several = (
            bool(found["multilabel"]) if "multilabel" in found else found.get("labels", np.zeros(0)).ndim == 2
        )
        known: dict[str, Any] = {name: found.get(name) for name in ("labels", "groups", "folds", "decided")}
        ids, classes = ([str(text) for text in found[name]] for name in ("ids", "classes"))
        return Predictions(ids, found["probs"].astype(np.float32), classes, **known, multilabel=several)
    except (OSError, ValueError, KeyError, BadZipFile, EOFError) as error:
        raise DataError(f"{path} holds no predictions of fastload ({error}); write it anew") from error


def _read_csv(path: Path) -> Predictions:
    """``id`` and ``p_<class>`` columns; ``prediction`` is not read, since the probabilities say it."""
    ids, rows = [], []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        head = next(reader, [])
        columns = [i for i, name in enumerate(head) if name.startswith("p_")]
        if not head or head[0].lower() != "id" or not columns:
            raise DataError(
                f"{path} needs a column 'id' first and a column 'p_<class>' for each class, got {', '.join(head[:6])!r}"
            )
        for number, row in enumerate(reader, start=2):
            try:
                rows.append([float(row[i]) for i in columns])
            except (ValueError, IndexError) as error:
                raise DataError(f"{path}, line {number}: not a number for each class ({error})") from error
            ids.append(row[0])
    probs = np.array(rows, np.float32).reshape(len(ids), len(columns))
    if not np.isfinite(probs).all() or (probs < 0).any() or (probs > 1).any():
        raise DataError(f"{path} has values that are no probabilities; they must be from 0 to 1")
    several = bool(len(probs)) and not np.allclose(probs.sum(axis=1), 1, atol=1e-2)
    return Predictions(ids, probs, [head[i][2:] for i in columns], multilabel=several)
