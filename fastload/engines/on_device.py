"""The steps behind the resize as torch operations on a whole batch, where it lies: colour, erasing, normalising, mixing.

The definitions are those of :mod:`fastload.kernels.pixels`, which does the same on the CPU, row by row and several times faster;
on a GPU a batch at a time is what costs few launches. Images are (B, H, W, 3), contiguous.

>>> recolour(images, rows, table.colour[rows]); erase(images, table.erase, plan.erase_fill); normalise(images, *plan.affine)
"""

from __future__ import annotations

import numpy as np
import torch


def recolour(images: torch.Tensor, rows: np.ndarray, matrices: np.ndarray) -> None:
    """In place: the ``rows`` (k,) of ``images`` uint8 by ``matrices`` (k, 3, 7) float32, rounded and cut to 0..255."""
    if not rows.size:
        return
    where = torch.from_numpy(rows).to(images.device)
    planes = images[where].permute(0, 3, 1, 2).to(torch.float32)
    matrix = torch.from_numpy(matrices).to(images.device)[..., None, None]
    mean = planes.mean(dim=(2, 3), keepdim=True)
    # Term by term, not as a product of matrices, which a GPU may compute with ten bits.
    changed = matrix[:, :, 6] + 0.5
    for k in range(3):
        changed = changed + matrix[:, :, 3 + k] * mean[:, k : k + 1]
    for k in range(3):
        changed = changed + matrix[:, :, k] * planes[:, k : k + 1]
    images[where] = changed.clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def erase(images: torch.Tensor, boxes: np.ndarray, fills: np.ndarray) -> None:
    """In place: ``boxes`` (B, K, 4) int64 (y0, x0, y1, x1) of ``images`` uint8 painted with ``fills`` (K, 3) uint8."""
    for k, fill in enumerate(torch.from_numpy(fills).to(images.device)):
        images.copy_(torch.where(_inside(boxes[:, k], images), fill, images))


def normalise(images: torch.Tensor, scale: np.ndarray, shift: np.ndarray) -> torch.Tensor:
    """images * scale + shift in each channel, float32 from uint8."""
    scales, shifts = (torch.from_numpy(values).to(images.device) for values in (scale, shift))
    return images.to(torch.float32).mul_(scales).add_(shifts)


def mix(images: torch.Tensor, weights: np.ndarray, boxes: np.ndarray) -> torch.Tensor:
    """``images``, uint8 or float32, blended with their partners: own share ``weights`` (B,), or inside of ``boxes`` (B, 4)."""
    own = images.to(torch.float32)
    other = own.flip(0)
    weight = torch.from_numpy(weights).to(images.device)[:, None, None, None]
    cut = torch.from_numpy((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).to(images.device)
    pasted = torch.where(_inside(boxes, images), other, own)
    mixed = torch.where(cut[:, None, None, None], pasted, own * weight + other * (1 - weight))
    return mixed.add_(0.5).to(torch.uint8) if images.dtype == torch.uint8 else mixed


def _inside(boxes: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 1) bool: the pixels inside of each box (B, 4)."""
    y0, x0, y1, x1 = torch.from_numpy(boxes).to(images.device)[:, :, None].unbind(1)
    y, x = (torch.arange(length, device=images.device) for length in images.shape[1:3])
    inside: torch.Tensor = ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]
    return inside[..., None]
