"""The numbers of :mod:`fastload.kernels.rng` made where they are used: of samples on a device, the same to the bit.

Uniforms and permutations are integer arithmetic, so a GPU gives what the CPU gives. A uniform costs a quarter of a Philox block (ten
rounds, some 60 integer instructions) and 8 bytes written; a position of a permutation about ten blocks and no memory. The trade-off:
each call is one launch, worth it for some thousand samples at once.

Tensors in host memory go through the CPU's kernels, or through Triton's interpreter with TRITON_INTERPRET=1, as in
:mod:`fastload.kernels.gpu`.

>>> uniforms(seed=0, epoch=0, samples=torch.arange(4, device="cuda"), stream=1, count=2)  # (4, 2) float64 in [0, 1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastload.kernels import rng
from fastload.kernels.gpu import on_device, runs_triton, triton_kernels

if TYPE_CHECKING:
    import torch

BLOCK = 256
_WORD = 0xFFFFFFFF


def uniforms(seed: int, epoch: int, samples: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """:func:`fastload.kernels.rng.uniforms` of ``samples`` (B,) int64, the bits of their unsigned numbers: (B, count) float64."""
    import torch

    if not runs_triton(samples):
        numbers = samples.numpy().view(np.uint64)
        return torch.from_numpy(rng.uniforms(seed, epoch, numbers, stream, count))
    out = torch.empty((len(samples), count), dtype=torch.float64, device=samples.device)
    blocks = -(-count // 4)
    if out.numel():
        with on_device(samples):
            triton_kernels("gpu_rng_triton").uniforms_kernel[(-(-len(samples) * blocks // BLOCK),)](
                samples.contiguous(), out, len(samples), *_words(seed, epoch), _signed(stream << 16), count, blocks, BLOCK
            )  # fmt: skip
    return out


def permute(positions: torch.Tensor, length: int, seed: int, epoch: int) -> torch.Tensor:
    """:func:`fastload.kernels.rng.permute` of ``positions`` (B,) int64 below ``length``: (B,) int64."""
    import torch

    if not runs_triton(positions):
        moved = rng.permute(positions.numpy().view(np.uint64), length, seed, epoch)
        return torch.from_numpy(moved.view(np.int64))
    out = torch.empty_like(positions)
    half = max(1, -(-(length - 1).bit_length() // 2))  # the bits of each side of the network
    if out.numel():
        with on_device(positions):
            triton_kernels("gpu_rng_triton").permute_kernel[(-(-len(positions) // BLOCK),)](
                positions.contiguous(), out, len(positions), length, *_words(seed, epoch), half, BLOCK
            )
    return out


def _words(seed: int, epoch: int) -> tuple[int, int, int]:
    """The seed's halves and the epoch."""
    return _signed(seed & _WORD), _signed(seed >> 32), _signed(epoch & _WORD)


def _signed(word: int) -> int:
    """32 bits as a signed number: Triton would compile again for one that needs 33."""
    return word - (1 << 32) if word > 0x7FFFFFFF else word
