"""What is done to an image, as frozen descriptions that every engine executes alike.

A pipeline is a tuple of these, in this order: geometry, flips, colour, erasing, ``PerImage``, ``Normalize``, mixing. They
hold numbers only and draw nothing: :mod:`fastload.draws` turns them into parameters, an engine turns those into pixels.

>>> transforms.train(224)
(RandomResizedCrop(size=(224, 224), ...), HorizontalFlip(p=0.5), Normalize(...))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastload.errors import UsageError, unknown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Size = int | tuple[int, int]
Range = float | tuple[float, float]


def _set(spec: Any, name: str, value: Any) -> None:
    object.__setattr__(spec, name, value)


def _size(spec: Any, value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    try:
        height, width = (int(v) for v in pair)
    except (TypeError, ValueError):
        height = width = 0
    if not (0 < height < 65536 and 0 < width < 65536):
        raise UsageError(
            f"{type(spec).__name__}: size must be one or two (height, width) integers, got {value!r}"
        )
    return height, width


def _probability(spec: Any, p: Any) -> None:
    if not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise UsageError(f"{type(spec).__name__}: p must be from 0 to 1, got {p!r}")


def _interval(spec: Any, name: str, low: float, high: float) -> None:
    value = tuple(getattr(spec, name))
    if len(value) != 2 or not (low <= value[0] <= value[1] <= high):
        raise UsageError(
            f"{type(spec).__name__}: {name} must be two rising numbers from {low} to {high}, got {value!r}"
        )
    _set(spec, name, (float(value[0]), float(value[1])))


@dataclass(frozen=True)
class RandomResizedCrop:
    """A crop of random area and aspect ratio, resized to ``size`` (antialiased bilinear), drawn as torchvision does.

    ``scale``: its share of the image's area; ``ratio``: width / height. Source: Szegedy et al., "Going deeper with
    convolutions", 2015.
    """

    size: Size
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        _set(self, "size", _size(self, self.size))
        _interval(self, "scale", 1e-6, 1.0)
        _interval(self, "ratio", 1e-3, 1e3)


@dataclass(frozen=True)
class Resize:
    """Resize the whole image: an integer is the shorter side (shape kept), a pair is (height, width)."""

    size: Size

    def __post_init__(self) -> None:
        if not isinstance(self.size, int):
            _set(self, "size", _size(self, self.size))
        elif not 0 < self.size < 65536:
            raise UsageError(f"Resize: size must be from 1 to 65535, got {self.size!r}")


@dataclass(frozen=True)
class CenterCrop:
    """The middle of the image, padded with black where the image is smaller."""

    size: Size

    def __post_init__(self) -> None:
        _set(self, "size", _size(self, self.size))


@dataclass(frozen=True)
class RandomCrop:
    """A crop of ``size`` at a random place of the image after ``padding`` pixels of ``fill`` were added on each side.

    An image smaller than the crop is padded as far as it needs.
    """

    size: Size
    padding: int = 0
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        _set(self, "size", _size(self, self.size))
        if not isinstance(self.padding, int) or self.padding < 0:
            raise UsageError(f"RandomCrop: padding must be an integer of 0 or more, got {self.padding!r}")
        _set(self, "fill", _colour(self, self.fill))


def _colour(spec: Any, value: Any) -> tuple[int, int, int]:
    triple = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(triple) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in triple):
        raise UsageError(
            f"{type(spec).__name__}: a colour is one or three integers from 0 to 255, got {value!r}"
        )
    return triple


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror left and right with probability ``p``."""

    p: float = 0.5

    def __post_init__(self) -> None:
        _probability(self, self.p)


@dataclass(frozen=True)
class VerticalFlip:
    """Mirror top and bottom with probability ``p``."""

    p: float = 0.5

    def __post_init__(self) -> None:
        _probability(self, self.p)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue changed by random factors, with probability ``p``.

    A number b means factors from max(0, 1 - b) to 1 + b (hue: -b to b turns, at most 0.5), a pair gives the range
    itself. All are linear in the pixel and in the image's mean, so they run as one matrix; values are cut to 0..255
    once, at the end, and so their order does not matter. Hue turns around the grey axis in YIQ, which is not HSV but close for small angles.
    """

    brightness: Range = 0.0
    contrast: Range = 0.0
    saturation: Range = 0.0
    hue: Range = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        _probability(self, self.p)
        for name in ("brightness", "contrast", "saturation", "hue"):
            value = getattr(self, name)
            if isinstance(value, (int, float)):
                if value < 0:
                    raise UsageError(f"ColorJitter: {name} must not be negative, got {value!r}")
                pair = (-value, value) if name == "hue" else (max(0.0, 1.0 - value), 1.0 + value)
                _set(self, name, pair)
            _interval(self, name, *((-0.5, 0.5) if name == "hue" else (0.0, 1e3)))


@dataclass(frozen=True)
class Grayscale:
    """Grey (in three channels) with probability ``p``."""

    p: float = 1.0

    def __post_init__(self) -> None:
        _probability(self, self.p)


@dataclass(frozen=True)
class RandomErasing:
    """A random rectangle painted over with probability ``p``; ``value`` None is the mean colour of Normalize (or black).

    ``scale``: its share of the output's area, ``ratio``: height / width. Source: Zhong et al., "Random erasing data
    augmentation", 2020.
    """

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    value: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        _probability(self, self.p)
        _interval(self, "scale", 0.0, 1.0)
        _interval(self, "ratio", 1e-3, 1e3)
        if self.value is not None:
            _set(self, "value", _colour(self, self.value))


@dataclass(frozen=True)
class Cutout:
    """A square of ``size`` pixels around a random point painted over, cut at the edges, with probability ``p``.

    Source: DeVries and Taylor, "Improved regularization of convolutional neural networks with cutout", 2017.
    """

    size: int
    p: float = 1.0
    value: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        _probability(self, self.p)
        if not isinstance(self.size, int) or self.size < 1:
            raise UsageError(f"Cutout: size must be an integer of 1 or more, got {self.size!r}")
        if self.value is not None:
            _set(self, "value", _colour(self, self.value))


@dataclass(frozen=True)
class PerImage:
    """Any function on one image, at the cost of Python for each: an Albumentations pipeline, a torchvision v2 transform,
    or a function from (H, W, 3) uint8 to (h, w, 3) uint8.

    As the first step it takes the place of the geometry and gets the whole image: then ``size`` says what it returns.
    Later it gets and returns an image of the pipeline's size. With ``seeded`` the function is called as
    ``fn(image, rng)`` with a ``numpy.random.Generator`` of this sample and epoch, which keeps batches reproducible;
    Albumentations pipelines are seeded so by themselves. torchvision draws from torch's global generator, which
    several threads share: its draws are not reproducible.
    """

    fn: Callable[..., Any]
    size: Size | None = None
    seeded: bool = False

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise UsageError(f"PerImage: fn must be callable, got {self.fn!r}")
        if self.size is not None:
            _set(self, "size", _size(self, self.size))


@dataclass(frozen=True)
class Normalize:
    """(pixel / 255 - mean) / std in each channel, float output."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = tuple(float(v) for v in getattr(self, name))
            if (
                len(value) != 3
                or not all(math.isfinite(v) for v in value)
                or (name == "std" and min(value) <= 0)
            ):
                raise UsageError(
                    f"Normalize: {name} must be three finite numbers (std above 0), got {value!r}"
                )
            _set(self, name, value)


@dataclass(frozen=True)
class Mixup:
    """Each image blended with its partner in the batch, weight from Beta(alpha, alpha), with probability ``p``.

    Labels become soft targets (B, C) float32. With CutMix beside it, each image takes one of the two by a fair coin.
    Source: Zhang et al., "mixup: beyond empirical risk minimization", 2018.
    """

    alpha: float = 0.2
    p: float = 1.0

    def __post_init__(self) -> None:
        _probability(self, self.p)
        if not self.alpha > 0:
            raise UsageError(f"{type(self).__name__}: alpha must be above 0, got {self.alpha!r}")


@dataclass(frozen=True)
class CutMix:
    """A rectangle of each image replaced by its partner's, with probability ``p``; labels in proportion to the area.

    Source: Yun et al., "CutMix: regularization strategy to train strong classifiers with localizable features", 2019.
    """

    alpha: float = 1.0
    p: float = 1.0

    def __post_init__(self) -> None:
        _probability(self, self.p)
        if not self.alpha > 0:
            raise UsageError(f"{type(self).__name__}: alpha must be above 0, got {self.alpha!r}")


Spec = (
    RandomResizedCrop | Resize | CenterCrop | RandomCrop | HorizontalFlip | VerticalFlip | ColorJitter | Grayscale
    | RandomErasing | Cutout | PerImage | Normalize | Mixup | CutMix
)  # fmt: skip
Pipeline = tuple[Spec, ...]
SPECS = {spec.__name__: spec for spec in Spec.__args__}


def train(
    size: Size = 224,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    flip: float = 0.5,
    jitter: float = 0.0,
    erasing: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Pipeline:
    """The usual training pipeline: random resized crop, flip, and what is asked for above 0, normalised."""
    steps: list[Spec] = [RandomResizedCrop(size, scale=scale)]
    if flip:
        steps.append(HorizontalFlip(flip))
    if jitter:
        steps.append(ColorJitter(jitter, jitter, jitter))
    if erasing:
        steps.append(RandomErasing(erasing))
    steps.append(Normalize(tuple(mean), tuple(std)))  # type: ignore[arg-type]
    if mixup:
        steps.append(Mixup(mixup))
    if cutmix:
        steps.append(CutMix(cutmix))
    return tuple(steps)


def eval(
    size: Size = 224,
    *,
    crop_ratio: float = 0.875,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Pipeline:
    """The usual evaluation pipeline: shorter side to size / crop_ratio, centre crop, normalised."""
    if not 0 < crop_ratio <= 1:
        raise UsageError(f"crop_ratio must be above 0 and at most 1, got {crop_ratio!r}")
    side = size if isinstance(size, int) else max(size)
    return (
        Resize(round(side / crop_ratio)),
        CenterCrop(size),
        Normalize(tuple(mean), tuple(std)),  # type: ignore[arg-type]
    )


def to_json(pipeline: Sequence[Spec]) -> list[dict[str, Any]]:
    """A pipeline as JSON: one object a step. UsageError for PerImage, whose function cannot be written down."""
    steps = []
    for spec in pipeline:
        if isinstance(spec, PerImage):
            raise UsageError("PerImage holds a Python function and cannot be written as JSON; leave it out")
        steps.append({"type": type(spec).__name__, **dataclasses.asdict(spec)})
    return steps


def from_json(steps: Sequence[dict[str, Any]]) -> Pipeline:
    """The pipeline that :func:`to_json` wrote; unknown names are errors."""
    pipeline = []
    for step in steps:
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in step.items() if k != "type"}
        name = step.get("type")
        if name not in SPECS or name == "PerImage":
            raise unknown("transform", name, set(SPECS) - {"PerImage"})
        spec = SPECS[name]
        for key in options:
            if key not in {f.name for f in dataclasses.fields(spec)}:
                raise unknown(f"option of {name}", key, [f.name for f in dataclasses.fields(spec)])
        pipeline.append(spec(**options))
    return tuple(pipeline)
