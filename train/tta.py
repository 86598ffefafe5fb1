"""Test-time augmentation: the model sees each image in several views, and their answers are merged.

A text says which views: ``hflip``, ``vflip``, ``rot90`` (by 90, 180 and 270 degrees), ``shifts`` (a sixteenth of the side to
each of four sides, the edge repeated), ``crops`` (the four corners of a larger image), ``scales`` (0.9 and 1.15 of the usual
resolution), several joined by ``+``: the union of them, not each with each. The plain image is always one of the views.
The trade-off is time: one forward pass for each view; ``crops`` and ``scales`` decode the images again, the rest does not.

>>> views = parse("hflip+shifts"); probs = infer_views(load_run("runs/photos"), data, views)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad

from fastload import transforms as T
from fastload.dataset import Dataset
from fastload.errors import UsageError, unknown
from fastload.loader import Loader
from fastload.train.data import eval_pipeline
from fastload.train.infer import Activation, activate, infer
from fastload.train.losses import activation as loss_activation
from fastload.train.model import resolve_amp
from fastload.train.runs import LoadedRun

MERGES = ("mean", "geometric")
_SCALES = (0.9, 1.15)
_MARGIN = 0.875  # the model's side in that of the image whose corners are cropped

# (B, 3, H, W) images as loaded and the side that the model sees -> (B, 3, side, side)
Turn = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class View:
    """``turn`` makes the view of a batch. Views of the same ``pixels`` share one pass over the data.

    ``pixels``: "plain" (as validated), "larger" (for corner crops), or a factor of the resolution. ``columns``: class number of
    the true image for each column of this view, where a mirror changes the class.
    """

    name: str
    turn: Turn
    pixels: str | float = "plain"
    columns: tuple[int, ...] | None = None


def parse(
    tta: str | None, classes: Sequence[str] = (), flip_labels: Mapping[str, str] | None = None
) -> list[View]:
    """The views that ``tta`` names, the plain image first; None and "none" are the plain image alone.

    ``flip_labels``: ``{"left": "right"}`` says that a mirror image (left and right changed) of class ``left`` is of class
    ``right``, and the other way round unless it says otherwise. UsageError for an unknown view or class.
    """
    views = [View("plain", _same)]
    names = [] if tta in (None, "none") else [part.strip() for part in str(tta).split("+")]
    columns = None
    if flip_labels:
        columns = _flip_columns(classes, flip_labels)
        turned = [name for name in names if name in ("vflip", "rot90")]
        if turned:
            raise UsageError(
                f"flip_labels says what a left-right mirror image is, not what {turned[0]} does; use hflip alone, got {tta!r}"
            )
    for name in dict.fromkeys(names):
        if name not in _VIEWS:
            raise unknown("view for tta", name, _VIEWS, "join several with +, as in hflip+shifts")
        views += [replace(view, columns=columns) if name == "hflip" else view for view in _VIEWS[name]]
    return views


def _flip_columns(classes: Sequence[str], flip_labels: Mapping[str, str]) -> tuple[int, ...]:
    """Which column of a mirror image's probabilities belongs to each class; a permutation, or a UsageError."""
    for name in (*flip_labels, *flip_labels.values()):
        if name not in classes:
            raise unknown("class in flip_labels", name, classes)
    both = {**{new: old for old, new in flip_labels.items()}, **flip_labels}
    columns = tuple(list(classes).index(both.get(name, name)) for name in classes)
    if len(set(columns)) != len(columns):
        raise UsageError(
            f"flip_labels must give each class a mirror class of its own, got {dict(flip_labels)!r}"
        )
    return columns


# -- the views -----------------------------------------------------------------------------------------------------


def _same(images: torch.Tensor, side: int) -> torch.Tensor:
    return images


def _flip(dim: int) -> Turn:
    return lambda images, side: images.flip(dim)


def _rotate(quarters: int) -> Turn:
    return lambda images, side: torch.rot90(images, quarters, (2, 3))


def _shift(down: int, right: int) -> Turn:
    """Moved by a sixteenth of the side; the edge is repeated, so nothing comes back in on the other side."""

    def turn(images: torch.Tensor, side: int) -> torch.Tensor:
        by = max(1, side // 16)
        padded = pad(images, (by, by, by, by), mode="replicate")
        top, left = by - down * by, by - right * by
        return padded[:, :, top : top + side, left : left + side]

    return turn


def _corner(bottom: bool, right: bool) -> Turn:
    def turn(images: torch.Tensor, side: int) -> torch.Tensor:
        top, left = (images.shape[2] - side) * bottom, (images.shape[3] - side) * right
        return images[:, :, top : top + side, left : left + side]

    return turn


_SIDES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
_VIEWS = {
    "hflip": [View("hflip", _flip(3))],
    "vflip": [View("vflip", _flip(2))],
    "rot90": [View(f"rot{90 * k}", _rotate(k)) for k in (1, 2, 3)],
    "shifts": [View(f"shift {name}", _shift(*by)) for name, by in _SIDES.items()],
    "crops": [
        View(f"crop {'bottom' if b else 'top'} {'right' if r else 'left'}", _corner(b, r), "larger")
        for b in (False, True)
        for r in (False, True)
    ],
    "scales": [View(f"scale {factor}", _same, factor) for factor in _SCALES],
}


def view_pipeline(pixels: str | float, plain: tuple[Any, ...]) -> tuple[Any, ...]:
    """The transforms that give the pixels of a view, from those of validation (Resize, CenterCrop, Normalize).

    The image is never resized to less than the crop, which would give it black borders: where validation sees it whole,
    a scale below 1 is the plain view.
    """
    if pixels == "plain":
        return plain
    resize, crop, normalize = plain
    side = crop.size[0]
    if pixels == "larger":
        larger = round(side / _MARGIN)
        return T.Resize(larger), T.CenterCrop(larger), normalize
    return T.Resize(max(side, round(resize.size * float(pixels)))), crop, normalize


# -- their answers -------------------------------------------------------------------------------------------------


class _Merged(nn.Module):
    """The sum of a model's answers to several views of a batch, each put through ``activation`` first."""

    def __init__(self, model: nn.Module, views: Sequence[View], side: int, activation: Activation) -> None:
        super().__init__()
        self.model, self.views, self.side, self.activation = model, views, side, activation

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else None
        total = None
        for view in self.views:
            turned = view.turn(images, self.side).contiguous(memory_format=layout or torch.contiguous_format)
            answer = activate(self.model(turned), self.activation)
            if view.columns is not None:
                answer = answer[:, view.columns]
            total = answer if total is None else total + answer
        assert total is not None
        return total


def infer_views(
    loaded: LoadedRun,
    data: Dataset,
    views: Sequence[View],
    *,
    merge: str = "mean",
    batch_size: int = 64,
    threads: int | None = None,
    label: str = "predict",
    progress: bool = True,
) -> np.ndarray:
    """(N, C) float32 probabilities of the images of ``data``, merged over ``views``; NaN where the model gives no numbers.

    ``mean`` of the probabilities, or ``geometric``: the activation of the mean logits. For softmax that is the geometric mean of
    the probabilities, scaled to add up to 1; for sigmoids that of the odds. It needs no logarithm of a probability that was
    rounded to 0. One view alone gives the plain prediction, bit for bit.
    """
    check_merge(merge)
    cfg = loaded.config
    activation = loss_activation(cfg.loss, loaded.multilabel)
    geometric = merge == "geometric" and len(views) > 1
    plain = eval_pipeline(cfg, loaded.mean, loaded.std)
    passes: dict[tuple[Any, ...], list[View]] = {}
    for view in views:
        shared = passes.setdefault(view_pipeline(view.pixels, plain), [])
        # A scale that changes nothing is no second vote.
        if view.turn not in [other.turn for other in shared]:
            shared.append(view)
    total: np.ndarray | None = None
    for pipeline, shared in passes.items():
        loader = Loader(
            data, batch_size, transforms=pipeline, threads=threads, fields=[data.image_field],
            device=None if loaded.device.type == "cpu" else str(loaded.device),
        )  # fmt: skip
        try:
            part = infer(
                _Merged(loaded.model, shared, cfg.size, _same_logits if geometric else activation),
                loader, loaded.device, total=len(data), activation=_same_logits, label=label, progress=progress,
                amp="off" if cfg.amp == "off" else resolve_amp("auto", loaded.device),
                layout=torch.channels_last if cfg.channels_last else torch.contiguous_format,
            )  # fmt: skip
        finally:
            loader.close()
        total = part if total is None else total + part
    assert total is not None
    mean = total / np.float32(sum(len(shared) for shared in passes.values()))
    return activation(torch.from_numpy(mean)).numpy() if geometric else mean


def check_merge(merge: str) -> None:
    if merge not in MERGES:
        raise unknown("merge of tta", merge, MERGES)


def _same_logits(logits: torch.Tensor) -> torch.Tensor:
    return logits
