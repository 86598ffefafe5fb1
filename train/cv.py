"""Cross-validation: a training for each fold, and one true score over all images, each scored by a model that never saw it.

``cv = cross_validate("masks.beton", cfg, folds=5, groups="person")``. Each fold is an ordinary run folder beside the split's table,
so what was interrupted goes on where it was, fold by fold, and every later step (ensemble, thresholds, report, submission) is a
function of the saved probabilities. The trade-off: folds are trained one after the other; several processes share one fold.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastload.dataset import Dataset
from fastload.errors import DataError, UsageError
from fastload.train import metrics, runs
from fastload.train.callbacks import Callback
from fastload.train.config import Config
from fastload.train.data import (
    Labelled,
    TrainWarning,
    field_values,
    folds_of,
    read_labelled,
    refuse_leaks,
)
from fastload.train.distributed import ranks
from fastload.train.files import write_json
from fastload.train.folds import Folds, check_folds
from fastload.train.model import Given
from fastload.train.predictions import OOF, VALID, Predictions
from fastload.train.trainer import Trainer

FOLDS, SCORES, OOF_LAST = "folds.csv", "scores.json", "oof_last.npz"


@dataclass(frozen=True)
class CvRun:
    """A finished cross-validation. ``scores``: ``metric``, ``best`` and ``last`` (every metric, pooled over the folds, and the
    ``interval`` of the chosen one), ``folds`` (a dict for each fold).
    """

    folder: Path
    config: Config
    runs: list[runs.Run]
    scores: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        return self.runs[0].classes

    @property
    def oof(self) -> Predictions:
        """Out-of-fold probabilities of all images that were held out once."""
        return Predictions.load(self.folder / OOF)

    @property
    def folds(self) -> Folds:
        return Folds.load(self.folder / FOLDS)

    @property
    def score(self) -> float:
        """Pooled over the folds, each at its best epoch, in the metric that chose it."""
        return float(self.scores["best"][self.scores["metric"]])

    @property
    def interval(self) -> tuple[float, float]:
        """95% bootstrap interval of :attr:`score`, by group where there are groups."""
        low, high = self.scores["best"]["interval"]
        return float(low), float(high)

    def predict(self, data: Dataset | str | Path, **options: Any) -> Predictions:
        """Mean probabilities of the folds' models for new images: see :func:`fastload.train.predict`."""
        from fastload.train.predicting import predict

        return predict(self, data, **options)

    def figures(self) -> dict[str, Any]:
        """The outcome as plain values, for JSON."""
        return {
            "run": str(self.folder), "model": self.config.model, "folds": len(self.runs), **self.scores,
            "seconds": sum(run.seconds for run in self.runs),
        }  # fmt: skip

    def _repr_html_(self) -> str:
        metric, (low, high) = self.scores["metric"], self.interval
        rows = "".join(
            f"<tr><td>{i}</td><td>{fold['images']:,}</td><td>{fold[metric]:.4f}</td></tr>"
            for i, fold in enumerate(self.scores["folds"])
        )
        return (
            f"<p>{html.escape(self.config.model)}, {len(self.runs)} folds: {html.escape(metric)} {self.score:.4f} "
            f"[{low:.4f}, {high:.4f}]</p><table><tr><th>fold</th><th>images</th><th>{html.escape(metric)}</th></tr>{rows}</table>"
        )


def cross_validate(
    data: Dataset | str | Path,
    cfg: Config | None = None,
    folds: int | Folds | str | Path = 5,
    *,
    groups: str | None = None,
    scheme: str = "auto",
    repeats: int = 1,
    column: str | None = None,
    out: str | Path = "runs/cv",
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
    model: Given | None = None,
    progress: bool = True,
    on_fold: Callable[[int, runs.Run], object] | None = None,
) -> CvRun:
    """Train a model for each fold and pool the held-out probabilities.

    ``folds``: how many, or a saved split. ``groups`` is ``cfg.groups`` unless given. ``scheme`` as in
    :func:`fastload.train.folds.make_folds` ("auto": stratified, and by group where there are groups); ``repeats``: that many
    splits, whose probabilities are averaged for each image; ``column``: a field whose values are the folds. DataError: the
    split probably leaks and ``cfg.allow_leak`` is False; UsageError: options that do not fit.
    """
    cfg = cfg or Config()
    cfg = replace(cfg, valid=None, split=None, fold=0, groups=cfg.groups if groups is None else groups)
    folder = Path(out)
    with ranks() as group:
        if group.first:
            runs.check_folder(folder, resume=resume, overwrite=overwrite)
        whole = read_labelled(data, cfg.groups)
        table = _table(whole, cfg, folds, scheme, repeats, column)
        again = resume and (folder / FOLDS).is_file()
        if again and Folds.load(folder / FOLDS).digest() != table.digest():
            raise UsageError(
                f"{folder} was started with other folds, images or labels; resume it with its own, or give another folder with -o"
            )
        _inspect(table, whole, cfg, looked=again or not group.first)
        cfg = replace(cfg, data=str(Path(whole.data.path).resolve()))
        if group.first:
            if overwrite:
                _clear(folder)
            _describe(folder, cfg, whole, table)
        group.wait()
        done = []
        for k in range(table.count):
            one = replace(cfg, split=str((folder / FOLDS).resolve()), fold=k)
            place = folder / f"fold{k}"
            run = Trainer(one, model=model).fit(
                whole.data, out=place, resume=place.is_dir() and any(place.iterdir()), callbacks=callbacks, progress=progress,
                checked=True,
            )  # fmt: skip
            done.append(run)
            if on_fold is not None and group.first:
                on_fold(k, run)
        if group.first:
            _pool(folder, done, table, cfg.metric)
        group.wait()
    return read_cv(folder)


def _table(
    whole: Labelled,
    cfg: Config,
    folds: int | Folds | str | Path,
    scheme: str,
    repeats: int,
    column: str | None,
) -> Folds:
    if not isinstance(folds, int):
        known = folds if isinstance(folds, Folds) else Folds.load(folds)
        return known.match([str(id) for id in whole.data.ids])
    given = None
    if column is not None:
        if column not in whole.data.fields:
            raise UsageError(f"the folds' column must be a field of {whole.data.path}, got {column!r}")
        given, scheme = field_values(whole.data, column), "given"
    return folds_of(whole, scheme, cfg, folds=folds, repeats=repeats, given=given)


def _inspect(table: Folds, whole: Labelled, cfg: Config, *, looked: bool) -> None:
    """Warn of classes that are missing on a side, and refuse a split that leaks."""
    for text in check_folds(table, whole.classes):
        warnings.warn(text, TrainWarning, stacklevel=3)
    if not cfg.allow_leak and not looked:
        refuse_leaks([whole.data], [table.vector()], [whole.labels], whole.group_field, cfg.threads)


def _describe(folder: Path, cfg: Config, whole: Labelled, table: Folds) -> None:
    cfg.save(folder / runs.CONFIG)  # first: it marks the folder as ours
    about = {
        "kind": "cv", "folds": table.count // table.repeats, "repeats": table.repeats, "scheme": table.scheme,
        "resolved": {"groups": whole.group_field, "multilabel": whole.multilabel},
        "data": {"train": whole.data.path, "images": len(whole.data), "classes": whole.classes},
        "versions": runs.versions(), "machine": runs.machine(),
    }  # fmt: skip
    write_json(folder / runs.ABOUT, about)
    table.save(folder / FOLDS)


def _pool(folder: Path, done: Sequence[runs.Run], table: Folds, metric: str) -> None:
    """Write the out-of-fold probabilities and the scores."""
    best = pool([Predictions.load(run.folder / VALID) for run in done], table)
    last = pool([Predictions.load(run.folder / runs.LAST_PROBS) for run in done], table)
    best.save(folder / OOF)
    last.save(folder / OOF_LAST)
    scores: dict[str, Any] = {"metric": metric}
    for name, one in (("best", best), ("last", last)):
        scores[name] = one.summary() | {metric: one.score(metric), "images": len(one)}
        scores[name]["interval"] = list(metrics.bootstrap(metric, one.true, one.probs, one.groups))
    scores["folds"] = [
        {
            **run.oof.summary(), metric: run.score, "images": run.valid_images, "best_epoch": run.best_epoch,
            "seconds": run.seconds,
        }
        for run in done
    ]  # fmt: skip
    write_json(folder / SCORES, scores)


def pool(parts: Sequence[Predictions], table: Folds) -> Predictions:
    """Predictions of the folds as one, in the order of the split's ids; an image held out more than once gets the mean."""
    place = {id: i for i, id in enumerate(table.ids)}
    count, classes = len(table.ids), parts[0].classes
    sums, times = np.zeros((count, len(classes)), np.float64), np.zeros(count, np.int64)
    first = parts[0].true
    labels = np.zeros((count, *first.shape[1:]), first.dtype)
    folds = np.full(count, -1, np.int64)
    groups = None if table.groups is None else np.array(table.groups)
    for k, part in enumerate(parts):
        rows = np.array([place[id] for id in part.ids], np.int64)
        sums[rows] += part.probs
        times[rows] += 1
        labels[rows] = part.true
        folds[rows] = np.where(folds[rows] < 0, k, folds[rows])  # of the first repeat
    held = np.flatnonzero(times)
    probs = (sums[held] / times[held, None]).astype(np.float32)
    return Predictions(
        [table.ids[i] for i in held.tolist()], probs, classes, labels[held], None if groups is None else groups[held],
        folds[held], multilabel=parts[0].multilabel,
    )  # fmt: skip


def read_cv(folder: str | Path) -> CvRun:
    """The cross-validation in a folder. UsageError: none there, or not finished; DataError: damaged."""
    folder = Path(folder)
    about = runs.read_about(folder)
    if about.get("kind") != "cv":
        raise UsageError(f"the folder holds one training, not a cross-validation, got {str(folder)!r}")
    if not (folder / SCORES).is_file():
        raise UsageError(f"the cross-validation is not finished; go on with --resume, got {str(folder)!r}")
    scores = runs.read_json(folder / SCORES)
    done = [runs.Run.read(folder / f"fold{k}") for k in range(int(about["folds"]) * int(about["repeats"]))]
    if not done:
        raise DataError(f"{folder} has no folds; start it anew with --overwrite")
    return CvRun(folder, Config.load(folder / runs.CONFIG), done, scores)


def read_run(folder: str | Path) -> runs.Run | CvRun:
    """The training or the cross-validation in a run folder."""
    about = runs.read_about(folder)
    return read_cv(folder) if about.get("kind") == "cv" else runs.Run.read(folder)


def _clear(folder: Path) -> None:
    """Remove an earlier cross-validation (or run) and nothing else."""
    for place in [folder, *sorted(folder.glob("fold[0-9]*"))]:
        runs.clear(place)
    for name in (FOLDS, SCORES, OOF, OOF_LAST):
        (folder / name).unlink(missing_ok=True)
