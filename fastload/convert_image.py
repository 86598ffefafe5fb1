"""One image of a source as it goes into the file: kept as it is, decoded, cropped, shrunk, encoded.

The cheapest way that loses nothing is taken first: a baseline or progressive JPEG that needs no change keeps its coefficients. Where an image is
shrunk to less than half, the JPEG decoder does a part of the work (DCT scaling), never below twice the final size, so that the
antialiased resize still decides how the result looks.

>>> store_image(data, ImageOptions(max_side=500)).how
'kept'
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastload import codecs
from fastload.beton import EncodedImage
from fastload.errors import DataError, UsageError
from fastload.kernels import resize
from fastload.sources_base import Box, Payload

STORES = ("jpeg", "raw", "auto")
REENCODES = ("auto", "always", "never")
CROP_FORMATS = ("xyxy", "xywh", "rel")

_GAP = 2  # a scaled decode leaves at least this many pixels per final pixel
_MAX_SIDE = 65_535  # of a side: 16 bits in the container's rows
_SMALL_RAW = 4_096  # bytes, one memory page: a smaller JPEG saves nothing when read
_RAW_FACTOR = 2  # raw may be this many times larger than the JPEG

How = Literal["kept", "encoded", "raw", "copied"]


@dataclass(frozen=True)
class ImageOptions:
    """What happens to the pixels.

    ``max_side`` / ``short_side``: the longer / shorter side is at most this many pixels (never enlarged). ``store``: ``jpeg``, ``raw``
    (H, W, 3 bytes), or ``auto``: raw where it takes at most 4,096 bytes or at most twice the bytes of the JPEG, which decodes faster for
    small images, else jpeg. ``reencode``: ``auto`` keeps the coefficients of a JPEG that needs no change, ``always`` decodes and encodes
    every image, ``never`` refuses to lose anything: what cannot be kept is stored raw (``store`` auto) or is an error (jpeg).
    ``crop_format``: ``xyxy`` (x0, y0, x1, y1 in pixels), ``xywh`` (x, y, width, height in pixels) or ``rel`` (x0, y0, x1, y1 from 0 to
    1), all in the image as it is displayed, with its EXIF orientation applied. ``crop_margin``: fraction of the box's width and height
    that is added on each side; the result is cut to the image.
    """

    max_side: int | None = None
    short_side: int | None = None
    quality: int = 90
    store: str = "auto"
    reencode: str = "auto"
    crop_margin: float = 0.0
    crop_format: str = "xyxy"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("store", self.store, STORES),
            ("reencode", self.reencode, REENCODES),
            ("crop_format", self.crop_format, CROP_FORMATS),
        ):
            if value not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name, side in (("max_side", self.max_side), ("short_side", self.short_side)):
            if side is not None and not 1 <= side <= _MAX_SIDE:
                raise UsageError(f"{name} must be from 1 to {_MAX_SIDE} pixels, got {side!r}")
        if self.max_side is not None and self.short_side is not None:
            raise UsageError(
                f"give max_side or short_side, not both, got {self.max_side} and {self.short_side}"
            )
        if not 1 <= self.quality <= 100:
            raise UsageError(f"quality must be from 1 to 100, got {self.quality!r}")
        if not 0 <= self.crop_margin <= 10:
            raise UsageError(f"crop_margin is a fraction of the box from 0 to 10, got {self.crop_margin!r}")
        if self.reencode == "never" and (self.max_side or self.short_side or self.store == "raw"):
            raise UsageError(f"reencode never goes with neither a size limit nor store raw, got {self!r}")


@dataclass(frozen=True)
class Stored:
    """An image for the container, and how it came about."""

    image: EncodedImage
    how: How


def target_size(height: int, width: int, options: ImageOptions) -> tuple[int, int]:
    """Height and width after the size limit; the same as before where the image is within it."""
    if options.max_side is not None:
        limit, side = options.max_side, max(height, width)
    elif options.short_side is not None:
        limit, side = options.short_side, min(height, width)
    else:
        return height, width
    if side <= limit:
        return height, width
    return max(1, round(height * limit / side)), max(1, round(width * limit / side))


def crop_window(box: Box, height: int, width: int, options: ImageOptions) -> tuple[int, int, int, int]:
    """The box as whole pixels (top, left, bottom, right) with its margin, cut to the image; DataError where nothing is left."""
    x0, y0, x1, y1 = box
    if options.crop_format == "xywh":
        x1, y1 = x0 + x1, y0 + y1
    elif options.crop_format == "rel":
        x0, y0, x1, y1 = x0 * width, y0 * height, x1 * width, y1 * height
    if x1 <= x0 or y1 <= y0:
        raise DataError(f"its crop box {box} is empty; check --crop-format, which is {options.crop_format}")
    dx, dy = (x1 - x0) * options.crop_margin, (y1 - y0) * options.crop_margin
    # Cut before they become integers: numbers in a table may be so large that these sums are infinite.
    left, top = math.floor(min(max(0.0, x0 - dx), width)), math.floor(min(max(0.0, y0 - dy), height))
    right, bottom = math.ceil(max(min(width, x1 + dx), 0.0)), math.ceil(max(min(height, y1 + dy), 0.0))
    if right <= left or bottom <= top:
        raise DataError(
            f"its crop box {box} lies outside of the image ({width} x {height}); check --crop-format"
        )
    return top, left, bottom, right


def store_image(payload: Payload, options: ImageOptions, box: Box | None = None) -> Stored:
    """Encode one image. Safe from several threads; most of the time is spent outside of the GIL.

    ``payload`` is an image file's bytes, (H, W, 3) uint8 pixels, or an encoded image. Raises CorruptError or DataError.
    """
    if isinstance(payload, EncodedImage):
        return _from_encoded(payload, options, box)
    if isinstance(payload, np.ndarray):
        return _from_pixels(payload, options, box)
    probe = codecs.probe(payload)
    height, width = probe.height, probe.width
    window = None if box is None else crop_window(box, height, width, options)
    if window == (0, 0, height, width):
        window = None
    size = (height, width) if window is None else (window[2] - window[0], window[3] - window[1])
    final = target_size(*size, options)
    _check_sides(final)
    untouched = window is None and final == size
    if untouched and probe.keepable and options.store != "raw" and options.reencode != "always":
        kept = codecs.keep_jpeg(payload)
        # A progressive JPEG that is no baseline one now is incomplete or odd: decoders may show it in different ways.
        if codecs.is_baseline(kept):
            if options.store == "auto" and _raw_is_better(final, len(kept)):
                return _raw(codecs.load_rgb(payload))
            return Stored(EncodedImage("jpeg", height, width, kept), "kept")
    if options.reencode == "never" and (options.store == "jpeg" or window is not None):
        why = "it must be cropped" if window is not None else f"it is {_what(probe)}"
        raise DataError(f"reencode never cannot keep it: {why}; use auto")
    if untouched and probe.keepable and options.store != "raw" and not _is_small(final, options):
        anew = codecs.encode_anew(payload, options.quality)
        if anew is not None:
            if options.store == "auto" and _raw_is_better(final, len(anew)):
                return _raw(codecs.load_rgb(payload))
            return Stored(EncodedImage("jpeg", height, width, anew), "encoded")
    least = None
    if final[0] * _GAP * 2 <= size[0] and final[1] * _GAP * 2 <= size[1]:
        least = (-(-height * final[0] * _GAP // size[0]), -(-width * final[1] * _GAP // size[1]))
    rgb = codecs.load_rgb(payload, min_size=least, padded=options.store != "raw")
    whole = (0, 0, height, width)
    if least is not None and rgb.shape[:2] != (height, width):
        return _encode(_shrink_scaled(rgb, whole if window is None else window, probe, final), options)
    return _encode(_shrink(rgb, whole if window is None else window, final), options)


def _from_pixels(rgb: np.ndarray, options: ImageOptions, box: Box | None) -> Stored:
    height, width = rgb.shape[:2]
    window = (0, 0, height, width) if box is None else crop_window(box, height, width, options)
    final = target_size(window[2] - window[0], window[3] - window[1], options)
    _check_sides(final)
    if options.reencode == "never" and options.store == "jpeg":
        raise DataError("reencode never cannot keep it: it is pixels, no JPEG; use auto")
    return _encode(_shrink(rgb, window, final), options)


def _from_encoded(image: EncodedImage, options: ImageOptions, box: Box | None) -> Stored:
    """An image of a `.beton` file: copied where nothing changes, else treated like a file or like pixels."""
    if image.mode == "raw":
        rgb = np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)
        unchanged = target_size(image.height, image.width, options) == rgb.shape[:2] and box is None
        if unchanged and options.store != "jpeg" and (options.reencode != "always" or options.store == "raw"):
            return Stored(image, "copied")
        return _from_pixels(rgb, options, box)
    return store_image(bytes(image.data), options, box)


def _encode(rgb: np.ndarray, options: ImageOptions) -> Stored:
    """(H, W, 3 or 4) uint8, the fourth byte being padding, as it is to be stored."""
    height, width = rgb.shape[:2]
    if options.store == "raw" or options.reencode == "never" or _is_small((height, width), options):
        return _raw(rgb)
    data = codecs.encode_jpeg(rgb, options.quality)
    if options.store == "auto" and _raw_is_better((height, width), len(data)):
        return _raw(rgb)
    return Stored(EncodedImage("jpeg", height, width, data), "encoded")


def _is_small(size: tuple[int, int], options: ImageOptions) -> bool:
    """So small that JPEG's headers are not worth it."""
    return options.store == "auto" and 3 * size[0] * size[1] <= _SMALL_RAW


def _raw_is_better(size: tuple[int, int], jpeg_bytes: int) -> bool:
    return size[0] * size[1] * 3 <= max(_SMALL_RAW, _RAW_FACTOR * jpeg_bytes)


def _raw(rgb: np.ndarray) -> Stored:
    return Stored(EncodedImage("raw", rgb.shape[0], rgb.shape[1], np.ascontiguousarray(rgb[:, :, :3])), "raw")


def _shrink(rgb: np.ndarray, window: tuple[int, int, int, int], final: tuple[int, int]) -> np.ndarray:
    """The window (top, left, bottom, right) of (H, W, 3 or 4) pixels in its final size."""
    top, left, bottom, right = window
    cut = np.ascontiguousarray(rgb[top:bottom, left:right])
    return cut if cut.shape[:2] == final else codecs.resize(cut, final)


def _shrink_scaled(
    rgb: np.ndarray, window: tuple[int, int, int, int], probe: codecs.Probe, final: tuple[int, int]
) -> np.ndarray:
    """The same of a decode at n/8 (the factors that JPEG decoders know), with the window in pixels of the full size.

    Sides are rounded up when decoding, so the last pixel may stand for less than the others: the window has fractions here. Turning
    the image may have made the last pixel the first.
    """
    height, width = rgb.shape[:2]
    eighths = next(
        n for n in range(1, 9) if (-(-probe.height * n // 8), -(-probe.width * n // 8)) == (height, width)
    )
    scale = eighths / 8
    down = height - probe.height * scale if probe.orientation in (3, 4, 7, 8) else 0.0
    across = width - probe.width * scale if probe.orientation in (2, 3, 6, 7) else 0.0
    top, left, bottom, right = (edge * scale for edge in window)
    box = (top + down, left + across, bottom + down, right + across)
    clip = (math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3]))
    out = np.empty((*final, 3), np.uint8)
    resize.resize(rgb, box, clip, out)
    return out


def _check_sides(size: tuple[int, int]) -> None:
    if max(size) > _MAX_SIDE:
        raise DataError(
            f"{size[1]} x {size[0]} pixels exceed the format's {_MAX_SIDE} on a side; use --max-side"
        )


def _what(probe: codecs.Probe) -> str:
    if probe.format.upper() != "JPEG":
        return f"a {probe.format} image"
    return (
        "rotated by its EXIF data"
        if probe.orientation != 1
        else "a JPEG of a kind that cannot be kept (such as CMYK, 12 bits, arithmetic coding or an incomplete progressive one)"
    )
