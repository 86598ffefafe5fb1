"""Do the test images look as the training images do: resolution, shape, brightness, contrast and colour, compared as distributions.

The trade-off: two-sample Kolmogorov-Smirnov tests see any difference, and with thousands of images the smallest one is significant; so
a drift is told only where the largest gap between the two distributions is wide as well.

>>> [row.sentence for row in drift(figures(train, looks), figures(test, looks_of_test)) if row.found]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

WIDE = (
    0.15  # KS distance from which a drift is told: 15% of the images lie on the other side of some threshold
)
RARE = 0.001  # chance of such a gap between two samples of one distribution, for all properties together
FEWEST = 20  # images on each side; fewer say nothing about a distribution
_BINS = 32

# Name, what it is, unit, and what a higher and a lower median mean.
PROPERTIES = {
    "resolution": ("square root of height * width, px", "px", "larger", "smaller"),
    "aspect": ("width / height", "", "wider", "narrower"),
    "brightness": ("mean grey level", "of 255", "brighter", "darker"),
    "contrast": ("std of grey levels", "of 255", "richer in contrast", "flatter"),
    "colour": ("strongest minus weakest channel", "of 255", "more colourful", "paler"),
}  # fmt: skip


@dataclass(frozen=True)
class Drift:
    """One property on two sides: medians, KS distance (0 to 1), p value, whether it is told, the sentence, and shares in each of
    32 bins from ``low`` to ``high`` for a plot."""

    name: str
    medians: tuple[float, float]
    distance: float
    p: float
    found: bool
    sentence: str
    low: float
    high: float
    shares: tuple[list[float], list[float]]


def drift(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> list[Drift]:
    """Compare the properties (N,) and (M,) of two collections; empty where one has fewer than 20 images."""
    from scipy.stats import ks_2samp

    rows: list[Drift] = []
    for name, (_, unit, more, less) in PROPERTIES.items():
        one, two = np.asarray(first[name], np.float64), np.asarray(second[name], np.float64)
        if min(len(one), len(two)) < FEWEST:
            return []
        result = ks_2samp(one, two)
        distance, p = float(result.statistic), float(result.pvalue)
        medians = float(np.median(one)), float(np.median(two))
        found = bool(distance >= WIDE and p < RARE / len(PROPERTIES))
        which = more if medians[1] > medians[0] else less if medians[1] < medians[0] else "otherwise spread"
        shown = [_round(value) for value in medians]
        figures = f"{name}: median {shown[1]} against {shown[0]} {unit}".rstrip()
        sentence = f"test images are {which if found else 'about the same'} ({figures}, Kolmogorov-Smirnov distance {distance:.2f}, p {_p(p)})"
        low, high = np.quantile(np.concatenate([one, two]), [0.005, 0.995]).tolist()
        high = high if high > low else low + 1.0
        shares = tuple(
            (np.histogram(np.clip(side, low, high), _BINS, (low, high))[0] / len(side)).tolist()
            for side in (one, two)
        )
        rows.append(Drift(name, medians, distance, p, found, sentence, low, high, (shares[0], shares[1])))
    return rows


def _round(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2f}"


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 1e-4 else "< 0.0001"
