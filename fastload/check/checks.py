"""All checks of a collection of images, and of a test collection beside it: the work behind ``fastload check``.

>>> report = check("train.beton", "test.beton"); report.problems; report.write_html("check.html")
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fastload.check import hashing
from fastload.check.drift import FEWEST, drift
from fastload.check.groups import PathGroups, path_groups
from fastload.check.report import Balance, Cluster, Groups, Picture, Report
from fastload.dataset import Dataset
from fastload.dataset import open as open_dataset
from fastload.errors import DataError, UsageError

FEW_IMAGES = 10  # of a class: two in each of five folds
UNEVEN = 10.0  # times as many images in the largest class as in the smallest
Path = str | os.PathLike[str]


def check(
    data: Dataset | Path,
    test: Dataset | Path | None = None,
    *,
    folds: Path | np.ndarray | None = None,
    threads: int | None = None,
    near: float = hashing.NEAR,
    progress: bool = True,
) -> Report:
    """Look at every image once and tell what looks wrong.

    ``test``: images to be predicted, or to be scored on. ``folds``: a saved table (CSV with the columns id and fold), or (N,) int64 as
    in the guard. ``near``: least cosine of look-alikes, from 0.5 to 1. UsageError for a wrong call, DataError for a file that cannot be
    read; damaged images are counted and told.
    """
    if not 0.5 <= near <= 1:
        raise UsageError(f"near is a cosine from 0.5 to 1 (0.85 is usual), got {near!r}")
    sides = [
        one if isinstance(one, Dataset) else open_dataset(one) for one in (data, test) if one is not None
    ]
    for side in sides:
        if not len(side):
            raise DataError(f"{side.path} holds no images to check; convert some first, got 0 samples")
    train = sides[0]
    skipped: list[tuple[str, str]] = []
    names, codes = _labels(sides, skipped)
    count, fold = len(train), None
    if folds is not None:
        fold = read_folds(folds, train.ids) if not isinstance(folds, np.ndarray) else folds.astype(np.int64)
        if fold.shape != (count,):
            raise UsageError(f"folds need one number for each of {count} images, got shape {fold.shape}")
    else:
        skipped.append(("copies across folds", "no split was given (--folds FILE)"))

    looks = hashing.look_at(sides, threads, progress)
    pairs = hashing.look_alikes(looks, threads, near)
    copies = hashing.exact_copies(sides)
    joined = _clusters(sides, pairs, copies, names, codes, fold)
    known = None if codes is None else codes[:count]
    balance = _balance(train) if known is not None else None
    groups = _groups(train, known, pairs, skipped)
    rows = []
    if len(sides) == 1:
        skipped.append(
            ("drift, and copies between training and test", "no test data were given (--test FILE)")
        )
    else:
        rows = drift(*(_figures(side, looks, part) for side, part in zip(sides, _parts(sides))))
        if not rows:
            skipped.append(("drift", f"it needs {FEWEST} images on each side"))
    unseen = int((~looks.comparable & ~looks.damaged).sum())
    if unseen:
        why = f"{unseen:,} images are blank or have a side below {hashing.SMALLEST} pixels, too little to tell copies from cousins"
        skipped.append(("look-alikes of some images", why))
    if pairs.raised > 0.5:
        why = f"{pairs.raised:.0%} of the images are so alike by nature that only nearly identical ones count as look-alikes"
        skipped.append(("some look-alikes", why))
    report = Report(
        paths=[", ".join(side.paths) for side in sides],
        images=[len(side) for side in sides],
        damaged=int(looks.damaged.sum()),
        balance=balance,
        groups=groups,
        clusters=joined,
        drift=rows,
        skipped=skipped,
        problems=[],
        datasets=tuple(sides),
    )
    report.problems.extend(_problems(report))
    return report


def read_folds(path: Path, ids: Sequence[str]) -> np.ndarray:
    """(N,) int64 folds in the order of ``ids`` from a CSV with the columns id and fold (a number, or train and valid)."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f"the folds cannot be read ({error}); give a CSV file, got {os.fspath(path)!r}"
        ) from error
    if not rows or not {"id", "fold"} <= set(rows[0]):
        raise DataError(f"{os.fspath(path)} has no columns id and fold; give a table that a split has saved")
    sides = {"train": -1, "valid": 0}
    found: dict[str, int] = {}
    for row in rows:  # of repeated folds, the first ones
        try:
            found.setdefault(row["id"], sides[row["fold"]] if row["fold"] in sides else int(row["fold"]))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{os.fspath(path)}: a fold is a number, train or valid, got {row['fold']!r}"
            ) from error
    missing = [id for id in ids if id not in found]
    if missing:
        raise DataError(
            f"{os.fspath(path)} lacks {len(missing):,} of {len(ids):,} images; give the split of these data, "
            f"got none for {missing[0]!r}"
        )
    return np.array([found[id] for id in ids], np.int64)


def _labels(sides: Sequence[Dataset], skipped: list[tuple[str, str]]) -> tuple[list[str], np.ndarray | None]:
    """Class of each image of all sides as text ("" where unknown), and (N,) int64 numbers of these texts, or None without labels."""
    texts: list[str] = []
    for which, data in zip(("training", "test"), sides):
        field = data.fields.get("label")
        if field is None or field.kind not in ("int", "ndarray"):
            what = (
                "class balance, label conflicts"
                if which == "training"
                else "label conflicts with the test data"
            )
            skipped.append((what, f"the {which} data have no labels"))
            texts += [""] * len(data)
            continue
        names, labels = data.classes, data.labels

        def name(number: int, names: list[str] = names) -> str:
            return names[number] if 0 <= number < len(names) else str(number)

        if labels.ndim == 2:
            texts += [", ".join(name(int(c)) for c in np.flatnonzero(row > 0.5)) or "none" for row in labels]
        else:
            texts += [name(int(label)) for label in labels.tolist()]
    if not any(texts[: len(sides[0])]):
        return texts, None
    return texts, np.unique(np.array(texts, dtype=str), return_inverse=True)[1].reshape(-1)


def _parts(sides: Sequence[Dataset]) -> list[slice]:
    ends = np.cumsum([0, *(len(side) for side in sides)]).tolist()
    return [slice(low, high) for low, high in pairwise(ends)]


def _figures(data: Dataset, looks: hashing.Looks, part: slice) -> dict[str, np.ndarray]:
    """The properties whose drift is looked for, each (N,), of the images that are not damaged."""
    good = ~looks.damaged[part]
    heights, widths = data.heights.astype(np.float64), data.widths.astype(np.float64)
    named = {
        "resolution": np.sqrt(heights * widths),
        "aspect": widths / heights,
        "brightness": looks.brightness[part],
        "contrast": looks.contrast[part],
        "colour": looks.colour[part],
    }
    return {name: values[good] for name, values in named.items()}


def _balance(data: Dataset) -> Balance:
    counts = data.label_counts()
    some = [count for count in counts.values() if count]
    return Balance(
        counts=counts,
        ratio=max(some) / min(some) if some else 1.0,
        rare={name: count for name, count in counts.items() if count < FEW_IMAGES},
    )


def _groups(
    data: Dataset, codes: np.ndarray | None, pairs: hashing.Pairs, skipped: list[tuple[str, str]]
) -> Groups | None:
    """Probable groups by paths, and how many of their images also look like another one of the group."""
    if data.format_version == 0:
        skipped.append(("groups from paths", "the file names no sources (FFCV wrote it)"))
        return None
    sources = list(data.sources)
    found: PathGroups | None = path_groups(sources, codes)
    if found is None:
        return None
    numbers, sizes = np.unique(found.values, return_inverse=True, return_counts=True)[1:]
    numbers = numbers.reshape(-1)
    inside = sizes[numbers] > 1
    mine = (pairs.second < len(data)) & (pairs.first < len(data))
    first, second = pairs.first[mine], pairs.second[mine]
    same = numbers[first] == numbers[second]
    alike = np.unique(np.concatenate([first[same], second[same]]))
    examples = []
    usual = np.median(sizes[sizes > 1])
    for group in sorted(np.flatnonzero(sizes > 1).tolist(), key=lambda g: (abs(sizes[g] - usual), g))[:4]:
        members = np.flatnonzero(numbers == group)
        examples.append([Picture(0, int(i), sources[i]) for i in members[:6]])
    return Groups(
        rule=found.rule,
        why=found.why,
        count=int((sizes > 1).sum()),
        images=int(inside.sum()),
        alike=len(alike),
        examples=examples,
    )


def _clusters(
    sides: Sequence[Dataset],
    pairs: hashing.Pairs,
    copies: np.ndarray,
    names: list[str],
    codes: np.ndarray | None,
    fold: np.ndarray | None,
) -> list[Cluster]:
    """Images that are copies or look-alikes of one another; those that matter most come first."""
    own = np.arange(len(copies))
    twins = np.flatnonzero(copies != own)
    heads = hashing.clusters(
        len(copies), np.concatenate([pairs.first, twins]), np.concatenate([pairs.second, copies[twins]])
    )
    twin = np.bincount(copies, minlength=len(copies))[copies] > 1
    members: dict[int, list[int]] = {}
    for place in np.flatnonzero(np.bincount(heads, minlength=len(heads))[heads] > 1).tolist():
        members.setdefault(int(heads[place]), []).append(place)
    turned: dict[tuple[int, int], int] = dict(
        zip(zip(pairs.first.tolist(), pairs.second.tolist()), pairs.turn.tolist())
    )
    least: dict[int, float] = {}
    for head, score in zip(heads[pairs.first].tolist(), pairs.score.tolist()):
        least[head] = min(score, least.get(head, 1.0))
    count = len(sides[0])
    found = []
    for head, places in members.items():
        pictures = []
        for place in places:
            side = int(place >= count)
            index = place - side * count
            turn = turned.get((head, place), 0)
            pictures.append(
                Picture(
                    side, index, sides[side].sources[index], sides[side].ids[index], names[place],
                    None if fold is None or side else int(fold[index]), hashing.TURNS[turn] if turn else "",
                )
            )  # fmt: skip
        known = {p.label for p in pictures if p.label}
        folds = {p.fold for p in pictures if p.fold is not None}
        found.append(
            Cluster(
                pictures=pictures,
                copies=int(twin[places].sum()),
                score=least.get(head, 1.0),
                conflict=codes is not None and len(known) > 1,
                across_sides=len({p.side for p in pictures}) == 2,
                across_folds=len(folds) > 1,
            )
        )
    return sorted(
        found, key=lambda c: (not c.conflict, not c.across_sides, not c.across_folds, -len(c.pictures))
    )


def _problems(report: Report) -> list[str]:
    """What a person should look at before training, in sentences."""
    told: list[str] = []
    if report.damaged:
        told.append(f"{report.damaged:,} images are damaged: fastload verify names them")
    balance = report.balance
    if balance is not None:
        if balance.rare:
            rare = [
                f"{name!r} ({count})" for name, count in sorted(balance.rare.items(), key=lambda kv: kv[1])
            ]
            more = f" and {len(rare) - 5} more" if len(rare) > 5 else ""
            told.append(
                f"classes with fewer than {FEW_IMAGES} images, too few for five folds: {len(rare)} of {len(balance.counts)}, "
                f"{', '.join(rare[:5])}{more}"
            )
        if balance.ratio >= UNEVEN:
            told.append(
                f"the largest class has {balance.ratio:,.0f} times as many images as the smallest: choose by macro-F1 or "
                "balanced accuracy, and weigh classes or sample them evenly"
            )
    if report.groups is not None:
        groups = report.groups
        told.append(
            f"images seem to come in groups: {groups.why}; {groups.alike / max(groups.images, 1):.0%} of the images in groups look like "
            "another one of theirs; a random split would put one subject on both sides"
        )
    count = Counter[str]()
    for cluster in report.clusters:
        train, test = (sum(p.side == side for p in cluster.pictures) for side in (0, 1))
        count["copies"] += cluster.copies
        count["look-alikes"] += 0 if cluster.exact else len(cluster.pictures)
        count["clusters"] += not cluster.exact
        count["leaked"] += test if train else 0
        count["conflicts"] += cluster.conflict
        count["conflicting"] += len(cluster.pictures) if cluster.conflict else 0
        count["across"] += len(cluster.pictures) if cluster.across_folds else 0
        count["across clusters"] += cluster.across_folds
    if count["copies"]:
        told.append(f"{count['copies']:,} images are exact copies of one another")
    if count["look-alikes"]:
        told.append(
            f"{count['look-alikes']:,} images in {count['clusters']:,} clusters look like one another (turned and mirrored ones included); "
            "--groups duplicates keeps each cluster on one side of a split"
        )
    if count["conflicts"]:
        told.append(
            f"{count['conflicts']:,} clusters of copies or look-alikes have several labels ({count['conflicting']:,} images): at most "
            "one of the labels can be right"
        )
    if count["across"]:
        told.append(
            f"{count['across clusters']:,} clusters of copies or look-alikes ({count['across']:,} images) lie in more than one fold, so "
            "validation sees what training has seen"
        )
    if count["leaked"]:
        told.append(
            f"{count['leaked']:,} of {report.images[1]:,} test images ({count['leaked'] / report.images[1]:.1%}) are copies or "
            "look-alikes of training images"
        )
    told += [row.sentence for row in report.drift if row.found]
    return told
