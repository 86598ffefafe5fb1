"""Which images probably show one subject, told from where they came from: small folders, common stems, names that say "copy".

Only names are read. The trade-off: a rule on names can be wrong both ways, so it never decides a split by itself; it tells why it
thinks so, and a person answers with ``--groups`` or ``--allow-leak``.

>>> found = path_groups(ds.sources, ds.labels); found.rule, found.why
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FEWEST_GROUPS = 5  # fewer folders or stems than that are batches, cameras or sides of a split
LARGEST_FOLDER = 50  # images on average: more of them are a class, a day or a batch, not a subject
_LARGEST_STEM = 100  # a stem of more images, and of five times as many as is usual, only numbers them
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "images", "imgs", "data"}

# What a copy's name has more than its original's: "x copy 3", "x - Copy (2)", "Copy of x", "x7 (1)", "x_rot90", "augmented_x".
_COPY = re.compile(
    r"[ _-]+\(?cop(?:y|ie|ia)\)?(?:[ _-]*\(?\d+\)?)*$|(?<=[\d)]) \(\d+\)$|^copy of |^aug(?:mented)?[ _-](?=.*\w)"
    r"|[ _.-]+(?:aug(?:mented)?|[hv]?flip(?:ped)?|mirror(?:ed)?|rot(?:ated)?)[ _-]?\d*$",
    re.IGNORECASE,
)
# The last part of a name that tells one image of a subject from another: "_3", "-0017", "_mask2", "_left".
_VIEW = re.compile(
    r"[ _.-]+(?:\(?[a-z]{0,12}\d{1,6}\)?|left|right|front|back|top|bottom|side|normal|incorrect|mask|[lr])$",
    re.IGNORECASE,
)
# 20240115_143022 and 2024-01-15 14.30.22: a clock, not a subject and its number.
_TIME = re.compile(r"(?:^|\D)(?:19|20)\d\d[_.-]?[01]\d[_.-]?[0-3]\d(?:[ _.T-]+[\d_.-]*)?$")


@dataclass(frozen=True)
class PathGroups:
    """``values`` (N,) text: the group of each image; ``rule``: "parent" (folders), "stem" or "copy" (file names); ``why``: in words."""

    values: np.ndarray
    rule: str
    why: str


class _Name(NamedTuple):
    folders: tuple[str, ...]
    stem: str


def path_groups(sources: Sequence[str], labels: np.ndarray | None) -> PathGroups | None:
    """Probable groups of N images by ``sources``, or None. ``labels``: (N,) int64, (N, C) multi-hot, or None where unknown.

    A folder or stem that only names the class is no group, neither are names that only number the images.
    """
    names = [_split(source) for source in sources]
    if not names or all(name.stem.isdigit() and not name.folders for name in names):
        return None  # a file without sources numbers its samples
    classes = _classes(labels, len(names))
    dirs = _without_labels([name.folders for name in names], classes)
    return _by_folder(names, dirs, classes) or _by_stem(names, dirs, classes) or _by_copy(names)


def _split(source: str) -> _Name:
    *folders, file = re.split(r"[/\\]+", source.strip("/\\"))
    stem = file.rsplit(".", 1)[0] if re.search(r"\.[A-Za-z][A-Za-z0-9]{1,4}$", file) else file
    return _Name(tuple(folders), stem.strip())


def _classes(labels: np.ndarray | None, number: int) -> np.ndarray | None:
    """(N,) int64, one number for each label or set of labels."""
    if labels is None:
        return None
    unique = np.unique(np.asarray(labels), axis=0, return_inverse=True)[1]
    numbers: np.ndarray = unique.reshape(number)
    return numbers


def _names_class(keys: Sequence[str], classes: np.ndarray | None) -> bool:
    """Whether ``keys`` (N,) are names of the classes: each stands for one class, and there are hardly more of them than classes."""
    if classes is None:
        return False
    pure, groups = _purity(keys, classes)
    return pure >= 0.99 and groups <= 1.5 * len(np.unique(classes))


def _purity(keys: Sequence[str], classes: np.ndarray) -> tuple[float, int]:
    """Share of images that are of their key's usual class, and the number of keys."""
    codes = np.unique(np.array(keys, dtype=str), return_inverse=True)[1].reshape(-1)
    pairs, counts = np.unique(np.stack([codes, classes]), axis=1, return_counts=True)
    usual = np.zeros(codes.max() + 1, np.int64)
    np.maximum.at(usual, pairs[0], counts)
    return float(usual.sum() / len(codes)), len(usual)


def _without_labels(folders: list[tuple[str, ...]], classes: np.ndarray | None) -> list[tuple[str, ...]]:
    """Folders of each image without those that name its class or a side of a split, as in train/cat/."""
    deepest = max(len(parts) for parts in folders)
    named = set()
    for back in range(1, deepest + 1):
        at_depth = [parts[-back] if len(parts) >= back else "" for parts in folders]
        if _names_class(at_depth, classes):
            named.add(back)
    return [
        tuple(
            part
            for back, part in zip(range(len(parts), 0, -1), parts)
            if back not in named and part.lower() not in _SPLITS
        )
        for parts in folders
    ]


def _by_folder(
    names: list[_Name], dirs: list[tuple[str, ...]], classes: np.ndarray | None
) -> PathGroups | None:
    if classes is None:
        return None
    for depth in range(max(map(len, dirs)), 0, -1):  # the finest folders that hold several images
        keys = ["/".join(parts[:depth]) for parts in dirs]
        sizes = Counter(keys)
        if len(sizes) < FEWEST_GROUPS or len(keys) > LARGEST_FOLDER * len(sizes):
            continue
        pure, kinds = _purity(keys, classes)[0], len(np.unique(classes))
        shared = sum(n for n in sizes.values() if n > 1)
        if shared < len(keys) / 2 or (pure >= 0.99 and len(sizes) < 2 * kinds):
            continue
        many = "each of one class" if pure >= 0.99 else "many with several classes"
        why = f"{len(sizes):,} small folders such as {_shown(names, keys)} hold {_mean(sizes)} images each, {many}"
        return PathGroups(np.array(keys, dtype=str), "parent", why)
    return None


def _by_stem(
    names: list[_Name], dirs: list[tuple[str, ...]], classes: np.ndarray | None
) -> PathGroups | None:
    cut, whole = [], []
    for name, parts in zip(names, dirs):
        stem = _without_copy(name.stem)
        subject = "" if _TIME.search(stem) else _VIEW.sub("", stem)
        cut.append("/".join((*parts, subject)) if subject and subject != stem else "")
        whole.append("/".join((*name.folders, stem)))
    sizes = Counter(key for key in cut if key)
    usual = float(np.median([n for n in sizes.values() if n > 1] or [0]))
    numbering = {key for key, n in sizes.items() if n == 1 or n > max(_LARGEST_STEM, 5 * usual)}
    inside = [bool(key) and key not in numbering for key in cut]
    chosen = [key for key, good in zip(cut, inside) if good]
    kept = Counter(chosen)
    if len(kept) < FEWEST_GROUPS or len(chosen) < len(names) / 5:
        return None
    many = ""
    if classes is not None:
        of = classes[np.array(inside)]
        pure, groups = _purity(chosen, of)
        # Breeds, species and the like: words for a class finer than the label, with many images each.
        words = sum(n for key, n in kept.items() if not re.search(r"\d", key)) > len(chosen) / 2
        if pure >= 0.99 and (groups < 2 * len(np.unique(of)) or (words and usual > 30)):
            return None
        many = ", each of one class" if pure >= 0.99 else ", many with several classes"
    why = f"{len(kept):,} common stems of file names such as {_shown(names, cut, kept)} have {_mean(kept)} images each{many}"
    copies = sum(name.stem != _without_copy(name.stem) for name in names)
    if copies:
        why += f", and {copies:,} are copies by their names"
    values = [key if good else f"{full}\N{NO-BREAK SPACE}" for key, good, full in zip(cut, inside, whole)]
    return PathGroups(np.array(values, dtype=str), "stem", why)


def _by_copy(names: list[_Name]) -> PathGroups | None:
    marked = [_without_copy(name.stem) != name.stem for name in names]
    keys = ["/".join((*name.folders, _without_copy(name.stem))) for name in names]
    sizes = Counter(keys)
    copies = sum(mark and sizes[key] > 1 for mark, key in zip(marked, keys))
    if copies < 3:
        return None
    examples = Counter({key: sizes[key] for mark, key in zip(marked, keys) if mark and sizes[key] > 1})
    why = f"{copies:,} files are copies by their names, such as {_shown(names, keys, examples)}"
    return PathGroups(np.array(keys, dtype=str), "copy", why)


def _without_copy(stem: str) -> str:
    """The name without the marks of a copy; a name that is nothing else stays."""
    while (shorter := _COPY.sub("", stem).strip()) != stem and shorter:
        stem = shorter
    return stem


def _shown(names: list[_Name], keys: Sequence[str], sizes: Counter[str] | None = None) -> str:
    """Two images of a group of usual size, for a sentence."""
    sizes = Counter(keys) if sizes is None else sizes
    shared = [key for key, n in sizes.items() if n > 1]
    usual = np.median([sizes[key] for key in shared])
    key = min(shared, key=lambda key: abs(sizes[key] - usual))
    pair = [name for name, own in zip(names, keys) if own == key][:2]
    return " and ".join(repr("/".join((*name.folders[-3:], name.stem))) for name in pair)


def _mean(sizes: Counter[str]) -> str:
    return f"{sum(sizes.values()) / len(sizes):.2g}"
