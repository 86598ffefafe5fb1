"""The kernels once more, in plain numpy and Python: slow, obvious, and what the fast ones are tested against.

No line is shared with the kernels. Where a kernel follows somebody's definition (Philox, Pillow's triangle filter, JPEG
segments), this follows the same definition by the shortest way.
"""

from __future__ import annotations

import numpy as np


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0], c[1], c[2], c[3]


def uniforms(seed: int, epoch: int, samples: np.ndarray, stream: int, count: int) -> np.ndarray:
    """See :func:`fastload.kernels.rng.uniforms`."""
    rows = []
    for sample in map(int, samples):
        words: list[int] = []
        for block in range(-(-count // 4)):
            counter = (sample % 2**32, sample >> 32, epoch % 2**32, (stream << 16) + block)
            words += philox(counter, (seed % 2**32, seed >> 32))
        rows.append(words[:count])
    return np.array(rows, np.float64).reshape(len(samples), count) / 2**32


def axis_matrix(start: float, stop: float, low: int, high: int, length: int, size: int) -> np.ndarray:
    """(size, length) float64: the antialiased triangle filter of one axis as a matrix."""
    scale = (stop - start) / size
    reach = max(scale, 1.0)
    matrix = np.zeros((size, length))
    for i in range(size):
        centre = start + (i + 0.5) * scale
        taps = np.arange(
            max(int(np.floor(centre - reach + 0.5)), low), min(int(np.floor(centre + reach + 0.5)), high)
        )
        weights = np.maximum(1 - np.abs(taps + 0.5 - centre) / reach, 0)
        if weights.sum() > 0:
            matrix[i, taps] = weights / weights.sum()
        else:
            matrix[i, min(max(int(np.floor(centre - reach + 0.5)), low), high - 1)] = 1
    return matrix


def resize(
    source: np.ndarray,
    box: tuple[float, float, float, float],
    clip: tuple[int, int, int, int],
    size: tuple[int, int],
    flips: int = 0,
) -> np.ndarray:
    """See :func:`fastload.kernels.resize.resize`; (h, w, 3) uint8."""
    rows = axis_matrix(box[0], box[2], clip[0], clip[2], source.shape[0], size[0])
    columns = axis_matrix(box[1], box[3], clip[1], clip[3], source.shape[1], size[1])
    down = np.einsum("yh,hwc->ywc", rows, source[:, :, :3].astype(np.float64), optimize=True)
    blended = np.einsum("ywc,xw->yxc", down, columns, optimize=True)
    out = np.clip(np.floor(blended + 0.5), 0, 255).astype(np.uint8)
    out = out[:, ::-1] if flips & 1 else out
    return out[::-1] if flips & 2 else out


def recolour(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """See :func:`fastload.kernels.pixels.recolour`; a copy."""
    pixels = image.reshape(-1, 3).astype(np.float64)
    mean = np.broadcast_to(pixels.mean(axis=0), pixels.shape)
    terms = np.concatenate([pixels, mean, np.ones((len(pixels), 1))], axis=1)
    levels = np.clip(terms @ matrix.astype(np.float64).T + 0.5, 0, 255)
    return levels.astype(np.uint8).reshape(image.shape)


def normalise(images: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """See :func:`fastload.kernels.pixels.normalise`."""
    return images.astype(np.float32) * scale + shift


def mix(images: np.ndarray, weights: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """See :func:`fastload.kernels.pixels.mix`; a copy."""
    out = images.astype(np.float32)
    for i in range(len(images)):
        partner = len(images) - 1 - i
        if partner == i:
            continue
        y0, x0, y1, x1 = boxes[i]
        if y1 > y0 and x1 > x0:
            out[i, y0:y1, x0:x1] = images[partner, y0:y1, x0:x1]
        else:
            out[i] = images[i] * weights[i] + images[partner] * (np.float32(1) - weights[i])
    return np.floor(out + 0.5).astype(np.uint8) if images.dtype == np.uint8 else out


def restart_segments(data: bytes) -> list[bytes]:
    """The entropy-coded segments of a one-scan JPEG, without markers."""
    start = data.index(b"\xff\xda")
    start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    segments, at = [], start
    for place in range(start, len(data) - 1):
        if data[place] == 0xFF and (0xD0 <= data[place + 1] <= 0xD7 or data[place + 1] == 0xD9):
            segments.append(data[at:place])
            at = place + 2
    return segments
