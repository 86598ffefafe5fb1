"""The GPU kernel against the numpy oracle: through Triton's interpreter in processes of their own, compiled, and on a GPU if there is one."""

import os
import subprocess
import sys

import gpu_cases
import numpy as np
import pytest
import torch
from interpreted import result, start

from fastload.kernels import gpu

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


def check(measured):
    """Every case has passed its own limit; this holds how rarely the limit is needed."""
    assert max(m["plain"] for m in measured) <= 1.001
    assert np.mean([m["differ"] for m in measured]) < 0.01


def test_the_kernels_equal_the_oracle():
    """200 random pipelines; 40 random crops such as no pipeline draws; a scale of 16; Mixup and CutMix."""
    pytest.importorskip("triton")
    processes = [
        start(gpu_cases, "drawn", "0", "100"),
        start(gpu_cases, "drawn", "100", "200"),
        start(gpu_cases, "crop", "0", "40"),
        start(gpu_cases, "other"),
    ]
    first, second, crops, (special, mixed) = map(result, processes)
    assert len(first) == len(second) == 100 and len(crops) == 40
    check([*first, *second])
    check(crops)
    check(special)
    assert max(mixed) <= 1


def test_the_kernels_compile_for_t4_and_h100():
    pytest.importorskip("triton")
    for kernels in result(start(gpu_cases, "compile", "75", "90", interpret=False)):
        assert len(kernels) == 9
        for name, (code, shared) in kernels.items():
            # Shared memory in a crop would mean that taps are exchanged between lanes, see gpu_triton.crop_kernel.
            assert code > 1000 and (shared == 0 or "crop_kernel" not in name), (name, code, shared)


@needs_gpu
def test_the_kernel_on_a_gpu_equals_the_oracle():
    cases = [*map(gpu_cases.Case, range(64)), *map(gpu_cases.drawn, range(200)), *gpu_cases.special()]
    check([gpu_cases.compare(case, "cuda") for case in cases])


@needs_gpu
def test_mixing_on_a_gpu_equals_the_oracle():
    assert max(gpu_cases.compare_mix(count, "cuda") for count in (1, 2, 5)) <= 1


def test_plain_torch_equals_the_oracle():
    cases = [*map(gpu_cases.Case, range(64)), *gpu_cases.special()]
    check([gpu_cases.compare(case, "cpu", gpu.crop_reference) for case in cases])
    assert max(gpu_cases.compare_mix(count, "cpu", gpu.mix_reference) for count in (1, 2, 5)) <= 1


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="Triton's interpreter was asked for")
def test_tensors_in_host_memory_need_no_triton(monkeypatch):
    monkeypatch.setattr(gpu, "triton_kernels", lambda name: pytest.fail("Triton was asked for"))
    gpu_cases.compare(gpu_cases.Case(3), "cpu")
    gpu_cases.compare_mix(3, "cpu")


def test_without_triton_there_is_a_sentence(monkeypatch):
    case = gpu_cases.Case(0)
    out = torch.empty(3, 3, *case.size)
    monkeypatch.setattr(gpu, "runs_triton", lambda tensor: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "fastload.kernels.gpu_triton", raising=False)
    monkeypatch.delattr("fastload.kernels.gpu_triton", raising=False)
    with pytest.raises(ImportError, match=r"GPU kernels need Triton.*pip install triton"):
        gpu.crop(case.sources(0, "cpu"), case.table, out, case.paint)


def test_the_module_is_imported_without_torch_and_triton():
    code = "import sys, fastload.kernels.gpu; print([m for m in ('torch', 'triton') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
def test_a_buffer_and_separate_tensors_are_the_same_sources(layout):
    rng = np.random.default_rng(1)
    shapes = np.array([[5, 7], [3, 3], [8, 2]])
    images = [rng.integers(0, 256, (3, *s) if layout == "CHW" else (*s, 3), dtype=np.uint8) for s in shapes]
    ends = np.cumsum([i.size + 5 for i in images])
    offsets = ends - [i.size for i in images]
    buffer = torch.zeros(int(ends[-1]), dtype=torch.uint8)
    for image, offset in zip(images, offsets):
        buffer[offset : offset + image.size] = torch.from_numpy(image.ravel())
    apart = gpu.sources_of([torch.from_numpy(i) for i in images], layout)
    together = gpu.sources_in(buffer, offsets, shapes, layout)
    assert np.array_equal(apart.shapes, together.shapes) and np.array_equal(apart.strides, together.strides)
    for row, image in enumerate(images):
        planar = image if layout == "CHW" else image.transpose(2, 0, 1)
        for sources in (apart, together):
            assert np.array_equal(sources.image(row).numpy(), planar)


def test_sources_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="'CHW' or 'HWC', got 'NCHW'"):
        gpu.sources_of([], "NCHW")
    with pytest.raises(ValueError, match=r"image 1 .*CHW order, got torch.uint8 \(4, 5, 3\)"):
        gpu.sources_of([torch.zeros(3, 4, 5).byte(), torch.zeros(4, 5, 3).byte()], "CHW")
    with pytest.raises(ValueError, match=r"image 1, 2 x 3 at byte 3, is not in a buffer of 20 bytes"):
        gpu.sources_in(torch.zeros(20).byte(), np.array([2, 3]), np.array([[2, 3], [2, 3]]))
    with pytest.raises(ValueError, match="without gaps"):
        gpu.sources_in(torch.zeros(20).byte()[::2], np.array([0]), np.array([[1, 1]]))


@pytest.mark.parametrize(
    ("column", "row", "message"),
    [
        ("place", [0, 0, 99, 4], "row 1 .*its place is outside of an output"),
        ("clip", [0, 0, 99, 1], "row 1 .*its clip is empty or outside"),
        ("clip", [1, 0, 1, 1], "row 1 .*its clip is empty or outside"),
        ("box", [1.0, 0.0, 1.0, 4.0], "row 1 .*its box has no area"),
        ("box", [0.0, 0.0, np.nan, 4.0], "row 1 .*its box has no area"),
    ],
)
def test_rows_that_reach_outside_are_refused(column, row, message):
    case = gpu_cases.Case(0)
    values = getattr(case.table, column).copy()
    values[1] = row
    table = case.table._replace(**{column: values})
    table.place[1, 2:] = np.maximum(table.place[1, 2:], 1) if column == "box" else table.place[1, 2:]
    out = torch.empty(3, 3, *case.size)
    for crop in (gpu.crop, gpu.crop_reference):
        with pytest.raises(ValueError, match=message):
            crop(case.sources(0, "cpu"), table, out, case.paint)


def test_outputs_that_cannot_be_filled_are_refused():
    case = gpu_cases.Case(0)
    sources, size = case.sources(0, "cpu"), case.size
    for out in (
        torch.empty(3, 3, *size).double(),
        torch.empty(3, *size, 3),
        torch.empty(3, 3, *size, 2)[..., 0],
    ):
        with pytest.raises(ValueError, match="images must be"):
            gpu.crop(sources, case.table, out, case.paint)
    with pytest.raises(ValueError, match="as many rows, at most 65535, got 3, 3 and 2"):
        gpu.crop(sources, case.table, torch.empty(2, 3, *size), case.paint)
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        gpu.crop(sources, case.table, torch.empty(3, 3, *size, device="meta"), case.paint)
    with pytest.raises(ValueError, match="2 images needs as many weights and boxes"):
        gpu.mix(torch.empty(2, 3, 4, 4), np.ones(3, np.float32), np.zeros((3, 4), np.int64))
