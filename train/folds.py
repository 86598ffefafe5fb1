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
        said = [
            f"{what} {len(odd)} images (for example {', '.join(map(repr, odd[:3]))})"
            for what, odd in (("it lacks", missing), ("the data lack", extra))
            if odd
        ]
        if said:
            raise DataError(
                f"the split is of other images: {' and '.join(said)}; make a new one, "
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
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                head = reader.fieldnames or ()
                if not {"id", "fold", "label"} <= set(head):
                    raise DataError(
                        f"{path} is no split: it needs columns {', '.join(_COLUMNS)}, got {', '.join(head)!r}"
                    )
                rows = [
                    (row["id"], _fold_number(row["fold"], f"{path}, line {reader.line_num}"), row.get("group") or "",
                     row["label"] or "")
                    for row in reader
                ]  # fmt: skip
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} is no CSV file in UTF-8 ({error}); write it anew") from error
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


def _fold_number(text: str | None, where: str) -> int:
    if text in _SIDES:
        return _SIDES[text]
    if re.fullmatch(r"-1|\d+", text or "") is None:
        raise DataError(f"{where}: a fold is a number from 0, or -1, 'train' or 'valid', got {text!r}")
    return int(text or "")


def _from_rows(rows: Sequence[tuple[str, int, str, str]], path: Path) -> Folds:
    """The table of a file: the n-th row of an id is its fold in repeat n."""
    times = Counter(row[0] for row in rows)
    ids = list(times)  # in the order of the file
    place = {id: i for i, id in enumerate(ids)}
    first: dict[str, tuple[str, str]] = {}
    folds = np.full((max(times.values(), default=0), len(ids)), -2, dtype=np.int64)
    for id, fold, group, label in reversed(rows):
        times[id] -= 1
        folds[times[id], place[id]] = fold
        first[id] = group, label
    numbers = [k for row in folds for k in np.unique(row).tolist() if k >= 0]
    # A true repeat has every image, and fold numbers of its own.
    if (folds == -2).any() or len(set(numbers)) < len(numbers):
        _check_unique((row[0] for row in rows), str(path))
    groups = [first[id][0] for id in ids]
    return Folds(ids, folds, [first[id][1] for id in ids], groups if any(groups) else None, "given")


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
    if scheme == "auto":
        scheme = "stratified" if groups is None else "stratified_group"
    if not len(ids):
        raise DataError("there are no images to divide; give some, got 0")
    texts = None if groups is None else [str(value) for value in np.asarray(groups).tolist()]
    if given is not None:
        table = _numbered(given)[None]
    else:
        order = np.argsort(np.array(classes, dtype=str), kind="stable")
        sorted_labels = labels[:, order] if labels.ndim == 2 else np.argsort(order)[labels]
        unit = None
        if texts is not None and scheme in ("group", "stratified_group", "holdout"):
            names = [name or f"\0{i}" for i, name in enumerate(texts)]  # without a group: a group of one
            unit = np.unique(names, return_inverse=True)[1].reshape(-1)
        count = 1 if scheme == "holdout" else folds
        table = np.full((repeats, len(ids)), -1, dtype=np.int64)
        for r in range(repeats):
            row = _one(scheme, sorted_labels, unit, folds, fraction, np.random.default_rng([seed, r]))
            _check_filled(row, count, "image" if unit is None else "group")
            table[r] = np.where(row < 0, -1, row + r * count)
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
            f"the column of folds holds nothing out; give each fold its own value, got only {given[0]!r}"
        )
    result = np.full(len(values), -1, dtype=np.int64)
    result[held] = np.unique(values[held], return_inverse=True)[1].reshape(-1)
    return result


def _label_texts(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    if labels.ndim == 1:
        return [classes[label] for label in labels.tolist()]
    return [" ".join(classes[c] for c in np.flatnonzero(row).tolist()) for row in labels]


def _one(
    scheme: str,
    labels: np.ndarray,
    unit: np.ndarray | None,
    folds: int,
    fraction: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """(N,) int64 folds of one repeat, numbered from 0. ``unit`` (N,) int64: the number of each image's group."""
    if unit is None and scheme == "kfold":
        return _dealt(np.zeros(len(labels), dtype=np.int64), folds, rng)
    if unit is None and labels.ndim == 1:
        return _held(labels, fraction, rng) if scheme == "holdout" else _dealt(labels, folds, rng)
    unit = np.arange(len(labels)) if unit is None else unit
    counts = _class_counts(labels, unit, stratified=scheme != "group")
    return _allot(counts, folds, fraction if scheme == "holdout" else None, rng)[unit]


def _check_filled(row: np.ndarray, count: int, what: str) -> None:
    filled = len(np.unique(row[row >= 0]))
    if not filled:
        raise DataError(
            f"nothing can be held out for validation: training would lose the last {what} of a class; give --valid with other "
            f"images, got {len(row)} images"
        )
    if filled < count:
        raise DataError(
            f"there are too few {what}s, {count - filled} of {count} folds would hold none out; choose fewer folds, got {count}"
        )


def _dealt(labels: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Deal the images out like cards, class after class: a class's counts over the folds differ by at most one, the folds' too.

    ``StratifiedKFold`` does the same, but refuses where every class is smaller than the number of folds, and holds the only
    image of a class out, which no model can then get right; here it stays in training.
    """
    result = np.full(len(labels), -1, dtype=np.int64)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
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

    Not ``StratifiedGroupKFold``: with few groups it is uneven, and it may put all groups of a class into one fold, whose model
    then never saw that class. Few units are allotted several times and the most even result is taken.
    """
    total = counts.sum(axis=0)
    if fraction is None:
        target = np.repeat(total[None] / folds, folds + 1, axis=0)
        target[-1] = 0
    else:  # a class of few groups wants one of them held out, even if that is more than the fraction
        part = np.maximum(total * fraction, total / (counts > 0).sum(axis=0))
        target = np.stack([part, total - part])
    best = np.inf
    for _ in range(min(10, max(1, 2000 // len(counts)))):
        place, have = _spread(counts, target, rng)
        _even_out(place, have, counts, target)
        cost = float((((have - target) / total) ** 2).sum())
        if cost < best:
            best, result = cost, np.where(place == len(have) - 1, -1, place)
    return result


def _spread(
    counts: np.ndarray, target: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Iterative stratification. ``target`` (P, C): images wanted in each part; the last part is training.

    Sechidis, Tsoumakas, Vlahavas: On the Stratification of Multi-Label Data (2011), with the label sums of whole groups in place
    of single images, and what a part lacks measured against its target, so that a small held-out side gets large groups too: the
    rarest class first, its largest groups first, each to the part that has the smallest share of its target. Returns the part
    of each unit (U,) and the images that each part then has (P, C). No part but the last ever gets all images of a class.
    """
    total = counts.sum(axis=0)
    scale = np.divide(1, target, out=np.zeros_like(target), where=target > 0)
    full = np.where(target > 0, 0, np.inf)  # where nothing should be
    have = np.zeros_like(target)
    place = np.zeros(len(counts), dtype=np.int64)
    left, waiting = total.copy(), np.ones(len(counts), dtype=bool)
    while waiting.any():
        label = int(np.argmin(np.where(left > 0, left, np.inf)))
        units = np.flatnonzero(waiting & (counts[:, label] > 0))
        # Roughly by size: an exact order would give the same split for every seed where all sizes differ.
        units = units[np.argsort(-counts[units, label] * rng.uniform(0.8, 1, len(units)))]
        ties = rng.random((len(units), len(have))).tolist()
        columns = [label, -1]  # of parts equal in this class the emptier one
        slope, start = scale[:, columns], full[:, columns]
        for u, tie in zip(units.tolist(), ties):
            empties = (have + counts[u] == total).any(axis=1)
            empties[-1] = False
            filled = have[:, columns] * slope + start
            place[u] = min(zip(empties.tolist(), filled.tolist(), tie, range(len(have))))[3]
            have[place[u]] += counts[u]
        waiting[units] = False
        left -= counts[units].sum(axis=0)
    return place, have


def _even_out(place: np.ndarray, have: np.ndarray, counts: np.ndarray, target: np.ndarray) -> None:
    """Move single units to other parts, in place, the best move first, while that lessens sum(((have - target) / total)**2).

    Ends when a move brings less than a hundredth of what is left, or when the search gets long for what it can bring.
    """
    total = counts.sum(axis=0)
    scaled = counts / total**2
    own = (scaled * counts).sum(axis=1)
    rows = np.arange(len(counts))
    for _ in range(min(1000, 2 * 10**8 // counts.size)):
        excess = have - target
        enough = (
            0.005 * float(((excess / total) ** 2).sum()) + 1e-9
        )  # half a hundredth, as ``gain`` is half of the gain
        slope = scaled @ excess.T
        gain = (
            slope[rows, place][:, None] - slope - own[:, None]
        )  # (U, P) half of what the sum loses by the move
        gain[:, ~target.any(axis=1)] = 0
        gain[rows, place] = 0
        while True:
            u, part = np.unravel_index(int(gain.argmax()), gain.shape)
            if gain[u, part] < enough:
                return
            if part == len(have) - 1 or not (have[part] + counts[u] == total).any():
                break
            gain[u, part] = 0  # it would take the last image of a class out of training
        have[place[u]] -= counts[u]
        have[part] += counts[u]
        place[u] = part


# -- checking a split --------------------------------------------------------------------------------------------------


def check_folds(folds: Folds, classes: Sequence[str]) -> list[str]:
    """Warnings that name the classes without images on a side. DataError: a group on two sides, an image on none or on both."""
    for row in folds.folds if folds.groups is not None else ():
        names = np.array([name or f"\0{i}" for i, name in enumerate(folds.groups or ())])
        _, first, group = np.unique(names, return_index=True, return_inverse=True)
        other = first[group.reshape(-1)]  # an image of the same group
        apart = np.flatnonzero(row != row[other])
        if len(apart):
            pair = [int(other[apart[0]]), int(apart[0])]
            sides = [f"{folds.ids[i]!r} in {'training' if row[i] < 0 else f'fold {row[i]}'}" for i in pair]
            raise DataError(
                f"{len(np.unique(names[apart]))} groups are on two sides of the split, so its scores would be too good; split by "
                f"groups (scheme stratified_group), got group {(folds.groups or [])[pair[0]]!r} with {' and '.join(sides)}"
            )
    has = _has_class(folds.labels, classes)
    total = has.sum(axis=0)
    ever = has[(folds.folds >= 0).any(axis=0)].any(axis=0)
    warned = [
        _lacking(classes, total == 0, "image at all"),
        _lacking(classes, (total > 0) & ~ever, "validation image in any fold"),
    ]
    for k in range(folds.count):
        train, valid = folds.sides(k)
        if not np.array_equal(np.sort(np.concatenate([train, valid])), np.arange(len(folds))) or not len(
            train
        ):
            raise DataError(
                f"fold {k} must divide {len(folds)} images into two sides, got {len(train)} and {len(valid)}"
            )
        held = has[valid].sum(axis=0)
        warned.append(_lacking(classes, (total > 0) & (held == total), f"training image in fold {k}"))
        warned.append(_lacking(classes, ever & (held == 0), f"validation image in fold {k}"))
    return [sentence for sentence in warned if sentence]


def _lacking(classes: Sequence[str], lacks: np.ndarray, what: str) -> str:
    names = [repr(classes[c]) for c in np.flatnonzero(lacks).tolist()]
    shown = ", ".join(names[:10]) + (" and more" if len(names) > 10 else "")
    return f"{len(names)} of {len(classes)} classes have no {what}: {shown}" if names else ""


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
