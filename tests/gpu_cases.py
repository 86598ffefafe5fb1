"""Random crops for the GPU kernel, and what the oracle makes of them; for tests through Triton's interpreter and on a GPU.

TRITON_INTERPRET=1 must be set before Triton is imported, and torch or another test may have imported it. So the interpreter runs
in a process of its own, which prints what was measured as one line of JSON.

>>> TRITON_INTERPRET=1 python tests/gpu_cases.py crop 0 20
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from dataclasses import replace

import numpy as np
import torch
from engine_cases import random_pipeline

from fastload import draws
from fastload import transforms as T
from fastload.kernels import gpu, oracle
from fastload.kernels.batch import Paint, Rows

DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
SENTINELS = {True: (float("nan"), 7.0), False: (77, 178)}


class Case:
    """A batch of three random images, their rows of a table, and the output that they are for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = self.rng = np.random.default_rng(seed)
        self.dtype = DTYPES[seed % 4]
        self.last = bool(seed // 4 % 2)
        self.size = tuple(rng.integers(8, 41, 2).tolist())
        self.images, self.kinds = [], []
        for _ in range(3):
            shape = np.where(rng.random(2) < 0.1, 1, rng.integers(1, 81, 2))
            self.images.append(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
            self.kinds.append(("planar", "interleaved", "padded")[rng.integers(3)])
        clip, place, box = [], [], []
        for image in self.images:
            c, p, b = zip(*(self._axis(image.shape[a], self.size[a]) for a in (0, 1)))
            clip.append([c[0][0], c[1][0], c[0][1], c[1][1]])
            place.append([p[0][0], p[1][0], p[0][1], p[1][1]])
            box.append([b[0][0], b[1][0], b[0][1], b[1][1]])
        erasers = seed % 3
        colour = np.zeros((0, 3, 7), np.float32)
        if rng.random() < 0.7:
            colour = np.zeros((3, 3, 7), np.float32)
            colour[:, :, :3] = np.eye(3) + rng.normal(0, 0.2, (3, 3, 3))
            colour[:, :, 3:6] = rng.normal(0, 0.2, (3, 3, 3)) * (rng.random((3, 1, 1)) < 0.5)
            colour[:, :, 6] = rng.normal(0, 20, (3, 3))
        erase = np.sort(rng.integers(0, min(self.size) + 1, (3, erasers, 2, 2)), axis=2).reshape(
            3, erasers, 4
        )
        self.table = Rows(
            np.array(place, np.int64), np.array(box, np.float64), np.array(clip, np.int64), rng.integers(0, 4, 3),
            colour, rng.random(3) < 0.8 if len(colour) else np.zeros(3, bool), erase,
        )  # fmt: skip
        std = np.array([0.229, 0.224, 0.225])
        self.paint = Paint(
            rng.integers(0, 256, 3).astype(np.uint8),
            rng.integers(0, 256, (erasers, 3)).astype(np.uint8),
            (1 / (255 * std)).astype(np.float32),
            (-np.array([0.485, 0.456, 0.406]) / std).astype(np.float32),
        )

    def __repr__(self) -> str:
        return f"case {self.seed}: {self.kinds} to {self.dtype}, {'channels_last' if self.last else 'contiguous'}"

    def _axis(self, length: int, out: int) -> tuple[tuple[int, int], tuple[int, int], tuple[float, float]]:
        """Clip, place and box of one axis."""
        rng = self.rng
        low, high = (0, length) if rng.random() < 0.5 else np.sort(rng.integers(0, length + 1, 2)).tolist()
        if low == high:
            low, high = 0, length
        kind = rng.integers(6)
        size = out if rng.random() < 0.5 else int(rng.integers(0, out + 1))
        start = int(rng.integers(0, out - size + 1))
        if kind == 0:  # not scaled, at times larger than what there is, most from a whole pixel
            at = float(rng.integers(low, high)) + (0.25 if rng.random() < 0.3 else 0)
            return (low, high), (start, size), (at, at + max(size, 1))
        if kind == 1:  # a crop in whole pixels
            return (low, high), (start, size), (float(low), float(high))
        scale = np.exp(rng.uniform(np.log(0.3), np.log(6)))
        span = max(size, 1) * scale
        at = rng.uniform(low, max(high - span, low + 0.5)) - (rng.uniform(0, 3) if kind == 2 else 0)
        return (low, high), (start, size), (at, at + span)

    def sources(self, guard: int, device: str) -> gpu.Sources:
        """The images on the device, planar, interleaved, or with ``guard`` in the gaps between rows and planes."""
        views = []
        for number, (image, kind) in enumerate(zip(self.images, self.kinds)):
            pixels = image if kind == "interleaved" else image.transpose(2, 0, 1)
            gaps = ((1, 0), (2, 1), (0, 3)) if kind == "padded" else ((0, 0),) * 3
            memory = np.pad(pixels, gaps, constant_values=guard)
            stored = held(memory.tobytes(), bool(number % 2), guard, device).view(memory.shape)
            inner = tuple(slice(a, size - b) for size, (a, b) in zip(memory.shape, gaps))
            views.append(stored.permute(2, 0, 1) if kind == "interleaved" else stored[inner])
        return gpu.sources_of(views, "CHW")

    def expected(self) -> np.ndarray:
        """The oracle's batch (3, H, W, 3), uint8 or float32."""
        table, levels = self.table, np.empty((3, *self.size, 3), np.uint8)
        for i, image in enumerate(self.images):
            (y, x, h, w), canvas = table.place[i], levels[i]
            canvas[:] = self.paint.background
            if h and w:
                canvas[y : y + h, x : x + w] = oracle.resize(
                    image, table.box[i], table.clip[i], (h, w), table.flips[i]
                )
            if len(table.colour) and table.coloured[i]:
                canvas[:] = oracle.recolour(canvas, table.colour[i])
            for (y0, x0, y1, x1), fill in zip(table.erase[i], self.paint.erase_fill):
                canvas[y0:y1, x0:x1] = fill
        if self.dtype == torch.uint8:
            return levels
        return oracle.normalise(levels, self.paint.scale, self.paint.shift)


def held(data: bytes, at_end: bool, guard: int, device: str) -> torch.Tensor:
    """``data`` as uint8 on the device, in host memory beside a page that may not be touched (behind it, or before it)."""
    if device != "cpu":
        rim = bytes([guard]) * 64
        return torch.frombuffer(bytearray(rim + data + rim), dtype=torch.uint8).to(device)[64:-64]
    page = mmap.PAGESIZE
    pages = -(-len(data) // page) * page
    memory = mmap.mmap(-1, pages + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fence, offset = (start + pages, pages - len(data)) if at_end else (start, page)
    memory[offset : offset + len(data)] = data
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    return torch.frombuffer(memory, dtype=torch.uint8, count=len(data), offset=offset)


def blank(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, sentinel: float, device: str
) -> torch.Tensor:
    """A poisoned output."""
    form = torch.channels_last if last else torch.contiguous_format
    return torch.full(shape, sentinel, dtype=dtype, device=device).contiguous(memory_format=form)


def off_by(images: torch.Tensor, expected: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """How many levels each element is off, without what the rounding of ``images`` to its own dtype explains."""
    ours = images.permute(0, 2, 3, 1).cpu().double().numpy()
    if images.dtype == torch.uint8:
        return np.abs(ours - expected)
    # Triton's interpreter cuts bfloat16 where a GPU rounds: wrong by up to a whole unit in the last place, not a half.
    units = 1.0 if images.dtype == torch.bfloat16 and "TRITON_INTERPRET" in os.environ else 0.5
    rounding = np.abs(expected) * (
        torch.finfo(images.dtype).eps * units if images.element_size() == 2 else 1e-6
    )
    return np.maximum(np.abs(ours - expected) - rounding, 0) / scale


def compare(case: Case, device: str, crop=gpu.crop) -> dict[str, float]:
    """Run a case in poisoned memory, every third one twice with other poison; how many levels it is off the oracle."""
    results = []
    for sentinel, guard in list(zip(SENTINELS[case.dtype.is_floating_point], (0, 255)))[case.seed % 3 > 0 :]:
        out = blank((3, 3, *case.size), case.dtype, case.last, sentinel, device)
        crop(case.sources(guard, device), case.table, out, case.paint)
        results.append(out)
    assert torch.equal(results[0], results[-1]), (
        f"{case}: unwritten pixels, or pixels from outside of the image"
    )
    wrong = off_by(results[0], case.expected(), case.paint.scale)
    # A sum of taps that lies on x.5 in exact arithmetic is rounded to either side by the order of adding. That level, the
    # only one that a resize may be off, is then multiplied by the colour matrix.
    gain = np.ones(3)
    if len(case.table.colour):
        gain = np.where(case.table.coloured, np.abs(case.table.colour[:, :, :6]).sum(2).max(1), 1)
    allowed = np.ceil(gain)[:, None, None, None] + 1e-3
    assert (wrong <= allowed).all(), f"{case}: {wrong.max((1, 2, 3))} levels off, {case.table}"
    plain = ~case.table.coloured
    return {
        "plain": float(wrong[plain].max(initial=0)),
        "coloured": float(wrong.max()),
        "differ": float((wrong > 0.5).mean()),
    }


def compare_mix(count: int, device: str, mix=gpu.mix) -> float:
    """Mixup and CutMix of ``count`` images in all dtypes and both layouts: the most levels by which the oracle differs."""
    rng = np.random.default_rng(count)
    weights = rng.random(count).astype(np.float32)
    boxes = np.zeros((count, 4), np.int64)
    boxes[:: 3 if count > 2 else 2] = [1, 2, 9, 13]
    worst = 0.0
    scale = np.full(3, 1 / 64)
    for dtype in DTYPES:
        for last in (True, False):
            levels = rng.integers(0, 256, (count, 3, 21, 19)).astype(np.float64)
            values = torch.from_numpy(levels if dtype == torch.uint8 else levels / 64 - 2).to(dtype)
            images = blank(tuple(values.shape), dtype, last, 0, device)
            images.copy_(values)
            nhwc = values.permute(0, 2, 3, 1)
            before = nhwc.numpy() if dtype == torch.uint8 else nhwc.float().numpy()
            mix(images, weights, boxes)
            wrong = off_by(images, oracle.mix(before, weights, boxes), scale)
            worst = max(worst, float(wrong.max()))
            assert worst <= 1 and (wrong > 0.5).mean() < 0.001, (dtype, last, worst, (wrong > 0.5).mean())
    return worst


def compile_for(capability: int) -> dict[str, list[int]]:
    """Compile the kernels for a GPU that need not be here: bytes of machine code and of shared memory of each."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fastload.kernels import gpu_rng_triton, gpu_triton

    found = {}
    same = {"HEIGHT": 224, "WIDTH": 224, "BLOCK": gpu.BLOCK}
    tables = {"words": "*i64", "reals": "*fp32", "paint": "*fp32", "sums": "*i64"}
    mixes = {"weights": "*fp32", "boxes": "*i64", "count": "i32"}
    jobs = [(gpu_triton.sums_kernel, tables, {**same, "COLUMNS": 20})]
    for kind, last in (("u8", True), ("fp16", False), ("bf16", True)):
        flags = {"COLUMNS": 20, "ERASERS": 1, "LAST": last, "NORMALISE": kind != "u8"}
        jobs.append((gpu_triton.crop_kernel, {**tables, "out": f"*{kind}"}, {**same, **flags}))
        flags = {"LAST": last, "ROUNDING": kind == "u8"}
        jobs.append((gpu_triton.mix_kernel, {**mixes, "images": f"*{kind}"}, {**same, **flags}))
    words = dict.fromkeys(("count", "low", "high", "epoch", "stream", "length", "half"), "i32")
    flags = {"COUNT": 40, "BLOCKS": 10, "BLOCK": 256}
    jobs.append((gpu_rng_triton.uniforms_kernel, {**words, "samples": "*i64", "out": "*fp64"}, flags))
    jobs.append(
        (gpu_rng_triton.permute_kernel, {**words, "positions": "*i64", "out": "*i64"}, {"BLOCK": 256})
    )
    for number, (kernel, types, constants) in enumerate(jobs):
        signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
        # What a launch with torch's tensors knows as well.
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if "*" in signature[n]
        }
        source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        found[f"{number} {kernel.__name__}"] = [len(made.asm["cubin"]), made.metadata.shared]
    return found


def drawn(seed: int) -> Case:
    """A random pipeline's table for random images."""
    case = Case(seed)
    plan = draws.Plan((*random_pipeline(seed), *((T.Normalize(),) if seed % 2 else ())))
    # The interpreter takes a second for a pixel that is the mean of a whole image; special() has such a scale.
    height, width = (6 * side + 6 for side in plan.size)
    case.images = [image[:height, :width].copy() for image in case.images]
    heights, widths = np.array([image.shape[:2] for image in case.images]).T
    table = plan.draw(seed, 0, np.arange(3), heights, widths)
    colour = np.zeros((0, 3, 7), np.float32) if table.colour is None else table.colour
    case.table, case.size = replace(table, colour=colour), plan.size
    case.paint = Paint(np.array(plan.fill, np.uint8), plan.erase_fill, *plan.affine)
    return case


def special() -> list[Case]:
    """Cases that chance would not bring: four pipelines with all steps, and a scale of 16."""
    cases = []
    pipeline = [
        T.RandomResizedCrop(20), T.HorizontalFlip(), T.ColorJitter(0.4, 0.4, 0.4, 0.1), T.RandomErasing(p=0.5),
        T.Normalize(),
    ]  # fmt: skip
    for seed in range(4):
        case, plan = Case(seed), draws.Plan(pipeline)
        heights, widths = np.array([image.shape[:2] for image in case.images]).T
        case.table = plan.draw(seed, 0, np.arange(3), heights, widths)
        case.size, case.paint = (20, 20), Paint(np.array(plan.fill, np.uint8), plan.erase_fill, *plan.affine)
        cases.append(case)
    case = Case(4)
    case.size = (9, 10)
    case.images = [case.rng.integers(0, 256, (150, 170, 3), dtype=np.uint8) for _ in range(3)]
    clip = np.array([[0, 0, 150, 170], [3, 5, 147, 169], [0, 0, 150, 170]])
    box = np.array([[0.5, 0, 144.5, 160], [3, 5, 147, 20], [-2.25, 30, 22.75, 190]])
    case.table = case.table._replace(place=np.array([[0, 0, 9, 10]] * 3), clip=clip, box=box)
    return [*cases, case]


def main(name: str, *numbers: str) -> None:
    found: object
    if name == "crop":
        found, usual = [], gpu.BLOCK
        for seed in range(*map(int, numbers)):
            gpu.BLOCK = 2048 if seed % 16 else usual  # the interpreter is as slow with fewer lanes
            found.append(compare(Case(seed), "cpu"))
    elif name == "drawn":
        gpu.BLOCK = 4096
        found = [compare(drawn(seed), "cpu") for seed in range(*map(int, numbers))]
    elif name == "other":
        gpu.BLOCK = 2048
        found = [
            [compare(case, "cpu") for case in special()],
            [compare_mix(count, "cpu") for count in (1, 2, 5)],
        ]
    else:
        found = [compile_for(int(capability)) for capability in numbers]
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
