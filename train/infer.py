"""Probabilities of a model for every image of a loader, in order. Used by validation and by prediction alike.

>>> probs = infer(model, loader, device, total=len(dataset))
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from fastload.train.model import autocast


@torch.inference_mode()
def infer(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device,
    *,
    total: int,
    amp: str = "off",
    layout: torch.memory_format = torch.channels_last,
    label: str = "predict",
    progress: bool = True,
) -> np.ndarray:
    """(N, C) float32 probabilities in the loader's order. ``total``: images expected, for the progress bar.

    The model runs in eval mode and is given back in the mode it came in.
    """
    mode = model.training
    model.eval()
    parts = []
    try:
        with tqdm(
            total=total, desc=label, unit="img", leave=False, disable=not progress, mininterval=0.5
        ) as bar:
            for batch in loader:
                images = batch[0].to(device, non_blocking=True, memory_format=layout)
                with autocast(device, amp):
                    logits = model(images)
                parts.append(logits.float().softmax(dim=1))
                bar.update(len(images))
    finally:
        model.train(mode)
    return torch.cat(parts).cpu().numpy()
