"""Draw, then execute: the first half. A pipeline, a seed, an epoch and sample ids become a table of plain numbers.

Each row says all that an engine needs: which box of the source goes where in the output, flips, a colour matrix, boxes to
erase, a partner to mix with. The numbers come from a counter-based generator keyed by (seed, epoch, sample), so a batch
is the same on any engine, with any number of threads, resumed or not.

>>> Plan(transforms.train(224)).draw(seed=0, epoch=0, samples=ids, heights=h, widths=w).box
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import array_api_compat
import numpy as np

from fastload import transforms as T
from fastload.errors import UsageError
from fastload.kernels import rng

FLIP_HORIZONTAL, FLIP_VERTICAL = 1, 2
_NUMPY = array_api_compat.array_namespace(np.empty(0))
_QUANTILES = 16384
_KEPT: dict[Any, Any] = {}
# Luma and chroma of NTSC. A colour is its luma's share of grey, and two of chroma: all steps work on these alone.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_RGB = np.linalg.inv(_YIQ)
_LUMA = np.tile(_YIQ[0], (3, 1))  # (3, 3): a pixel to its grey
_CHROMA = _RGB[:, 1:] @ _YIQ[1:]  # a pixel less its grey
_TURNED = _RGB[:, 1:] @ np.array([[0.0, -1.0], [1.0, 0.0]]) @ _YIQ[1:]  # the same by a quarter turn of hue
_STREAM_MIX = 0xFE00  # the draws of mixing, apart from those of the steps, which count from 1
_STREAM_PER_IMAGE = 0xFD00
_ATTEMPTS = 10

_STAGE = {
    T.RandomResizedCrop: 0, T.Resize: 0, T.CenterCrop: 0, T.RandomCrop: 0, T.HorizontalFlip: 1, T.VerticalFlip: 1,
    T.ColorJitter: 2, T.Grayscale: 2, T.RandomErasing: 3, T.Cutout: 3, T.PerImage: 4, T.Normalize: 5, T.Mixup: 6,
    T.CutMix: 6,
}  # fmt: skip
_STAGES = ("geometry", "flips", "colour", "erasing", "PerImage", "Normalize", "mixing")


@dataclass(frozen=True)
class Table:
    """Parameters of B samples: numpy arrays, or tensors on one device.

    ``box`` (B, 4) float64: y0, x0, y1, x1 of the source that is resized to ``place`` (B, 4) int64: y, x, height, width in
    the output, whose rest is filled; ``clip`` (B, 4) int64: the source pixels that may be used. ``flips`` (B,) int64:
    1 horizontal + 2 vertical, inside of ``place``. ``colour`` (B, 3, 7) float32 or None: three channels by (3 of the
    pixel, 3 of the image's channel means, 1 constant), for pixels 0 to 255; ``coloured`` (B,) bool: rows that differ
    from the identity. ``erase`` (B, K, 4) int64: y0, x0, y1, x1. ``mix`` (B,) float32 or None: own weight, with
    ``mix_box`` (B, 4) int64 for CutMix (empty for mixup); the partner of row i is B - 1 - i. ``keys`` (B, 4) uint32:
    seeds for PerImage, or None.
    """

    box: Any
    clip: Any
    place: Any
    flips: Any
    colour: Any
    coloured: Any
    erase: Any
    mix: Any
    mix_box: Any
    keys: np.ndarray | None

    def windows(self) -> tuple[Any, Any]:
        """The y0, x0, y1, x1 of the image that each crop reads, (B, 4) int64, and the rows (B,) in which nothing is placed: they read one pixel."""
        xp = _namespace(self.box)
        empty = (self.place[:, 2] <= 0) | (self.place[:, 3] <= 0)
        # The triangle filter looks a pixel, a scaled one where that is larger, further than its box.
        reach = ((self.box[:, 2:] - self.box[:, :2]) / self.place[:, 2:].clip(min=1)).clip(min=1.0)
        low = xp.maximum(self.clip[:, :2], xp.astype(xp.floor(self.box[:, :2] - reach), xp.int64))
        high = xp.minimum(self.clip[:, 2:], xp.astype(xp.ceil(self.box[:, 2:] + reach), xp.int64))
        nothing = xp.zeros_like(low)
        single = xp.concat([nothing, nothing + 1], axis=1)
        return xp.where(empty[:, None], single, xp.concat([low, high], axis=1)), empty


class Plan:
    """A checked pipeline: its output ``size`` (height, width) or None (images as they are), and how to draw for it."""

    def __init__(self, pipeline: Sequence[T.Spec] | None) -> None:
        self.specs: T.Pipeline = tuple(pipeline or ())
        stages = []
        for spec in self.specs:
            if type(spec) not in _STAGE:
                raise UsageError(
                    f"{spec!r} is not a fastload transform; wrap a function or another library's transform as "
                    "transforms.PerImage(fn)"
                )
            stages.append(_STAGE[type(spec)])
        # A PerImage in front is the geometry; there is then no other.
        self.whole_image = bool(stages) and stages[0] == 4
        if self.whole_image:
            stages[0] = 0
        for before, after, spec in zip(stages, stages[1:], self.specs[1:]):
            if after < before:
                raise UsageError(
                    f"{type(spec).__name__} ({_STAGES[after]}) comes after {_STAGES[before]}; "
                    f"the order is {', '.join(_STAGES)}"
                )
        self.geometry = [s for s, stage in zip(self.specs, stages) if stage == 0]
        self.per_image: list[T.PerImage] = [s for s in self.specs if isinstance(s, T.PerImage)]
        self.normalize = next((s for s in self.specs if isinstance(s, T.Normalize)), None)
        self.mixers = [s for s in self.specs if isinstance(s, (T.Mixup, T.CutMix))]
        self._check()
        self.size = self._output_size()
        # A step's stream of random numbers is its place in the pipeline, so the same step twice draws twice.
        steps = list(enumerate(self.specs, 1))
        self._flips = [(n, s) for n, s in steps if isinstance(s, (T.HorizontalFlip, T.VerticalFlip))]
        self._colours = [(n, s) for n, s in steps if isinstance(s, (T.ColorJitter, T.Grayscale))]
        self._erasers = [(n, s) for n, s in steps if isinstance(s, (T.RandomErasing, T.Cutout))]

    @property
    def fill(self) -> tuple[int, int, int]:
        """Colour of output pixels outside of ``place``."""
        return next((s.fill for s in self.geometry if isinstance(s, T.RandomCrop)), (0, 0, 0))

    @property
    def erase_fill(self) -> np.ndarray:
        """Colour of each eraser, (K, 3) uint8."""
        mean = np.zeros(3) if self.normalize is None else np.asarray(self.normalize.mean)
        default = np.clip(np.rint(mean * 255), 0, 255).astype(np.uint8)
        fills = [default if s.value is None else np.array(s.value, np.uint8) for _, s in self._erasers]
        return np.array(fills, np.uint8).reshape(-1, 3)

    @property
    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """scale and shift (3,) float32 that turn bytes into normalised pixels, or into 0..1 without a Normalize."""
        if self.normalize is None:
            return np.full(3, 1 / 255, np.float32), np.zeros(3, np.float32)
        mean, std = np.asarray(self.normalize.mean), np.asarray(self.normalize.std)
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)

    def _check(self) -> None:
        kinds = [type(s) for s in self.geometry]
        allowed: list[list[type]] = [
            [], [T.RandomResizedCrop], [T.Resize], [T.CenterCrop], [T.RandomCrop], [T.Resize, T.CenterCrop],
            [T.Resize, T.RandomCrop], [T.PerImage],
        ]  # fmt: skip
        if kinds not in allowed:
            names = " + ".join(k.__name__ for k in kinds)
            raise UsageError(
                f"the geometry {names} is not one of: RandomResizedCrop; Resize; CenterCrop; RandomCrop; "
                "Resize + CenterCrop; Resize + RandomCrop; a PerImage in front instead"
            )
        if len(self.mixers) > 2 or len({type(m) for m in self.mixers}) < len(self.mixers):
            raise UsageError("at most one Mixup and one CutMix")
        if sum(isinstance(s, T.Normalize) for s in self.specs) > 1:
            raise UsageError("at most one Normalize")
        if self.whole_image and self.per_image[0].size is None:
            raise UsageError(
                "a PerImage in front gets images of any size: say which one it returns, PerImage(fn, size=...)"
            )

    def _output_size(self) -> tuple[int, int] | None:
        if not self.geometry:
            return None
        last: Any = self.geometry[-1]
        if isinstance(last, T.Resize) and isinstance(last.size, int):
            raise UsageError(
                f"Resize({last.size}) keeps each image's shape, and a batch needs one: "
                f"add CenterCrop({last.size}) or give Resize(({last.size}, {last.size}))"
            )
        size: tuple[int, int] = last.size
        return size

    def draw(
        self,
        seed: int,
        epoch: int,
        samples: Any,
        heights: Any,
        widths: Any,
        batch: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Table:
        """The parameters of the samples (B,) with base ids ``samples`` and stored sizes ``heights``, ``widths``.

        All three are numpy arrays of integers, or int64 tensors on one device, and the table is of the same kind. ``batch``: the rows
        are those of batches of so many samples, one after the other (only Mixup and CutMix ask); None is one batch. ``size`` is that
        of images that stay as they are, if it is known: else a device has to be waited for to say it.
        """
        uniforms: Callable[[int, int], Any]  # (stream, count) to (B, count) float64
        if array_api_compat.is_torch_array(heights):
            from fastload.kernels import gpu_rng

            uniforms = partial(gpu_rng.uniforms, seed, epoch, samples)
        else:
            samples = np.asarray(samples, np.uint64)
            heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
            uniforms = partial(rng.uniforms, seed, epoch, samples)
        xp = _namespace(heights)
        count = len(heights)
        size = self.size or size
        if size is None:
            size = (int(heights[0]), int(widths[0])) if count else (0, 0)
        out_h, out_w = size
        box, clip, place = self._boxes(uniforms, heights, widths)
        flips = xp.zeros_like(heights)
        for stream, flip in self._flips:
            bit = FLIP_HORIZONTAL if isinstance(flip, T.HorizontalFlip) else FLIP_VERTICAL
            flips ^= xp.astype(uniforms(stream, 1)[:, 0] < flip.p, xp.int64) * bit
        # A flip mirrors the place that is filled, too.
        place[:, 0] = xp.where((flips & FLIP_VERTICAL) != 0, out_h - place[:, 0] - place[:, 2], place[:, 0])
        place[:, 1] = xp.where((flips & FLIP_HORIZONTAL) != 0, out_w - place[:, 1] - place[:, 3], place[:, 1])
        colour, coloured = self._colour(uniforms, heights)
        boxes = [_erase_boxes(eraser, uniforms(stream, 32), out_h, out_w) for stream, eraser in self._erasers]
        erase = xp.stack(boxes, axis=1) if boxes else xp.reshape(clip[:, :0], (count, 0, 4))
        mix, mix_box = self._mix(uniforms, heights, out_h, out_w, batch or max(count, 1))
        keys = None
        if self.per_image:
            keys = np.asarray(uniforms(_STREAM_PER_IMAGE, 4) * 4294967296.0, np.uint32)
        return Table(box, clip, place, flips, colour, coloured, erase, mix, mix_box, keys)

    def _boxes(self, uniforms: Callable[[int, int], Any], heights: Any, widths: Any) -> tuple[Any, Any, Any]:
        xp = _namespace(heights)
        zero = xp.zeros_like(heights)
        whole = _columns(zero, zero, heights, widths)
        if not self.geometry or self.whole_image:
            size = (heights, widths) if self.size is None else (zero + self.size[0], zero + self.size[1])
            return xp.astype(whole, xp.float64), whole, _columns(zero, zero, *size)
        first: Any = self.geometry[0]
        last: Any = self.geometry[-1]
        out_h, out_w = last.size
        if isinstance(first, T.RandomResizedCrop):
            crops = _resized_crops(first, uniforms(1, 4 * _ATTEMPTS), heights, widths)
            return xp.astype(crops, xp.float64), crops, _columns(zero, zero, zero + out_h, zero + out_w)
        if isinstance(first, T.Resize):
            if isinstance(first.size, int):
                short = xp.minimum(heights, widths)
                new_h = xp.where(heights <= widths, first.size, first.size * heights // short)
                new_w = xp.where(heights <= widths, first.size * widths // short, first.size)
            else:
                new_h, new_w = zero + first.size[0], zero + first.size[1]
        else:
            new_h, new_w = heights, widths
        if isinstance(last, T.RandomCrop):
            u = uniforms(len(self.geometry), 2)
            top = _random_offsets(u[:, 0], new_h, out_h, last.padding)
            left = _random_offsets(u[:, 1], new_w, out_w, last.padding)
        elif isinstance(last, T.CenterCrop):
            top, left = _centre_offsets(new_h, out_h), _centre_offsets(new_w, out_w)
        else:
            top, left = zero, zero
        y, x = (-top).clip(0, out_h), (-left).clip(0, out_w)
        # With much padding a crop may miss the image: then nothing is placed, and all is fill.
        h = ((new_h - top).clip(max=out_h) - y).clip(min=0)
        w = ((new_w - left).clip(max=out_w) - x).clip(min=0)
        scale_y, scale_x = _real(heights) / new_h, _real(widths) / new_w
        box = _columns(
            (top + y) * scale_y, (left + x) * scale_x, (top + y + h) * scale_y, (left + x + w) * scale_x
        )
        return box, whole, _columns(y, x, h, w)

    def _colour(self, uniforms: Callable[[int, int], Any], like: Any) -> tuple[Any, Any]:
        """The matrix of all colour steps (B, 3, 7) float32, and which rows it changes.

        Nothing is cut to 0..255 between the steps, so each of them scales luma, or scales and turns chroma; these commute, and
        their order does not matter. Contrast scales everything but the luma of the image's mean.
        """
        xp = _namespace(like)
        coloured = like < 0  # none of them
        if not self._colours:
            return None, coloured
        # A pixel's luma, the mean's luma, chroma along and across: what becomes of 1, 1, 1 and 0.
        luma = xp.ones_like(like, dtype=xp.float64)
        mean, along, across = luma, luma, xp.zeros_like(luma)
        for stream, spec in self._colours:
            u = uniforms(stream, 9)
            active = u[:, 0] < spec.p
            coloured = coloured | active
            if isinstance(spec, T.Grayscale):
                along, across = (xp.where(active, 0.0, part) for part in (along, across))
                continue
            ranges: tuple[Any, ...] = (spec.brightness, spec.contrast, spec.saturation, spec.hue)
            brightness, contrast, saturation, hue = (
                xp.where(active, low + u[:, 5 + k] * (high - low), 0.0 if k == 3 else 1.0)
                for k, (low, high) in enumerate(ranges)
            )
            luma, mean = luma * brightness * contrast, mean * brightness
            cos, sin = xp.cos(2 * math.pi * hue), xp.sin(2 * math.pi * hue)
            chroma = brightness * contrast * saturation
            along, across = chroma * (along * cos - across * sin), chroma * (along * sin + across * cos)

        def combined(*parts: tuple[Any, np.ndarray]) -> Any:
            terms = [part[:, None, None] * _constant(matrix, part) for part, matrix in parts]
            return sum(terms[1:], terms[0])

        pixel = combined((luma, _LUMA), (along, _CHROMA), (across, _TURNED))
        means = combined((mean - luma, _LUMA))
        colour = xp.concat([pixel, means, xp.zeros_like(means[:, :, :1])], axis=2)
        return xp.astype(colour, xp.float32), coloured

    def _mix(
        self, uniforms: Callable[[int, int], Any], like: Any, height: int, width: int, batch: int
    ) -> tuple[Any, Any]:
        if not self.mixers:
            return None, None
        xp = _namespace(like)
        u = uniforms(_STREAM_MIX, 4)
        which = xp.astype(u[:, 0] * len(self.mixers), xp.int64)
        quantile = uniforms(_STREAM_MIX + 1, 1)[:, 0]
        weights = xp.ones_like(quantile)
        boxes = _columns(*[xp.zeros_like(like)] * 4)
        # A sample in the middle of an odd batch is its own partner: mixing would change nothing but its label's weight.
        row = xp.arange(len(like), device=array_api_compat.device(like))
        place = row % batch
        alone = 2 * place + 1 == (len(like) - (row - place)).clip(max=batch)
        for number, mixer in enumerate(self.mixers):
            chosen = (which == number) & (u[:, 1] < mixer.p) & ~alone
            weight = _beta(mixer.alpha, quantile)
            if isinstance(mixer, T.CutMix):
                side = xp.sqrt(1.0 - weight)
                h, w = xp.astype(height * side, xp.int64), xp.astype(width * side, xp.int64)
                y, x = xp.astype(u[:, 2] * height, xp.int64), xp.astype(u[:, 3] * width, xp.int64)
                y0, y1 = (y - h // 2).clip(0, height), (y + h // 2).clip(0, height)
                x0, x1 = (x - w // 2).clip(0, width), (x + w // 2).clip(0, width)
                boxes = xp.where(chosen[:, None], _columns(y0, x0, y1, x1), boxes)
                weight = 1.0 - _over(_real((y1 - y0) * (x1 - x0)), height * width)
            weights = xp.where(chosen, weight, weights)
        return xp.astype(weights, xp.float32), boxes


def _namespace(array: Any) -> Any:
    """The array API of an array's library; numpy's without being looked for, which would cost more than most steps."""
    return _NUMPY if isinstance(array, np.ndarray) else array_api_compat.array_namespace(array)


def _constant(values: np.ndarray, like: Any) -> Any:
    """``values`` where ``like`` is. On a device they are kept, since the host waits for such a copy."""
    if isinstance(like, np.ndarray):
        return values
    key = id(values), array_api_compat.device(like)
    if key not in _KEPT:
        # With the array itself, so that no other gets its number.
        _KEPT[key] = values, _namespace(like).asarray(values, device=key[1])
    return _KEPT[key][1]


def _columns(*parts: Any) -> Any:
    """Columns (B,) side by side, (B, 4)."""
    return _namespace(parts[0]).stack(parts, axis=1)


def _real(values: Any) -> Any:
    """As float64: torch would make float32 of a quotient of integers."""
    xp = _namespace(values)
    return xp.astype(values, xp.float64)


def _over(values: Any, number: float) -> Any:
    """A quotient, rounded once: of a tensor on a GPU torch would make a product with the inverse of a plain number."""
    return values / _namespace(values).full_like(values, number)


def _whole(values: Any) -> Any:
    """Rounded to the nearest whole number, halves to even ones, int64."""
    xp = _namespace(values)
    return xp.astype(xp.round(values), xp.int64)


def _below(u: Any, limits: Any) -> Any:
    """Whole numbers (B,) below ``limits`` (integers of 1 or more) from uniforms."""
    xp = _namespace(u)
    return xp.minimum(xp.astype(u * limits, xp.int64), limits - 1)


def _first(fits: Any, *tries: Any) -> list[Any]:
    """Of each of ``tries`` (B, n) the first that fits (B, n), or try 0: (B,)."""
    xp = _namespace(fits)
    first = xp.argmax(xp.astype(fits, xp.uint8), axis=1)[:, None]
    return [xp.take_along_axis(values, first, axis=1)[:, 0] for values in tries]


def _shapes(area: Any, u: Any, ratio: tuple[float, float], over: bool) -> tuple[Any, Any]:
    """Heights and widths of boxes of ``area``, whose ratio is uniform in its logarithm; ``over``: it is height / width."""
    xp = _namespace(area)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    drawn = xp.exp(low + u * (high - low))
    long, short = _whole(xp.sqrt(area * drawn)), _whole(xp.sqrt(area / drawn))
    return (long, short) if over else (short, long)


def _resized_crops(spec: T.RandomResizedCrop, u: Any, heights: Any, widths: Any) -> Any:
    """(B, 4) int64 y0, x0, y1, x1: the first of ten attempts that fits, else the largest central crop in ratio."""
    xp = _namespace(u)
    u = xp.reshape(u, (len(heights), _ATTEMPTS, 4))
    area = (heights * widths)[:, None] * (spec.scale[0] + u[:, :, 0] * (spec.scale[1] - spec.scale[0]))
    h, w = _shapes(area, u[:, :, 1], spec.ratio, False)
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    h, w, along_y, along_x = _first(fits, h, w, u[:, :, 2], u[:, :, 3])
    shape = _real(widths) / heights
    back_w = xp.where(shape > spec.ratio[1], _whole(_real(heights) * spec.ratio[1]), widths)
    back_h = xp.where(shape < spec.ratio[0], _whole(_over(_real(widths), spec.ratio[0])), heights)
    # An extreme ratio can round to a side longer than the image or to none.
    back_w, back_h = (xp.minimum(b, most).clip(min=1) for b, most in ((back_w, widths), (back_h, heights)))
    ok = xp.any(fits, axis=1)
    h, w = xp.where(ok, h, back_h), xp.where(ok, w, back_w)
    y = xp.where(ok, _below(along_y, heights - h + 1), (heights - h) // 2)
    x = xp.where(ok, _below(along_x, widths - w + 1), (widths - w) // 2)
    return _columns(y, x, y + h, x + w)


def _random_offsets(u: Any, size: Any, out: int, padding: int) -> Any:
    """Where a crop of ``out`` begins on an axis of ``size``; negative in the padding."""
    xp = _namespace(u)
    room = size + 2 * padding - out
    offset = _below(u, room.clip(min=0) + 1)
    return xp.where(room >= 0, offset - padding, -((out - size) // 2))


def _centre_offsets(size: Any, out: int) -> Any:
    """Where a centre crop begins, rounded as torchvision rounds it; negative where the image is smaller."""
    xp = _namespace(size)
    return xp.where(size >= out, _whole(_real(size - out) / 2), -((out - size) // 2))


def _erase_boxes(spec: T.RandomErasing | T.Cutout, u: Any, height: int, width: int) -> Any:
    """(B, 4) int64 y0, x0, y1, x1; an empty box where nothing is erased. ``u`` (B, 32)."""
    xp = _namespace(u)
    active = u[:, 0] < spec.p
    if isinstance(spec, T.Cutout):
        y0, x0 = (
            xp.astype(u[:, 1 + axis] * length, xp.int64) - spec.size // 2
            for axis, length in enumerate((height, width))
        )
        ends = ((y0, height), (x0, width), (y0 + spec.size, height), (x0 + spec.size, width))
        return xp.where(active[:, None], _columns(*[end.clip(0, most) for end, most in ends]), 0)
    tries = xp.reshape(u[:, 2:], (len(u), _ATTEMPTS, 3))  # area, ratio, place
    area = height * width * (spec.scale[0] + tries[:, :, 0] * (spec.scale[1] - spec.scale[0]))
    h, w = _shapes(area, tries[:, :, 1], spec.ratio, True)
    fits = (h < height) & (w < width)
    h, w, along = _first(fits, h, w, tries[:, :, 2])
    y = xp.astype(u[:, 1] * (height - h + 1).clip(min=1), xp.int64)
    x = xp.astype(along * (width - w + 1).clip(min=1), xp.int64)
    return xp.where((active & xp.any(fits, axis=1))[:, None], _columns(y, x, y + h, x + w), 0)


def _beta(alpha: float, u: Any) -> Any:
    """(B,) draws from Beta(alpha, alpha): the inverse of its distribution function at ``u``, linear between 16,384 places."""
    xp = _namespace(u)
    quantiles = _constant(_quantiles(alpha), u)
    at = u * _QUANTILES
    below = xp.astype(at, xp.int64)
    low, high = xp.take(quantiles, below, axis=0), xp.take(quantiles, below + 1, axis=0)
    return low + (high - low) * (at - xp.astype(below, xp.float64))


@lru_cache(maxsize=16)
def _quantiles(alpha: float) -> np.ndarray:
    from scipy.special import betaincinv

    return np.asarray(betaincinv(alpha, alpha, np.arange(_QUANTILES + 1) / _QUANTILES))
