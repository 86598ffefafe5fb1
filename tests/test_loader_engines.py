"""Engines that take whole batches, through the Loader: the same batches, state, order and errors as with the CPU engine."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_beton

import fastload
from fastload import transforms as T
from fastload.choose import Choice, choose, rate
from fastload.errors import CorruptError, UsageError

PIPELINES = {
    "train": (T.RandomResizedCrop(32), T.HorizontalFlip(), T.Normalize()),
    "bytes": (T.Resize(40), T.CenterCrop(32)),
    "mixed": (T.RandomResizedCrop(32), T.Mixup(0.4), T.CutMix(1.0)),
    "erased": (T.Resize(32), T.RandomCrop(32, padding=4), T.RandomErasing(1.0), T.Normalize()),
}


@pytest.fixture(scope="module")
def dali():
    return pytest.importorskip(
        "nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastload[dali]'"
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("d") / "d.beton", 43, store="mixed")


def batches(path, engine, pipeline, **options):
    options = {"shuffle": True, "seed": 3, "threads": 2, **options}
    return fastload.Loader(path, 8, transforms=PIPELINES[pipeline], engine=engine, decode="exact", **options)


def levels(a, b, pipeline):
    scale = 255 * 0.225 if "Normalize" in str(PIPELINES[pipeline]) else 1.0
    return (a.float() - b.float()).abs() * scale


@pytest.mark.parametrize("engine", ["dali", "cuda"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_batches_are_those_of_the_cpu_engine(dali, photos, pipeline, engine):
    """The cuda engine without a GPU: the same code, torch's reference in the kernel's place."""
    ours = batches(photos, "cpu", pipeline)
    theirs = batches(photos, engine, pipeline, device="cpu")
    for _ in range(2):  # two epochs
        count = 0
        for a, b in zip(ours, theirs):
            assert torch.equal(a.index, b.index) and torch.equal(a.label, b.label)
            assert a.image.shape == b.image.shape and a.image.dtype == b.image.dtype
            assert b.image.is_contiguous(memory_format=torch.channels_last)
            # The outermost pixels of a reduced crop may differ more: see fastload.engines.dali.
            apart = levels(a.image, b.image, pipeline)
            assert apart.mean() < 0.3 and (apart > 1.1).float().mean() < 0.02
            count += len(b.index)
        assert count == 43


@pytest.mark.parametrize(
    ("engine", "options"),
    [("dali", {}), ("cuda", {"device": "cpu"}), ("cuda", {"device": "cpu", "cache": "device"})],
)
def test_resuming_and_leaving_early(dali, photos, engine, options):
    whole = [b.image.clone() for b in batches(photos, engine, "train", **options)]
    loader = batches(photos, engine, "train", **options)
    for i, _ in enumerate(loader):
        if i == 2:
            break
    state = loader.state_dict()
    again = batches(photos, engine, "train", **{**options, "threads": 1})
    again.load_state_dict(state)
    for a, b in zip(whole[3:], again, strict=True):
        assert torch.equal(a, b.image)
    # The next iteration of the loader that was left is the next epoch, whole.
    assert sum(len(b.index) for b in loader) == 43
    kept = next(iter(loader)).image
    before = kept.clone()
    for _ in loader:
        pass
    assert torch.equal(kept, before)


def test_a_cache_says_what_it_keeps(photos):
    loader = batches(photos, "cuda", "train", device="cpu", cache="device", vram=1 << 30)
    assert "all 43 images" in loader.chosen
    with pytest.warns(UserWarning):
        small = batches(photos, "cuda", "train", device="cpu", cache="device", vram=40_000)
    for a, b in zip(loader, small, strict=True):
        assert torch.equal(a.image, b.image)


def test_two_iterations_at_a_time_are_refused(dali, photos):
    loader = batches(photos, "dali", "bytes")
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    with pytest.raises(UsageError, match="one at a time"):
        next(first)
    assert sum(len(b.index) for b in second) == 35


def test_a_corrupt_sample(dali, tmp_path):
    path = make_beton(tmp_path / "c.beton", 20)
    with fastload.open(path) as data:
        reader, at = data.locate(11)
        where = int(reader.spans(np.array([at]), "image").starts[0])
    content = bytearray(path.read_bytes())
    content[where : where + 300] = bytes(300)
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="id-11"):
        list(batches(path, "dali", "bytes", shuffle=False))
    ours, theirs = (batches(path, e, "bytes", shuffle=False, on_error="replace") for e in ("cpu", "dali"))
    with pytest.warns(UserWarning, match="id-11"):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.index, b.index) and torch.equal(a.label, b.label)
    assert [e.index for e in theirs.errors] == [11] and theirs.errors == ours.errors


def test_closing_leaves_no_thread(dali, photos):
    before = threading.active_count()
    for _ in range(5):
        loader = batches(photos, "dali", "train")
        next(iter(loader))
        loader.close()
    assert threading.active_count() <= before + 1


def test_functions_of_the_user_are_refused_by_name(dali, photos):
    pipeline = (T.Resize(40), T.CenterCrop(32), T.PerImage(lambda image: image))
    with pytest.raises(UsageError, match="engine='cpu'"):
        fastload.Loader(photos, 8, transforms=pipeline, engine="dali")
    loader = fastload.Loader(photos, 8, transforms=pipeline, engine="auto")
    assert loader.engine == "cpu" and "dali not measured" in str(loader.choice)


def test_auto_measures_and_says_what_it_took(dali, photos):
    loader = batches(photos, "auto", "mixed")
    assert loader.engine in ("cpu", "dali") and set(loader.choice.rates) == {"cpu", "dali"}
    assert loader.choice.rates[loader.engine] == max(loader.choice.rates.values())
    assert sum(len(b.index) for b in loader) == 43


def test_a_loader_that_is_forgotten_takes_its_cache_with_it(photos):
    """Without the cycle collector: nothing tells it that a GPU is full."""
    loader = batches(photos, "cuda", "train", device="cpu", cache="device")
    memory, engine = weakref.ref(loader._device_feed._memory), weakref.ref(loader._engine.engine)
    next(iter(loader))
    gc.collect()
    gc.disable()
    try:
        del loader
        assert memory() is None and engine() is None
    finally:
        gc.enable()


def test_what_is_said_of_a_choice_does_not_make_it_again(photos):
    loader = batches(photos, "cuda", "train", device="cpu", cache="device")
    said = loader.chosen
    loader.close()
    assert loader.chosen == said and loader._engine.engine.resident is None


def test_leaving_an_iteration_is_not_measured():
    """DALI waits for the batches that it has begun."""
    assert rate(_Fake(0.01, leaving=0.5), 0.2) > 500


def test_what_was_measured_is_used(dali, photos, monkeypatch):
    """An engine is built once: a cache is filled by decoding all images."""
    from fastload import loader as room
    from fastload.engines import dali as engines

    built = []
    original = engines.DaliEngine.__init__
    monkeypatch.setattr(
        engines.DaliEngine, "__init__", lambda self, *a, **o: (built.append(self), original(self, *a, **o))[1]
    )
    monkeypatch.setattr("fastload.choose.rate", lambda loader, seconds: float(loader.engine == "dali"))
    auto, named = batches(photos, "auto", "train"), batches(photos, "dali", "train")
    assert auto.engine == "dali" and len(built) == 2 and isinstance(auto, room.Loader)
    for _ in range(2):
        for a, b in zip(auto, named, strict=True):
            assert torch.equal(a.image, b.image) and torch.equal(a.label, b.label)
    auto.close()


class _Fake:
    """Batches of 10 that take ``seconds`` each, so many in an epoch."""

    def __init__(self, seconds, batches=1000, leaving=0.0):
        self.seconds, self.batches, self.leaving, self.closed = seconds, batches, leaving, False

    def __iter__(self):
        import time

        try:
            for _ in range(self.batches):
                time.sleep(self.seconds)
                yield type("B", (), {"index": range(10)})
        finally:
            time.sleep(self.leaving)

    def close(self):
        self.closed = True


@pytest.mark.parametrize("batches", [1000, 1, 2])
def test_the_faster_one_is_chosen_and_the_other_is_closed(batches):
    """In epochs of one batch, too: a file can be so small."""
    slow, fast = _Fake(0.02, batches), _Fake(0.002, batches)

    def broken():
        raise UsageError("it needs a GPU")

    choice, kept = choose({"slow": lambda: slow, "fast": lambda: fast, "gpu": broken})
    assert choice.name == "fast" and choice.rates["fast"] > 2 * choice.rates["slow"]
    assert slow.closed and kept is fast and not fast.closed
    assert "gpu not measured: it needs a GPU" in str(choice)
    assert isinstance(choice, Choice)
    alone, _ = choose({"slow": lambda: slow, "gpu": broken})
    assert str(alone) == "engine 'slow' is the only one here; gpu not measured: it needs a GPU"
    with pytest.raises(UsageError, match="it needs a GPU"):
        choose({"gpu": broken})

    def driver():
        raise RuntimeError("CUDA error: out of memory")

    class Stops(_Fake):
        def __iter__(self):
            yield from list(super().__iter__())[:1]
            raise RuntimeError("it failed at the second batch")

    stops = Stops(0.001, 5)
    choice, _ = choose({"slow": lambda: slow, "driver": driver, "stops": lambda: stops})
    assert choice.name == "slow" and stops.closed and list(choice.rates) == ["slow"]
    assert "out of memory" in choice.left_out["driver"] and "second batch" in choice.left_out["stops"]

    class Wrong(_Fake):
        def __iter__(self):
            raise CorruptError("bad bytes")

    wrong = Wrong(0.001)
    fast.closed = False
    with pytest.raises(CorruptError):
        choose({"fast": lambda: fast, "wrong": lambda: wrong})
    assert wrong.closed and fast.closed
    assert choose({"none": lambda: _Fake(0, 0), "fast": lambda: _Fake(0.002)})[0].name == "fast"


@pytest.mark.parametrize(
    ("engine", "options"),
    [("cpu", {}), ("dali", {}), ("cuda", {"device": "cpu"}), ("cuda", {"device": "cpu", "cache": "device"})],
)
def test_twenty_epochs_that_are_left_early_leave_nothing_behind(dali, photos, engine, options):
    loader = batches(photos, engine, "train", **options)

    def epochs(count):
        for _ in range(count):
            for i, _batch in enumerate(loader):
                if i == 2:
                    break
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        return threading.active_count(), len(os.listdir("/proc/self/fd")), resident

    threads, files, mib = epochs(5)
    after = epochs(20)
    assert after[:2] == (threads, files)
    assert after[2] < mib + 20
    loader.close()
