"""Several models as one: how to put their probabilities together, chosen by a score that nothing was fitted on.

A member is a run, its folder, or a file of probabilities, one row for each image that its model did not learn from. Whatever is
fitted (the best member, weights, stacking, temperature, thresholds) is scored on other rows than it was fitted on: groups stay
together where the members have them, else their folds are used, else folds are made from the labels. What is kept is then fitted
on all rows.

Which optimism remains. ``table`` holds one nested score for each method and each member's own score, and ``method`` is the best of
them, so it is never worse there than the best member; the best of a few scores is a little too good, the best of many members
more than a little. ``score`` is free of that: the choice is made anew without the rows that it is scored on. Where out-of-fold
probabilities are pooled, each fold's models have learned from the rows of the others; that is usual and its effect is small.

>>> ensemble = Ensemble(["runs/a", "runs/b", "other.csv"]).search("macro_f1"); ensemble.score, ensemble.method
>>> ensemble.save("ensemble.json"); Ensemble.load("ensemble.json").predict("test.beton", tta="hflip").write_csv("out.csv")
"""

from __future__ import annotations

import csv
import html
import json
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastload.errors import DataError, UsageError, unknown
from fastload.train import metrics
from fastload.train.blend import METHODS, UNFITTED, Blend, fit
from fastload.train.calibrate import fit_temperature, fit_thresholds
from fastload.train.files import write_json
from fastload.train.predictions import Metric, Predictions

FOLDS = 5


# -- members ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One model: ``path`` is where :func:`fastload.train.predict` finds it, or its file of probabilities."""

    name: str
    path: Path | None
    oof: Predictions | None


def _member(given: Any, number: int) -> Member:
    if isinstance(given, Member):
        return given
    if isinstance(given, Predictions):
        return Member(f"member {number}", None, given)
    if isinstance(given, (str, Path)):
        path = Path(given)
        return Member(path.name or str(path), path, Predictions.load(path))
    if isinstance(getattr(given, "oof", None), Predictions) and hasattr(given, "folder"):
        return Member(Path(given.folder).name, Path(given.folder), given.oof)
    raise UsageError(f"a member is a run, its folder, predictions or a file of them, got {given!r}")


def _named(members: list[Member]) -> list[Member]:
    """Members with names of their own: the path where the last part of it is not enough."""
    names = [member.name for member in members]
    long = [str(m.path) if names.count(m.name) > 1 and m.path else m.name for m in members]
    return [
        replace(m, name=f"{name} ({long[: i + 1].count(name)})" if long.count(name) > 1 else name)
        for i, (m, name) in enumerate(zip(members, long))
    ]


def _align(members: list[Member], parts: Sequence[Predictions]) -> list[Predictions]:
    """Rows and columns of all in the order of the first. DataError names who lacks what."""
    first = parts[0]
    for member, part in zip(members, parts):
        for one, other, has, lacks in ((first, part, members[0], member), (part, first, member, members[0])):
            missing = set(one.ids) - set(other.ids)
            if missing:
                raise DataError(
                    f"members must be of the same images: {lacks.name!r} lacks {len(missing)} of the {len(one)} of "
                    f"{has.name!r}; predict them too or leave it out, got for example no {min(missing)!r}"
                )
        if not np.isfinite(part.probs).all():
            bad = int((~np.isfinite(part.probs)).any(axis=1).sum())
            raise DataError(
                f"member {member.name!r} has values that are no numbers; leave it out, got {bad} such images"
            )
    aligned = []
    for member, part in zip(members, parts):
        try:
            aligned.append(part.aligned(first.ids, first.classes))
        except DataError as error:
            raise DataError(f"member {member.name!r}: {error}") from error
    return aligned


def _read_labels(path: Path, classes: list[str], several: bool) -> Predictions:
    """A CSV with columns ``id`` and ``label`` (class name; with several labels, joined by a blank) as labels without probabilities."""
    number = {name: k for k, name in enumerate(classes)}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            if not {"id", "label"} <= set(table.fieldnames or ()):
                raise DataError(
                    f"{path} needs columns 'id' and 'label', got {', '.join(table.fieldnames or ())!r}"
                )
            rows = [(row["id"], (row["label"] or "").split() if several else [row["label"]]) for row in table]
    except OSError as error:
        raise UsageError(
            f"cannot read labels ({error.strerror}); give a CSV with columns id and label, got {str(path)!r}"
        ) from error
    hot = np.zeros((len(rows), len(classes)), np.float32)
    for i, (id, names) in enumerate(rows):
        for name in names:
            if name not in number:
                raise DataError(f"{path}: the label of {id!r} is none of the members' classes, got {name!r}")
            hot[i, number[name]] = 1
    labels = hot if several else hot.argmax(axis=1)
    return Predictions([id for id, _ in rows], hot, classes, labels, multilabel=several)


# -- the ensemble ----------------------------------------------------------------------------------------------------

Candidate = tuple[
    str | int, bool
]  # a method by name or a member by number, and whether thresholds are fitted


class Ensemble:
    """Members and, after :meth:`search` or :meth:`load`, the best way to put them together.

    ``method``; ``weights`` (M,) float64 of the members (None for stacking); ``blend``, all that was fitted; ``table``, a dict for
    each member and method with its nested ``score``; ``score``, of the whole procedure with the choice nested too; ``oof``, nested
    out-of-fold predictions of the chosen method (their score is the one in the table; None after :meth:`load`).
    """

    def __init__(
        self, members: Sequence[Any], seed: int = 0, labels: Predictions | str | Path | None = None
    ) -> None:
        """``members``: runs, run folders, predictions, ``.npz`` or ``.csv`` files. ``labels``: where the members have none."""
        if isinstance(members, (str, Path, Predictions)) or not len(members):
            raise UsageError(f"an ensemble needs a list of members, got {members!r}")
        self.members = _named([_member(given, i) for i, given in enumerate(members, start=1)])
        self.seed = seed
        self.metric = ""
        self.blend: Blend | None = None
        self.table: list[dict[str, Any]] = []
        self.score = math.nan
        self.oof: Predictions | None = None
        known = [m.oof for m in self.members if m.oof is not None]
        if len(known) == len(self.members):
            self._prepare(_align(self.members, known), labels)

    def _prepare(self, parts: list[Predictions], labels: Predictions | str | Path | None) -> None:
        """``stack`` (M, N, C), ``true`` labels, ``groups`` and ``folds`` of all members."""
        first = parts[0]
        sources = list(zip((m.name for m in self.members), parts))
        if labels is not None:
            if not isinstance(labels, Predictions):
                labels = _read_labels(Path(labels), first.classes, first.multilabel)
            try:
                sources.insert(0, ("labels", labels.aligned(first.ids, first.classes)))
            except DataError as error:
                raise DataError(f"labels: {error}") from error
        labelled = [(name, part.labels) for name, part in sources if part.labels is not None]
        if not labelled:
            raise UsageError("no member has labels; give labels=, a CSV with columns id and label, got None")
        name, true = labelled[0]
        for other, values in labelled[1:]:
            if values.shape != true.shape or (values != true).any():
                odd = (
                    ""
                    if values.shape != true.shape
                    else f" of {first.ids[int((values != true).reshape(len(true), -1).any(1).argmax())]!r}"
                )
                raise DataError(
                    f"members must agree about the labels; {name!r} and {other!r} differ, got another label{odd}"
                )
        self.classes, self.true, self.several = first.classes, true, true.ndim == 2
        self.stack = np.stack([part.probs for part in parts]).astype(np.float32)
        groups = next((part.groups for _, part in sources if part.groups is not None), None)
        folds = next((part.folds for _, part in sources if part.folds is not None), None)
        self.base = Predictions(
            first.ids, first.probs, first.classes, true, groups, folds, multilabel=self.several
        )

    def search(
        self,
        metric: Metric = "macro_f1",
        *,
        calibrate: bool = False,
        thresholds: bool = False,
        methods: Sequence[str] = METHODS,
    ) -> Ensemble:
        """Score every method, keep the best, fit it on all rows; returns the ensemble itself.

        ``calibrate``: a temperature after every blend. ``thresholds``: try each method with thresholds for ``metric`` too. Members
        alone are candidates where "best" is among ``methods``.
        """
        if isinstance(metric, str):
            metrics.check_metric(metric)
        for name in methods:
            if name not in METHODS:
                raise unknown("ensemble method", name, METHODS)
        if not methods:
            raise UsageError(f"search needs at least one method, got {methods!r}")
        if not hasattr(self, "stack"):
            raise UsageError(
                "a loaded ensemble has no probabilities to search on; make it from its members, got a file"
            )
        trial = _Nested(self, metric, calibrate, nested_folds(self.base, self.seed))
        alone: list[Candidate] = [(i, False) for i in range(len(self.members))]
        blends: list[Candidate] = [
            (name, flag)
            for name in METHODS
            if name in methods
            for flag in ((False, True) if thresholds else (False,))
        ]
        allowed = [*(alone if "best" in methods else []), *blends]
        whole = frozenset(range(trial.count))
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn brings it

        with threadpool_limits(1):  # many small products: threads would only wait for each other
            chosen = trial.choose(allowed, whole, frozenset())
            self.metric = metric if isinstance(metric, str) else getattr(metric, "__name__", repr(metric))
            self.table = [
                {
                    "name": self.members[what].name if isinstance(what, int) else what,
                    "kind": "member" if isinstance(what, int) else "method", "thresholds": flag,
                    "score": trial.score((what, flag), whole, frozenset()), "chosen": (what, flag) == chosen,
                }
                for what, flag in [*alone, *blends]
            ]  # fmt: skip
            self.blend = trial.fitted(chosen, frozenset())
            self.oof = trial.predictions(dict.fromkeys(whole, chosen), frozenset())
            choices = {fold: trial.choose(allowed, whole - {fold}, frozenset({fold})) for fold in whole}
            self.score = trial.predictions(choices, frozenset()).score(metric)
        return self

    @property
    def method(self) -> str:
        return self._fitted().method

    @property
    def weights(self) -> np.ndarray | None:
        """(M,) float64, or None for stacking."""
        weights = self._fitted().weights
        return None if weights is None else np.array(weights)

    def combine(self, predictions: Sequence[Predictions]) -> Predictions:
        """One for each member, in their order; rows and classes as in the first. "rank" ranks within these images."""
        blend = self._fitted()
        if len(predictions) != len(self.members):
            raise UsageError(
                f"combine needs predictions of each of the {len(self.members)} members, got {len(predictions)}"
            )
        if set(predictions[0].classes) != set(self.classes):
            raise DataError(
                f"the ensemble was made for other classes ({', '.join(self.classes[:5])}, ...); "
                f"got {', '.join(predictions[0].classes[:5])}"
            )
        ordered = [predictions[0].aligned(predictions[0].ids, self.classes), *predictions[1:]]
        parts = _align(self.members, ordered)
        stack = np.stack([part.probs for part in parts]).astype(np.float32)
        probs, decided = blend.finish(blend.mix(stack, self.several), self.several)
        known = {
            name: next((getattr(part, name) for part in parts if getattr(part, name) is not None), None)
            for name in ("labels", "groups")
        }
        return Predictions(
            parts[0].ids, probs, self.classes, **known, decided=decided, multilabel=self.several,
            note="; ".join(dict.fromkeys(part.note for part in parts if part.note)), seconds=sum(part.seconds for part in parts),
        )  # fmt: skip

    def predict(
        self, data: Any, tta: str | None = None, out: str | Path | None = None, **options: Any
    ) -> Predictions:
        """Predict ``data`` with every member that counts and combine. ``out``: also write a CSV.

        ``options`` go to :func:`fastload.train.predict`. UsageError for members that are only probabilities.
        """
        from fastload.train.predicting import predict

        weights = self._fitted().weights
        paths: list[Path | None] = []
        for i, member in enumerate(self.members):
            counts = weights is None or weights[i] > 0
            if counts and (member.path is None or member.path.suffix.lower() in (".npz", ".csv", ".tsv")):
                raise UsageError(
                    f"{member.name!r} is probabilities and no model; predict with what made them and use combine(), got {member.path}"
                )
            paths.append(member.path if counts else None)
        made = [None if path is None else predict(path, data, tta=tta, **options) for path in paths]
        any_made = next(part for part in made if part is not None)
        result = self.combine([replace(any_made, seconds=0.0) if part is None else part for part in made])
        if out is not None:
            result.write_csv(out)
        return result

    def save(self, path: str | Path) -> None:
        """Write JSON: members (paths relative to the file) and everything fitted; :meth:`load` reads it."""
        path, blend = Path(path), self._fitted()
        members = [
            {"name": m.name, "path": None if m.path is None else _relative(m.path, path.parent)}
            for m in self.members
        ]
        table = [{**row, "score": _plain(row["score"])} for row in self.table]
        write_json(path, {
            "fastload_ensemble": 1, "metric": self.metric, "score": _plain(self.score), "seed": self.seed, "classes": self.classes,
            "multilabel": self.several, "members": members, "blend": asdict(blend), "table": table,
        })  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> Ensemble:
        """Read what :meth:`save` wrote, ready to combine and predict. UsageError: no such file; DataError: something else."""
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            members = [
                Member(
                    m["name"],
                    None if m["path"] is None else Path(os.path.normpath(path.parent / m["path"])),
                    None,
                )
                for m in content["members"]
            ]
            self = cls(members, content["seed"])
            self.classes, self.several, self.metric = (
                content["classes"],
                content["multilabel"],
                content["metric"],
            )
            self.blend = Blend(**content["blend"])
            self.table = [{**row, "score": _number(row["score"])} for row in content["table"]]
            self.score = _number(content["score"])
        except OSError as error:
            raise UsageError(
                f"cannot read an ensemble ({error.strerror}); give the file of save(), got {str(path)!r}"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} holds no ensemble of fastload ({error!r}); save it anew") from error
        return self

    def _fitted(self) -> Blend:
        if self.blend is None:
            raise UsageError(
                "this ensemble does not know yet how to combine; call search() first, got no fitted method"
            )
        return self.blend

    def __repr__(self) -> str:
        found = f"{self.method}, {self.metric} {self.score:.4f}" if self.blend else "not searched"
        return f"Ensemble({len(self.members)} members, {found})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(row['name'])}{' + thresholds' if row['thresholds'] else ''}</td><td>{row['kind']}</td>"
            f"<td>{row['score']:.4f}</td><td>{'chosen' if row['chosen'] else ''}</td></tr>"
            for row in self.table
        )
        head = "".join(f"<th>{name}</th>" for name in ("name", "kind", html.escape(self.metric), ""))
        return f"<p>{html.escape(repr(self))}</p>" + (f"<table><tr>{head}</tr>{rows}</table>" if rows else "")


# -- nesting ---------------------------------------------------------------------------------------------------------


def nested_folds(base: Predictions, seed: int) -> np.ndarray:
    """(N,) int64 from 0, at least three folds: of whole groups where there are groups, else the folds of ``base``, else new ones."""
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    labels, n = base.true, len(base)
    stratify = labels.ndim == 1 and n > 0 and np.bincount(labels).max() >= FOLDS
    if base.groups is not None:
        count = len(np.unique(base.groups))
        if count < 3:
            raise DataError(
                f"an ensemble is scored on other groups than it is fitted on and needs 3 of them, got {count}"
            )
        k = min(FOLDS, count)
        maker = StratifiedGroupKFold(k, shuffle=True, random_state=seed) if stratify else GroupKFold(k)
        found = _held_out(maker.split(np.zeros(n), labels if stratify else None, base.groups), n)
        # Few large groups can leave a stratified fold empty.
        return (
            found if found.max() >= 2 else _held_out(GroupKFold(k).split(np.zeros(n), None, base.groups), n)
        )
    if base.folds is not None and len(np.unique(base.folds)) >= 3:
        return np.unique(base.folds, return_inverse=True)[1].reshape(-1) % FOLDS
    if n < 3:
        raise DataError(
            f"an ensemble is scored on other images than it is fitted on and needs 3 of them, got {n}"
        )
    k = min(FOLDS, n)
    maker = (StratifiedKFold if stratify else KFold)(k, shuffle=True, random_state=seed)
    return _held_out(maker.split(np.zeros(n), labels if stratify else None), n)


def _held_out(sides: Iterable[tuple[np.ndarray, np.ndarray]], n: int) -> np.ndarray:
    folds = np.zeros(n, np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes with fewer images than folds are no mistake
        for k, (_, rows) in enumerate(sides):
            folds[rows] = k
    return np.unique(folds, return_inverse=True)[1].reshape(-1)


class _Nested:
    """Candidates fitted without some folds and applied to those. Each fit is made once: without i and j is without j and i."""

    def __init__(self, of: Ensemble, metric: Metric, calibrate: bool, folds: np.ndarray) -> None:
        self.stack, self.true, self.several, self.seed = of.stack, of.true, of.several, of.seed
        self.base, self.metric, self.calibrate, self.folds = of.base, metric, calibrate, folds
        self.count = int(folds.max()) + 1
        self.fits: dict[tuple[Any, frozenset[int]], Blend] = {}
        self.mixes: dict[str, np.ndarray] = {}

    def fitted(self, candidate: Candidate, without: frozenset[int]) -> Blend:
        """``candidate`` fitted on the rows of all folds but ``without``."""
        if (candidate, without) in self.fits:
            return self.fits[candidate, without]
        what, flag = candidate
        rows = np.flatnonzero(~np.isin(self.folds, list(without)))
        labels = self.true[rows]
        if flag:  # the same blend as without thresholds
            blend = self.fitted((what, False), without)
            probs, _ = blend.finish(self.mixed(blend, rows), self.several)
            blend = replace(blend, thresholds=fit_thresholds(labels, probs, self.metric).tolist())
        else:
            if isinstance(what, int):
                blend = Blend("best", np.eye(len(self.stack))[what].tolist())
            else:
                groups = None if self.base.groups is None else self.base.groups[rows]
                blend = fit(what, self.stack[:, rows], labels, self.metric, groups, self.seed)
            if self.calibrate:
                blend = replace(blend, temperature=fit_temperature(labels, self.mixed(blend, rows)))
        self.fits[candidate, without] = blend
        return blend

    def mixed(self, blend: Blend, rows: np.ndarray) -> np.ndarray:
        """(n, C) of ``rows``. What needs no fit is mixed once for all rows, so that ranks are among all of them."""
        if blend.method not in UNFITTED:
            return blend.mix(self.stack[:, rows], self.several)
        if blend.method not in self.mixes:
            self.mixes[blend.method] = blend.mix(self.stack, self.several)
        return self.mixes[blend.method][rows]

    def predictions(self, choices: dict[int, Candidate], without: frozenset[int]) -> Predictions:
        """For each fold in ``choices`` its rows by that candidate, fitted without the fold and ``without``; others left out."""
        probs = self.base.probs.copy()
        decided = np.zeros_like(self.true, dtype=bool if self.several else np.int64)
        own = False
        for fold, candidate in choices.items():
            rows = np.flatnonzero(self.folds == fold)
            blend = self.fitted(candidate, without | {fold})
            probs[rows], chosen = blend.finish(self.mixed(blend, rows), self.several)
            own = own or chosen is not None
            if chosen is None:
                chosen = probs[rows] > 0.5 if self.several else probs[rows].argmax(axis=1)
            decided[rows] = chosen
        whole = replace(self.base, probs=probs, decided=decided if own else None)
        return whole if len(choices) == self.count else whole.take(np.isin(self.folds, list(choices)))

    def score(self, candidate: Candidate, folds: frozenset[int], without: frozenset[int]) -> float:
        """The nested score on the rows of ``folds``."""
        return self.predictions(dict.fromkeys(sorted(folds), candidate), without).score(self.metric)

    def choose(
        self, candidates: Sequence[Candidate], folds: frozenset[int], without: frozenset[int]
    ) -> Candidate:
        """The first of the candidates with the best nested score on ``folds``."""
        best, top = candidates[0], math.nan
        for candidate in candidates:
            new = self.score(candidate, folds, without)
            if metrics.better(self.metric, new, top):
                best, top = candidate, new
        return best


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive
        return str(path.absolute())


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
