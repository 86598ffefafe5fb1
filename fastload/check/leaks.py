"""The cheap part of ``fastload check`` that training runs first: does this split put nearly the same picture on both sides?

Names are always read, and exact copies looked for; up to 50,000 images are decoded small and compared as pictures. The trade-off:
seconds before every training, against a score that means nothing.

>>> guard([data], [folds.vector()], labels=[data.labels])
[]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from fastload.check import hashing
from fastload.check.groups import PathGroups, path_groups
from fastload.dataset import Dataset

MOST_HASHED = 50_000
# A share of held-out images below this moves no accuracy by more than two hundredths, and a few images may be alike by chance.
# Five random folds of CIFAR-10, which has real look-alikes and is learned from as it is, have 1.2%.
LEAK_SHARE, LEAK_IMAGES = 0.02, 3
COPY_SHARE = 0.005  # of exact copies, which no chance makes; a few among very many move no score


def guard(
    datasets: Sequence[Dataset],
    folds: Sequence[np.ndarray],
    *,
    labels: Sequence[np.ndarray] | np.ndarray | None,
    threads: int | None = None,
    paths: bool = True,
) -> list[str]:
    """One sentence for each probable leak between images of different folds; empty where none was found.

    ``folds``: for each dataset (N,) int64, the fold in which an image is held out, -1 for always in training. ``labels``: for each
    dataset (N,) int64 or (N, C), or one array for all. Exact copies on the other side are told from 0.5% of the held-out
    images on, look-alikes and common paths from 2% (and 3 of them). ``paths`` False: the caller knows what belongs together, and
    asks for what is seen only.
    """
    fold = np.concatenate([np.asarray(part, np.int64) for part in folds])
    if not (fold >= 0).any() or len(np.unique(fold)) < 2:
        return []
    together = labels if labels is None or isinstance(labels, np.ndarray) else np.concatenate(labels)
    sources = [source for data in datasets for source in data.sources]
    names = _Names(sources, fold)
    leaks = [
        _by_paths(path_groups(sources, together), names) if paths else None,
        _by_looks(datasets, names, threads),
    ]
    return [leak for leak in leaks if leak]


class _Names:
    """Sources and folds of all images, and how a pair of them is told."""

    def __init__(self, sources: Sequence[str], fold: np.ndarray) -> None:
        self.sources, self.fold = sources, fold
        self.held = int((fold >= 0).sum())

    def pair(self, first: int, second: int) -> str:
        return " and ".join(f"{self.sources[i]!r} ({self._side(i)})" for i in (first, second))

    def _side(self, place: int) -> str:
        return f"fold {self.fold[place]}" if self.fold[place] >= 0 else "training"

    def share(self, count: int) -> str:
        return f"{count:,} of {self.held:,} held-out images ({count / self.held:.1%})"

    def many(self, count: int) -> bool:
        return count >= max(LEAK_IMAGES, LEAK_SHARE * self.held)


def _by_paths(found: PathGroups | None, names: _Names) -> str | None:
    if found is None:
        return None
    group = np.unique(found.values, return_inverse=True)[1].reshape(-1)
    leaked = _spread(group, names.fold)
    if not names.many(len(leaked)):
        return None
    # Of person/cat/1.jpg the folder of the image is not the subject's.
    parents = [source.replace("\\", "/").rpartition("/")[0] for source in names.sources]
    exactly = len(set(zip(parents, found.values.tolist()))) == len(set(parents)) == group.max() + 1
    cure = "keep each subject on one side with --groups and a field that names it"
    if found.rule == "parent" and exactly:
        cure = "--groups parent keeps each folder on one side"
    elif found.rule == "copy":
        cure = "--groups duplicates keeps those together that also look alike"
    return (
        f"{names.share(len(leaked))} have a probable companion on the training side by their paths: {found.why}; "
        f"for example {names.pair(*_pair(group, names.fold, leaked))}; {cure}"
    )


def _spread(group: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Held-out images whose group (N,) int64 has an image in another fold, too: their places, sorted."""
    lowest, highest = np.full(group.max() + 1, len(fold)), np.full(group.max() + 1, -1)
    np.minimum.at(lowest, group, fold)
    np.maximum.at(highest, group, fold)
    return np.flatnonzero((lowest != highest)[group] & (fold >= 0))


def _pair(group: np.ndarray, fold: np.ndarray, leaked: np.ndarray) -> tuple[int, int]:
    """The first of the leaked images and one of its group in another fold."""
    first = int(leaked[0])
    return first, int(np.flatnonzero((group == group[first]) & (fold != fold[first]))[0])


def _by_looks(datasets: Sequence[Dataset], names: _Names, threads: int | None) -> str | None:
    fold = names.fold
    copies = hashing.exact_copies(datasets, blank_too=False)
    copied = _spread(copies, fold)
    limit = ""
    if len(fold) > MOST_HASHED:
        leaked = copied
        limit = f" (look-alikes were not searched for: {len(fold):,} images are more than {MOST_HASHED:,})"
    else:
        pairs = hashing.look_alikes(hashing.look_at(datasets, threads, sys.stderr.isatty()), threads)
        apart = fold[pairs.first] != fold[pairs.second]
        alike = np.unique(np.concatenate([pairs.first[apart], pairs.second[apart]]))
        leaked = np.union1d(alike[fold[alike] >= 0], copied)
    if not (len(copied) > COPY_SHARE * names.held or names.many(len(leaked))):
        return None
    if len(copied):
        example = _pair(copies, fold, copied)
    else:
        example = int(pairs.first[apart][0]), int(pairs.second[apart][0])
    kind = "an exact copy" if len(copied) == len(leaked) else "a look-alike"
    exact = f", {len(copied):,} of them an exact copy" if 0 < len(copied) < len(leaked) else ""
    return (
        f"{names.share(len(leaked))} have {kind} on the training side{exact}{limit}; "
        f"for example {names.pair(*example)}; --groups duplicates keeps them together"
    )
