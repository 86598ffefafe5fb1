"""From a staged batch to what the kernels take: pixels on the device, where each image lies there, and the table to match.

An image may come as a window that was uploaded, as one that the device decodes, from a cache on the device, or finished by ``repair``:
to :func:`fastload.kernels.gpu.crop` all are pointers with a shape and strides, and a box that counts from where the window begins. The
clip of each row is its window, so that the kernels see the same whichever way the pixels came.

>>> sources, origins = gather(batch, device, stager, decoder, cache); gpu.crop(sources, rows_of(batch, origins), images, paint)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastload.engines.gpu_decode import Decoder
from fastload.engines.resident import Resident
from fastload.engines.staging import JPEG, READY, Staged, Stager
from fastload.kernels import batch as kb
from fastload.kernels import gpu

_NO_COLOUR = np.empty((0, 3, 7), np.float32)


def gather(
    batch: Staged, device: torch.device, stager: Stager, decoder: Decoder | None, cache: Resident | None
) -> tuple[gpu.Sources, np.ndarray]:
    """The sources of a batch on the device, and the y, x (B, 2) of the image at which each of them begins.

    Uploads, and decodes what is left to the device, on the current stream. Rows that cannot be decoded are mended.
    """
    kinds, windows, count = batch.kinds, batch.windows, len(batch.bases)
    if cache is not None and cache.on_device:
        kept = cache.holds(batch.bases) & (kinds == READY)
        encoded = kept & ~cache.raw[batch.bases]
        if kept.all() and not encoded.any():
            return cache.sources(batch.bases), np.zeros((count, 2), np.int64)
    else:
        kept = encoded = np.zeros(count, bool)
    # Stored or decoded pixels: one copy for all of them.
    pixels = batch.buffer[: batch.pixel_bytes].to(device, non_blocking=True)
    shapes = windows[:, 2:] - windows[:, :2]
    strides = np.stack([3 * shapes[:, 1], np.full(count, 3), np.ones(count, np.int64)], axis=1)
    pointers = batch.places + (pixels.data_ptr() if batch.pixel_bytes else 0)
    origins = windows[:, :2].copy()
    owners: list[torch.Tensor] = [pixels] * count
    parts = []
    if kept.any():
        assert cache is not None
        plain = kept & ~encoded
        parts.append((plain, cache.sources(batch.bases[plain])))
        origins[plain] = 0
        if cache.jpegs is not None and encoded.any():
            windows_only, _ = cache.jpegs.decode(cache.memory, batch.bases[encoded], windows[encoded])
            parts.append((encoded, windows_only))
    for rows, mine in parts:
        pointers[rows], shapes[rows], strides[rows] = mine.pointers, mine.shapes, mine.strides
        for number, row in enumerate(np.flatnonzero(rows).tolist()):
            owners[row] = mine.owners[number if len(mine.owners) > 1 else 0]
    images = _decode(batch, stager, decoder)  # may add to `apart` and `finished`
    for row, image in images.items():
        origins[row] = batch.found[row, 1:3]
        pointers[row], shapes[row] = image.data_ptr(), image.shape[1:]
        strides[row] = image.stride(1), image.stride(2), image.stride(0)
        owners[row] = image
    # Other pixels (h, w, 3), and the single one of a row in which nothing is placed.
    single = np.zeros((1, 1, 3), np.uint8)
    nothing = dict.fromkeys(np.flatnonzero((kinds == READY) & ~kept).tolist(), single)
    unknown_rows = dict.fromkeys(batch.failed, single)
    others = {**batch.apart, **batch.finished, **nothing, **unknown_rows}
    for row, array in others.items():
        tensor = torch.from_numpy(array).to(device)
        pointers[row], shapes[row], owners[row] = tensor.data_ptr(), tensor.shape[:2], tensor
        strides[row] = tensor.stride()
    return gpu.Sources(pointers, shapes, strides, tuple(owners)), origins


def _decode(batch: Staged, stager: Stager, decoder: Decoder | None) -> dict[int, torch.Tensor]:
    """The JPEGs of a batch as (3, h, w) on the device, by row; those that it cannot decode are mended."""
    rows = [
        row
        for row in np.flatnonzero(batch.kinds == JPEG).tolist()
        if row not in batch.apart and row not in batch.finished and row not in batch.failed
    ]
    if not rows:
        return {}
    assert decoder is not None
    encoded = [
        batch.buffer[at : at + length]
        for at, length in zip(batch.places[rows].tolist(), batch.found[rows, 0].tolist())
    ]
    try:
        decoded: Sequence[torch.Tensor | None] = decoder.images(encoded)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        decoded = [_decode_one(decoder, one) for one in encoded]
    images = {}
    for row, image in zip(rows, decoded):
        if image is not None and tuple(image.shape) == (3, *batch.found[row, 3:].tolist()):
            images[row] = image
            continue
        stager.distrust(int(batch.bases[row]))  # else it would cost each epoch such a batch
        stager.mend(batch, row)
    return images


def _decode_one(decoder: Decoder, encoded: torch.Tensor) -> torch.Tensor | None:
    try:
        (image,) = decoder.images([encoded])
        return image
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def rows_of(batch: Staged, origins: np.ndarray) -> kb.Rows:
    """The table as it is for what lies on the device: windows, not images; and what is finished stays as it is."""
    table = batch.table
    assert table is not None
    clip = batch.windows - np.concatenate([origins, origins], axis=1)
    box = table.box - np.concatenate([origins, origins], axis=1)
    place, flips, coloured, erase = table.place, table.flips, table.coloured, table.erase
    empty = (place[:, 2] <= 0) | (place[:, 3] <= 0)
    if empty.any():
        box[empty] = clip[empty] = 0, 0, 1, 1
    if batch.finished:
        rows = list(batch.finished)
        place, flips, coloured, erase = place.copy(), flips.copy(), coloured.copy(), erase.copy()
        box[rows] = clip[rows] = place[rows] = 0, 0, *batch.size
        flips[rows], coloured[rows], erase[rows] = 0, False, 0
    colour = _NO_COLOUR if table.colour is None else table.colour
    return kb.Rows(place, box, clip, flips, colour, coloured, erase)
