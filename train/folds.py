"""Which images are held out, and by which model: k folds, stratified by class, and never one group on two sides.

A split is a table (id, fold, group, label) that is saved and serves the next model too. A score on held-out images is true only
if nothing there has a near twin in training: several photos of one person need ``groups``. The price is that classes are spread
over the folds only as evenly as whole groups allow.

>>> folds = make_folds(data.ids, labels, classes, folds=5, groups=persons, seed=0)
>>> train, valid = folds.sides(0); folds.save("folds.csv"); Folds.load("folds.csv").match(other.ids)
"""

from __future__ import annotations

import csv
import hashlib
import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastload.errors import DataError, UsageError, unknown
from fastload.train.files import write_csv

SCHEMES = ("auto", "kfold", "stratified", "group", "stratified_group", "holdout", "given")
_SIDES = {"train": -1, "valid": 0}  # how the split of a single training is written
_COLUMNS = ("id", "fold", "group", "label")


@dataclass(frozen=True, eq=False, repr=False)
class Folds:
    """A split. ``folds`` (R, N) int64: a row for each repeat, the fold in which the image is held out, -1: always in training.

    Fold numbers go on from repeat to repeat, so that each belongs to one. ``labels``: class names, several joined by a blank;
    ``groups``: text, empty where an image belongs to no group.
    """

    ids: list[str]
    folds: np.ndarray
    labels: list[str]
    groups: list[str] | None
    scheme: str

    def __post_init__(self) -> None:
        if self.folds.ndim != 2 or not self.folds.size or self.folds.shape[1] != len(self.ids):
            raise DataError(
                f"a split needs a fold for each of {len(self.ids)} images in each repeat, got shape {self.folds.shape}"
            )
        numbers = np.concatenate([np.unique(row[row >= 0]) for row in self.folds])
        if not len(numbers) or not np.array_equal(np.sort(numbers), np.arange(len(numbers))):
            raise DataError(
                "folds must be numbered from 0 without a gap, each in one repeat only, and -1 is never held out; "
                f"got {numbers[:20].tolist()}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def repeats(self) -> int:
        return len(self.folds)

    @property
    def count(self) -> int:
        """Number of folds in all repeats together."""
        return int(self.folds.max()) + 1

    def vector(self, r: int = 0) -> np.ndarray:
        """(N,) int64 fold of each image in repeat ``r``, -1 where it is never held out."""
        return self.folds[r]

    def sides(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorted positions (train, valid) of fold ``k``, int64, disjoint and complete."""
        if not 0 <= k < self.count:
            raise UsageError(f"the split has folds 0 to {self.count - 1}; choose one of them, got {k}")
        held = (self.folds == k).any(axis=0)  # a number is in one repeat only
        return np.flatnonzero(~held), np.flatnonzero(held)

    def rows(self) -> Iterator[tuple[str, int, str, str]]:
        """(id, fold, group, label) of every image, one repeat after the other."""
        for row in self.folds.tolist():
            yield from zip(self.ids, row, self.groups or [""] * len(self), self.labels)

    def digest(self) -> str:
        """Changes when an image, its place, its fold, its group or its label changes."""
        sha = hashlib.sha256()
        for row in self.rows():
            sha.update("\x1f".join(map(str, row)).encode() + b"\n")
        return sha.hexdigest()

    def match(self, ids: Sequence[str]) -> Folds:
        """The same split in the order of ``ids``. DataError where the images are not the same ones, or an id comes twice."""
        ids = [str(id) for id in ids]
        for where, names in (("data", ids), ("split", self.ids)):
            _check_unique(names, f"the {where}")
        place = {id: i for i, id in enumerate(self.ids)}
        missing, extra = [id for id in ids if id not in place], sorted(set(self.ids) - set(ids))
        if missing or extra:
            said = [
                f"{len(odd)} of {what} (for example {', '.join(map(repr, odd[:3]))})"
                for odd, what in (
                    (missing, "the images are not in it"),
                    (extra, "its images are not in the data"),
                )
                if odd
            ]
            raise DataError(
                f"the split belongs to other images: {' and '.join(said)}; make a new one, "
                f"got {len(ids)} images and a split of {len(self)}"
            )
        order = [place[id] for id in ids]
        return replace(
            self, ids=ids, folds=self.folds[:, order], labels=[self.labels[i] for i in order],
            groups=None if self.groups is None else [self.groups[i] for i in order],
        )  # fmt: skip

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write CSV ``id,fold,group,label``, atomically; a repeated split has a row for each repeat of an image."""
        write_csv(path, _COLUMNS, self.rows())

    @classmethod
    def load(cls, path: str | Path) -> Folds:
        """Read what ``save`` wrote, or ``split.csv`` of a run (fold ``train`` or ``valid``, read as -1 and 0).

        UsageError: nothing there; DataError: something else than a split, or ids that come twice.
        """
        path = Path(path)
        if not path.is_file():
            raise UsageError(
                f"no split at {path}; give a file with columns {', '.join(_COLUMNS)}, got {str(path)!r}"
            )
        rows: list[tuple[str, int, str, str]] = []
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                lacking = [name for name in ("id", "fold", "label") if name not in (reader.fieldnames or ())]
                if lacking:
                    raise DataError(
                        f"{path} lacks {' and '.join(lacking)}; a split has columns {', '.join(_COLUMNS)}, "
                        f"got {', '.join(reader.fieldnames or ())!r}"
                    )
                for row in reader:  # not a comprehension: the length tells the line of an error
                    group, label = row.get("group") or "", row["label"] or ""
                    rows.append((row["id"], _fold_number(row["fold"]), group, label))  # noqa: PERF401
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} is no CSV file in UTF-8 ({error}); write it anew") from error
        except ValueError as error:
            raise DataError(
                f"{path}, line {len(rows) + 2}: a fold is a number from -1, 'train' or 'valid', {error}"
            ) from error
        return _from_rows(rows, path)

    # -- for people ------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        repeats = f" in {self.repeats} repeats" if self.repeats > 1 else ""
        groups = "" if self.groups is None else f", {len(set(self.groups) - {''}):,} groups"
        return f"<Folds: {self.scheme}, {self.count} folds{repeats}, {len(self):,} images{groups}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{k}</td><td>{len(train):,}</td><td>{len(valid):,}</td></tr>"
            for k, (train, valid) in enumerate(map(self.sides, range(self.count)))
        )
        head = "<tr><th>fold</th><th>training</th><th>held out</th></tr>"
        return f"<p>{html.escape(repr(self)[1:-1])}</p><table>{head}{rows}</table>"


def _check_unique(ids: Iterable[str], where: str) -> None:
    twice = [id for id, times in Counter(ids).items() if times > 1]
    if twice:
        raise DataError(
            f"{len(twice)} ids come more than once in {where}, so a split cannot say which image is meant; give every image an "
            f"id of its own, got for example {twice[0]!r}"
        )


def _fold_number(text: str | None) -> int:
    number = _SIDES[text] if text in _SIDES else int(text or "")
    if number < -1:
        raise ValueError(f"got {text!r}")
    return number


def _from_rows(rows: list[tuple[str, int, str, str]], path: Path) -> Folds:
    """The table of a file: the n-th row of an id is its fold in repeat n."""
    place: dict[str, int] = {}
    table: list[dict[int, int]] = []  # for each repeat the fold at each place
    times: Counter[str] = Counter()
    for id, fold, _, _ in rows:
        if times[id] == len(table):
            table.append({})
        table[times[id]][place.setdefault(id, len(place))] = fold
        times[id] += 1
    numbers = [fold for row in table for fold in set(row.values()) if fold >= 0]
    if len(set(map(len, table))) > 1 or len(set(numbers)) < len(numbers):
        # A true repeat has all images and fold numbers of its own.
        _check_unique((row[0] for row in rows), str(path))
    first = {row[0]: row for row in reversed(rows)}
    groups = [first[id][2] for id in place]
    folds = np.array([[row[i] for i in range(len(place))] for row in table], dtype=np.int64).reshape(
        len(table), -1
    )
    return Folds(list(place), folds, [first[id][3] for id in place], groups if any(groups) else None, "given")


# -- making a split ----------------------------------------------------------------------------------------------------


def make_folds(
    ids: Sequence[str],
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    scheme: str = "auto",
    folds: int = 5,
    repeats: int = 1,
    fraction: float = 0.2,
    groups: np.ndarray | None = None,
    seed: int = 0,
    given: np.ndarray | None = None,
) -> Folds:
    """A split of ``ids`` with ``labels``: (N,) int64 numbers of ``classes``, or (N, C) 0 and 1 where an image may have several.

    ``scheme``: ``kfold`` (as chance has it), ``stratified``, ``group``, ``stratified_group``, ``auto`` (one of the stratified
    ones), ``holdout`` (``fraction`` of every class is fold 0, the rest -1; with ``groups`` whole groups), ``given`` (the values
    of ``given`` (N,), numbered in sorted order; 'train' and numbers below 0 are never held out). ``repeats``: so many splits with
    other seeds. ``groups``: (N,) of any kind; images with the same value, except an empty text, stay on one side.

    The stratified schemes and ``holdout`` keep an image or group in training (-1) for good if without it a class would be
    missing there. The result depends on names, labels, groups and ``seed``, not on how the classes are numbered.
    """
    if scheme not in SCHEMES:
        raise unknown("split scheme", scheme, SCHEMES)
    if scheme == "auto":
        scheme = "stratified" if groups is None else "stratified_group"
    if scheme in ("group", "stratified_group") and groups is None:
        raise UsageError(f"a split by groups needs to know them; give groups, got scheme {scheme!r} without")
    if folds < 2 or repeats < 1 or not 0 < fraction < 1:
        raise UsageError(
            "a split needs folds of at least 2, repeats of at least 1 and a fraction between 0 and 1, "
            f"got folds={folds}, repeats={repeats}, fraction={fraction}"
        )
    if (scheme == "given") != (given is not None) or (given is not None and repeats > 1):
        raise UsageError(
            f"a column of folds goes with scheme 'given' and no repeats, got scheme {scheme!r} and {repeats} repeats"
        )
    for name, column in (("labels", labels), ("groups", groups), ("given", given)):
        if column is not None and len(column) != len(ids):
            raise UsageError(f"{name} must have one value for each of {len(ids)} images, got {len(column)}")
    if not len(ids):
        raise DataError("there are no images to divide; give some, got 0")
    texts = None if groups is None else [str(value) for value in groups.tolist()]
    if given is not None:
        table = _numbered(given)[None]
    else:
        order = np.argsort(np.array(classes, dtype=str), kind="stable")
        sorted_labels = labels[:, order] if labels.ndim == 2 else np.argsort(order)[labels]
        rngs = [np.random.default_rng([seed, r]) for r in range(repeats)]
        table = np.stack([_one(scheme, sorted_labels, texts, folds, fraction, rng) for rng in rngs])
        per_repeat = 1 if scheme == "holdout" else folds
        table[table >= 0] += np.repeat(np.arange(repeats) * per_repeat, (table >= 0).sum(axis=1))
    return Folds([str(id) for id in ids], table, _label_texts(labels, classes), texts, scheme)


def _numbered(given: np.ndarray) -> np.ndarray:
    """(N,) int64: the values of a column numbered in sorted order, by value where all are numbers, also those kept as text."""
    values = np.asarray(given).astype(str)
    try:
        held = (values := values.astype(float)) >= 0
    except ValueError:
        held = values != "train"
    if not held.any():
        raise DataError(
            f"the column of folds holds nothing out; give each fold a value of its own, got only {given[0]!r}"
        )
    result = np.full(len(values), -1, dtype=np.int64)
    result[held] = np.unique(values[held], return_inverse=True)[1].reshape(-1)
    return result


def _label_texts(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    if labels.ndim == 1:
        return [classes[label] for label in labels.tolist()]
    return [" ".join(classes[c] for c in np.flatnonzero(row)) for row in labels]


def _one(
    scheme: str,
    labels: np.ndarray,
    groups: list[str] | None,
    folds: int,
    fraction: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """(N,) int64 folds of one repeat, numbered from 0."""
    n = len(labels)
    by_group = scheme in ("group", "stratified_group") or (scheme == "holdout" and groups is not None)
    if scheme == "kfold" or (scheme == "stratified" and labels.ndim == 1):
        result = _dealt(
            np.zeros(n, dtype=np.int64) if scheme == "kfold" else labels, folds, rng, keep=scheme != "kfold"
        )
    elif scheme == "holdout" and not by_group and labels.ndim == 1:
        result = _held(labels, fraction, rng)
    else:
        # Images without a group are groups of one.
        names = (
            [name or f"\0{i}" for i, name in enumerate(groups)] if groups is not None and by_group else None
        )
        unit = np.arange(n) if names is None else np.unique(names, return_inverse=True)[1].reshape(-1)
        counts = _class_counts(labels, unit, stratified=scheme != "group")
        result = _allot(counts, folds, fraction if scheme == "holdout" else None, rng)[unit]
    what = "group" if by_group else "image"
    if not (result >= 0).any():
        why = (
            f"no {what} can be held out without emptying a class"
            if by_group or labels.ndim == 2
            else "every class has a single image"
        )
        raise DataError(f"nothing can be held out for validation: {why}; give --valid with other images")
    if scheme != "holdout" and len(np.unique(result[result >= 0])) < folds:
        filled = len(np.unique(result[result >= 0]))
        raise DataError(
            f"there are too few {what}s for {folds} folds: only {filled} folds would hold some out; choose fewer folds, got {folds}"
        )
    return result


def _dealt(labels: np.ndarray, folds: int, rng: np.random.Generator, keep: bool) -> np.ndarray:
    """Deal the images out like cards, class after class: a class's counts over the folds differ by at most one, the folds' too.

    ``StratifiedKFold`` does the same, but refuses where every class is smaller than the number of folds. ``keep``: a class of a
    single image stays in training.
    """
    result = np.full(len(labels), -1, dtype=np.int64)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    if keep:
        order = order[np.bincount(labels)[labels[order]] > 1]
    result[order] = np.arange(len(order)) % folds
    return result


def _held(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Hold ``fraction`` of every class out; each class of two or more images has at least one on either side."""
    result = np.full(len(labels), -1, dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) > 1:
            count = min(max(round(len(members) * fraction), 1), len(members) - 1)
            result[rng.permutation(members)[:count]] = 0
    return result


def _class_counts(labels: np.ndarray, unit: np.ndarray, stratified: bool) -> np.ndarray:
    """(U, C + 1) float32: images of each class in each unit (a group or an image), and in the last column all images."""
    units = int(unit.max()) + 1
    classes = (labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1) if stratified else 0
    counts = np.zeros((units, classes + 1), dtype=np.float32)
    np.add.at(counts[:, -1], unit, 1)
    if stratified and labels.ndim == 2:
        np.add.at(counts[:, :-1], unit, labels)
    elif stratified:
        np.add.at(counts, (unit, labels), 1)
    return counts[:, counts.any(axis=0)]


def _allot(counts: np.ndarray, folds: int, fraction: float | None, rng: np.random.Generator) -> np.ndarray:
    """(U,) int64: the fold of each unit, -1 for training. ``counts`` as of :func:`_class_counts`.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas: On the Stratification of Multi-Label Data, 2011) with the label sums
    of whole groups in place of single images: the rarest class first, its largest groups first, each to the fold that has the
    least of that class in relation to what it should have; then single groups are moved as long as that helps.
    """
    total = counts.sum(axis=0)
    if fraction is None:
        target = np.repeat(total[None] / folds, folds + 1, axis=0)
        target[-1] = 0
    else:  # a class of few groups wants one of them held out, even if that is more than the fraction
        part = np.maximum(total * fraction, total / (counts > 0).sum(axis=0))
        target = np.stack([part, total - part])
    scale = np.divide(1, target, out=np.zeros_like(target), where=target > 0)
    full = np.where(target > 0, 0, np.inf)  # where nothing should be
    have = np.zeros_like(target)  # the last row is what stays in training
    place = np.zeros(len(counts), dtype=np.int64)
    left, waiting = total.copy(), np.ones(len(counts), dtype=bool)
    while waiting.any():
        label = int(np.argmin(np.where(left > 0, left, np.inf)))
        units = rng.permutation(np.flatnonzero(waiting & (counts[:, label] > 0)))
        units = units[np.argsort(-counts[units, label], kind="stable")]
        ties = rng.random((len(units), len(have))).tolist()
        columns = [label, -1]  # equal in this class: the smaller fold
        slope, start = scale[:, columns], full[:, columns]
        for u, tie in zip(units.tolist(), ties):
            empties = (have + counts[u] == total).any(axis=1)  # no training image of some class would be left
            empties[-1] = False
            filled = have[:, columns] * slope + start
            place[u] = min(zip(empties.tolist(), filled.tolist(), tie, range(len(have))))[3]
            have[place[u]] += counts[u]
        waiting[units] = False
        left -= counts[units].sum(axis=0)
    place[place == len(have) - 1] = -1
    return place


# -- checking a split --------------------------------------------------------------------------------------------------


def check_folds(folds: Folds, classes: Sequence[str]) -> list[str]:
    """Warnings that name the classes without images on a side. DataError: a group on two sides, an image on none or on both."""
    for row in folds.folds if folds.groups is not None else ():
        names = np.array([name or f"\0{i}" for i, name in enumerate(folds.groups or ())])
        _, first, group = np.unique(names, return_index=True, return_inverse=True)
        other = first[group.reshape(-1)]  # an image of the same group
        apart = np.flatnonzero(row != row[other])
        if len(apart):
            i, j = int(other[apart[0]]), int(apart[0])
            raise DataError(
                f"{len(np.unique(names[apart]))} groups are on two sides of the split, so its scores would be too good; split by "
                f"groups (scheme stratified_group), got group {names[i]!r} with image {folds.ids[i]!r} in fold {row[i]} and "
                f"image {folds.ids[j]!r} in fold {row[j]}"
            )
    has = _has_class(folds.labels, classes)
    total = has.sum(axis=0)
    warned = [_lacking(classes, total == 0, "", "image at all")] if (total == 0).any() else []
    for k in range(folds.count):
        train, valid = folds.sides(k)
        if not np.array_equal(np.sort(np.concatenate([train, valid])), np.arange(len(folds))) or not len(
            train
        ):
            raise DataError(
                f"fold {k} must divide the images into two sides, got {len(train)} and {len(valid)} of {len(folds)}"
            )
        held = has[valid].sum(axis=0)
        for count, side in ((total - held, "training"), (held, "validation")):
            lacks = (count == 0) & (total > 0)
            if lacks.any():
                warned.append(_lacking(classes, lacks, f"fold {k}: ", f"{side} image"))
    return warned


def _lacking(classes: Sequence[str], lacks: np.ndarray, where: str, what: str) -> str:
    names = [repr(classes[c]) for c in np.flatnonzero(lacks)]
    verb = "class has" if len(classes) == 1 else "classes have"
    return f"{where}{len(names)} of {len(classes)} {verb} no {what}: {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"


def _has_class(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """(N, C) bool: the classes that a text of class names, joined by blanks, names. Names may have blanks in them."""
    number = {name: c for c, name in enumerate(classes)}
    longest_first = sorted(map(re.escape, classes), key=len, reverse=True)
    word = re.compile(rf"(?:^|(?<= ))(?:{'|'.join(longest_first)})(?= |$)")
    found = {
        text: [number[text]] if text in number else [number[m] for m in word.findall(text)]
        for text in set(labels)
    }
    has = np.zeros((len(labels), len(classes)), dtype=bool)
    for i, text in enumerate(labels):
        has[i, found[text]] = True
    return has
