"""Random JPEGs, windows and damage for the JPEG decoder on the GPU; for tests through Triton's interpreter, on a GPU, and of its reference.

Pixels must be Pillow's (libjpeg-turbo's), all of them. The interpreter takes some 10 ms for each symbol of the longest segment, so its
images are tiny; it runs in processes of its own, see :mod:`gpu_cases`.

>>> TRITON_INTERPRET=1 python tests/gpu_jpeg_cases.py decode 0 10  # or: damaged 0 10, other 1 2, compile 75 90
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import sys
import tarfile
import unittest.mock
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from gpu_cases import held
from jpeg_damage import picture
from PIL import Image

from fastload import codecs
from fastload.kernels import gpu_jpeg, jpeg

KINDS = ("4:2:0", "4:2:2", "4:4:0", "4:4:4", "L", "ours")


def pillow(pixels: np.ndarray, mode: str = "RGB", **options) -> bytes:
    """A JPEG by Pillow."""
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """The oracle's pixels (h, w, 3) uint8."""
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def encode(pixels: np.ndarray, kind: str, quality: int, interval: int, optimize: bool = False) -> bytes:
    """A JPEG of a kind; what neither Pillow nor we encode gets its restart markers afterwards, at an interval of our choice."""
    if kind == "ours":
        return codecs.encode_jpeg(pixels, quality)
    if kind == "4:4:0":
        return codecs.keep_jpeg(simplejpeg.encode_jpeg(pixels, quality, "RGB", "440"))
    options = {} if kind == "L" else {"subsampling": kind}
    return pillow(
        pixels, "L" if kind == "L" else "RGB", quality=quality, optimize=optimize,
        restart_marker_blocks=interval, **options,
    )  # fmt: skip


def window(rng: np.random.Generator, height: int, width: int) -> list[int]:
    """A window of an image: all of it, one pixel, at a corner, or anything."""
    kind = rng.integers(6)
    if kind == 0:
        return [0, 0, height, width]
    y, x = (np.sort(rng.integers(0, size + 1, 2)).tolist() for size in (height, width))
    if kind == 1 or y[0] == y[1] or x[0] == x[1]:
        y, x = ([at, at + 1] for at in (int(rng.integers(height)), int(rng.integers(width))))
    if kind == 2:
        y[0], x[0] = 0, 0
    if kind == 3:
        y[1], x[1] = height, width
    return [y[0], x[0], y[1], x[1]]


class Case:
    """A few JPEGs, and windows of them; ``most`` pixels along a side."""

    def __init__(self, seed: int, most: int, count: int = 1) -> None:
        rng = self.rng = np.random.default_rng([seed, most])
        self.seed = seed
        self.jpegs = []
        for number in range(count):
            kind = KINDS[(seed + number) % len(KINDS)]
            height, width = rng.integers(1, most + 1, 2).tolist()
            if rng.random() < 0.2:  # libjpeg does not filter chroma of two columns
                width = int(rng.integers(1, 7))
            pixels = picture(height, width, seed, float(rng.integers(0, 12 if most > 64 else 4)))
            quality, interval = int(rng.integers(30, 101)), int(rng.integers(1, 9))
            if most <= 64:  # few symbols in a segment
                quality, interval = 30 + (quality - 30) * 6 // 10, 1 + interval % 2
            self.jpegs.append(encode(pixels, kind, quality, interval, bool(rng.integers(2))))
        self.images = rng.integers(0, count, max(count, 1))
        self.images[:count] = rng.permutation(count)
        self.windows = np.array([window(rng, *decoded(self.jpegs[i]).shape[:2]) for i in self.images])

    def __repr__(self) -> str:
        return f"case {self.seed}: {self.windows.tolist()} of {self.images.tolist()}"


def laid_out(jpegs: list[bytes], seed: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """JPEGs with garbage between them, and where they begin and how long they are."""
    rng = np.random.default_rng(seed)
    data, starts = b"", []
    for one in jpegs:
        data += rng.bytes(int(rng.integers(1, 6)))
        starts.append(len(data))
        data += one
    return data + rng.bytes(1), np.array(starts), np.array([len(one) for one in jpegs])


@contextlib.contextmanager
def fenced(device: str, at_end: bool):
    """New tensors of host memory lie beside a page that may not be touched, and are poisoned unless they are zeros."""
    if device != "cpu":
        yield
        return

    def make(fill, usual):
        def new(self, *size, dtype=None, device=None):
            if device is not None:  # Triton's interpreter
                return usual(self, *size, dtype=dtype, device=device)
            dtype = dtype or self.dtype
            count = math.prod(size) * dtype.itemsize
            if count == 0:
                return torch.empty(size, dtype=dtype)
            memory = held(bytes([fill]) * count, at_end, 0, "cpu")
            return (memory if dtype == torch.uint8 else memory.view(dtype)).view(size)

        return new

    with (
        unittest.mock.patch.object(torch.Tensor, "new_zeros", make(0, torch.Tensor.new_zeros)),
        unittest.mock.patch.object(torch.Tensor, "new_empty", make(0x55, torch.Tensor.new_empty)),
    ):
        yield


def decode(data: bytes, index, images, windows, device: str, at_end: bool):
    """The windows as arrays, and the errors; memory ends beside a page that may not be touched, or begins there."""
    memory = held(data, at_end, 255, device)
    with fenced(device, at_end):
        sources, errors = gpu_jpeg.decode(memory, index.to(device), images, windows)
    return [
        sources.image(row).permute(1, 2, 0).cpu().numpy() for row in range(len(images))
    ], errors.cpu().numpy()


def compare(case: Case, device: str) -> int:
    """Decode a case, and hold it against the oracle; the pixels that were compared."""
    data, starts, sizes = laid_out(case.jpegs, case.seed)
    index = gpu_jpeg.index_of(np.frombuffer(data, np.uint8), starts, sizes)
    assert index.ok.all(), case
    found, errors = decode(data, index, case.images, case.windows, device, bool(case.seed % 2))
    assert not errors.any(), (case, errors)
    pixels = 0
    for image, (y0, x0, y1, x1), ours in zip(case.images, case.windows, found):
        expected = decoded(case.jpegs[image])[y0:y1, x0:x1]
        assert ours.shape == expected.shape
        assert np.array_equal(ours, expected), (case, np.abs(ours.astype(int) - expected).max())
        pixels += ours.shape[0] * ours.shape[1]
    return pixels


def damage(data: bytearray, start: int, size: int, rng: np.random.Generator) -> None:
    """Change bytes of the scan, in one of several ways."""
    info, _ = jpeg.parse(np.frombuffer(data, np.uint8)[start : start + size])
    scan, end = start + int(info[jpeg.SCAN_AT]), start + size
    at = int(rng.integers(scan, end))
    kind = rng.integers(6)
    if kind == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        for _ in range(8):
            data[int(rng.integers(scan, end))] = int(rng.integers(256))
    elif kind == 2:  # zeros or ones: codes that are short, or none
        data[at:end] = bytes([255 * int(rng.integers(2))]) * (end - at)
    elif kind == 3:
        data[at:end] = rng.bytes(end - at)
    elif kind == 4:
        data[at] = 0xFF
    else:  # a part of the data moves
        data[scan : end - 1] = data[scan + 1 : end]


def endure(seed: int, device: str, most: int) -> list[int]:
    """Decode a case whose bytes were damaged after they were indexed, or whose segments seem shorter than they are.

    Nothing outside may be touched, and it must end. Where both see no error, the pixels are the reference's.
    Returns the flags.
    """
    case = Case(seed, most)
    rng = case.rng
    data, starts, sizes = laid_out(case.jpegs, seed)
    index = gpu_jpeg.index_of(np.frombuffer(data, np.uint8), starts, sizes)
    if seed % 5 == 4 and len(index.segments) > 1:
        begins = index.segments.copy()
        begins[1:] -= np.minimum(begins[1:] - begins[:-1] - 2, rng.integers(0, 9)).astype(np.uint32)
        index = index._replace(segments=begins)
    else:
        bad = bytearray(data)
        damage(bad, int(starts[0]), int(sizes[0]), rng)
        data = bytes(bad)
    height, width = index.shapes[0]
    windows = np.array([[0, 0, height, width]]) if seed % 2 else case.windows
    found, errors = decode(data, index, case.images, windows, device, bool(seed // 2 % 2))
    with unittest.mock.patch.object(gpu_jpeg.gpu, "runs_triton", lambda tensor: False):
        expected, flags = decode(data, index, case.images, windows, "cpu", True)
    if not errors.any() and not flags.any():
        assert np.array_equal(found[0], expected[0]), case
    elif (
        errors.any() != flags.any()
    ):  # the kernel looks further ahead for markers, and into stuffing that is left
        assert (errors | flags)[0] in (gpu_jpeg.BAD_MARKER, gpu_jpeg.TOO_MUCH), (case, errors, flags)
    return [int(errors[0]), int(flags[0])]


def compile_for(capability: int) -> dict[str, list[int]]:
    """Compile the kernels for a GPU that need not be here: bytes of machine code and of shared memory of each."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fastload.kernels import gpu_jpeg_triton as kernels

    types = {
        "memory": "*u8", "words": "*i64", "segments": "*i64", "lanes": "*i64", "blocks": "*i64", "pixels": "*i64",
        "huffman": "*i16", "quant": "*i32", "coefficients": "*i16", "errors": "*i32", "out": "*u8",
    }  # fmt: skip
    found = {}
    for kernel, constants, warps in (
        (kernels.entropy_kernel, {"LANES": gpu_jpeg.LANES}, 1),
        (kernels.transform_kernel, {"BLOCKS": gpu_jpeg.BLOCKS}, 4),
        (kernels.colour_kernel, {"PIXELS": gpu_jpeg.PIXELS}, 4),
    ):
        samples = {"samples": "*u8" if kernel is kernels.colour_kernel else "*i64"}
        signature = {n: "constexpr" if n in constants else {**types, **samples}[n] for n in kernel.arg_names}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n not in constants
        }
        source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        found[kernel.__name__] = [len(made.asm["cubin"]), made.metadata.shared, *resources(made.asm["cubin"])]
    return found


def resources(cubin: bytes) -> list[int]:
    """Registers and bytes of stack of a kernel, by the tool that comes with Triton; nothing if it is not there."""
    import re
    import subprocess
    import tempfile

    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        return []
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True
        ).stdout
    return [int(re.search(f"{name}:(\\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")]


def special() -> Case:
    """Segments that begin and end anywhere in a row, or are longer than one; large coefficients; a window of one MCU."""
    case = Case(1, 8)
    case.jpegs = [
        encode(picture(33, 57, 1, 1.0), "L", 60, 5),
        encode(picture(24, 60, 2, 1.0), "4:2:2", 40, 6),
        encode(picture(24, 24, 3, 1.0), "4:4:4", 40, 5),
        encode(picture(32, 40, 4, 90.0), "L", 100, 1),
        encode(picture(48, 48, 5, 1.0), "4:2:0", 50, 1),
    ]
    case.images = np.array([0, 0, 1, 2, 3, 4])
    case.windows = np.array(
        [
            *([9, 20, 30, 33], [8, 31, 25, 57], [10, 20, 20, 45]),
            *([9, 9, 23, 15], [0, 0, 32, 40], [16, 16, 32, 32]),
        ]
    )
    return case


def too_many(device: str) -> int:
    """The flag of a segment whose block has 65 coefficients: the difference 0, then four times 15 zeros and a 1."""
    jpeg_bytes = encode(picture(16, 16, 0), "L", 90, 2)
    data, starts, sizes = laid_out([jpeg_bytes], 0)
    index = gpu_jpeg.index_of(np.frombuffer(data, np.uint8), starts, sizes)
    bits = "00" + 4 * "11111111111101011"  # of the standard tables
    code = int(bits + "0" * (-len(bits) % 8), 2).to_bytes(9, "big").replace(b"\xff", b"\xff\0")
    bad, at = bytearray(data), int(starts[0] + index.segments[0])
    assert at + len(code) < starts[0] + index.segments[1] - 2
    bad[at : at + len(code)] = code
    _, errors = decode(bytes(bad), index, np.array([0]), np.array([[0, 0, 16, 16]]), device, True)
    return int(errors[0])


def transformed(device: str) -> float:
    """The share of samples of 2,048 blocks of large random coefficients that differ from the reference's: a wrong last digit of a
    constant changes one in 500 only."""
    from fastload.kernels import gpu_jpeg_reference, gpu_jpeg_triton

    blocks = np.random.default_rng(0).normal(0, 300, (2048, 64)).astype(np.int16)
    expected = gpu_jpeg_reference.transform(blocks).reshape(32, 64, 8, 8).transpose(0, 2, 1, 3)
    words = np.zeros((1, gpu_jpeg.COLUMNS), np.int64)
    words[0, [gpu_jpeg.MCU_BLOCKS, gpu_jpeg.LUMA, gpu_jpeg.MCUS, gpu_jpeg.MCUS_DOWN]] = 1, 1, 64, 32
    groups = np.ascontiguousarray(blocks.reshape(64, 32, 64).transpose(0, 2, 1))
    words, groups = torch.from_numpy(words).to(device), torch.from_numpy(groups).to(device)
    samples = torch.zeros(2048 * 8, dtype=torch.int64, device=device)
    gpu_jpeg_triton.transform_kernel[(1,)](words, words.new_zeros(1), groups, samples, 2048)
    return float((samples.view(torch.uint8).view(32, 8, 64, 8).cpu().numpy() != expected).mean())


def cut_photos(seed: int) -> Case:
    """Two windows of 32 x 32 pixels of a real photograph, as we encode it and as Pillow does; a made picture where none is there."""
    archive = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet_photos.tar"
    pixels = picture(32, 32, seed)
    if archive.exists():
        with tarfile.open(archive) as photos:
            member = [m for m in itertools.islice(photos, 4 * seed + 8) if m.isfile()][-1]
            photo = decoded(photos.extractfile(member).read())
        pixels = np.ascontiguousarray(photo[100:132, 100:132]) if min(photo.shape[:2]) >= 132 else pixels
    case = Case(seed, 8)
    case.jpegs = [encode(pixels, kind, 75, 1) for kind in ("ours", "4:2:0")]
    case.images, case.windows = np.array([1, 0]), np.array([[0, 0, 32, 32], [15, 9, 31, 30]])
    return case


def main(name: str, *numbers: str) -> None:
    found: object
    if name == "compile":
        found = [compile_for(int(capability)) for capability in numbers]
        print(json.dumps(found))
        return
    found = []
    for seed in range(*map(int, numbers)):
        # The interpreter is as slow with fewer lanes; some cases have several programs all the same.
        gpu_jpeg.LANES, gpu_jpeg.BLOCKS, gpu_jpeg.PIXELS = (64, 256, 2048) if seed % 8 else (8, 32, 256)
        if name == "decode":
            found.append(compare(Case(seed, 32), "cpu"))
        elif name == "other":
            compare(cut_photos(seed), "cpu")
            compare(special(), "cpu")
            found = [too_many("cpu"), transformed("cpu")]
        else:
            found.append(endure(seed, "cpu", 24))
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
