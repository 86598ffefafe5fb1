"""The CUDA engine, on the CPU: pixels against the CPU engine's, order, caches, damaged images, and what it leaves behind.

The tests at the end are for a machine with a GPU, and run there as they are.
"""

import gc
import importlib.util
import os
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from engine_cases import KINDS, batches, draw, jpeg_of, random_pipeline, sizes, write
from PIL import Image

from fastload import codecs, concat, dataset
from fastload import transforms as T
from fastload.draws import Plan
from fastload.engines import cuda, gpu_decode, resident, staging
from fastload.engines.cpu import Engine
from fastload.engines.cuda import CudaEngine
from fastload.engines.encoded import Encoded
from fastload.errors import CorruptError, UsageError
from fastload.kernels import pixels

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
FLOATS = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # and how coarse they are


@pytest.fixture(scope="module")
def odd(picture, tmp_path_factory):
    """All kinds of images, three of each, of all sizes."""
    ways = list(KINDS.values()) * 3
    images = [(h, w, ways[i](picture(h, w, i))) for i, (h, w) in enumerate(sizes(len(ways)))]
    return write(tmp_path_factory.mktemp("cuda") / "odd.beton", images)


def by_cpu(ds, plan, bases, table, shape, dtype=torch.uint8, decode="exact"):
    """The batch as the loader makes it with the CPU engine, (B, H, W, 3)."""
    engine, out = Engine(ds, plan, decode), np.full(shape, 123, np.uint8)
    for row, base in enumerate(bases.tolist()):
        engine.execute(base, table, row, out[row])
    if dtype != torch.uint8:
        floats = np.empty(shape, np.float32)
        pixels.normalise(out, *plan.affine, floats)
        out = floats
    if table.mix is not None:
        pixels.mix(out, table.mix, table.mix_box, np.float32(0.5 if dtype == torch.uint8 else 0.0))
    return torch.from_numpy(out).to(dtype)


def levels(images, plan):
    """Any batch in levels of 0 to 255."""
    if images.dtype == torch.uint8:
        return images.double().numpy()
    scale, shift = plan.affine
    return (images.double().numpy() - shift) / scale


def random_case(seed):
    """A pipeline, with normalising and mixing by chance, and a dtype."""
    rng = np.random.default_rng(seed)
    steps = [*random_pipeline(seed, rng)]
    dtype = [torch.uint8, *FLOATS][int(rng.integers(4))]
    steps += [T.Normalize()] if dtype != torch.uint8 and rng.random() < 0.7 else []
    steps += [T.Mixup(0.4, 0.6)] if rng.random() < 0.3 else []
    steps += [T.CutMix(1.0, 0.7)] if rng.random() < 0.3 else []
    return tuple(steps), dtype


def allowed(table, plan, dtype, count):
    """(B,) the levels by which a pixel may differ: one of the resize, more by colour, by mixing, by a coarse dtype."""
    gain = np.zeros(count)
    if table.colour is not None:
        gain = np.where(table.coloured, np.abs(table.colour[:, :, :6]).sum(axis=2).max(axis=1), 0)
    most = 1 + gain
    if table.mix is not None:
        most = np.maximum(most, most[::-1]) + (1 if dtype == torch.uint8 else 0)
    # Of a float of that dtype, rounded once here and twice (before and after it is mixed) there.
    coarse = FLOATS.get(dtype, 0.0) * 2 * (255 + np.abs(plan.affine[1] / plan.affine[0]).max())
    return most + coarse + 1e-3


# -- pixels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_random_pipelines_equal_the_cpu_engine(odd, make, seed):
    """libjpeg-turbo decodes for both, so only the resize may differ, by a level, and what is done to that level after it."""
    specs, dtype = random_case(seed)
    plan = Plan(specs)
    engine = make(odd, plan, dtype=dtype)
    total = []
    for bases, table, images in batches(engine, odd, plan, 13, seed):
        assert images.dtype == dtype and images.shape == (len(bases), *plan.size, 3)
        assert images.is_contiguous()
        wanted = by_cpu(odd, plan, bases, table, images.shape, dtype)
        difference = np.abs(levels(images, plan) - levels(wanted, plan))
        assert (
            difference.reshape(len(bases), -1).max(axis=1) <= allowed(table, plan, dtype, len(bases))
        ).all()
        total.append(difference.mean())
    assert np.mean(total) < (0.05 if dtype in (torch.uint8, torch.float32) else 0.6)


@pytest.mark.parametrize("store", ["jpeg", "raw", "mixed"])
def test_pixels_that_are_not_resized_are_equal_to_the_bit(beton_file, make, store):
    ds = dataset.open(beton_file(store=store, size=(48, 64)))
    for specs in (None, (T.HorizontalFlip(), T.VerticalFlip()), (T.RandomCrop(32, 40, (1, 2, 3)),)):
        plan = Plan(specs)
        for bases, table, images in batches(make(ds, plan), ds, plan, 7):
            assert torch.equal(images, by_cpu(ds, plan, bases, table, images.shape))


def test_decoded_by_our_threads(odd, photos, tmp_path, make):
    """Our decoder smooths chroma otherwise than libjpeg-turbo: half a level on average, in photographs."""
    images = []
    for data in photos[:12]:
        rgb = codecs.load_rgb(data, min_size=(160, 160))
        images.append((*rgb.shape[:2], codecs.encode_jpeg(rgb)))
    plan = Plan((T.RandomResizedCrop(96), T.HorizontalFlip()))
    for ds, mean in ((write(tmp_path / "photos.beton", images), 0.7), (odd, 2.0)):
        engine = make(ds, plan, decode="cpu")
        assert "CPU decodes" in engine.chosen
        for bases, table, made in batches(engine, ds, plan, 12):
            difference = np.abs(made.numpy() - by_cpu(ds, plan, bases, table, made.shape).numpy().astype(int))
            assert difference.mean() < mean
            raw = ds.gather("image", bases)["mode"] == 1
            assert difference[raw].max(initial=0) <= 1


def test_a_window_has_the_pixels_of_the_whole_image(odd, make):
    """However little is cut or decoded: whole rows, and the same crops of whole decoded images in a cache."""
    plan = Plan(
        (T.RandomResizedCrop(33, scale=(0.05, 0.5)), T.VerticalFlip(), T.ColorJitter(0.4, 0.4, 0.4, 0.1))
    )
    for decode in ("gpu", "cpu"):
        usual = [images for *_, images in batches(make(odd, plan, decode=decode), odd, plan, 9)]
        for options in ({"cache": "device", "vram": 10**7}, {"cache": "host", "ram": 10**7}):
            engine = make(odd, plan, decode=decode, **options)
            for _ in range(2):
                again = [images for *_, images in batches(engine, odd, plan, 9)]
                assert all(torch.equal(a, b) for a, b in zip(usual, again, strict=True))


def test_several_files_and_views(beton_file, make):
    ds = concat(
        [
            dataset.open(beton_file(f"{s}.beton", store=s, seed=i))
            for i, s in enumerate(("raw", "jpeg", "mixed"))
        ]
    )
    ds = ds.subset([55, 3, 41, 3, 22, 59, 20, 0, 40])
    plan = Plan((T.RandomResizedCrop(24), T.HorizontalFlip()))
    for cache in (None, "device", "host"):
        for bases, table, images in batches(
            make(ds, plan, cache=cache, vram=300_000, ram=300_000), ds, plan, 4
        ):
            wanted = by_cpu(ds, plan, bases, table, images.shape)
            assert (images.int() - wanted.int()).abs().max() <= 1


# -- order and memory --------------------------------------------------------------------------------------------------


def test_order_small_last_batch_and_kept_batches(beton_file, make):
    """Many batches in flight come in their order, and one that is kept does not change."""
    ds = dataset.open(beton_file(count=50, store="mixed"))
    plan = Plan((T.RandomResizedCrop(20),))
    engine = make(ds, plan, threads=3, prefetch=9)
    kept = list(batches(engine, ds, plan, 4, ahead=9))
    assert [len(images) for *_, images in kept] == [4] * 12 + [2]
    copies = [images.clone() for *_, images in kept]
    for *_, images in batches(engine, ds, plan, 4, epoch=1, ahead=9):
        assert images.data_ptr() not in {k.data_ptr() for *_, k in kept}
    for (bases, table, images), copy in zip(kept, copies, strict=True):
        assert torch.equal(images, copy)
        assert (images.int() - by_cpu(ds, plan, bases, table, images.shape).int()).abs().max() <= 1


class Event:
    def __init__(self, done):
        self.done = done

    def query(self):
        return self.done

    def synchronize(self):
        self.done = True


def test_a_buffer_is_used_again_when_its_copies_are_done():
    ring, event = staging.Ring(False, 2), Event(False)
    first = ring.take(1000)
    ring.give(first, [event])
    second = ring.take(1000)
    assert second.data_ptr() != first.data_ptr()
    ring.give(second, [Event(True)])
    event.done = True
    assert ring.take(1000).data_ptr() == first.data_ptr()
    assert ring.take(1000).data_ptr() == second.data_ptr()
    for size in (1, 1 << 21, 1 << 22, 1 << 23):
        ring.give(torch.empty(size, dtype=torch.uint8), [])
    assert sorted(b.numel() for b, _ in ring._free) == [1 << 22, 1 << 23]
    ring.give(first, [late := Event(False)])
    ring.clear()
    assert late.done or not ring._free


def test_a_device_decoder_is_only_called_on_a_drained_stream_of_its_own(monkeypatch):
    """Its hardware engine ignores streams. A log in place of CUDA: there is none here."""
    log = []

    class Stream:
        def __init__(self, device=None, name="own"):
            self.name = name

        def synchronize(self):
            log.append(f"drain {self.name}")

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event.stream.name}")

    class Mark:
        def record(self, stream):
            self.stream = stream

    class Current:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            log.append(f"enter {self.stream.name}")

        def __exit__(self, *_):
            log.append(f"leave {self.stream.name}")

    class Decoded:
        def record_stream(self, stream):
            log.append(f"record {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(torch.cuda, "stream", Current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(name="work"))

    def decode(encoded):
        log.append("decode")
        return [Decoded()]

    decoder = gpu_decode.Decoder("fake", torch.device("cuda"), decode, False)
    assert decoder.images([]) == [] and not log
    for _ in range(2):
        log.clear()
        decoder.images([torch.zeros(3, dtype=torch.uint8)])
        assert log == ["enter own", "drain own", "decode", "leave own", "work waits for own", "record work"]


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(picture, tmp_path):
    """Twelve images; the third was damaged in the file, so that its checksum does not match, the sixth is no JPEG."""
    images = [(64, 80, codecs.encode_jpeg(picture(64, 80, i))) for i in range(12)]
    images[5] = (64, 80, b"no JPEG at all, as everybody can see")
    write(tmp_path / "damaged.beton", images).close()
    content = bytearray((tmp_path / "damaged.beton").read_bytes())
    middle = content.index(images[2][2]) + len(images[2][2]) // 2
    content[middle : middle + 60] = b"\xff\xd9" * 30
    (tmp_path / "damaged.beton").write_bytes(content)
    return dataset.open(tmp_path / "damaged.beton")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decode": "cpu"},
        {"decode": "segments"},
        {"cache": "device", "vram": 10**6},
        {"cache": "device", "vram": 60_000},  # encoded
        {"cache": "host", "ram": 10**6},
    ],
)
def test_corrupt_samples_are_named_or_repaired(damaged, make, options):
    plan = Plan((T.Resize(48), T.CenterCrop(40), T.Normalize()))
    engine = make(damaged, plan, batch_size=4, dtype=torch.float32, **options)
    found, all_bases = [], damaged.indices
    for start in (0, 4, 8):
        bases = all_bases[start : start + 4]
        engine.submit(bases, damaged.spans(bases), draw(damaged, plan, bases))
    for start in (0, 4, 8):
        try:
            assert engine.collect().shape == (4, 40, 40, 3)
        except CorruptError as error:
            found.append((start, error.index, error.id))
    assert found == [(0, 2, "id-2"), (4, 5, "id-5")]
    repaired = []

    def repair(row, out):
        repaired.append(row)
        out[:] = 200

    bases = all_bases[2:6]
    engine.submit(bases, damaged.spans(bases), draw(damaged, plan, bases), repair)
    images = levels(engine.collect(), plan)
    assert sorted(repaired) == [0, 3]
    assert np.allclose(images[[0, 3]], 200, atol=1e-3) and images[1:3].std() > 10


def test_what_repair_made_is_not_painted_again(damaged, make):
    plan = Plan(
        (
            T.Resize(48),
            T.CenterCrop(60),
            T.VerticalFlip(1.0),
            T.ColorJitter(0.5, p=1.0),
            T.Cutout(90),
            T.Mixup(1.0),
        )
    )
    engine, bases = make(damaged, plan), damaged.indices[[2, 0, 5]]
    table, ramp = draw(damaged, plan, bases), np.arange(60 * 60 * 3, dtype=np.uint8).reshape(60, 60, 3)
    engine.submit(bases, damaged.spans(bases), table, lambda row, out: np.copyto(out, ramp + row * 0))
    images = engine.collect()
    assert (images[0].int() - torch.from_numpy(ramp).int()).abs().max() <= 1


def test_a_batch_at_which_the_decoder_fails_is_decoded_image_by_image(beton_file, make):
    """And the image that it was is decoded by the CPU from then on."""
    ds = dataset.open(beton_file(size=(48, 64)))
    plan = Plan((T.RandomCrop(32),))
    engine = make(ds, plan)
    real, calls = engine._decoder.decode, []
    hated = engine._dataset.encoded(3).data.size

    def decode(encoded):
        calls.append(len(encoded))
        if bad and 3 in bad and len(encoded) > 1:
            raise RuntimeError("nvjpegDecodeBatched failed")
        if bad and len(encoded) == 1 and calls.count(1) == 4:
            raise RuntimeError("nvjpegDecode failed")
        return real(encoded)

    engine._decoder.decode, bad = decode, {3}
    assert hated
    bases = ds.indices[:8]
    for turn in range(2):
        table = draw(ds, plan, bases)
        engine.submit(bases, ds.spans(bases), table)
        assert torch.equal(engine.collect(), by_cpu(ds, plan, bases, table, (8, 32, 32, 3)))
        assert calls == ([8, *[1] * 8] if not turn else [7])
        calls.clear()
        bad = set()


def test_a_decoder_that_gives_another_size_is_not_believed(beton_file, make):
    ds = dataset.open(beton_file(size=(48, 64)))
    plan = Plan((T.RandomCrop(32),))
    engine = make(ds, plan)
    real = engine._decoder.decode
    engine._decoder.decode = lambda encoded: [image.transpose(1, 2) for image in real(encoded)]
    for bases, table, images in batches(engine, ds, plan, 8):
        assert torch.equal(images, by_cpu(ds, plan, bases, table, images.shape))


def test_an_error_in_a_thread_reaches_the_consumer_with_the_sample(damaged, make):
    plan = Plan((T.Resize(48), T.CenterCrop(40)))
    engine, bases = make(damaged, plan), damaged.indices[4:8]

    def repair(row, out):
        raise ZeroDivisionError("a bug")

    engine.submit(bases, damaged.spans(bases), draw(damaged, plan, bases), repair)
    bases = damaged.indices[6:9]
    engine.submit(bases, damaged.spans(bases), draw(damaged, plan, bases))
    with pytest.raises(ZeroDivisionError) as caught:
        engine.collect()
    assert "sample 5, id 'id-5'" in "".join(caught.value.__notes__)
    assert len(engine.collect()) == 3
    with pytest.raises(UsageError, match="none is left"):
        engine.collect()


def test_memory_that_is_full_is_told_and_not_taken_for_a_bad_image(small, make):
    ds = dataset.open(small)
    engine = make(ds, (T.RandomResizedCrop(20),))

    def decode(encoded):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine._decoder.decode = decode
    engine.submit(ds.indices[:4], ds.spans(ds.indices[:4]), draw(ds, engine._plan, ds.indices[:4]))
    with pytest.raises(torch.OutOfMemoryError):
        engine.collect()


def test_wrong_calls(small, make):
    ds, plan = dataset.open(small), Plan((T.RandomResizedCrop(20),))
    for options, text in (
        ({"decode": "gpus"}, "gpu"),
        ({"cache": "devise"}, "device"),
        ({"vram": -1}, "vram"),
        ({"device": "mps"}, "mps"),
    ):
        with pytest.raises(UsageError, match=text):
            make(ds, plan, **options)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="engine='cpu'"):
            make(ds, plan, device="cuda")
    with pytest.raises(UsageError, match="PerImage"):
        make(ds, (T.RandomResizedCrop(20), T.PerImage(lambda image: image)))
    with pytest.raises(UsageError, match="float dtype"):
        make(ds, T.train(20))
    engine = make(ds, plan, batch_size=3)
    with pytest.raises(UsageError, match="1 to 3"):
        engine.submit(ds.indices[:4], ds.spans(ds.indices[:4]), draw(ds, plan, ds.indices[:4]))
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.submit(ds.indices[:3], ds.spans(ds.indices[:3]), draw(ds, plan, ds.indices[:3]))


# -- who decodes -------------------------------------------------------------------------------------------------------


def test_auto_measures_both_and_says_so(small, beton_file, make, monkeypatch):
    monkeypatch.setattr(cuda, "_MEASURE_SECONDS", 0.05)
    ds, plan = dataset.open(small), Plan((T.RandomResizedCrop(20),))
    engine = make(ds, plan, decode="auto")
    assert set(engine.rates) == {"gpu", "cpu"} and min(engine.rates.values()) > 0
    assert "fastest" in engine.chosen and f"{engine.rates['cpu']:,.0f}" in engine.chosen
    assert engine._stager.by_device == (engine.rates["gpu"] > engine.rates["cpu"])
    assert len(list(batches(engine, ds, plan, 16))) == 2
    raw = dataset.open(beton_file("raw.beton", store="raw"))
    assert "nothing to decode" in make(raw, plan, decode="auto").chosen
    monkeypatch.setattr(gpu_decode, "DECODERS", dict.fromkeys(gpu_decode.DECODERS, lambda device: 1 / 0))
    assert "division by zero" in make(ds, plan, decode="auto").chosen
    with pytest.raises(UsageError, match="pip install torchcodec"):
        make(ds, plan)


def test_the_second_decoder_gives_the_same_pixels(odd, picture, make, monkeypatch, tmp_path):
    if importlib.util.find_spec("torchcodec") is None:
        pytest.skip("torchcodec is not installed")
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = [(40, 60, jpeg_of(picture(40, 60, i), exif=exif)) for i in range(3)]
    plan = Plan((T.RandomResizedCrop(33), T.HorizontalFlip()))
    for ds in (odd, write(tmp_path / "turned.beton", turned)):
        usual = [images for *_, images in batches(make(ds, plan), ds, plan, 9)]
        with monkeypatch.context() as patch:
            patch.delitem(gpu_decode.DECODERS, "torchvision")
            engine = make(ds, plan)
        assert "torchcodec" in engine.chosen
        for a, (*_, b) in zip(usual, batches(engine, ds, plan, 9), strict=True):
            assert torch.equal(a, b)


# -- caches ------------------------------------------------------------------------------------------------------------


def test_what_a_budget_buys():
    pixels, encoded = np.array([300, 100, 200]), np.array([30, 10, 20])

    def kept(where, budget):
        choice = resident.choose(where, pixels, encoded, budget)
        assert choice.bytes <= budget and f"cache={where!r}" in choice.text
        return choice.what, choice.count, choice.whole

    for where in ("device", "host"):
        assert kept(where, 600) == kept(where, 10**12) == ("pixels", 3, True)
    assert kept("device", 599) == ("pixels", 2, False)
    assert kept("device", 60) == ("nothing", 0, False)
    assert kept("host", 599) == kept("host", 60) == ("encoded", 3, True)
    assert kept("host", 59) == ("nothing", 0, False)
    assert kept("host", 0) == kept("device", 0) == ("nothing", 0, False)
    for where in ("device", "host"):
        assert resident.free_bytes(where, torch.device("cpu")) > 10**8


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("store", ["jpeg", "mixed", "raw"])
def test_cached_epochs_equal_uncached_ones_to_the_bit(beton_file, make, where, store):
    """With all, some or none of the images in the cache, as pixels or as they are stored, and one warning where they are not all there."""
    ds = dataset.open(beton_file(count=24, store=store)).subset(np.r_[20:2:-1, 5, 5])
    plan = Plan((T.RandomResizedCrop(24), T.HorizontalFlip(), T.Grayscale(0.3), T.Mixup(1.0)))
    wanted = [[i for *_, i in batches(make(ds, plan), ds, plan, 8, epoch=e)] for e in range(2)]
    unique = resident.first_uses(ds.indices)
    pixels, encoded, _, _ = resident.measure(ds.spans, unique)
    whole, small = int(pixels.sum()), int(encoded.sum())
    option = "vram" if where == "device" else "ram"
    if where == "device":
        small += Encoded(ds.spans, unique, int(unique.max()) + 1).bytes
    for budget in (whole, whole - 1, whole // 2, min(small, whole), min(small, whole) - 1, small // 2, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            engine = make(ds, plan, cache=where, **{option: budget})
        told = [w for w in caught if w.category is UserWarning]
        everything = budget >= min(small, whole)
        assert len(told) == (0 if everything else 1)
        assert engine.resident.memory.numel() <= budget
        assert f"cache={where!r}" in engine.chosen
        for epoch in range(2):
            for a, (*_, b) in zip(wanted[epoch], batches(engine, ds, plan, 8, epoch=epoch), strict=True):
                assert torch.equal(a, b)


def test_an_epoch_in_device_memory_touches_no_pixels_on_the_cpu(small, make, monkeypatch):
    ds, plan = dataset.open(small), Plan((T.RandomResizedCrop(20),))
    engine = make(ds, plan, cache="device", vram=10**7)

    def fail(*_):
        raise AssertionError("this is work of the CPU")

    monkeypatch.setattr(staging.Stager, "prepare", fail)
    monkeypatch.setattr(gpu_decode.Decoder, "images", fail)
    monkeypatch.setattr(staging.Ring, "take", fail)
    assert len(list(batches(engine, ds, plan, 8))) == 3


def test_many_small_images_in_one_batch(beton_file, make):
    ds = dataset.open(beton_file(count=300, store="raw", size=(32, 32)))
    plan = Plan((T.RandomCrop(32, padding=4), T.HorizontalFlip(), T.Normalize()))
    engine = make(ds, plan, batch_size=300, cache="device", vram=10**6, dtype=torch.float16)
    ((bases, table, images),) = batches(engine, ds, plan, 300)
    assert torch.equal(images, by_cpu(ds, plan, bases, table, images.shape, torch.float16))


# -- what it leaves behind ---------------------------------------------------------------------------------------------


def alive():
    return [t.name for t in threading.enumerate() if t.name.startswith("fastload-cu")]


@pytest.mark.parametrize("cache", [None, "device", "host"])
def test_nothing_is_left_after_an_early_end(beton_file, cache):
    ds = dataset.open(beton_file(count=40, store="mixed"))
    plan = Plan((T.RandomResizedCrop(64),))

    def once(collected):
        engine = CudaEngine(
            ds, plan, batch_size=8, threads=2, device="cpu", prefetch=4, cache=cache, vram=10**5, ram=10**5
        )
        for start in range(0, 40, 8):
            bases = ds.indices[start : start + 8]
            engine.submit(bases, ds.spans(bases), draw(ds, plan, bases))
        kept = [engine.collect() for _ in range(collected)]
        engine.close()
        return kept

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        once(1)
        gc.collect()
        files = len(os.listdir("/proc/self/fd"))
        tensors = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
        for turn in range(6):
            once(turn % 3)
        gc.collect()
    assert not alive()
    assert len(os.listdir("/proc/self/fd")) == files
    assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= tensors


def test_drop_forgets_and_goes_on(beton_file, make):
    ds = dataset.open(beton_file(count=40, store="mixed"))
    plan = Plan((T.RandomResizedCrop(32),))
    engine = make(ds, plan, prefetch=4)
    wanted = [images for *_, images in batches(engine, ds, plan, 8)]
    for _ in range(5):
        for start in (0, 8, 16):
            bases = ds.indices[start : start + 8]
            engine.submit(bases, ds.spans(bases), draw(ds, plan, bases, seed=7))
        engine.drop()
    for a, (*_, b) in zip(wanted, batches(engine, ds, plan, 8), strict=True):
        assert torch.equal(a, b)
    time.sleep(0.05)
    assert len(engine._ring._free) <= 7


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smooth(picture, tmp_path_factory):
    """Sixty pictures as smooth as photographs, one in five as pixels."""
    images = []
    for i, (height, width) in enumerate(sizes(60, 200, 500)):
        rgb = codecs.resize(picture(height // 6, width // 6, i), (height, width))
        images.append((height, width, rgb if i % 5 == 4 else codecs.encode_jpeg(rgb)))
    return write(tmp_path_factory.mktemp("gpu") / "smooth.beton", images)


@needs_gpu
@pytest.mark.parametrize("seed", range(49))
def test_gpu_random_pipelines(odd, make, seed):
    """Stored pixels as on the CPU; nvJPEG's chroma is plain, and the made pictures are noisy, so a JPEG only on average."""
    specs, dtype = random_case(seed)
    plan = Plan(specs)
    for decode in ("gpu", "cpu"):
        for bases, table, images in batches(
            make(odd, plan, dtype=dtype, device="cuda", decode=decode), odd, plan, 13, seed
        ):
            assert images.is_cuda and images.is_contiguous()
            wanted = by_cpu(odd, plan, bases, table, images.shape, dtype)
            difference = np.abs(levels(images.cpu(), plan) - levels(wanted, plan)).reshape(len(bases), -1)
            most = allowed(table, plan, dtype, len(bases))
            raw = odd.gather("image", bases)["mode"] == 1
            raw &= raw[::-1] | (table.mix is None)
            assert (difference.max(axis=1) <= most)[raw].all()
            assert (difference.mean(axis=1) <= 12 * most).all()


@needs_gpu
@pytest.mark.parametrize("decode", ["gpu", "cpu"])
def test_gpu_smooth_pictures(smooth, make, decode):
    plan = Plan(T.train(160))
    engine = make(smooth, plan, dtype=torch.float32, device="cuda", decode=decode)
    for bases, table, images in batches(engine, smooth, plan, 16):
        wanted = by_cpu(smooth, plan, bases, table, images.shape, torch.float32)
        difference = np.abs(levels(images.cpu(), plan) - levels(wanted, plan)).reshape(len(bases), -1)
        assert difference.mean(axis=1).max() < 3
        raw = smooth.gather("image", bases)["mode"] == 1
        assert difference[raw].max(initial=0) < 1.01


@needs_gpu
def test_gpu_decoding_while_the_consumer_is_busy_corrupts_nothing(smooth, make):
    """The trap: a hardware decoder that writes to memory which the consumer's stream still reads. 50 batches, twice."""
    plan = Plan(T.train(160)[:2])
    engine = make(smooth, plan, device="cuda", prefetch=3)

    def epochs(busy):
        sums, held = [], []
        for epoch in range(13):
            for bases, table, images in batches(engine, smooth, plan, 16, epoch=epoch, ahead=3):
                if busy:
                    torch.cuda._sleep(50_000_000)  # some 30 ms in front of whatever reads the batch
                weights = torch.arange(images.numel() // len(images), device="cuda") % 251
                sums.append((images.reshape(len(images), -1).long() * weights).sum(dim=1))
                held.append((bases, table, images.cpu() if not busy and epoch == 12 else None))
                del images  # its memory goes back while the sums are still to come
                torch.empty(1 << 24, dtype=torch.uint8, device="cuda").fill_(255)
        torch.cuda.synchronize()
        return [s.cpu() for s in sums][:50], held

    quiet, held = epochs(False)
    busy, _ = epochs(True)
    assert len(busy) == 50 and all(torch.equal(a, b) for a, b in zip(quiet, busy, strict=True))
    for bases, table, images in held:
        if images is not None:
            wanted = by_cpu(smooth, plan, bases, table, images.shape)
            assert (images.int() - wanted.int()).abs().float().mean() < 3


@needs_gpu
@pytest.mark.parametrize("where", ["device", "host"])
def test_gpu_caches(smooth, make, where):
    plan = Plan(T.train(128))
    wanted = [
        i.clone() for *_, i in batches(make(smooth, plan, device="cuda", dtype=torch.half), smooth, plan, 16)
    ]
    option = "vram" if where == "device" else "ram"
    for budget in (None, 4_000_000):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = make(smooth, plan, device="cuda", dtype=torch.half, cache=where, **{option: budget})
        for a, (*_, b) in zip(wanted, batches(engine, smooth, plan, 16), strict=True):
            # A decoder of whole images and one of cut ones may round chroma otherwise at the cut's edge.
            assert (a.float() - b.float()).abs().mean() < 0.02


@needs_gpu
def test_gpu_auto_and_each_decoder(smooth, make):
    engine = make(smooth, Plan(T.train(96)[:2]), device="cuda", decode="auto", threads=4)
    assert set(engine.rates) == {"gpu", "segments", "cpu"} and "fastest" in engine.chosen
    sample = torch.from_numpy(codecs.as_bytes(smooth.encoded(0).data).copy())
    for name in [*gpu_decode.DECODERS]:
        if name == "segments" or importlib.util.find_spec(name) is not None:
            (image,) = gpu_decode.find_decoder(torch.device("cuda"), [name]).images([sample])
            wanted = torch.from_numpy(codecs.decode_jpeg(sample.numpy())).permute(2, 0, 1)
            assert (image.cpu().int() - wanted.int()).abs().float().mean() < (
                1e-9 if name == "segments" else 3
            )


@needs_gpu
def test_gpu_memory_is_given_back(smooth):
    plan = Plan(T.train(96)[:2])

    def once():
        engine = CudaEngine(smooth, plan, batch_size=16, threads=4, device="cuda", prefetch=3)
        for start in (0, 16, 32):
            bases = smooth.indices[start : start + 16]
            engine.submit(bases, smooth.spans(bases), draw(smooth, plan, bases))
        engine.collect()
        engine.close()

    once()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        once()
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before and not alive()
