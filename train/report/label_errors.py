"""Labels that are probably wrong, by confident learning (Northcutt, Jiang and Chuang, JAIR 2021).

An image counts as confidently of class j if its out-of-fold probability of j reaches the mean that images labelled j have. Those
off the diagonal of that count (labelled i, confidently j) are suspects, ranked by how much more probable j is than i. The
trade-off: a model that is wrong in a systematic way makes suspects of right labels, so a person must look.

>>> suspects(labels, oof)[0].row
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Suspect(NamedTuple):
    """``row`` of the predictions, its given and suggested class number, and by how much the suggested one is more probable.

    For several labels an image: ``given`` and ``suggested`` are 0 or 1, whether the image has the label number ``label``.
    """

    row: int
    given: int
    suggested: int
    margin: float
    label: int | None = None


def suspects(labels: np.ndarray, probs: np.ndarray) -> list[Suspect]:
    """The suspects, most suspect first. ``probs`` (N, C) float in [0, 1] by models that did not see the image.

    ``labels``: (N,) int64 class numbers, or (N, C) of 0 and 1, where each label is a question of two classes of its own.
    """
    if labels.ndim == 2:
        found = [
            one._replace(label=label)
            for label in range(labels.shape[1])
            for one in suspects(
                (labels[:, label] > 0.5).astype(np.int64),
                np.stack([1 - probs[:, label], probs[:, label]], axis=1),
            )
        ]
        return sorted(found, key=lambda one: -one.margin)
    rows = np.arange(len(labels))
    own = probs[rows, labels].astype(np.float64)
    counts = np.bincount(labels, minlength=probs.shape[1])
    sums = np.bincount(labels, weights=own, minlength=probs.shape[1])
    # No image is confidently of a class that nobody was labelled with.
    thresholds = np.divide(sums, counts, out=np.full(len(counts), np.inf), where=counts > 0)
    confident = np.where(probs >= thresholds, probs, -1.0)
    guess = confident.argmax(axis=1)
    # Where the given label is still the more probable one, there is nothing to correct.
    margin = confident[rows, guess] - own
    off = np.flatnonzero((guess != labels) & (margin > 0))
    order = off[np.argsort(-margin[off], kind="stable")]
    return [Suspect(int(i), int(labels[i]), int(guess[i]), float(margin[i])) for i in order]
