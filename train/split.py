"""Which images are held out: stratified by class, and never one group on two sides.

Pure functions of labels and a seed. The score on the held-out side is honest only if nothing there has a near twin in
training: several photos of one person need ``groups``, which costs a fraction that is met only as well as whole groups
allow.

>>> train, valid = holdout(labels, fraction=0.2, seed=0)
"""

from __future__ import annotations

import numpy as np

from fastload.errors import DataError


def holdout(
    labels: np.ndarray, fraction: float, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (train, valid), disjoint and complete. ``labels``: (N,) int64; ``groups``: (N,) of any sortable kind.

    Without groups every class with two or more images has at least one on either side. With groups the held-out side
    comes as near to ``fraction`` of every class as whole groups allow, and no class loses its last image in training.
    DataError where nothing can be held out.
    """
    rng = np.random.default_rng(seed)
    if groups is None:
        held = _stratified(labels, fraction, rng)
    else:
        held = _grouped(labels, fraction, np.unique(groups, return_inverse=True)[1].reshape(-1), rng)
    if not held.any():
        what = (
            "every class has a single image"
            if groups is None
            else "no group can be held out without emptying a class"
        )
        raise DataError(f"nothing can be held out for validation: {what}; give --valid with other images")
    return np.flatnonzero(~held), np.flatnonzero(held)


def _stratified(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) > 1:
            count = min(max(round(len(members) * fraction), 1), len(members) - 1)
            held[rng.permutation(members)[:count]] = True
    return held


def _grouped(
    labels: np.ndarray, fraction: float, group_of: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Take groups in random order, each if it brings the class counts of the held-out side nearer to their target."""
    left = np.bincount(labels).astype(np.float64)  # images of each class still in training
    missing = left * fraction  # images of each class still wanted on the held-out side
    by_group = np.argsort(group_of, kind="stable")
    ends = np.cumsum(np.bincount(group_of))
    held = np.zeros(len(labels), dtype=bool)
    for group in rng.permutation(len(ends)):
        members = by_group[ends[group - 1] if group else 0 : ends[group]]
        kinds, counts = np.unique(labels[members], return_counts=True)
        gain = (missing[kinds] ** 2 - (missing[kinds] - counts) ** 2).sum()
        if gain > 0 and (left[kinds] > counts).all():
            held[members] = True
            missing[kinds] -= counts
            left[kinds] -= counts
    return held
