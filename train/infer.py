"""Probabilities of a model for every image of a loader, in order. Used by validation and by prediction alike.

A batch with a value that is no number (mixed precision overflows above 65504 in fp16) is done again in fp32. Nothing waits for
the device on the way: what went wrong is seen when all results are fetched at the end, and then the loader is gone through once
more for those batches alone. The trade-off: that rare case costs a second pass of decoding, the usual one costs nothing.

>>> probs = infer(model, loader, device, total=len(dataset))
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from fastload.train.data import TrainWarning
from fastload.train.model import autocast

Activation = Callable[[torch.Tensor], torch.Tensor]


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """(B, C) probabilities of classes that exclude each other."""
    return logits.softmax(dim=1)


@torch.inference_mode()
def infer(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device,
    *,
    total: int,
    amp: str = "off",
    layout: torch.memory_format = torch.channels_last,
    activation: Activation = softmax,
    label: str = "predict",
    progress: bool = True,
) -> np.ndarray:
    """(N, C) float32: ``activation`` of the model's (B, C) logits, in the loader's order.

    ``loader`` gives tuples with the images (B, 3, H, W) first, and the same ones each time it is iterated; ``total``: images
    expected, for the progress bar. All of the model is in eval mode meanwhile, and then as it was. A batch that is not finite is
    repeated in fp32, with a TrainWarning; rows that still are not finite are NaN.
    """
    parts = []
    with evaluating(model), tqdm(
        total=total, desc=label, unit="img", leave=False, disable=not progress, mininterval=0.5
    ) as bar:  # fmt: skip
        for batch in loader:
            images = batch[0].to(device, non_blocking=True, memory_format=layout)
            with autocast(device, amp):
                logits = model(images)
            parts.append(activate(logits, activation))
            bar.update(len(images))
        probs = torch.cat(parts).cpu().numpy()
        ends = np.cumsum([len(part) for part in parts])
        bad = {i for i, part in enumerate(np.split(probs, ends[:-1])) if np.isnan(part).any()}
        if bad:
            for i, batch in enumerate(loader):
                if i in bad:
                    images = batch[0].to(device, memory_format=layout)
                    probs[ends[i] - len(images) : ends[i]] = activate(model(images), activation).cpu().numpy()
            still = int(np.isnan(probs).any(axis=1).sum())
            warnings.warn(
                f"{label}: {len(bad)} of {len(parts)} batches had values that are no numbers{'' if amp == 'off' else f' in {amp}'} "
                f"and were repeated in fp32; {f'{still} images still have none' if still else 'all are numbers now'}",
                TrainWarning, stacklevel=3,
            )  # fmt: skip
    return probs


def activate(logits: torch.Tensor, activation: Activation) -> torch.Tensor:
    """``activation`` in float32, with NaN in each row that has a logit of NaN or +inf: a sigmoid would make a plain 1 of it.

    A logit of -inf is allowed, since some models exclude a class so.
    """
    logits = logits.float()
    probs = activation(logits)
    good = (logits < math.inf).all(dim=1) & ~probs.isnan().any(dim=1)
    return torch.where(good[:, None], probs, torch.full_like(probs, math.nan))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode, and each in its own mode again: a frozen norm layer must stay frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
