"""What images look like in few numbers: frequencies of a small grey picture, in which turning and mirroring are free.

An image becomes 32 x 32 grey, its lowest 12 x 12 DCT coefficients without the mean, each times its frequency (photographs have most
of their energy in the lowest ones, which unrelated pictures share), scaled to length 1. A quarter turn or a mirror image swaps and
negates coefficients, so all eight orientations are compared without decoding again. The trade-off: a crop of more than about a tenth
or a turn by a few degrees is no look-alike any more. Coefficients as a picture's hash: Zauner, "Implementation and benchmarking of
perceptual image hash functions", 2010.

>>> looks = look_at([train, test]); pairs = look_alikes(looks)
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fastload.beton import EncodedImage
from fastload.check import search
from fastload.dataset import Dataset, decode
from fastload.system import usable_cores

SIDE, FREQUENCIES = 32, 12
SMALLEST = 32  # a stored image with a shorter side than this has too few pixels to tell copies from cousins
NEAR = 0.85  # least cosine of look-alikes
NEAR_SMALL = 0.9  # the same for images with a side below 64 pixels, which have less detail to differ in
FLATTEST = 3.0  # standard deviation of grey levels below which an image is taken to be blank
_QUERIES = 1024
_FEWEST, _SAMPLE = 40, 1000  # images from which on chance is estimated, and how many it is estimated from
_PRIOR = 100  # images: how slowly the mean look of a collection is trusted


@dataclass(frozen=True)
class Looks:
    """Of N images: ``units`` (N, 143) float32 descriptors of length 1, ``small`` (N,) bool (a side below 64 pixels), ``comparable``
    (N,) bool (large enough, not blank, not damaged), ``damaged`` (N,) bool, and of 32 x 32 pixels ``brightness``, ``contrast`` (mean and standard deviation of grey levels, 0 to 255) and ``colour`` (mean of max - min of the channels), (N,) float32.
    """

    units: np.ndarray
    small: np.ndarray
    comparable: np.ndarray
    damaged: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    colour: np.ndarray


@dataclass(frozen=True)
class Pairs:
    """Look-alikes: ``first`` < ``second`` (M,) int64 places, ``score`` (M,) float32 cosines, ``turn`` (M,) int64: how ``first``
    must be turned to look like ``second``, a place in ``TURNS``. ``raised``: share of the images for which a look-alike had to be more
    alike than asked, because the whole collection is.
    """

    first: np.ndarray
    second: np.ndarray
    score: np.ndarray
    turn: np.ndarray
    raised: float


TURNS = (
    "as it is", "mirrored left to right", "mirrored top to bottom", "turned by 180 degrees",
    "mirrored along the diagonal", "turned by 90 degrees right", "turned by 90 degrees left", "mirrored along the other diagonal",
)  # fmt: skip
_INVERSE = np.array([0, 1, 2, 3, 4, 6, 5, 7])


def _basis() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(143, 2) int64 frequencies (down, across), lowest first; (12, 32) float32 DCT rows; (8, 143, 2) float32 views (see the kernel)."""
    down, across = np.divmod(np.arange(1, FREQUENCIES**2), FREQUENCIES)
    order = np.argsort(down**2 + across**2, kind="stable")
    chosen = np.stack([down, across], 1)[order]
    # The four bands of the code take turns, so that each has low and high frequencies.
    low = chosen[:64].reshape(16, 4, 2).transpose(1, 0, 2).reshape(64, 2)
    chosen = np.concatenate([low, chosen[64:]])
    place = {(int(u), int(v)): k for k, (u, v) in enumerate(chosen)}
    views = np.empty((8, len(chosen), 2), np.float32)
    for g in range(8):
        for k, (u, v) in enumerate(chosen.tolist()):
            negate = (v % 2 if g & 1 else 0) + (u % 2 if g & 2 else 0)
            views[g, k] = place[(v, u) if g & 4 else (u, v)], -1.0 if negate % 2 else 1.0
    angle = np.pi * (2 * np.arange(SIDE) + 1) * np.arange(FREQUENCIES)[:, None] / (2 * SIDE)
    return chosen, np.cos(angle).astype(np.float32), views


_CHOSEN, _ROWS, _VIEWS = _basis()
_WEIGHT = np.sqrt((_CHOSEN**2).sum(1)).astype(np.float32)
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


def describe(grey: np.ndarray) -> np.ndarray:
    """Descriptors (B, 143) float32 of length 1 (0 for a blank image) of ``grey`` (B, 32, 32) float32."""
    frequencies = _ROWS @ grey @ _ROWS.T
    # The lowest row and column of a DCT count half as much in an orthonormal one.
    frequencies[:, 0] /= np.sqrt(2)
    frequencies[:, :, 0] /= np.sqrt(2)
    found = frequencies[:, _CHOSEN[:, 0], _CHOSEN[:, 1]] * _WEIGHT
    length = np.linalg.norm(found, axis=1, keepdims=True)
    unit: np.ndarray = np.divide(found, length, out=np.zeros_like(found), where=length > 1e-3)
    return unit


def look_at(datasets: Sequence[Dataset], threads: int | None = None, progress: bool = False) -> Looks:
    """Decode every image of ``datasets`` once, small, and describe it; N counts through them in order."""
    parts = [_look_at(data, threads, progress) for data in datasets if len(data)]
    return Looks(*(np.concatenate(column) for column in zip(*parts)))


def _look_at(data: Dataset, threads: int | None, progress: bool) -> tuple[np.ndarray, ...]:
    import warnings

    from tqdm.auto import tqdm

    from fastload import transforms as T
    from fastload.loader import Loader

    number, bases = len(data), data.indices
    units = np.empty((number, len(_CHOSEN)), np.float32)
    figures = np.empty((3, number), np.float32)
    damaged = np.zeros(number, bool)
    loader = Loader(
        data, 256, transforms=[T.Resize((SIDE, SIDE))], fields=["image"], threads=threads, on_error="replace"
    )
    at = 0
    with warnings.catch_warnings(), tqdm(total=number, desc="look", unit="img", disable=not progress) as bar:
        warnings.simplefilter("ignore")  # damaged images are counted here, and told by the caller
        for batch in loader:
            pixels = batch[0].permute(0, 2, 3, 1).numpy()
            rows = slice(at, at + len(pixels))
            grey = pixels.astype(np.float32) @ _GREY
            units[rows] = describe(grey)
            figures[0, rows], figures[1, rows] = grey.mean((1, 2)), grey.std((1, 2))
            # Channel by channel: numpy reduces an axis of three slowly.
            red, green, blue = (pixels[..., channel] for channel in range(3))
            top, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
            figures[2, rows] = (top - low).mean((1, 2))
            damaged[rows] = batch.index.numpy() != bases[rows]
            at = rows.stop
            bar.update(len(pixels))
    shorter = np.minimum(data.heights, data.widths)
    comparable = (shorter >= SMALLEST) & (figures[1] >= FLATTEST) & ~damaged
    return units, shorter < 64, comparable, damaged, *figures


def _chance(residuals: np.ndarray) -> np.ndarray:
    """(N,) float32 cosines that an image of this collection reaches with one of N others by chance, in any orientation.

    ``residuals`` (N, K) float32. The cosine that each image has with the most alike 5% of a sample is carried on to the
    8 N**2 / 2 comparisons of all by a normal tail (Fisher's transform of the cosine); none is trusted to be below what is usual here.
    Photographs stay under 0.7; written digits, where a look-alike proves nothing, come near to 1.
    """
    number = len(residuals)
    if number < _FEWEST:
        return np.zeros(number, np.float32)
    from scipy.stats import norm

    lengths = np.linalg.norm(residuals, axis=1, keepdims=True)
    unit = residuals / np.maximum(lengths, 1e-6)
    sample = unit[np.random.default_rng(0).permutation(number)[:_SAMPLE]]
    skip = max(len(sample) // 20, 5)
    top = np.concatenate(
        [
            np.partition(unit[at : at + 4096] @ sample.T, -skip - 1, axis=1)[:, -skip - 1]
            for at in range(0, number, 4096)
        ]
    )
    spread = np.arctanh(np.clip(top, 0, 0.999)) / norm.ppf(1 - skip / len(sample))
    reached = np.tanh(spread * np.sqrt(2 * np.log(4.0 * number * number)))
    limits: np.ndarray = np.maximum(reached, np.quantile(reached, 0.75)).astype(np.float32)
    return limits


def look_alikes(looks: Looks, threads: int | None = None, near: float = NEAR) -> Pairs:
    """Pairs of comparable images that look the same in one of eight orientations, in order of their places.

    What all images share (a face in the middle, one camera) is subtracted first, so that a collection of aligned pictures
    is not one crowd of copies.
    """
    places = np.flatnonzero(looks.comparable)
    units = np.ascontiguousarray(looks.units[places])
    number = len(units)
    mean = (units.sum(0) / (number + _PRIOR)).astype(np.float32)
    bits = np.uint64(1) << np.arange(64, dtype=np.uint64)
    codes = ((units[:, :64] > mean[:64]) * bits).sum(1, dtype=np.uint64)
    heads = np.empty((search.BANDS, (1 << search.BAND_BITS) + 1), np.int32)
    items = np.empty((search.BANDS, number), np.int32)
    for band in range(search.BANDS):
        keys = (codes >> np.uint64(band * search.BAND_BITS)) & np.uint64(0xFFFF)
        items[band] = np.argsort(keys, kind="stable")
        heads[band] = np.searchsorted(keys[items[band]], np.arange((1 << search.BAND_BITS) + 1))
    asked = np.where(looks.small[places], max(near, NEAR_SMALL), near).astype(np.float32)
    chance = _chance(units - mean)
    limits, raised = np.maximum(asked, chance), float((chance > asked).mean()) if number else 0.0

    def ask(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        room = 1 << 14
        while True:
            pairs, scores = np.empty((room, 2), np.int32), np.empty(room, np.float32)
            turns = np.empty(room, np.int8)
            stop = min(start + _QUERIES, number)
            count = search.look_alikes(
                units, mean, _VIEWS, codes, heads, items, limits, start, stop, pairs, scores, turns
            )
            if count >= 0:
                return pairs[:count], scores[:count], turns[:count]
            room *= 4

    with ThreadPoolExecutor(threads or usable_cores()) as pool:
        found = list(pool.map(ask, range(0, number, _QUERIES)))
    if not found:
        nothing = np.empty(0, np.int64)
        return Pairs(nothing, nothing, np.empty(0, np.float32), nothing, 0.0)
    pairs, scores, turns = (np.concatenate(column) for column in zip(*found))
    turns = turns.astype(np.int64)
    swapped = pairs[:, 0] > pairs[:, 1]
    first, second = places[pairs.min(1)], places[pairs.max(1)]
    turn = np.where(swapped, _INVERSE[turns], turns)
    best = np.lexsort((turn, -scores, second, first))  # of a pair seen several times, the best one
    key = first[best] * len(looks.units) + second[best]
    best = best[np.unique(key, return_index=True)[1]]
    return Pairs(first[best], second[best], scores[best], turn[best], raised)


def exact_copies(datasets: Sequence[Dataset], blank_too: bool = True) -> np.ndarray:
    """(N,) int64: for each image the place of the first one with the same encoded bytes (its own, where it is alone).

    Bytes are read in full only where size, shape and a digest of some of them agree. Without ``blank_too`` copies of one flat
    colour (an empty scan, a missing tile) count as different: they tell a model nothing.
    """
    sizes = [len(data) for data in datasets]
    starts = np.cumsum([0, *sizes])
    digests = np.zeros(starts[-1], np.uint64)
    for data, start in zip(datasets, starts):
        for file, places, where in data.spans(data.indices):
            rows = places[where.starts[places] >= 0]  # others are damaged
            out = np.empty(len(rows), np.uint64)
            search.digest(file, where.starts[rows], where.sizes[rows], where.shapes[rows], out)
            digests[start + rows] = out
    first_of = np.arange(len(digests))
    order = np.argsort(digests, kind="stable")
    agree = np.split(order, np.flatnonzero(np.diff(digests[order])) + 1)

    def encoded(place: int) -> EncodedImage:
        which = int(np.searchsorted(starts, place, side="right")) - 1
        return datasets[which].encoded(place - int(starts[which]))

    for places in agree:
        different: list[int] = []
        for place in places.tolist() if len(places) > 1 and digests[places[0]] else ():
            for head in different:
                if np.array_equal(encoded(head).data, encoded(place).data):
                    first_of[place] = head
                    break
            else:
                different.append(place)
    if not blank_too:
        for head in np.unique(first_of[first_of != np.arange(len(first_of))]).tolist():
            if decode(encoded(head)).std() < FLATTEST:
                same_as_head = np.flatnonzero(first_of == head)
                first_of[same_as_head] = same_as_head
    return first_of


def clusters(number: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(number,) int64: images joined by pairs (M,), directly or through others, have the same number, that of their first one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(first), bool), (first, second)), (number, number))
    parts = connected_components(graph, directed=False)[1]
    _, head, inverse = np.unique(parts, return_index=True, return_inverse=True)
    joined: np.ndarray = head[inverse.reshape(-1)].astype(np.int64)
    return joined


def duplicate_groups(data: Dataset, threads: int | None = None) -> np.ndarray:
    """(N,) int64 for ``--groups duplicates``: exact copies and look-alikes, directly or through others, have one number."""
    pairs = look_alikes(look_at([data], threads), threads)
    copies = exact_copies([data])
    own = np.arange(len(data))
    return clusters(len(data), np.concatenate([pairs.first, own]), np.concatenate([pairs.second, copies]))
