"""Draw, then execute: the first half. A pipeline, a seed, an epoch and sample ids become a table of plain numbers.

Each row says all that an engine needs: which box of the source goes where in the output, flips, a colour matrix, boxes to
erase, a partner to mix with. The numbers come from a counter-based generator keyed by (seed, epoch, sample), so a batch
is the same on any engine, with any number of threads, resumed or not.

>>> Plan(transforms.train(224)).draw(seed=0, epoch=0, samples=ids, heights=h, widths=w).box
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastload import transforms as T
from fastload.errors import UsageError
from fastload.kernels import rng

FLIP_HORIZONTAL, FLIP_VERTICAL = 1, 2
_GREY = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_RGB = np.linalg.inv(_YIQ)
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
    """Parameters of B samples.

    ``box`` (B, 4) float64: y0, x0, y1, x1 of the source that is resized to ``place`` (B, 4) int64: y, x, height, width in
    the output, whose rest is filled; ``clip`` (B, 4) int64: the source pixels that may be used. ``flips`` (B,) int64:
    1 horizontal + 2 vertical, inside of ``place``. ``colour`` (B, 3, 7) float32 or None: three channels by (3 of the
    pixel, 3 of the image's channel means, 1 constant), for pixels 0 to 255; ``coloured`` (B,) bool: rows that differ
    from the identity. ``erase`` (B, K, 4) int64: y0, x0, y1, x1. ``mix`` (B,) float32 or None: own weight, with
    ``mix_box`` (B, 4) int64 for CutMix (empty for mixup); the partner of row i is B - 1 - i. ``keys`` (B, 4) uint32:
    seeds for PerImage, or None.
    """

    box: np.ndarray
    clip: np.ndarray
    place: np.ndarray
    flips: np.ndarray
    colour: np.ndarray | None
    coloured: np.ndarray
    erase: np.ndarray
    mix: np.ndarray | None
    mix_box: np.ndarray | None
    keys: np.ndarray | None


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
        self, seed: int, epoch: int, samples: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> Table:
        """The parameters of the samples (B,) with base ids ``samples`` and stored sizes ``heights``, ``widths``."""
        samples = np.asarray(samples, np.uint64)
        heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
        count = len(samples)
        if self.size is None:
            out_h, out_w = (int(heights[0]), int(widths[0])) if count else (0, 0)
        else:
            out_h, out_w = self.size
        box, clip, place = self._boxes(seed, epoch, samples, heights, widths)
        flips = np.zeros(count, np.int64)
        for stream, flip in self._flips:
            bit = FLIP_HORIZONTAL if isinstance(flip, T.HorizontalFlip) else FLIP_VERTICAL
            flips ^= np.where(rng.uniforms(seed, epoch, samples, stream, 1)[:, 0] < flip.p, bit, 0)
        # A flip mirrors the place that is filled, too.
        place[:, 0] = np.where(flips & FLIP_VERTICAL, out_h - place[:, 0] - place[:, 2], place[:, 0])
        place[:, 1] = np.where(flips & FLIP_HORIZONTAL, out_w - place[:, 1] - place[:, 3], place[:, 1])
        colour, coloured = self._colour(seed, epoch, samples)
        erase = np.zeros((count, len(self._erasers), 4), np.int64)
        for k, (stream, eraser) in enumerate(self._erasers):
            erase[:, k] = _erase_boxes(eraser, rng.uniforms(seed, epoch, samples, stream, 32), out_h, out_w)
        mix, mix_box = self._mix(seed, epoch, samples, out_h, out_w)
        keys = None
        if self.per_image:
            u = rng.uniforms(seed, epoch, samples, _STREAM_PER_IMAGE, 4)
            keys = (u * 4294967296.0).astype(np.uint32)
        return Table(box, clip, place, flips, colour, coloured, erase, mix, mix_box, keys)

    def _boxes(
        self, seed: int, epoch: int, samples: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        count = len(samples)
        whole = np.stack([np.zeros(count, np.int64), np.zeros(count, np.int64), heights, widths], axis=1)
        if not self.geometry or self.whole_image:
            size = whole if self.size is None else np.tile([0, 0, *self.size], (count, 1))
            return whole.astype(np.float64), whole, size.astype(np.int64)
        first: Any = self.geometry[0]
        last: Any = self.geometry[-1]
        out_h, out_w = last.size
        if isinstance(first, T.RandomResizedCrop):
            crops = _resized_crops(
                first, rng.uniforms(seed, epoch, samples, 1, 4 * _ATTEMPTS), heights, widths
            )
            return crops.astype(np.float64), crops, np.tile(np.array([0, 0, out_h, out_w]), (count, 1))
        if isinstance(first, T.Resize):
            if isinstance(first.size, int):
                short = np.minimum(heights, widths)
                new_h = np.where(heights <= widths, first.size, first.size * heights // short)
                new_w = np.where(heights <= widths, first.size * widths // short, first.size)
            else:
                new_h, new_w = np.full(count, first.size[0]), np.full(count, first.size[1])
        else:
            new_h, new_w = heights, widths
        if isinstance(last, T.RandomCrop):
            u = rng.uniforms(seed, epoch, samples, len(self.geometry), 2)
            top = _random_offsets(u[:, 0], new_h, out_h, last.padding)
            left = _random_offsets(u[:, 1], new_w, out_w, last.padding)
        elif isinstance(last, T.CenterCrop):
            top, left = _centre_offsets(new_h, out_h), _centre_offsets(new_w, out_w)
        else:
            top, left = np.zeros(count, np.int64), np.zeros(count, np.int64)
        y, x = np.clip(-top, 0, out_h), np.clip(-left, 0, out_w)
        # With much padding a crop may miss the image: then nothing is placed, and all is fill.
        h = np.maximum(np.minimum(out_h, new_h - top) - y, 0)
        w = np.maximum(np.minimum(out_w, new_w - left) - x, 0)
        scale_y, scale_x = heights / new_h, widths / new_w
        box = np.stack(
            [(top + y) * scale_y, (left + x) * scale_x, (top + y + h) * scale_y, (left + x + w) * scale_x],
            axis=1,
        )
        return box, whole, np.stack([y, x, h, w], axis=1)

    def _colour(self, seed: int, epoch: int, samples: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        count = len(samples)
        coloured = np.zeros(count, bool)
        if not self._colours:
            return None, coloured
        state = np.zeros((count, 3, 7))  # pixel, mean, constant
        state[:, :, :3] = np.eye(3)
        for stream, spec in self._colours:
            u = rng.uniforms(seed, epoch, samples, stream, 9)
            active = u[:, 0] < spec.p
            coloured |= active
            if isinstance(spec, T.Grayscale):
                state = np.where(active[:, None, None], _saturate(state, np.zeros(count)), state)
                continue
            turns = np.argsort(u[:, 1:5], axis=1, kind="stable")
            ranges = np.array([spec.brightness, spec.contrast, spec.saturation, spec.hue])
            factors = ranges[:, 0] + u[:, 5:9] * (ranges[:, 1] - ranges[:, 0])
            changed = state
            for turn in range(4):
                which = turns[:, turn]
                factor = factors[np.arange(count), which]
                options = (_brighten, _contrast, _saturate, _turn_hue)
                results = [option(changed, factor) for option in options]
                changed = np.choose(which[:, None, None], results)
            state = np.where(active[:, None, None], changed, state)
        return state.astype(np.float32), coloured

    def _mix(
        self, seed: int, epoch: int, samples: np.ndarray, height: int, width: int
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        if not self.mixers:
            return None, None
        count = len(samples)
        u = rng.uniforms(seed, epoch, samples, _STREAM_MIX, 4)
        which = np.minimum((u[:, 0] * len(self.mixers)).astype(np.int64), len(self.mixers) - 1)
        weights = np.ones(count)
        boxes = np.zeros((count, 4), np.int64)
        for number, mixer in enumerate(self.mixers):
            chosen = (which == number) & (u[:, 1] < mixer.p)
            if not chosen.any():
                continue
            weight = _beta(mixer.alpha, seed, epoch, samples[chosen])
            if isinstance(mixer, T.CutMix):
                side = np.sqrt(1.0 - weight)
                h, w = (height * side).astype(np.int64), (width * side).astype(np.int64)
                y = (u[chosen, 2] * height).astype(np.int64)
                x = (u[chosen, 3] * width).astype(np.int64)
                y0, y1 = np.clip(y - h // 2, 0, height), np.clip(y + h // 2, 0, height)
                x0, x1 = np.clip(x - w // 2, 0, width), np.clip(x + w // 2, 0, width)
                boxes[chosen] = np.stack([y0, x0, y1, x1], axis=1)
                weight = 1.0 - (y1 - y0) * (x1 - x0) / (height * width)
            weights[chosen] = weight
        # In the middle of an odd batch a sample is its own partner: mixing would change nothing but its label's weight.
        if count % 2:
            weights[count // 2] = 1.0
            boxes[count // 2] = 0
        return weights.astype(np.float32), boxes


def _resized_crops(
    spec: T.RandomResizedCrop, u: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """(B, 4) int64 y0, x0, y1, x1: the first of ten attempts that fits, else the largest central crop in ratio."""
    count = len(heights)
    u = u.reshape(count, _ATTEMPTS, 4)
    area = (heights * widths)[:, None] * (spec.scale[0] + u[:, :, 0] * (spec.scale[1] - spec.scale[0]))
    low, high = np.log(spec.ratio[0]), np.log(spec.ratio[1])
    ratio = np.exp(low + u[:, :, 1] * (high - low))
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    first = np.argmax(fits, axis=1)
    rows = np.arange(count)
    h, w = h[rows, first], w[rows, first]
    y = np.minimum((u[rows, first, 2] * (heights - h + 1)).astype(np.int64), heights - h)
    x = np.minimum((u[rows, first, 3] * (widths - w + 1)).astype(np.int64), widths - w)
    shape = widths / heights
    back_w = np.where(shape > spec.ratio[1], np.rint(heights * spec.ratio[1]).astype(np.int64), widths)
    back_h = np.where(shape < spec.ratio[0], np.rint(widths / spec.ratio[0]).astype(np.int64), heights)
    # An extreme ratio can round to a side longer than the image or to none.
    back_w, back_h = np.clip(back_w, 1, widths), np.clip(back_h, 1, heights)
    ok = fits.any(axis=1)
    h, w = np.where(ok, h, back_h), np.where(ok, w, back_w)
    y = np.where(ok, y, (heights - back_h) // 2)
    x = np.where(ok, x, (widths - back_w) // 2)
    return np.stack([y, x, y + h, x + w], axis=1)


def _random_offsets(u: np.ndarray, size: np.ndarray, out: int, padding: int) -> np.ndarray:
    """Where a crop of ``out`` begins on an axis of ``size``; negative in the padding."""
    padded = size + 2 * padding
    room = padded - out
    offset = np.minimum((u * (room + 1)).astype(np.int64), np.maximum(room, 0))
    return np.where(room >= 0, offset - padding, -((out - size) // 2))


def _centre_offsets(size: np.ndarray, out: int) -> np.ndarray:
    """Where a centre crop begins, rounded as torchvision rounds it; negative where the image is smaller."""
    return np.where(size >= out, np.rint((size - out) / 2.0).astype(np.int64), -((out - size) // 2))


def _erase_boxes(spec: T.RandomErasing | T.Cutout, u: np.ndarray, height: int, width: int) -> np.ndarray:
    """(B, 4) int64 y0, x0, y1, x1; an empty box where nothing is erased."""
    active = u[:, 0] < spec.p
    if isinstance(spec, T.Cutout):
        y, x = (u[:, 1] * height).astype(np.int64), (u[:, 2] * width).astype(np.int64)
        y0, x0 = y - spec.size // 2, x - spec.size // 2
        boxes = np.stack(
            [
                np.clip(y0, 0, height),
                np.clip(x0, 0, width),
                np.clip(y0 + spec.size, 0, height),
                np.clip(x0 + spec.size, 0, width),
            ],
            axis=1,
        )
        return np.where(active[:, None], boxes, 0)
    tries = u[:, 2:32].reshape(len(u), -1, 3)  # ten of (area, ratio, place)
    area = height * width * (spec.scale[0] + tries[:, :, 0] * (spec.scale[1] - spec.scale[0]))
    low, high = np.log(spec.ratio[0]), np.log(spec.ratio[1])
    ratio = np.exp(low + tries[:, :, 1] * (high - low))
    h, w = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (h < height) & (w < width)
    first, rows = np.argmax(fits, axis=1), np.arange(len(u))
    h, w = h[rows, first], w[rows, first]
    y = (u[:, 1] * np.maximum(height - h + 1, 1)).astype(np.int64)
    x = (tries[rows, first, 2] * np.maximum(width - w + 1, 1)).astype(np.int64)
    boxes = np.stack([y, x, y + h, x + w], axis=1)
    return np.where((active & fits.any(axis=1))[:, None], boxes, 0)


def _brighten(state: np.ndarray, factor: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = state * factor[:, None, None]
    return scaled


def _saturate(state: np.ndarray, factor: np.ndarray) -> np.ndarray:
    grey = np.einsum("c,bcn->bn", _GREY, state)[:, None, :]
    mixed: np.ndarray = state * factor[:, None, None] + grey * (1 - factor)[:, None, None]
    return mixed


def _contrast(state: np.ndarray, factor: np.ndarray) -> np.ndarray:
    # The mean of a linear function of the pixel is that function of the mean: pixel terms become mean terms.
    grey = np.einsum("c,bcn->bn", _GREY, state)
    mean = np.concatenate([np.zeros_like(grey[:, :3]), grey[:, :3] + grey[:, 3:6], grey[:, 6:]], axis=1)
    mixed: np.ndarray = state * factor[:, None, None] + mean[:, None, :] * (1 - factor)[:, None, None]
    return mixed


def _turn_hue(state: np.ndarray, turns: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    zero, one = np.zeros_like(cos), np.ones_like(cos)
    rotation = np.array([[one, zero, zero], [zero, cos, -sin], [zero, sin, cos]]).transpose(2, 0, 1)
    return np.einsum("ij,bjk,kl,bln->bin", _RGB, rotation, _YIQ, state)


def _beta(alpha: float, seed: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """(B,) draws from Beta(alpha, alpha), by the inverse of its distribution function."""
    from scipy.special import betaincinv

    u = rng.uniforms(seed, epoch, samples, _STREAM_MIX + 1, 1)[:, 0]
    return np.asarray(betaincinv(alpha, alpha, u))
