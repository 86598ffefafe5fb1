"""The kernels once more, in plain numpy and Python: slow, obvious, and what the fast ones are tested against.

No line is shared with the kernels. Where a kernel follows somebody's definition (Philox, Pillow's triangle filter, JPEG
segments), this follows the same definition by the shortest way.
"""

from __future__ import annotations

import re

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


def _huffman_codes(data: bytes) -> tuple[dict[int, dict[tuple[int, int], int]], dict[int, np.ndarray]]:
    """All Huffman tables, {class and id byte: {(length, code): symbol}}, and quantisation tables in stream order."""
    codes, quants, at = {}, {}, 2
    while data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        while data[at + 1] == 0xC4 and body:
            table, code, k = {}, 0, 17
            for size in range(1, 17):
                for _ in range(body[size]):
                    table[size, code] = body[k]
                    code, k = code + 1, k + 1
                code *= 2
            codes[body[0]], body = table, body[k:]
        while data[at + 1] == 0xDB and body:
            quants[body[0]], body = np.frombuffer(body[1:65], np.uint8).astype(np.int64), body[65:]
        at += 2 + length
    return codes, quants


def jpeg_coefficients(data: bytes) -> list[np.ndarray]:
    """The dequantised coefficients of a baseline JPEG: for each component (block rows, block columns, 8, 8) int64.

    Bit by bit, in Python: for small pictures. Blocks that pad the last MCU are there too.
    """
    codes, quants = _huffman_codes(data)
    frame = min(i for i in (data.find(b"\xff\xc0"), data.find(b"\xff\xc1")) if i > 0) + 5
    height, width = (int.from_bytes(data[frame + i : frame + i + 2], "big") for i in (0, 2))
    parts = [data[frame + 5 + 3 * i : frame + 8 + 3 * i] for i in range(data[frame + 4])]
    shapes = [(p[1] >> 4, p[1] & 15) if len(parts) > 1 else (1, 1) for p in parts]
    across = -(-width // (8 * max(h for h, _ in shapes)))
    down = -(-height // (8 * max(v for _, v in shapes)))
    scan = data.index(b"\xff\xda") + 5
    tables = [data[scan + 1 + 2 * i] for i in range(len(parts))]
    order = sorted(range(64), key=lambda p: (p // 8 + p % 8, (p // 8 if (p // 8 + p % 8) % 2 else p % 8)))
    planes = [np.zeros((down * v, across * h, 64), np.int64) for h, v in shapes]
    restart = data.rfind(b"\xff\xdd\0\4", 0, scan)  # the last one counts
    interval = int.from_bytes(data[restart + 4 : restart + 6], "big") if restart > 0 else 0
    for number, segment in enumerate(restart_segments(data)):
        bits = "".join(f"{byte:08b}" for byte in re.sub(b"\xff+\x00", b"\xff", segment))
        at, predicted = 0, [0] * len(parts)

        def symbol(table: dict[tuple[int, int], int], bits: str = bits) -> int:
            nonlocal at
            for size in range(1, 17):
                found = table.get((size, int(bits[at : at + size], 2)))
                if found is not None:
                    at += size
                    return found
            raise ValueError("no such code")

        def value(size: int, bits: str = bits) -> int:
            nonlocal at
            at += size
            number = int("0" + bits[at - size : at], 2)
            return number if size == 0 or number >> (size - 1) else number - 2**size + 1

        last = across * down if not interval else min((number + 1) * interval, across * down)
        for mcu in range(number * interval, last):
            for c, (h, v) in enumerate(shapes):
                for b in range(h * v):
                    block = np.zeros(64, np.int64)
                    predicted[c] += value(symbol(codes[tables[c] >> 4]))
                    block[0] = predicted[c]
                    k = 1
                    while k < 64:
                        run = symbol(codes[0x10 | tables[c] & 15])
                        if run & 15 == 0 and run != 0xF0:
                            break
                        k += run >> 4
                        block[order[k]] = value(run & 15)
                        k += 1
                    natural = np.zeros(64, np.int64)
                    natural[order] = quants[parts[c][2]]
                    planes[c][mcu // across * v + b // h, mcu % across * h + b % h] = block * natural
    return [plane.reshape(*plane.shape[:2], 8, 8) for plane in planes]


def jpeg_planes(data: bytes) -> list[np.ndarray]:
    """Samples of each component by the definition of the inverse DCT, (height, width) float64 with MCU padding."""
    u = np.arange(8)
    basis = np.cos((2 * u[:, None] + 1) * u * np.pi / 16) / 2
    basis[:, 0] /= np.sqrt(2)
    planes = []
    for coefficients in jpeg_coefficients(data):
        samples = (
            np.einsum("yu,bcuv,xv->bycx", basis, coefficients.astype(np.float64), basis, optimize=True) + 128
        )
        planes.append(np.clip(samples.reshape(samples.shape[0] * 8, -1), 0, 255))
    return planes


def crop_planes(
    planes: list[np.ndarray],
    sampling: tuple[int, int],
    box: tuple[float, float, float, float],
    clip: tuple[int, int, int, int],
    size: tuple[int, int],
    flips: int = 0,
) -> np.ndarray:
    """See :func:`fastload.kernels.crops.crop_to`, without reduction; ``sampling`` (y, x) is luma samples to a chroma sample."""
    resized = []
    for c, plane in enumerate(planes):
        sy, sx = sampling if c else (1, 1)
        limits = [clip[0] // sy, clip[1] // sx, -(-clip[2] // sy), -(-clip[3] // sx)]
        rows = axis_matrix(box[0] / sy, box[2] / sy, limits[0], limits[2], plane.shape[0], size[0])
        columns = axis_matrix(box[1] / sx, box[3] / sx, limits[1], limits[3], plane.shape[1], size[1])
        resized.append(rows @ plane @ columns.T)
    y = resized[0]
    cb, cr = (p - 128 for p in resized[1:]) if len(planes) == 3 else (0 * y, 0 * y)
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=2)
    out = np.clip(np.floor(rgb + 0.5), 0, 255).astype(np.uint8)
    out = out[:, ::-1] if flips & 1 else out
    return out[::-1] if flips & 2 else out
