"""The JPEG decoder for the GPU against Pillow, to the bit: its reference, its kernels through Triton's interpreter, compiled, on a GPU if there is one."""

import io
import subprocess
import sys

import gpu_jpeg_cases as cases
import numpy as np
import pytest
import torch
from interpreted import result, start
from jpeg_damage import picture
from PIL import Image

from fastload import codecs
from fastload.kernels import gpu, gpu_jpeg, jpeg
from fastload.kernels.jpeg_index import LONG, _lookup

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


def index_of(*files):
    data, starts, sizes = cases.laid_out(list(files), 0)
    return data, gpu_jpeg.index_of(np.frombuffer(data, np.uint8), starts, sizes)


def patched(data, interval):
    """The same JPEG, as if it were 4,000 x 4,000 pixels in one segment."""
    info, _ = jpeg.parse(np.frombuffer(data, np.uint8))
    bad, at, dri = bytearray(data), int(info[jpeg.FRAME_AT]), data.index(b"\xff\xdd\0\4")
    end = data.index(b"\xff\xd0", int(info[jpeg.SCAN_AT]))
    bad[at : at + 4] = 2 * (4000).to_bytes(2, "big")
    bad[dri + 4 : dri + 6] = interval.to_bytes(2, "big")
    bad[end + 1] = 0xD9
    return bytes(bad)


@pytest.fixture
def plain(monkeypatch):
    """The reference, whatever the environment says."""
    monkeypatch.setattr(gpu, "runs_triton", lambda tensor: tensor.is_cuda)


def test_the_kernels_equal_pillow_and_touch_nothing_else():
    """Whole images and windows of all kinds of JPEG; and damaged ones, with pages around all memory that may not be touched."""
    pytest.importorskip("triton")
    sound, damaged, other = (
        start(cases, "decode", "0", "15"),
        start(cases, "damaged", "0", "12"),
        start(cases, "other", "1", "2"),
    )
    assert len(result(sound)) == 15
    assert result(other) == [gpu_jpeg.BAD_CODE, 0.0]
    assert np.any(result(damaged), axis=1).sum() >= 4


def test_the_kernels_compile_for_t4_and_h100():
    """Without shared memory, so no lane waits for another's data; registers are left for 16 warps of a scheduler, and none spill."""
    pytest.importorskip("triton")
    processes = [start(cases, "compile", capability, interpret=False) for capability in ("75", "90")]
    for (kernels,) in map(result, processes):
        assert len(kernels) == 3
        for name, (code, shared, *resources) in kernels.items():
            assert code > 1000 and shared == 0, (name, code, shared)
            if resources:
                registers, stack, local = resources
                assert registers <= (64 if name == "entropy_kernel" else 96), (name, registers)
                assert stack == local == 0, (name, "registers spill")


def test_the_reference_equals_pillow(plain):
    assert sum(cases.compare(cases.Case(seed, 100, 3), "cpu") for seed in range(150)) > 300_000
    cases.compare(cases.special(), "cpu")


def test_the_reference_endures_damage(plain):
    assert cases.too_many("cpu") == gpu_jpeg.BAD_CODE
    flags = np.array([cases.endure(seed, "cpu", 60) for seed in range(120)])
    assert (flags[:, 0] > 0).mean() > 0.3


@needs_gpu
def test_the_kernels_on_a_gpu_equal_pillow():
    for seed in range(200):
        cases.compare(cases.Case(seed, 100, 3), "cuda")
    cases.compare(cases.special(), "cuda")
    assert cases.transformed("cuda") == 0


@needs_gpu
def test_the_kernels_on_a_gpu_endure_damage():
    assert cases.too_many("cuda") == gpu_jpeg.BAD_CODE
    flags = np.array([cases.endure(seed, "cuda", 60) for seed in range(200)])
    assert (flags[:, 0] > 0).mean() > 0.3


def check_photos(photos, device):
    """Photographs as convert keeps them, and as it encodes them: 32 at once, a window each."""
    kept = []
    for i, photo in enumerate(photos[:32]):
        pixels = np.array(Image.open(io.BytesIO(photo)).convert("RGB"))[: 120 + 7 * i, : 160 + 5 * i]
        kept.append(codecs.encode_jpeg(pixels, 50 + i) if i % 2 else codecs.keep_jpeg(photo))
    rng = np.random.default_rng(0)
    case = cases.Case(0, 8)
    case.jpegs, case.images = kept, np.arange(len(kept))
    case.windows = np.array([cases.window(rng, *cases.decoded(one).shape[:2]) for one in kept])
    return cases.compare(case, device)


def test_the_reference_equals_pillow_for_photographs(photos, plain):
    assert check_photos(photos, "cpu") > 500_000


@needs_gpu
def test_the_kernels_on_a_gpu_equal_pillow_for_photographs(photos):
    assert check_photos(photos, "cuda") > 500_000


def test_the_accurate_decoder_of_the_cpu_engine_agrees(plain):
    data = codecs.encode_jpeg(picture(70, 90, 3), 85)
    memory, index = index_of(data)
    (ours,), _ = cases.decode(memory, index, np.array([0]), np.array([[0, 0, 70, 90]]), "cpu", True)
    assert np.array_equal(ours, codecs.decode_jpeg(np.frombuffer(data, np.uint8)))


def test_only_segments_under_the_window_are_read(plain):
    """All others may be anything, and a row's last ones too."""
    data = bytearray(codecs.encode_jpeg(picture(96, 200, 1), 80))
    memory, index = index_of(bytes(data))
    rows, box = np.array([0]), np.array([[40, 60, 60, 100]])
    packed = gpu_jpeg.pack(index, rows, box, len(memory))
    assert len(packed.segments) < (len(index.segments) - 1) / 2
    before, errors = cases.decode(memory, index, rows, box, "cpu", True)
    other = bytearray(b"\xff" * len(memory))
    for at, facts in packed.segments.tolist():
        size = facts & 0xFFFF
        other[at : at + size] = memory[at : at + size]
    after, wrong = cases.decode(bytes(other), index, rows, box, "cpu", True)
    assert not errors.any() and not wrong.any()
    assert np.array_equal(before[0], after[0])


def test_what_the_index_takes():
    pixels = picture(40, 56, 0)
    marked = {"quality": 80, "restart_marker_blocks": 2}
    yes = [
        codecs.encode_jpeg(pixels),
        cases.pillow(pixels, **marked),
        cases.pillow(pixels, "L", **marked),
        cases.pillow(pixels, optimize=True, **marked),
    ]
    no = [
        cases.pillow(pixels),  # one segment
        cases.pillow(pixels, progressive=True, **marked),
        cases.pillow(pixels, "CMYK", **marked),
        yes[0][: len(yes[0]) // 2],
        yes[1][:-40],
        patched(yes[1], 65_535),  # more blocks than bits
        b"",
        b"no JPEG",
    ]
    _, index = index_of(*yes, *no)
    assert index.ok.tolist() == [True] * 4 + [False] * 8
    assert index.shapes[:4].tolist() == [[40, 56]] * 4 and not index.shapes[4:].any()
    assert index.components[:4].tolist() == [3, 3, 1, 3]
    assert index.sampling[1:4].tolist() == [[2, 2], [1, 1], [2, 2]]
    # Standard tables are there once.
    assert index.tables[1, 0] == index.tables[2, 0] and index.tables[1, 0] != index.tables[3, 0]


def test_markers_out_of_order_and_places_outside_are_not_ok():
    data = bytearray(cases.pillow(picture(40, 56, 0), quality=80, restart_marker_blocks=2))
    first, second = data.index(b"\xff\xd0"), data.index(b"\xff\xd1")
    data[first + 1], data[second + 1] = 0xD1, 0xD0
    assert not index_of(bytes(data))[1].ok.any()
    array = np.frombuffer(codecs.encode_jpeg(picture(40, 56, 0)), np.uint8)
    starts, sizes = np.array([0, -1, 5, 0]), np.array([len(array), len(array), len(array), -3])
    assert gpu_jpeg.index_of(array, starts, sizes).ok.tolist() == [True, False, False, False]


def test_an_index_that_lies_is_not_ok():
    data = bytearray(codecs.encode_jpeg(picture(64, 96, 0)))
    info, _ = jpeg.parse(np.frombuffer(data, np.uint8))
    for at in range(int(info[jpeg.INDEX_AT]), int(info[jpeg.INDEX_AT] + 2 * info[jpeg.INDEX_COUNT])):
        bad = bytearray(data)
        bad[at] ^= 0x11
        assert not index_of(bytes(bad))[1].ok.any()


def test_damaged_headers_are_judged_and_decoded_without_harm(plain):
    """Whatever the index takes can be decoded; flips before the scan."""
    rng = np.random.default_rng(0)
    taken = 0
    data = cases.pillow(picture(30, 41, 0), quality=70, restart_marker_blocks=1)
    info, _ = jpeg.parse(np.frombuffer(data, np.uint8))
    for _ in range(300):
        bad = bytearray(data)
        for _ in range(int(rng.integers(1, 3))):
            bad[int(rng.integers(2, info[jpeg.SCAN_AT]))] = int(rng.integers(256))
        memory, index = index_of(bytes(bad))
        if index.ok[0] and index.shapes[0].prod() < 1 << 20:
            taken += 1
            box = np.array([[0, 0, *index.shapes[0]]])
            cases.decode(memory, index, np.array([0]), box, "cpu", True)
    assert taken > 100


def test_lookup_tables_decode_every_code():
    """Against the definition: codes of a length follow one another, and the next length goes on behind them."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        counts, symbols, room = np.zeros(16, np.int64), rng.permutation(256).astype(np.uint8), 1.0
        for length in range(1, 17):
            most = int(min(room * 2**length - 1, 256 - counts.sum()))
            counts[length - 1] = rng.integers(0, max(most, 0) + 1) if rng.random() < 0.6 else 0
            room -= counts[length - 1] / 2**length
        definition = np.concatenate([counts, symbols[: counts.sum()]]).astype(np.uint8)
        if counts.max() > 255:
            continue
        table = _lookup(definition, 0).view(np.uint16)
        code, k = 0, 0
        for length in range(1, 17):
            for _ in range(counts[length - 1]):
                word = code << (16 - length) | int(rng.integers(1 << (16 - length)))
                entry = int(table[word >> 8])
                if entry & LONG:
                    more = (entry >> 12 & 7) + 1
                    entry = int(table[(entry & 0xFFF) + (word >> (8 - more) & ((1 << more) - 1))])
                assert entry == length << 8 | int(symbols[k])
                code, k = code + 1, k + 1
            code <<= 1
        assert len(table) < 2048
    ones, eleven = np.array([2] + [0] * 15 + [1, 2], np.uint8), np.array([1] + [0] * 15 + [12], np.uint8)
    assert len(_lookup(ones, 0)) == 0  # a code of ones only
    assert len(_lookup(eleven, 0)) == 256 and len(_lookup(eleven, 1)) == 0  # a DC difference of 12 bits


def test_wrong_calls_are_refused():
    memory, index = index_of(codecs.encode_jpeg(picture(40, 56, 0)), b"no JPEG")
    tensor = torch.frombuffer(bytearray(memory), dtype=torch.uint8)
    ready = index.to("cpu")
    row, box = np.array([0]), np.array([[0, 0, 40, 56]])
    for images, windows, message in (
        ([1], box, "image 1 has no restart segments"),
        ([2], box, "image 2 has no restart segments"),
        ([-1], box, "image -1 has no restart segments"),
        ([0], [[0, 0, 41, 56]], r"window \[0, 0, 41, 56\] is empty or outside of the image \[40, 56\]"),
        ([0], [[5, 5, 5, 9]], "is empty or outside"),
        ([0], [[-1, 0, 3, 3]], "is empty or outside"),
        ([0, 0], box, "each image needs a window"),
    ):
        with pytest.raises(ValueError, match=message):
            gpu_jpeg.decode(tensor, ready, np.array(images), np.array(windows))
    with pytest.raises(ValueError, match="the index is of more data than the 99 bytes"):
        gpu_jpeg.decode(tensor[:99], ready, row, box)
    with pytest.raises(ValueError, match="the index must be on the memory's device"):
        gpu_jpeg.decode(tensor, index, row, box)
    with pytest.raises(ValueError, match=r"memory must be \(n,\) uint8"):
        gpu_jpeg.decode(tensor.int(), ready, row, box)


def test_no_images_are_no_work():
    memory, index = index_of(codecs.encode_jpeg(picture(40, 56, 0)))
    tensor = torch.frombuffer(bytearray(memory), dtype=torch.uint8)
    nothing = np.zeros((0, 4), np.int64)
    sources, errors = gpu_jpeg.decode(tensor, index.to("cpu"), nothing[:, 0], nothing)
    assert len(sources.pointers) == len(errors) == 0


def test_the_module_is_imported_without_torch_and_triton():
    code = (
        "import sys, fastload.kernels.gpu_jpeg; print([m for m in ('torch', 'triton') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.strip() == "[]"


def test_without_triton_there_is_a_sentence(monkeypatch):
    memory, index = index_of(codecs.encode_jpeg(picture(40, 56, 0)))
    tensor = torch.frombuffer(bytearray(memory), dtype=torch.uint8)
    monkeypatch.setattr(gpu, "runs_triton", lambda tensor: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "fastload.kernels.gpu_jpeg_triton", raising=False)
    monkeypatch.delattr("fastload.kernels.gpu_jpeg_triton", raising=False)
    with pytest.raises(ImportError, match=r"need Triton.*pip install triton"):
        gpu_jpeg.decode(tensor, index.to("cpu"), np.array([0]), np.array([[0, 0, 40, 56]]))
