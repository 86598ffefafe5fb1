"""From a table of parameters to pixels on the GPU: ragged uint8 images in, a batch out, with one pass over memory.

:func:`crop` does in one launch what the CPU engine does step by step: the antialiased resize of
:func:`fastload.kernels.oracle.axis_matrix`, flips, background, colour matrix, erased boxes, normalising; rounded and cut at
the same places, so results differ by the rounding of single floats only. :func:`mix` is Mixup and CutMix, a second pass.

**Memory.** For an image, with ``b`` bytes an element of the output: ``crop`` reads the 3hw bytes of the crop in the source
(once from memory; the taps of neighbours overlap, which is left to the caches), reads some 250 bytes of parameters, and
writes 3HWb bytes. An image whose colour matrix has columns for the means (contrast) is read twice: a small kernel first adds
up the resized levels, in whole numbers. Nothing is stored in between. ``mix`` reads and writes 3HWb bytes of each image. So a
crop of 224 x 224 pixels to 224 x 224 in fp16 moves 147 + 294 KiB, mixing it 588 KiB more.

**Direct taps.** Each output element adds up its rows times columns of taps at once, in registers. The separable way, rows
first, needs a buffer that Triton cannot index freely. Taps of one axis are about 2 * scale, so a pixel of the crop is
read about 4 times at any scale, and about 4 times for each pixel of the output where that is larger; separable taps
would read it twice and the buffer besides. A scale of 16 is right, and as slow as its crop is large.

torch and Triton are imported when something runs. On tensors in host memory the same is done by :func:`crop_reference` and
:func:`mix_reference`, plain torch; with the environment variable TRITON_INTERPRET=1, set before Triton is imported, by
Triton's interpreter. This room is below :mod:`fastload.errors`, so wrong calls are ValueErrors, and a missing Triton is an
ImportError with its cure.

>>> crop(sources_of(decoded, "CHW"), table, torch.empty(64, 3, 224, 224, device="cuda", dtype=torch.half), paint)
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_compat
import numpy as np

if TYPE_CHECKING:
    import torch

    from fastload.kernels.batch import Paint

_WORDS = 16  # columns of a table in front of its erasers
BLOCK = 512  # pixels of a program, and elements where batches are mixed
_MOST_IMAGES = 65535  # CUDA's limit of a grid's second axis


class Sources(NamedTuple):
    """Where the pixels of B images lie in the memory of one device."""

    pointers: Any  # (B,) int64, numpy's or a tensor on the device: address of each image's first byte
    shapes: Any  # (B, 2) int64: height and width
    strides: Any  # (B, 3) int64: bytes from row to row, from pixel to pixel, from channel to channel
    owners: tuple[torch.Tensor, ...]  # one for each image, or one for all: they keep the memory

    def image(self, row: int) -> torch.Tensor:
        """One image as a (3, H, W) uint8 view."""
        owner = self.owners[row if len(self.owners) > 1 else 0]
        (height, width), (over, along, channel) = self.shapes[row].tolist(), self.strides[row].tolist()
        offset = owner.storage_offset() + int(self.pointers[row]) - owner.data_ptr()
        return owner.as_strided((3, height, width), (channel, over, along), offset)


def sources_of(images: Sequence[torch.Tensor], layout: str) -> Sources:
    """Sources of separate uint8 tensors on one device, each ``layout`` "CHW" (nvJPEG's) or "HWC", with any strides."""
    import torch

    axes = _axes(layout)
    for i, image in enumerate(images):
        if image.ndim != 3 or image.dtype != torch.uint8 or image.shape[axes[2]] != 3:
            raise ValueError(
                f"image {i} must be uint8 with 3 channels in {layout} order, got {image.dtype} {tuple(image.shape)}"
            )
    shapes = np.array([[i.shape[axes[0]], i.shape[axes[1]]] for i in images], np.int64).reshape(-1, 2)
    strides = np.array([[i.stride(axis) for axis in axes] for i in images], np.int64).reshape(-1, 3)
    pointers = np.array([i.data_ptr() for i in images], np.int64)
    return Sources(pointers, shapes, strides, tuple(images))


def sources_in(buffer: torch.Tensor, offsets: np.ndarray, shapes: np.ndarray, layout: str = "HWC") -> Sources:
    """Sources of images without gaps that begin at ``offsets`` (B,) of one ``buffer`` (n,) uint8; ``shapes`` (B, 2)."""
    import torch

    axes = _axes(layout)
    offsets, shapes = np.asarray(offsets, np.int64), np.asarray(shapes, np.int64).reshape(-1, 2)
    if buffer.ndim != 1 or buffer.dtype != torch.uint8 or not buffer.is_contiguous():
        raise ValueError(
            f"a buffer must be (n,) uint8 without gaps, got {buffer.dtype} {tuple(buffer.shape)}"
        )
    wrong = (offsets < 0) | (shapes < 1).any(1) | (offsets + 3 * shapes.prod(1) > len(buffer))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"image {i}, {shapes[i, 0]} x {shapes[i, 1]} at byte {offsets[i]}, is not in a buffer of {len(buffer)} bytes"
        )
    plane, one = shapes.prod(1), np.ones(len(shapes), np.int64)
    strides = [3 * shapes[:, 1], 3 * one, one] if axes[2] == 2 else [shapes[:, 1], one, plane]
    return Sources(offsets + buffer.data_ptr(), shapes, np.stack(strides, axis=1), (buffer,))


def crop(sources: Sources, table: Any, out: torch.Tensor, paint: Paint) -> None:
    """Fill ``out`` (B, 3, H, W), uint8, float16, bfloat16 or float32, channels_last or contiguous, as ``table`` says.

    ``table`` is a :class:`fastload.draws.Table` or :class:`fastload.kernels.batch.Rows`, in host memory like ``sources``,
    which describes memory of the device of ``out``. Floats are level * scale + shift of ``paint``; uint8 are the
    levels. All is done on the current stream, without waiting for it: sources from another stream are the caller's matter.
    """
    if not runs_triton(out):
        crop_reference(sources, table, out, paint)
        return
    _check(sources, table, out)
    if out.numel():
        packed = pack(sources, table, paint)
        words, reals, colours = upload(out.device, (packed.words, packed.reals, packed.paint))
        render(Packed(words, reals, colours, packed.means), out)


def render(packed: Packed, out: torch.Tensor) -> None:
    """Fill ``out`` as :func:`crop` does, from what :func:`pack` made of tensors on its device; nothing is checked."""
    if len(out) > _MOST_IMAGES:
        for start in range(0, len(out), _MOST_IMAGES):
            render(packed.rows(start, start + _MOST_IMAGES), out[start : start + _MOST_IMAGES])
        return
    kernels = triton_kernels("gpu_triton")
    count, height, width, last = len(out), *out.shape[2:], _channels_last(out)
    columns = packed.words.shape[1]
    # Where nobody asks for means they are multiplied by 0, whatever they are.
    sums = (out.new_zeros if packed.means else out.new_empty)((count, 3), dtype=packed.words.dtype)
    tiles = -(-height * width // BLOCK)
    with on_device(out):
        if packed.means:
            kernels.sums_kernel[(tiles, count)](
                packed.words, packed.reals, packed.paint, sums, columns, height, width, BLOCK
            )
        kernels.crop_kernel[(tiles, count)](
            packed.words, packed.reals, packed.paint, sums, out,
            columns, (columns - _WORDS) // 4, height, width, last, out.is_floating_point(), BLOCK,
        )  # fmt: skip


def mix(images: torch.Tensor, weights: Any, boxes: Any) -> None:
    """Blend ``images`` (B, 3, H, W), of the kinds that :func:`crop` fills, with their partners B - 1 - i, in place.

    ``weights`` (B,) float32 and ``boxes`` (B, 4) int64 as in :func:`fastload.kernels.pixels.mix`: the table's ``mix`` and
    ``mix_box``, in host memory or on the device.
    """
    if tuple(weights.shape) != (len(images),) or tuple(boxes.shape) != (len(images), 4):
        raise ValueError(
            f"mixing {len(images)} images needs as many weights and boxes, got {weights.shape} and {boxes.shape}"
        )
    last = _channels_last(images)
    if not runs_triton(images):
        mix_reference(images, weights, boxes)
        return
    pairs, (height, width) = len(images) // 2, images.shape[2:]
    if not pairs or not images.numel():
        return
    kernels = triton_kernels("gpu_triton")
    box, share = boxes, weights
    if isinstance(boxes, np.ndarray):
        box, share = upload(images.device, (boxes.astype(np.int64), weights.astype(np.float32)))
    with on_device(images):
        kernels.mix_kernel[(-(-3 * height * width // BLOCK), pairs)](
            images, share, box, len(images), height, width, last, not images.is_floating_point(), BLOCK
        )


def crop_reference(sources: Sources, table: Any, out: torch.Tensor, paint: Paint) -> None:
    """:func:`crop` in plain torch, image by image in float64, on any device: the oracle's steps, slow."""
    import torch

    _check(sources, table, out)
    _channels_last(out)
    scale, shift, background = (
        torch.as_tensor(v, dtype=torch.float32, device=out.device).view(3, 1, 1)
        for v in (paint.scale, paint.shift, paint.background)
    )
    for i in range(len(out)):
        (y, x, h, w), flips = table.place[i].tolist(), int(table.flips[i])
        levels = background.double().expand(3, *out.shape[2:]).clone()
        if h and w:
            box, clip = table.box[i].tolist(), table.clip[i].tolist()
            # Only what may be used is read.
            window = sources.image(i)[:, clip[0] : clip[2], clip[1] : clip[3]].double()
            rows = _axis_matrix(
                box[0] - clip[0], box[2] - clip[0], clip[2] - clip[0], h, bool(flips & 2), out
            )
            columns = _axis_matrix(
                box[1] - clip[1], box[3] - clip[1], clip[3] - clip[1], w, bool(flips & 1), out
            )
            levels[:, y : y + h, x : x + w] = torch.floor(rows @ window @ columns.T + 0.5)
        if _has_colour(table) and table.coloured[i]:
            matrix = torch.as_tensor(table.colour[i], dtype=torch.float64, device=out.device)
            base = matrix[:, 3:6] @ levels.mean((1, 2)) + matrix[:, 6]
            changed = torch.einsum("ck,kyx->cyx", matrix[:, :3], levels) + base.view(3, 1, 1)
            levels = torch.floor((changed + 0.5).clamp(0, 255))
        for (y0, x0, y1, x1), fill in zip(table.erase[i].tolist(), paint.erase_fill):
            levels[:, y0:y1, x0:x1] = torch.as_tensor(fill, dtype=levels.dtype, device=out.device).view(
                3, 1, 1
            )
        out[i] = (levels.float() * scale + shift if out.is_floating_point() else levels).to(out.dtype)


def mix_reference(images: torch.Tensor, weights: Any, boxes: Any) -> None:
    """:func:`mix` in plain torch."""
    import torch

    own, other = images.float(), images.float().flip(0)
    share = torch.as_tensor(weights, dtype=torch.float32, device=images.device).view(-1, 1, 1, 1)
    mixed = own * share + other * (1 - share)
    mixed = mixed if images.is_floating_point() else torch.floor(mixed + 0.5)
    for i, (y0, x0, y1, x1) in enumerate(boxes.tolist()):
        if y1 > y0 and x1 > x0:
            mixed[i] = own[i]
            mixed[i, :, y0:y1, x0:x1] = other[i, :, y0:y1, x0:x1]
    if len(images) % 2:
        mixed[len(images) // 2] = own[len(images) // 2]  # its own partner
    images.copy_(mixed)


class Packed(NamedTuple):
    """A table as the kernels read it, see :mod:`fastload.kernels.gpu_triton` for the columns."""

    words: Any  # (B, 16 + 4K) int64
    reals: Any  # (B, 29) float32
    paint: Any  # (9 + 3K,) float32
    means: bool  # whether some of the colour matrices may ask for the mean of their image

    def rows(self, start: int, stop: int) -> Packed:
        """Some of the rows."""
        return self._replace(words=self.words[start:stop], reals=self.reals[start:stop])


def paint_on(device: Any, paint: Paint) -> torch.Tensor:
    """A paint as the kernels read it, (9 + 3K,) float32 on the device, which is waited for."""
    import torch

    return torch.from_numpy(_colours(paint)).to(device)


def _colours(paint: Paint) -> np.ndarray:
    parts = (paint.background, paint.scale, paint.shift, paint.erase_fill.ravel())
    return np.concatenate(parts).astype(np.float32)


def pack(sources: Sources, table: Any, paint: Any) -> Packed:
    """Tables and sources as numbers for the kernels, whose floats are 32 bits: all that needs 64 is done here.

    ``sources`` and ``table`` may be tensors on a device, which then is not waited for; ``paint`` is then what :func:`paint_on` made.
    """
    xp, device = array_api_compat.array_namespace(table.box), array_api_compat.device(table.box)
    count, erasers = len(table.box), table.erase.shape[1]
    words = xp.zeros((count, _WORDS + 4 * erasers), dtype=xp.int64, device=device)
    reals = xp.zeros((count, 29), dtype=xp.float32, device=device)
    words[:, 1:4] = sources.strides
    words[:, 4:8], words[:, 8] = table.place, table.flips
    words[:, 16:] = xp.reshape(table.erase, (count, 4 * erasers))
    # Positions count from the whole pixel in which the box begins, so that they are small.
    corner = xp.floor(table.box[:, :2])
    origin = xp.astype(corner, xp.int64)
    words[:, 0] = sources.pointers + xp.sum(origin * sources.strides[:, :2], axis=1)
    scale = (table.box[:, 2:] - table.box[:, :2]) / table.place[:, 2:].clip(min=1)
    low, high = table.clip[:, :2] - origin, table.clip[:, 2:] - origin
    reach = scale.clip(min=1)
    taps = xp.astype(xp.ceil(2 * reach), xp.int64)
    # At scale 1 from a whole pixel the second tap of each axis has no weight.
    unscaled = (scale == 1) & (table.box[:, :2] == corner)
    taps = xp.minimum(xp.where(unscaled, 1, taps), (high - low).clip(min=1))
    words[:, 10:16] = xp.reshape(xp.stack([low, high, taps], axis=2), (count, 6))
    axes = xp.stack([table.box[:, :2] - corner, scale, reach, 1 / reach], axis=2)
    reals[:, :8] = xp.reshape(xp.astype(axes, xp.float32), (count, 8))
    means = False
    if _has_colour(table):
        reals[:, 8:] = xp.reshape(table.colour, (count, 21))
        asks = table.coloured & xp.any(xp.reshape(table.colour[:, :, 3:6], (count, 9)) != 0, axis=1)
        words[:, 9] = xp.astype(table.coloured, xp.int64) + 2 * xp.astype(asks, xp.int64)
        means = not isinstance(table.box, np.ndarray) or bool(asks.any())
    return Packed(words, reals, _colours(paint) if isinstance(table.box, np.ndarray) else paint, means)


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether :func:`crop` and :func:`mix` launch kernels for this tensor, rather than use plain torch."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def triton_kernels(name: str) -> Any:
    """A module of this room that holds Triton code."""
    try:
        return importlib.import_module(f"fastload.kernels.{name}")
    except ImportError as error:
        raise ImportError(
            f"the GPU kernels need Triton, which cannot be imported ({error}); "
            "torch's wheels for Linux with CUDA bring it, or install it with: pip install triton"
        ) from error


def upload(device: torch.device, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Arrays (int64 before float32) on the device, by one copy that the host does not wait for."""
    import torch

    packed = torch.from_numpy(
        np.concatenate([np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays])
    )
    if device.type == "cuda":
        # torch's allocator keeps pinned memory until the copy that was asked for has been made.
        packed = packed.pin_memory().to(device, non_blocking=True)
    parts = packed.split([a.nbytes for a in arrays])
    kinds = {"int64": torch.int64, "float32": torch.float32}
    return [part.view(kinds[a.dtype.name]).view(a.shape) for part, a in zip(parts, arrays)]


def on_device(tensor: torch.Tensor) -> Any:
    """Triton launches on the current device, which may be another."""
    import torch

    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _axes(layout: str) -> tuple[int, int, int]:
    """The axes of height, width and channels."""
    if layout not in ("CHW", "HWC"):
        raise ValueError(f"layout must be 'CHW' or 'HWC', got {layout!r}")
    return (1, 2, 0) if layout == "CHW" else (0, 1, 2)


def _has_colour(table: Any) -> bool:
    return table.colour is not None and len(table.colour) > 0


def _channels_last(images: torch.Tensor) -> bool:
    """Whether pixels are whole in memory. ValueError for what :func:`crop` cannot fill."""
    import torch

    kinds = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
    if images.ndim == 4 and images.shape[1] == 3 and images.dtype in kinds:
        if images.is_contiguous(memory_format=torch.channels_last):
            return True
        if images.is_contiguous():
            return False
    raise ValueError(
        "images must be (B, 3, H, W) in uint8, float16, bfloat16 or float32, channels_last or contiguous; "
        f"got {images.dtype} {tuple(images.shape)} with strides {images.stride()}"
    )


def _check(sources: Sources, table: Any, out: torch.Tensor) -> None:
    """ValueError for what would read or write outside of the memory given: on a GPU that ends the process's work there."""
    count = len(out)
    _channels_last(out)
    if not len(sources.pointers) == len(table.box) == count <= _MOST_IMAGES:
        raise ValueError(
            f"sources, table and output must have as many rows, at most {_MOST_IMAGES}, "
            f"got {len(sources.pointers)}, {len(table.box)} and {count}"
        )
    for owner in sources.owners:
        if owner.device != out.device:
            raise ValueError(f"sources and output must be on one device, got {owner.device} and {out.device}")
    box, clip, place, shape = table.box, table.clip, table.place, sources.shapes
    limits = np.array(out.shape[2:])
    reach = ((shape - 1) * sources.strides[:, :2]).sum(1) + 2 * sources.strides[:, 2]
    outside = (place < 0).any(1) | (place[:, :2] + place[:, 2:] > limits).any(1)
    cut = (clip[:, :2] < 0) | (clip[:, :2] >= clip[:, 2:]) | (clip[:, 2:] > shape)
    flat = ~(box[:, :2] < box[:, 2:]) & (place[:, 2:] > 0).all(1, keepdims=True)
    for wrong, reason in (
        (outside, f"its place is outside of an output of {limits[0]} x {limits[1]}"),
        (cut.any(1), "its clip is empty or outside of the image"),
        (flat.any(1) | ~(np.abs(box).sum(1) < 1e9), "its box has no area"),
        (reach >= 2**31, "its image has 2 GiB or more"),
    ):
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ValueError(
                f"row {i} cannot be cropped: {reason}; place {place[i].tolist()}, clip {clip[i].tolist()}, "
                f"box {box[i].tolist()}, image {shape[i].tolist()}"
            )


def _axis_matrix(
    start: float, stop: float, length: int, size: int, flip: bool, like: torch.Tensor
) -> torch.Tensor:
    """(size, length) float64: the triangle filter of one axis, see :func:`fastload.kernels.oracle.axis_matrix`."""
    import torch

    scale = (stop - start) / size
    reach = max(scale, 1.0)
    at = torch.arange(size, dtype=torch.float64, device=like.device)
    centres = (start + (at + 0.5) * scale).clamp(1 - reach, length - 1 + reach)
    taps = torch.arange(length, dtype=torch.float64, device=like.device) + 0.5
    weights = (1 - (taps - (centres.flip(0) if flip else centres).view(-1, 1)).abs() / reach).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)
