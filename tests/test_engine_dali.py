"""The DALI engine: its pixels against the CPU engine's, order, memory, damaged images, and what it leaves behind."""

import gc
import hashlib
import importlib.util
import os
import sys
import threading
import warnings
from dataclasses import replace

import engine_cases
import numpy as np
import pytest
import torch
from engine_cases import draw, jpeg_of, random_pipeline, write

from fastload import codecs, concat, dataset
from fastload import transforms as T
from fastload.draws import Plan
from fastload.engines import on_device
from fastload.engines.cpu import Engine
from fastload.errors import CorruptError, DataError, MissingExtraError, UsageError
from fastload.jobs import Filler, Job
from fastload.kernels import pixels

if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
    pytest.skip("nvidia.dali is not installed (pip install 'fastload[dali]')", allow_module_level=True)

from fastload.engines import dali
from fastload.engines.dali import DaliEngine


def without_adobe(data):
    """Without the segment that says which colours these are: only the components' names are left."""
    at = data.index(b"\xff\xee\x00\x0eAdobe")
    return data[:at] + data[at + 16 :]


KINDS = {**engine_cases.KINDS, "rgb": lambda p: without_adobe(jpeg_of(p, keep_rgb=True))}
BY_CPU = ("progressive", "cmyk", "rgb")


@pytest.fixture(scope="module")
def odd(picture, tmp_path_factory):
    """All kinds of images, four of each, of all sizes."""
    rng, images = np.random.default_rng(1), []
    for i in range(4 * len(KINDS)):
        height, width = int(rng.integers(20, 150)), int(rng.integers(20, 150))
        images.append((height, width, list(KINDS.values())[i % len(KINDS)](picture(height, width, i))))
    return write(tmp_path_factory.mktemp("dali") / "odd.beton", images)


@pytest.fixture
def make():
    """The function that makes an engine, which is closed after the test."""
    made = []

    def engine(ds, plan, **options):
        options = {"batch_size": 16, "threads": 2, "device_id": None, **options}
        made.append(DaliEngine(ds, plan if isinstance(plan, Plan) else Plan(plan), **options))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def batches(engine, ds, plan, size, seed=0, ahead=2):
    """(bases, table, images) of all samples, submitted some batches ahead."""
    waiting, starts = [], range(0, len(ds), size)
    for start in starts:
        bases = ds.indices[start : start + size]
        table = draw(ds, plan, bases, seed)
        engine.submit(bases, ds.spans(bases), table)
        waiting.append((bases, table))
        if len(waiting) > ahead:
            yield (*waiting.pop(0), engine.collect())
    while waiting:
        yield (*waiting.pop(0), engine.collect())


def by_cpu(ds, plan, bases, table, shape, decode="exact"):
    engine, out = Engine(ds, plan, decode), np.full(shape, 123, np.uint8)
    for row, base in enumerate(bases.tolist()):
        engine.execute(base, table, row, out[row])
    return out


def at_the_edge(table, row):
    """On which sides of the output, flipped or not, the filter would look at pixels that it may not use: 1 or 0."""
    box, clip, size = table.box[row], table.clip[row], np.maximum(table.place[row, 2:], 1)
    reach = np.maximum((box[2:] - box[:2]) / size, 1)
    low, high = box[:2] - reach < clip[:2], box[2:] + reach > clip[2:]
    vertical, horizontal = bool(table.flips[row] & 2), bool(table.flips[row] & 1)
    top, bottom = (high[0], low[0]) if vertical else (low[0], high[0])
    left, right = (high[1], low[1]) if horizontal else (low[1], high[1])
    return int(top), int(left), int(bottom), int(right)


@pytest.mark.parametrize("seed", range(200))
def test_random_pipelines_equal_the_cpu_engine(odd, make, seed):
    """Within one level, but for the outermost pixels of what was made smaller; the fill to the bit."""
    plan = Plan(random_pipeline(seed))
    differences = []
    for bases, table, images in batches(make(odd, plan), odd, plan, 13, seed):
        assert images.dtype == torch.uint8 and images.shape == (len(bases), *plan.size, 3)
        difference = np.abs(images.numpy() - by_cpu(odd, plan, bases, table, images.shape).astype(int))
        differences.append(difference)
        for row, (y, x, height, width) in enumerate(table.place.tolist()):
            inner, outer = np.zeros(plan.size, bool), np.ones(plan.size, bool)
            top, left, bottom, right = at_the_edge(table, row)
            inner[y + top : y + height - bottom, x + left : x + width - right] = True
            outer[y : y + height, x : x + width] = False
            if table.colour is None or not table.coloured[row]:
                assert difference[row][inner].max(initial=0) <= 1
                assert difference[row][outer].max(initial=0) == 0
            elif min(height, width) >= 16:  # else the edge weighs too much in the image's mean
                gain = np.abs(table.colour[row, :, :6]).sum(axis=1).max()
                assert difference[row][inner].max(initial=0) <= 1 + gain
    share = 1 - np.prod(np.maximum(np.array(plan.size) - 2, 0)) / np.prod(plan.size)  # of the frame
    assert np.concatenate(differences).mean() <= 0.05 + 8 * share**2


@pytest.mark.parametrize("store", ["jpeg", "raw", "mixed"])
def test_pixels_that_are_not_resized_are_equal_to_the_bit(beton_file, make, store):
    ds = dataset.open(beton_file(store=store, size=(48, 64)))
    for specs in (
        None,
        (T.HorizontalFlip(), T.VerticalFlip()),
        (T.RandomCrop(32, 4, (1, 2, 3)), T.HorizontalFlip()),
    ):
        plan = Plan(specs)
        for bases, table, images in batches(make(ds, plan), ds, plan, 7):
            assert np.array_equal(images, by_cpu(ds, plan, bases, table, images.shape))


def test_photographs_within_the_stated_tolerance(photos, tmp_path, make):
    images = []
    for data in photos[:24]:
        rgb = codecs.load_rgb(data, min_size=(200, 200))
        images.append((*rgb.shape[:2], codecs.encode_jpeg(rgb)))
    ds, plan = write(tmp_path / "photos.beton", images), Plan(T.train(160)[:2])
    for bases, table, made in batches(make(ds, plan), ds, plan, 12):
        difference = np.abs(made.numpy() - by_cpu(ds, plan, bases, table, made.shape).astype(int))
        assert difference.mean() < 0.02 and difference.max() <= 24
        fast = np.abs(made.numpy() - by_cpu(ds, plan, bases, table, made.shape, "fast").astype(int))
        assert fast.mean() < 1.5


def test_regions_cut_out_of_whole_images_are_the_same(odd, make, monkeypatch):
    """The way of a GPU on which decoding of regions crashes."""
    plan = Plan(T.train(40)[:2])
    usual = [images for *_, images in batches(make(odd, plan), odd, plan, 16)]
    monkeypatch.setattr(DaliEngine, "_decodes_regions", lambda self: False)
    for ours, images in zip(usual, (images for *_, images in batches(make(odd, plan), odd, plan, 16))):
        assert torch.equal(ours, images)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_floats_and_mixing(odd, make, monkeypatch, dtype, there):
    """All that follows the resize is defined: to the bit by the CPU's kernels, within rounding by torch on a GPU."""
    if there:
        monkeypatch.setattr(DaliEngine, "_finish", DaliEngine._finish_there)
    jitter = (T.ColorJitter(0.4, 0.4, 0.4, 0.1), T.Grayscale(0.3), T.RandomErasing(0.8), T.Cutout(9))
    normalize = () if dtype == torch.uint8 else (T.Normalize(),)
    plan = Plan((T.RandomResizedCrop(32), *jitter, *normalize, T.Mixup(0.4, 0.6), T.CutMix(1.0, 0.7)))
    bases = odd.indices[:15]
    table = draw(odd, plan, bases)
    engine = make(odd, plan, dtype=dtype)
    engine.submit(bases, odd.spans(bases), table)
    got = engine.collect()
    plain = make(odd, Plan(plan.specs[:5]))
    only_pixels = replace(table, colour=None, erase=table.erase[:, :0], mix=None, mix_box=None)
    plain.submit(bases, odd.spans(bases), only_pixels)
    images = plain.collect().numpy()
    own = {row for row, base in enumerate(bases.tolist()) if engine._route[base] != dali._DALI}
    for row in range(15):
        pixels.recolour(images[row], table.colour[row])
        pixels.erase(images[row], table.erase[row], plan.erase_fill)
    if normalize:
        floats = np.empty(images.shape, np.float32)
        pixels.normalise(images, *plan.affine, floats)
        images = floats
    pixels.mix(images, table.mix, table.mix_box, np.float32(0 if normalize else 0.5))
    assert own and len(own) < 15 and (table.mix < 1).any() and table.mix_box.any()
    assert got.dtype == dtype and got.shape == images.shape
    if there:
        step = 1 if dtype == torch.uint8 else 1.1 / 255 / 0.224
        assert np.abs(got.float().numpy() - images).max() <= step
    else:
        assert torch.equal(got, torch.from_numpy(images).to(dtype))


def test_operations_for_other_devices_equal_the_kernels():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 20, 30, 3)).astype(np.uint8)
    plan = Plan((T.CenterCrop((20, 30)), T.ColorJitter(0.4, 0.4, 0.4, 0.1), T.RandomErasing(1.0, value=(9, 8, 7)), T.Cutout(7), T.Mixup(), T.CutMix()))  # fmt: skip
    table = plan.draw(0, 0, np.arange(6), np.full(6, 20), np.full(6, 30))
    ours, theirs = images.copy(), torch.from_numpy(images.copy())
    for row in (1, 2, 5):
        pixels.recolour(ours[row], table.colour[row])
    on_device.recolour(theirs, np.array([1, 2, 5]), table.colour[[1, 2, 5]])
    assert np.abs(ours.astype(int) - theirs.numpy()).max() <= 1 and not np.array_equal(ours, images)
    theirs = torch.from_numpy(ours.copy())
    for row in range(6):
        pixels.erase(ours[row], table.erase[row], plan.erase_fill)
    on_device.erase(theirs, table.erase, plan.erase_fill)
    assert np.array_equal(ours, theirs)
    floats, scale, shift = np.empty(images.shape, np.float32), *Plan((T.Normalize(),)).affine
    pixels.normalise(images, scale, shift, floats)
    assert np.array_equal(on_device.normalise(torch.from_numpy(images), scale, shift), floats)
    for array, rounding in ((images.copy(), 0.5), (floats, 0.0)):
        mixed = on_device.mix(torch.from_numpy(array.copy()), table.mix, table.mix_box)
        pixels.mix(array, table.mix, table.mix_box, np.float32(rounding))
        assert np.array_equal(mixed, array)


def test_several_files_and_views(beton_file, make):
    """Batches out of two files, one of JPEG and one of pixels, in any order, with repeats."""
    both = concat(
        [dataset.open(beton_file("a.beton")), dataset.open(beton_file("b.beton", store="raw", seed=1))]
    )
    view = both.subset([39, 0, 20, 1, 1, 38, 19, 20, 3])
    plan = Plan(T.train(24)[:2])
    found = list(batches(make(view, plan, batch_size=4), view, plan, 4))
    assert [len(images) for *_, images in found] == [4, 4, 1]
    for bases, table, images in found:
        difference = np.abs(images.numpy() - by_cpu(view, plan, bases, table, images.shape).astype(int))
        assert difference[:, 1:-1, 1:-1].max() <= 1


def digest(images):
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def test_kept_batches_never_change(small, make):
    """Neither while later batches are made, nor when the engine is gone; nor later ones when a kept one is written to."""
    ds, plan = dataset.open(small), Plan(T.train(32)[:2])
    engine = make(ds, plan, batch_size=4)
    kept = [images for *_, images in batches(engine, ds, plan, 4)]
    before = [digest(images) for images in kept]
    again = [digest(images) for *_, images in batches(engine, ds, plan, 4)]
    assert again == before == [digest(images) for images in kept]
    kept[0].fill_(7)
    assert [digest(images) for *_, images in batches(engine, ds, plan, 4)] == before
    engine.close()
    del engine
    gc.collect()
    assert [digest(images) for images in kept[1:]] == before[1:]


def test_many_batches_ahead_come_in_order(small, make):
    ds, plan = dataset.open(small), Plan(T.eval(24)[:2])
    engine = make(ds, plan, batch_size=3)
    one_by_one = [images.clone() for *_, images in batches(engine, ds, plan, 3, ahead=0)]
    all_ahead = [images for *_, images in batches(engine, ds, plan, 3, ahead=99)]
    assert [len(images) for images in all_ahead] == [3] * 6 + [2]
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, all_ahead))


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["for DALI", "short", "later"])
def damaged(request, picture, tmp_path):
    """Sample 5 is cut short before it was written, with a checksum that fits: without restart markers, so that only DALI
    will notice, or with them. Or bytes change in the finished file, which DALI does not notice at all."""
    encode = KINDS["ours" if request.param == "short" else "unindexed"]
    images = [(60, 80, encode(picture(60, 80, i))) for i in range(16)]
    whole = images[5][2]
    if request.param != "later":
        images[5] = (60, 80, whole[: len(whole) // 2])
    ds = write(tmp_path / "damaged.beton", images)
    if request.param == "later":
        reader, at = ds.locate(5)
        with open(ds.path, "r+b") as file:
            file.seek(int(reader.spans(np.array([at])).starts[0]) + len(whole) // 2)
            file.write(np.random.default_rng(0).integers(0, 255, 60).astype(np.uint8).tobytes())
    return dataset.open(ds.path)


@pytest.fixture
def starts(monkeypatch):
    """Grows by one for each pipeline that is started."""
    seen, start = [], DaliEngine._start
    monkeypatch.setattr(DaliEngine, "_start", lambda self, kind: (seen.append(kind), start(self, kind))[1])
    return seen


def test_a_corrupt_image_is_named_and_the_rest_goes_on(damaged, make, starts, request):
    plan, good = Plan((T.Resize((32, 32)),)), 0
    killed = (
        "for DALI" in request.node.name
    )  # the pipeline dies, is tried with this batch alone, and dies again
    engine = make(damaged, plan, batch_size=4)
    for _ in range(3):
        jobs = []
        for at in range(0, 16, 4):
            bases = damaged.indices[at : at + 4]
            jobs.append((bases, draw(damaged, plan, bases)))
            engine.submit(bases, damaged.spans(bases), jobs[-1][1])
        for number, (bases, table) in enumerate(jobs):
            if number == 1:
                with pytest.raises(CorruptError, match=r"sample 5, id 'id-5', source '5\.jpg'") as caught:
                    engine.collect()
                assert caught.value.index == 5
                continue
            images = engine.collect()
            difference = np.abs(
                images.numpy() - by_cpu(damaged, plan, bases, table, images.shape).astype(int)
            )
            assert difference[:, 1:-1, 1:-1].max() <= 1
            good += 1
        assert len(starts) == (3 if killed else 1)  # later epochs know the sample
    assert good == 9
    assert (np.flatnonzero(engine._route == dali._CPU) == [5]).all()  # nobody else is blamed


def test_a_corrupt_image_is_replaced(damaged, make):
    """The loader's replacement fills the row, and the batch bears the substitute's number."""
    plan = Plan((T.Resize((32, 32)), T.Grayscale(), T.Normalize()))
    filler = Filler(damaged, plan, 0, Engine(damaged, plan, "exact"), replace=True)
    engine = make(damaged, plan, batch_size=8, dtype=torch.float32)
    bases = damaged.indices[:8].copy()
    job = Job(0, 8, bases, damaged.spans(bases), draw(damaged, plan, bases), np.empty(0), None)
    with pytest.warns(UserWarning, match="another sample takes its place"):
        engine.submit(job.bases, job.spans, job.table, lambda row, out: filler.execute(job, row, out))
        images = engine.collect()
    [replaced] = filler.errors
    assert replaced.index == 5 and job.bases[5] == replaced.replacement != 5
    expected = by_cpu(damaged, plan, job.bases, draw(damaged, plan, job.bases), images.shape)
    floats = np.empty(expected.shape, np.float32)
    pixels.normalise(expected, *plan.affine, floats)
    assert np.abs(images.numpy() - floats)[:, 1:-1, 1:-1].max() <= 1.01 / 255 / 0.224
    assert np.array_equal(images[5], floats[5])
    assert (np.flatnonzero(engine._route == dali._CPU) == [5]).all()


def test_images_for_the_cpu_engine_are_found_by_their_header(odd, picture, tmp_path, make, starts):
    """Progressive and CMYK are made to the bit as the CPU engine makes them; 12 bits are refused with the sample's name."""
    engine, plan = make(odd, T.train(32)[:2]), Plan(T.train(32)[:2])
    for bases, table, images in batches(engine, odd, plan, 16):
        expected = by_cpu(odd, plan, bases, table, images.shape)
        for row, base in enumerate(bases.tolist()):
            own = list(KINDS)[base % len(KINDS)] in BY_CPU
            assert engine._route[base] == (dali._CPU if own else dali._DALI)
            assert not own or np.array_equal(images[row], expected[row])
    deep = bytearray(jpeg_of(picture(40, 40)))
    deep[deep.index(b"\xff\xc0") + 4] = 12
    ds = write(tmp_path / "deep.beton", [(40, 40, bytes(deep)), (40, 40, jpeg_of(picture(40, 40)))])
    engine = make(ds, plan)
    bases = ds.indices
    engine.submit(bases, ds.spans(bases), draw(ds, plan, bases))
    with pytest.raises(CorruptError, match="sample 0, id 'id-0'"):
        engine.collect()
    assert starts == ["jpeg", "raw", "jpeg"]  # none died


def test_a_failure_without_a_reason_is_said_and_then_an_error(small, make, monkeypatch):
    ds, plan = dataset.open(small), Plan(T.train(32)[:2])
    engine = make(ds, plan, batch_size=5)
    monkeypatch.setattr(engine, "_output", lambda kind, part: (None, "no idea"))
    found = batches(engine, ds, plan, 5, ahead=0)
    for _ in range(2):
        with pytest.warns(UserWarning, match="DALI failed at a batch.*no idea"):
            bases, table, images = next(found)
        assert np.array_equal(images, by_cpu(ds, plan, bases, table, images.shape))
    with pytest.raises(DataError, match=r"3 batches.*engine='cpu'.*no idea"):
        next(found)


def test_after_an_interrupted_collect_the_next_batches_are_right(small, make, monkeypatch):
    ds, plan = dataset.open(small), Plan(T.eval(24)[:2])
    engine, real = make(ds, plan, batch_size=4), DaliEngine._output
    expected = [images for *_, images in batches(make(ds, plan, batch_size=4), ds, plan, 4)]
    for start in range(0, 20, 4):
        bases = ds.indices[start : start + 4]
        engine.submit(bases, ds.spans(bases), draw(ds, plan, bases))

    def interrupted(kind, part):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_output", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.collect()
    monkeypatch.setattr(engine, "_output", lambda kind, part: real(engine, kind, part))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is the fault of the batch that comes next
        assert all(torch.equal(engine.collect(), images) for images in expected[1:])


# -- lifecycle and usage -----------------------------------------------------------------------------------------------


def test_dropped_batches_do_not_come_back(odd, make, starts):
    plan = Plan(T.eval(24)[:2])
    engine = make(odd, plan, batch_size=8)
    for _ in range(3):
        for start in (8, 16, 24):
            engine.submit(odd.indices[start : start + 8], odd.spans(odd.indices[start : start + 8]), draw(odd, plan, odd.indices[start : start + 8]))  # fmt: skip
        engine.drop()
        bases, table, images = next(batches(engine, odd, plan, 8, ahead=0))
        difference = np.abs(images.numpy() - by_cpu(odd, plan, bases, table, images.shape).astype(int))
        assert difference[:, 1:-1, 1:-1].max() <= 1
    assert len(starts) == 2


def test_early_close_leaves_nothing(odd):
    plan = Plan(T.train(32))

    def once(collected):
        engine = DaliEngine(odd, plan, batch_size=8, threads=3, device_id=None, dtype=torch.float32)
        for start in (0, 8, 16):
            bases = odd.indices[start : start + 8]
            engine.submit(bases, odd.spans(bases), draw(odd, plan, bases))
        for _ in range(collected):
            engine.collect()
        engine.close()
        assert not any(thread.name.startswith("fastload-dali") for thread in threading.enumerate())

    def left():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), threading.active_count()

    once(1)
    before = left()
    for turn in range(10):
        once(turn % 3)
    assert left() == before


def test_wrong_use_is_one_sentence(small, make, monkeypatch):
    ds, plan = dataset.open(small), Plan(T.train(32)[:2])
    with pytest.raises(UsageError, match=r"Python function.*engine='cpu'"):
        make(ds, (T.CenterCrop(32), T.PerImage(lambda image: image)))
    with pytest.raises(UsageError, match="uint8 cannot hold"):
        make(ds, T.train(32))
    engine = make(ds, plan, batch_size=4)
    with pytest.raises(UsageError, match="1 to 4 samples, got 5"):
        engine.submit(ds.indices[:5], ds.spans(ds.indices[:5]), draw(ds, plan, ds.indices[:5]))
    with pytest.raises(UsageError, match="none is left"):
        engine.collect()
    with pytest.raises(UsageError, match=r"number 99.*device_id=None"):
        make(ds, plan, device_id=99)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fastload\[dali\]'"):
        make(ds, plan)


def test_a_pipeline_that_cannot_start_is_one_sentence(small, make, monkeypatch):
    def broken(self, kind, gpu):
        raise RuntimeError("CUDA driver\nis missing")

    ds, plan = dataset.open(small), Plan(T.train(32)[:2])
    monkeypatch.setattr(DaliEngine, "_graph", broken)
    with pytest.raises(
        UsageError, match=r"cannot start a pipeline on cpu.*CUDA driver is missing.*engine='cpu'"
    ):
        make(ds, plan).submit(ds.indices[:4], ds.spans(ds.indices[:4]), draw(ds, plan, ds.indices[:4]))


def test_a_crash_is_found_out_in_another_process(monkeypatch):
    assert dali._survives("import sys; sys.exit(0)")
    assert not dali._survives("import os; os.abort()")
    assert not dali._survives("import time; time.sleep(30)", seconds=0.2)
    asked = []
    monkeypatch.setattr(dali, "_survives", lambda code: asked.append(code) or False)
    dali.roi_decode_works.cache_clear()
    try:
        assert not dali.roi_decode_works(3) and not dali.roi_decode_works(3)
        assert len(asked) == 1 and asked[0].endswith("_try_roi_decode(3)")
    finally:
        dali.roi_decode_works.cache_clear()


def test_the_trial_of_regions_itself_runs():
    dali._try_roi_decode(None)
