"""Batches that are drawn and made on the device: those of the engine that asks the host, to the bit, whatever is made at once."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_beton
from engine_cases import random_pipeline
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastload
from fastload import beton, device_feed, draws
from fastload import transforms as T
from fastload.draws import Plan
from fastload.engines import staging
from fastload.errors import DataError
from fastload.feeds import Drawer
from fastload.finish import Finisher
from fastload.kernels import gpu
from fastload.order import Order

MIXERS = [(), (T.Mixup(0.3),), (T.CutMix(1.0, p=0.7),), (T.Mixup(1.0), T.CutMix(0.5))]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """37 images, JPEG and stored pixels, of all shapes, with columns of all kinds."""
    extra = [
        beton.Field("age", "float"), beton.Field("note", "json"), beton.Field("group", "int"),
        beton.Field("box", "ndarray", "float32", (4,)),
    ]  # fmt: skip
    return make_beton(tmp_path_factory.mktemp("odd") / "odd.beton", 37, store="mixed", extra=extra)


@pytest.fixture
def little_at_once(monkeypatch):
    """Several launches and several draws in an epoch of few images."""
    monkeypatch.setattr(device_feed, "_ROWS", 14)
    monkeypatch.setattr(device_feed, "_BYTES", 60_000)


def loader(path, size, pipeline, cache="device", **options):
    given = {
        "shuffle": True,
        "seed": 3,
        "threads": 2,
        "engine": "cuda",
        "device": "cpu",
        "gpu_decode": "cpu",
        **options,
    }
    return fastload.Loader(path, size, transforms=pipeline, cache=cache, **given)


def assert_same(ours, theirs):
    """Batch by batch to the bit, tensors and lists."""
    for a, b in itertools.zip_longest(ours, theirs):
        assert torch.equal(a.index, b.index)
        for mine, other in zip(a, b, strict=True):
            if isinstance(mine, torch.Tensor):
                assert mine.dtype == other.dtype and mine.stride() == other.stride()
                assert torch.equal(mine, other)
            else:
                assert mine == other


@pytest.mark.parametrize("seed", range(36))
def test_random_pipelines_give_the_batches_of_the_host(odd, little_at_once, seed):
    rng = np.random.default_rng(seed)
    pipeline = random_pipeline(seed) + ((T.Normalize(),) if seed % 3 else ()) + MIXERS[seed % 4]
    options = {
        "weights": rng.random(37) if seed % 5 == 0 else None,
        "indices": rng.integers(0, 37, 30) if seed % 7 == 0 and seed % 5 else None,
        "drop_last": seed % 4 == 1, "shuffle": seed % 6 != 0, "seed": int(rng.integers(0, 2**63)),
        "rank": seed % 2, "world_size": 2 if seed % 2 else 1, "fields": ["label", "image", "index", "group"],
        "dtype": ["float16", "float32"][seed % 2] if seed % 3 else None,
    }  # fmt: skip
    ours = loader(odd, int(rng.integers(1, 12)), pipeline, **options)
    theirs = loader(odd, ours.batch_size, pipeline, None, **options)
    assert ours._device_feed is not None and theirs._device_feed is None
    for _ in range(2):
        assert_same(ours, theirs)


def test_columns_of_all_kinds(odd, little_at_once):
    fields = ["image", "label", "age", "note", "group", "box", "id", "source"]
    made = [loader(odd, 5, (T.Resize((9, 9)),), cache, fields=fields) for cache in ("device", None)]
    assert_same(*made)
    assert {type(value) for value in next(iter(made[0]))} == {torch.Tensor, list}


def test_several_labels_are_mixed_and_wrong_ones_are_told(tmp_path, little_at_once):
    pipeline = (T.CenterCrop(16), T.Mixup(0.5))
    kinds = {
        "v": (beton.Field("label", "ndarray", "float32", (3,)), np.eye(3, dtype=np.float32)),
        "w": (beton.Field("label", "int"), [-1, 0, 1]),
    }
    with fastload.open(make_beton(tmp_path / "m.beton", 12)) as data:
        for name, (field, labels) in kinds.items():
            writer = beton.Writer(tmp_path / name, [beton.Field("image", "image"), field], 12)
            for i in range(12):
                writer.add({"image": data.encoded(i), "label": labels[i % 3]}, id=str(i), source=str(i))
            writer.finish({})
    assert_same(loader(tmp_path / "v", 5, pipeline), loader(tmp_path / "v", 5, pipeline, None))
    for cache in ("device", None):
        with pytest.raises(DataError, match="labels from 0"):
            list(loader(tmp_path / "w", 5, pipeline, cache))


def test_it_goes_on_where_it_was(odd, little_at_once):
    pipeline = (T.RandomResizedCrop(16), T.Mixup(0.4))
    whole = list(loader(odd, 4, pipeline))
    for at in range(1, len(whole)):
        again = loader(odd, 4, pipeline)
        again.load_state_dict({"seed": 3, "epoch": 0, "position": 4 * at})
        assert_same(whole[at:], again)


def test_two_iterations_at_once(odd, little_at_once):
    one = loader(odd, 4, (T.RandomResizedCrop(16),))
    wanted = [list(one), list(one)]
    two = loader(odd, 4, (T.RandomResizedCrop(16),))
    first, second = iter(two), iter(two)
    found = [[next(first)], [next(second)]]
    for _ in range(len(two) - 1):
        found[0].append(next(first))
        found[1].append(next(second))
    assert_same(wanted[0], found[0])
    assert_same(wanted[1], found[1])


def test_neither_draws_nor_pixels_nor_threads_are_the_hosts(odd, monkeypatch):
    batches = loader(
        odd, 8, (T.RandomResizedCrop(16), T.ColorJitter(0.3, 0.3)), fields=["image", "label", "index"]
    )
    kinds = set()
    original = Plan.draw

    def draw(self, seed, epoch, samples, heights, widths, *more):
        kinds.update(type(values) for values in (samples, heights, widths))
        return original(self, seed, epoch, samples, heights, widths, *more)

    monkeypatch.setattr(Plan, "draw", draw)
    for room, name in ((Drawer, "draw"), (staging.Stager, "prepare"), (staging.Ring, "take")):
        monkeypatch.setattr(room, name, lambda *_: pytest.fail("this is work of the CPU"))
    before = threading.active_count()
    assert len(list(batches)) == 5 and kinds == {torch.Tensor}
    assert threading.active_count() == before
    assert batches.chosen.endswith("without the CPU")


def test_an_epoch_of_small_images_is_few_launches(tmp_path, monkeypatch):
    """1,000 images in batches of 10: one draw, and as few launches as the memory for them allows."""
    path = make_beton(tmp_path / "small.beton", 1000, store="raw", size=(8, 8))
    launched, drawn = [], []
    crop, draw = gpu.crop, Plan.draw
    monkeypatch.setattr(gpu, "crop", lambda s, t, out, p: (launched.append(len(out)), crop(s, t, out, p)))
    monkeypatch.setattr(Plan, "draw", lambda *a: (drawn.append(len(a[3])), draw(*a))[1])
    pipeline = (T.RandomCrop(8, padding=2), T.HorizontalFlip())
    batches = list(loader(path, 10, pipeline))
    assert len(batches) == 100 and launched == [1000] and drawn == [1000]
    launched.clear()
    monkeypatch.setattr(device_feed, "_BYTES", 3 * 64 * 255)  # 255 images, or 25 batches
    assert_same(batches, loader(path, 10, pipeline))
    assert launched == [250] * 4
    # A batch that was kept stays as it is, also where the user writes into its neighbour.
    before = batches[1].image.clone()
    batches[0].image.fill_(0), batches[2].image.fill_(0)
    assert torch.equal(batches[1].image, before)


def test_closing(odd):
    batches = loader(odd, 8, (T.RandomResizedCrop(16),), weights=np.ones(37))
    running = iter(batches)
    kept = next(running).image.clone()
    batches.close()
    batches.close()
    assert not batches._order._on_devices
    assert len(list(running)) <= 1 and kept.float().std() > 1


def test_large_and_unsigned_columns_stay_with_the_host(tmp_path, little_at_once):
    extra = [
        beton.Field("mask", "ndarray", "uint8", (40, 40)),
        beton.Field("depth", "ndarray", "uint16", (3,)),
    ]
    path = make_beton(tmp_path / "wide.beton", 20, extra=extra)
    fields = ["image", "label", "mask", "depth", "index"]
    made = [loader(path, 6, (T.CenterCrop(8),), cache, fields=fields) for cache in ("device", None)]
    assert set(made[0]._device_feed._columns) == {"label"}
    assert_same(*made)


def test_a_batch_may_be_changed_while_the_graph_of_its_neighbour_lives(odd):
    weight = torch.ones(1, requires_grad=True)
    first, second, *_ = loader(odd, 4, (T.CenterCrop(8), T.Normalize()))
    loss = (first.image * weight).square().sum()
    second.image.mul_(2)
    loss.backward()
    assert weight.grad.item() > 0


def test_images_as_they_are(tmp_path):
    path = make_beton(tmp_path / "same.beton", 11, size=(20, 30))
    assert_same(loader(path, 4, None), loader(path, 4, None, None))


# -- draws and order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_tables_of_tensors_are_those_of_arrays(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    plan = Plan(random_pipeline(seed) + MIXERS[seed % 4])
    heights, widths = rng.integers(1, 600, (2, count))
    keys = rng.integers(0, 2**64, count, np.uint64)
    batch = [None, 1, 3, 16][seed // 4 % 4]
    wanted = plan.draw(seed, seed % 5, keys, heights, widths, batch)
    tensors = (torch.from_numpy(v) for v in (keys.view(np.int64), heights, widths))
    found = plan.draw(seed, seed % 5, *tensors, batch)
    for name in ("box", "clip", "place", "flips", "colour", "coloured", "erase", "mix", "mix_box"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        if theirs is None:
            assert ours is None
            continue
        assert ours.numpy().dtype == theirs.dtype and ours.shape == theirs.shape, name
        # Two libraries' sine and cosine may differ in their last bit.
        assert np.allclose(ours, theirs, rtol=1e-6 if name == "colour" else 0, atol=0), name


class Copies(TorchDispatchMode):
    """Counts what makes a host wait for a GPU: copies between them. Reading a number is refused by fake tensors themselves."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {part.device for part in (*args, out) if isinstance(part, torch.Tensor)}
        if any(name in str(func) for name in ("_to_copy", "copy_", "index_put")) and len(devices) > 1:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("seed", range(28))
def test_on_a_gpu_nothing_is_mixed_with_the_host_and_nothing_waits(seed, monkeypatch):
    """Tensors without data on a GPU that need not be here: which devices meet is checked by torch."""
    plan = Plan(random_pipeline(seed) + MIXERS[seed % 4])
    monkeypatch.setattr(draws, "_KEPT", {})
    with FakeTensorMode(), Copies() as copies:

        def blank(*shape, dtype=torch.int64):
            return torch.empty(shape, dtype=dtype, device="cuda:1")

        monkeypatch.setattr(
            "fastload.kernels.gpu_rng.uniforms",
            lambda s, e, ids, stream, count: blank(len(ids), count, dtype=torch.float64),
        )
        paint = blank(9 + 3 * len(plan.erase_fill), dtype=torch.float32)
        for turn in range(2):
            copies.found.clear()
            table = plan.draw(0, 0, blank(12), blank(12), blank(12), 5, (20, 30))
            sources = gpu.Sources(blank(12), blank(12, 2), blank(12, 3), ())
            packed = gpu.pack(sources, replace(table, clip=table.windows()[0]), paint)
            assert {str(part.device) for part in (packed.words, packed.reals)} == {"cuda:1"}
            if table.mix is not None:
                soft = Finisher.soften(SimpleNamespace(_classes=7), blank(5), table.mix[:5])
                assert soft.shape == (5, 7) and str(soft.device) == "cuda:1"
            assert turn == 0 or not copies.found  # constants are brought there once


def test_batches_drawn_together_are_those_drawn_apart():
    plan = Plan((T.CenterCrop(32), T.Mixup(0.4), T.CutMix(1.0)))
    size = np.full(23, 40)
    together = plan.draw(1, 2, np.arange(23), size, size, 5)
    for at in range(0, 23, 5):
        some = np.arange(at, min(at + 5, 23))
        apart = plan.draw(1, 2, some, size[some], size[some])
        assert np.array_equal(together.mix[some], apart.mix)
        assert np.array_equal(together.mix_box[some], apart.mix_box)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_orders_on_a_device_are_those_of_the_host(weighted, shuffle):
    weights = np.r_[0.0, np.random.default_rng(0).random(1000), 0.0] if weighted else None
    order = Order(1002, 2**63 + 5, shuffle, weights, rank=1, world_size=3)
    for start, stop in ((0, 334), (17, 60), (5, 5), (300, 999)):
        ours = order.take(4, start, stop, torch.device("cpu"))
        assert ours.dtype == torch.int64 and np.array_equal(ours, order.take(4, start, stop))


def test_the_kernels_make_the_same_epoch(tmp_path):
    """Random words, permutations, packed tables, crops and mixing through Triton's interpreter, against the host."""
    path = make_beton(tmp_path / "few.beton", 7, size=(12, 14))
    code = f"""
import os, sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
import fastload
from fastload import transforms as T
from test_device_feed import loader
pipeline = (T.RandomResizedCrop(10), T.HorizontalFlip(), T.ColorJitter(0.4, 0.4, 0.4, 0.1), T.Normalize(), T.CutMix())
for cache in ("device", None):
    ours = loader({str(path)!r}, 3, pipeline, cache, fields=["image", "label", "index"])
    for batch in ours:
        torch.save(tuple(batch), sys.argv[1] + f"/{{cache}}-{{batch.index[0]}}.pt")
from fastload.kernels import gpu_rng, rng
import numpy as np
ids = np.random.default_rng(0).integers(0, 2**64, 37, dtype=np.uint64)
for seed, epoch, stream, count in [(0, 0, 1, 2), (2**64 - 1, 2**32 - 1, 0xFFFF, 7), (3 << 31, 5, 0xFE00, 32)]:
    ours = gpu_rng.uniforms(seed, epoch, torch.from_numpy(ids.view(np.int64)), stream, count).numpy()
    assert np.array_equal(ours, rng.uniforms(seed, epoch, ids, stream, count)), (seed, stream)
for length in (1, 2, 3, 1000, 1025):
    places = np.arange(max(0, length - 300), length)
    ours = gpu_rng.permute(torch.from_numpy(places), length, 2**64 - 1, length).numpy()
    assert np.array_equal(ours, rng.permute(places.astype(np.uint64), length, 2**64 - 1, length)), length
"""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = sorted(tmp_path.glob("device-*.pt"))
    assert len(made) == 3
    for file in made:
        ours, theirs = (torch.load(f) for f in (file, tmp_path / file.name.replace("device", "None")))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("seed", range(28))
def test_gpu_random_pipelines_give_the_batches_of_the_host(odd, seed):
    pipeline = random_pipeline(seed) + ((T.Normalize(),) if seed % 3 else ()) + MIXERS[seed % 4]
    options = {
        "device": "cuda",
        "fields": ["image", "label", "index"],
        "weights": np.arange(37.0) if seed % 5 == 0 else None,
    }
    for _ in range(2):
        for a, b in zip(
            loader(odd, 8, pipeline, **options), loader(odd, 8, pipeline, None, **options), strict=True
        ):
            assert torch.equal(a.index, b.index) and torch.allclose(a.label, b.label, atol=1e-6)
            apart = (a.image.float() - b.image.float()).abs() * (60 if seed % 3 else 1)
            # A double that is rounded to a float or a level may lie on either side of a half.
            assert apart.max() <= 1.1 and (apart > 0.1).float().mean() < 1e-3


@needs_gpu
def test_gpu_draws_are_the_hosts():
    plan = Plan(draws.T.train(224, jitter=0.4, erasing=0.5, mixup=0.2, cutmix=1.0))
    count = 100_000
    heights, widths = np.random.default_rng(0).integers(1, 900, (2, count))
    wanted = plan.draw(5, 1, np.arange(count), heights, widths)
    found = plan.draw(5, 1, *(torch.from_numpy(v).cuda() for v in (np.arange(count), heights, widths)))
    for name in ("box", "place", "flips", "coloured", "erase", "mix_box"):
        assert np.array_equal(getattr(found, name).cpu(), getattr(wanted, name)), name
    assert np.allclose(found.colour.cpu(), wanted.colour, atol=1e-6)
    order = Order(100_003, 7, True)
    assert np.array_equal(order.take(2, 0, 100_003, torch.device("cuda")).cpu(), order.take(2, 0, 100_003))


@needs_gpu
def test_gpu_kept_batches_stay_and_memory_is_given_back(tmp_path):
    path = make_beton(tmp_path / "small.beton", 600, store="raw", size=(32, 32))
    torch.randn(2000, 2000, device="cuda") @ torch.randn(2000, 2000, device="cuda")  # its workspace stays
    gc.collect()
    least = torch.cuda.memory_allocated()
    batches = loader(path, 32, (T.RandomCrop(32, padding=4), T.Normalize()), device="cuda")
    kept = [b.image for b in batches]
    copies = [image.clone() for image in kept]
    for _ in range(20):
        for i, _batch in enumerate(batches):
            torch.randn(2000, 2000, device="cuda") @ torch.randn(2000, 2000, device="cuda")  # a busy consumer
            if i == 2:
                break
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(kept, copies))
    del kept, copies, _batch
    batches.close()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() < least + (1 << 20)
