"""The loader: pixels against Pillow and torchvision, the same bits for any threads, resume, lifecycle, errors."""

import gc
import hashlib
import os
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastload import Loader, concat, dataset
from fastload import transforms as T
from fastload.draws import Plan
from fastload.errors import CorruptError, DataError, UsageError


def loader_threads():
    """Threads of ours; other libraries in the same process keep theirs."""
    return sum(thread.name.startswith("fastload") for thread in threading.enumerate())


TRAIN = T.train(48, jitter=0.3, erasing=0.5, mixup=0.4, cutmix=1.0)


def digest(loader):
    h = hashlib.sha256()
    for batch in loader:
        h.update(batch.image.contiguous().numpy().tobytes())
        h.update(batch.label.numpy().tobytes())
        h.update(batch.index.numpy().tobytes())
    return h.hexdigest()


def test_shapes_types_and_names(small):
    loader = Loader(small, 6, transforms=T.eval(32))
    batches = list(loader)
    assert [len(b.label) for b in batches] == [6, 6, 6, 2] and len(loader) == 4
    images, labels = batches[0]
    assert images.shape == (6, 3, 32, 32) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64 and batches[1]["index"].tolist() == [6, 7, 8, 9, 10, 11]
    assert batches[0]["image"] is images and batches[0].label is labels
    with pytest.raises(KeyError, match="image, label and index"):
        batches[0]["labels"]
    assert len(Loader(small, 6, transforms=T.eval(32), drop_last=True)) == 3


@pytest.mark.parametrize("store", ["jpeg", "raw"])
@pytest.mark.parametrize("threads", [1, 3])
def test_crops_equal_pillow_on_the_same_boxes(beton_file, store, threads):
    """The draws say which boxes; Pillow cuts and resizes them out of the whole decoded picture."""
    path = beton_file(store=store)
    pipeline = (T.RandomResizedCrop((40, 56)), T.HorizontalFlip(), T.VerticalFlip(0.3))
    ds = dataset.open(path)
    table = Plan(pipeline).draw(3, 0, np.arange(20), ds.heights, ds.widths)
    loader = Loader(ds, 7, transforms=pipeline, seed=3, threads=threads, decode="exact")
    ours = torch.cat([b.image for b in loader]).permute(0, 2, 3, 1).numpy()
    for i in range(20):
        y0, x0, y1, x1 = (int(v) for v in table.box[i])
        crop = Image.fromarray(ds[i]["image"][y0:y1, x0:x1])
        expected = np.asarray(crop.resize((56, 40), Image.Resampling.BILINEAR)).astype(int)
        expected = expected[:, ::-1] if table.flips[i] & 1 else expected
        expected = expected[::-1] if table.flips[i] & 2 else expected
        assert np.abs(ours[i] - expected).max() <= 1


@pytest.mark.parametrize("size", [32, 64, 150])
def test_eval_equals_torchvision(beton_file, size):
    ds = dataset.open(beton_file())
    reference = v2.Compose([v2.Resize(round(size / 0.875), antialias=True), v2.CenterCrop(size)])
    for batch in Loader(ds, 5, transforms=T.eval(size)[:2], decode="exact"):
        for image, index in zip(batch.image, batch.index.tolist()):
            expected = reference(Image.fromarray(ds[index]["image"]))
            difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected))
            assert difference.max() <= 1


def test_real_photos_fast_decode_is_near_exact(photos, tmp_path):
    """The fast path (plain chroma upsampling, reduced decoding) stays near the exact one, which is Pillow's."""
    from fastload import beton, codecs

    writer = beton.Writer(
        tmp_path / "p.beton", [beton.Field("image", "image"), beton.Field("label", "int")], 60
    )
    for i, data in enumerate(photos):
        pixels = codecs.load_rgb(data)
        image = beton.EncodedImage("jpeg", *pixels.shape[:2], codecs.encode_jpeg(pixels, 90))
        writer.add({"image": image, "label": i}, id=str(i), source="")
    writer.finish({})
    pipeline = (T.RandomResizedCrop(112), T.HorizontalFlip())
    fast, exact = (
        torch.cat(
            [b.image for b in Loader(tmp_path / "p.beton", 20, transforms=pipeline, decode=mode)]
        ).float()
        for mode in ("fast", "exact")
    )
    difference = (fast - exact).abs()
    assert 0 < difference.mean() < 1.5
    assert (fast.mean((2, 3)) - exact.mean((2, 3))).abs().max() < 1.5  # no shift of colour


@pytest.mark.parametrize("shuffle", [False, True])
def test_any_thread_count_gives_the_same_bits(small, shuffle):
    digests = {
        digest(
            Loader(small, 6, transforms=TRAIN, shuffle=shuffle, seed=9, threads=threads, prefetch=prefetch)
        )
        for threads, prefetch in ((1, 1), (2, 2), (4, 5), (4, 1))
    }
    assert len(digests) == 1
    assert digest(Loader(small, 6, transforms=TRAIN, shuffle=shuffle, seed=8)) not in digests


@pytest.mark.parametrize("stop", range(1, 5))
def test_resume_with_other_threads_equals_uninterrupted(small, stop):
    def take(loader, count):
        out = []
        for batch in loader:
            out.append((batch.image.clone(), batch.label.clone(), batch.index.clone()))
            if len(out) == count:
                break
        return out

    options = {"transforms": TRAIN, "shuffle": True, "seed": 4}
    reference = Loader(small, 6, threads=2, **options)
    whole = take(reference, 99) + take(reference, 99)
    first = Loader(small, 6, threads=4, prefetch=3, **options)
    head = take(first, stop)
    state = first.state_dict()
    assert all(isinstance(v, int) for v in state.values()) and len(state) == 3
    second = Loader(small, 6, threads=1, **options)
    second.load_state_dict(state)
    rest = take(second, 99)
    if stop < 4:  # the interrupted epoch, then the next one
        rest += take(second, 99)
    for a, b in zip(head + rest, whole, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_ranks_share_an_epoch_and_see_what_one_process_would(small):
    options = {"transforms": T.train(32), "shuffle": True, "seed": 2}
    alone = {int(i): image for b in Loader(small, 5, **options) for i, image in zip(b.index, b.image)}
    seen = []
    for rank in range(3):
        for batch in Loader(small, 4, rank=rank, world_size=3, **options):
            for index, image in zip(batch.index.tolist(), batch.image):
                assert torch.equal(image, alone[index])
                seen.append(index)
    assert sorted(seen) == list(range(20))


def test_epochs_differ_and_follow_each_other(small):
    loader = Loader(small, 20, transforms=T.train(32), shuffle=True)
    first, second = (next(iter(list(loader))) for _ in range(2))
    assert loader.epoch == 1 and not torch.equal(first.image, second.image)
    assert sorted(first.index.tolist()) == sorted(second.index.tolist())
    loader.set_epoch(0)
    assert torch.equal(next(iter(list(loader))).image, first.image)


def test_a_sample_is_augmented_alike_in_every_view(small):
    ds = dataset.open(small)
    base = {
        int(i): im for b in Loader(ds, 20, transforms=T.train(32), seed=1) for i, im in zip(b.index, b.image)
    }
    view = Loader(ds.subset([13, 2, 7]), 3, transforms=T.train(32), seed=1)
    for batch in view:
        assert batch.index.tolist() == [13, 2, 7]
        assert all(torch.equal(im, base[int(i)]) for i, im in zip(batch.index, batch.image))
    assert next(iter(Loader(ds, 2, transforms=T.eval(32), indices=[5, 6]))).index.tolist() == [5, 6]


def test_joined_files(beton_file):
    a, b = dataset.open(beton_file("a.beton")), dataset.open(beton_file("b.beton", seed=5, count=9))
    both = concat([a.subset([3, 1]), b])
    batch = next(iter(Loader(both, 11, transforms=T.eval(32))))
    alone = next(iter(Loader(b, 9, transforms=T.eval(32))))
    assert torch.equal(batch.image[2:], alone.image)
    assert batch.label.tolist() == [3, 1] + [i % 4 for i in range(9)]


def test_mixing_blends_pictures_and_labels(small):
    plain = next(iter(Loader(small, 8, transforms=T.train(32), seed=6)))
    mixed = next(iter(Loader(small, 8, transforms=T.train(32, mixup=1.0), seed=6)))
    assert mixed.label.shape == (8, 4) and torch.allclose(mixed.label.sum(1), torch.ones(8))
    weights = Plan(T.train(32, mixup=1.0)).draw(6, 0, np.arange(8), np.full(8, 9), np.full(8, 9)).mix
    own = torch.from_numpy(weights).view(-1, 1, 1, 1)
    assert torch.allclose(mixed.image, plain.image * own + plain.image.flip(0) * (1 - own), atol=1e-5)
    one_hot = torch.nn.functional.one_hot(plain.label, 4).float()
    assert torch.allclose(
        mixed.label, one_hot * own.view(-1, 1) + one_hot.flip(0) * (1 - own.view(-1, 1)), atol=1e-6
    )


def test_fields_and_dtypes(beton_file):
    from fastload.beton import Field

    extra = (
        Field("meta", "json"),
        Field("real", "float"),
        Field("vector", "ndarray", "<f4", (2,)),
        Field("text", "bytes"),
    )
    path = beton_file(extra=extra)
    names = ("id", "meta", "real", "vector", "text", "source", "index", "label")
    batch = next(iter(Loader(path, 3, transforms=T.eval(32), fields=names)))
    assert batch.id == ["id-0", "id-1", "id-2"] and batch.meta[2] == {"number": 2, "list": [2, 2, 2]}
    assert (
        batch.real.tolist() == [0, 0.25, 0.5] and batch.vector.shape == (3, 2) and batch.text[1] == b"text 1"
    )
    assert batch.index.tolist() == [0, 1, 2] and batch.source[1] == "class1/1.jpg"
    for dtype in ("float16", "bfloat16", torch.float32):
        image = next(iter(Loader(path, 3, transforms=T.eval(32), dtype=dtype))).image
        assert str(image.dtype).endswith(str(dtype).removeprefix("torch."))
    unit = next(iter(Loader(path, 3, transforms=T.eval(32)[:2], dtype="float32"))).image
    assert unit.min() >= 0 and 0.5 < unit.max() <= 1


def test_normalising_late_equals_normalising_early(small):
    """On a GPU bytes travel and are normalised there; forced here, it must give the same numbers."""
    early = Loader(small, 8, transforms=T.train(32))
    late = Loader(small, 8, transforms=T.train(32))
    late._normalise_late = True
    for a, b in zip(early, late):
        assert b.image.dtype == torch.float32 and torch.allclose(a.image, b.image, atol=1e-6)


def test_small_images_with_padding_equal_torchvision(beton_file):
    path = beton_file(store="raw", size=(32, 32), count=40)
    ds = dataset.open(path)
    pipeline = (T.RandomCrop(32, padding=4, fill=(9, 8, 7)), T.HorizontalFlip())
    table = Plan(pipeline).draw(0, 0, np.arange(40), ds.heights, ds.widths)
    ours = next(iter(Loader(ds, 40, transforms=pipeline))).image
    for i in range(40):
        padded = np.full((40, 40, 3), (9, 8, 7), np.uint8)
        padded[4:36, 4:36] = ds[i]["image"]
        mirrored = table.flips[i] & 1
        top = int(table.box[i, 0] - table.place[i, 0]) + 4
        left_place = 32 - table.place[i, 1] - table.place[i, 3] if mirrored else table.place[i, 1]
        left = int(table.box[i, 1] - left_place) + 4
        expected = padded[top : top + 32, left : left + 32]
        assert np.array_equal(ours[i].permute(1, 2, 0).numpy(), expected[:, ::-1] if mirrored else expected)


def test_without_transforms_images_come_as_they_are(beton_file, small):
    ds = dataset.open(beton_file(store="mixed", size=(30, 44)))
    batch = next(iter(Loader(ds, 20, decode="exact")))
    assert batch.image.dtype == torch.uint8 and batch.image.shape == (20, 3, 30, 44)
    assert all(np.array_equal(batch.image[i].permute(1, 2, 0).numpy(), ds[i]["image"]) for i in range(20))
    with pytest.raises(DataError, match="different sizes"):
        Loader(small, 4)


# -- PerImage ----------------------------------------------------------------------------------------------------------


def test_per_image_takes_functions_torchvision_and_albumentations(small):
    albumentations = pytest.importorskip("albumentations", reason="the test extra is not installed")
    plain = next(iter(Loader(small, 8, transforms=(T.CenterCrop(32),)))).image
    inverted = next(
        iter(Loader(small, 8, transforms=(T.CenterCrop(32), T.PerImage(lambda i: 255 - i))))
    ).image
    assert torch.equal(inverted, 255 - plain)
    torchvision = next(
        iter(Loader(small, 8, transforms=(T.CenterCrop(32), T.PerImage(v2.RandomInvert(1.0)))))
    ).image
    assert torch.equal(torchvision, 255 - plain)
    whole = (
        T.PerImage(albumentations.Compose([albumentations.Resize(24, 28)]), size=(24, 28)),
        T.Normalize(),
    )
    assert next(iter(Loader(small, 8, transforms=whole))).image.shape == (8, 3, 24, 28)
    noisy = (T.CenterCrop(32), T.PerImage(albumentations.Compose([albumentations.GaussNoise(p=1.0)])))
    runs = {digest(Loader(small, 4, transforms=noisy, threads=threads)) for threads in (1, 4)}
    assert len(runs) == 1
    seeded = (
        T.CenterCrop(32),
        T.PerImage(lambda i, rng: i + rng.integers(0, 5, i.shape, dtype=np.uint8), seeded=True),
    )
    assert len({digest(Loader(small, 4, transforms=seeded, threads=threads)) for threads in (1, 3)}) == 1


def test_per_image_that_returns_the_wrong_thing(small):
    with pytest.raises(UsageError, match=r"uint8 of shape \(32, 32, 3\), got float32"):
        list(Loader(small, 4, transforms=(T.CenterCrop(32), T.PerImage(lambda i: i.astype(np.float32)))))


def test_an_exception_in_per_image_arrives_as_it_is(small):
    def fail(image):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") as caught:
        list(Loader(small, 4, transforms=(T.CenterCrop(32), T.PerImage(fail))))
    if hasattr(caught.value, "__notes__"):
        assert "sample" in caught.value.__notes__[0]


# -- lifecycle ---------------------------------------------------------------------------------------------------------


def test_breaking_out_leaves_no_thread_and_no_descriptor(small):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    loader = Loader(small, 2, transforms=T.train(64), threads=4, prefetch=4)
    next(iter(loader))
    gc.collect()
    before = descriptors()
    for _ in range(20):
        for _ in loader:
            break
        iterator = iter(loader)
        next(iterator)
        del iterator
    gc.collect()
    assert loader_threads() == 0
    assert descriptors() == before


def test_memory_is_pooled_but_never_under_a_held_tensor(small):
    loader = Loader(small, 4, transforms=T.train(64), prefetch=1)
    held = [batch for _ in range(3) for batch in loader]
    copies = [batch.image.clone() for batch in held]
    views = [batch.image[1:, :, ::2] for batch in held]
    view_copies = [view.clone() for view in views]
    del held
    for _ in range(5):
        for _batch in loader:
            pass
    assert all(torch.equal(a, b) for a, b in zip(views, view_copies))
    assert all(torch.equal(a[1:, :, ::2], b) for a, b in zip(copies, views))
    fresh = Loader(small, 4, transforms=T.train(64), prefetch=1)
    for _ in range(10):
        for _batch in fresh:
            pass
    assert (
        sum(len(entries) for entries in fresh._buffers._pool.values()) <= 8
    )  # 10 epochs of 5 batches, 2 kinds


def test_an_error_in_a_worker_names_the_sample_and_ends_the_epoch(small, tmp_path):
    data = bytearray(open(small, "rb").read())
    with dataset.open(small) as ds:
        at = int(ds._readers[0].allocations["ptr"][11])
    data[at + 2 : at + 400] = b"\x00" * 398
    bad = tmp_path / "bad.beton"
    bad.write_bytes(data)
    loader = Loader(bad, 4, transforms=T.train(32), threads=3)
    with pytest.raises(
        CorruptError, match=r"sample 11, id 'id-11', source 'class3/11.jpg': .*JPEG"
    ) as caught:
        list(loader)
    assert caught.value.index == 11 and loader_threads() == 0
    results = []
    for threads in (1, 4):
        with pytest.warns(UserWarning, match="sample 11"):
            replacing = Loader(bad, 4, transforms=T.train(32), on_error="replace", threads=threads)
            batches = list(replacing)
        results.append(torch.cat([b.image for b in batches]))
        assert [e.index for e in replacing.errors] == [11] and replacing.errors[0].source == "class3/11.jpg"
        index = torch.cat([b.index for b in batches]).tolist()
        assert index[11] == replacing.errors[0].replacement != 11
        assert torch.cat([b.label for b in batches])[11] == index[11] % 4
    assert torch.equal(*results)


def test_waiting_is_measured(small):
    loader = Loader(small, 5, transforms=T.train(32))
    for _ in loader:
        time.sleep(0.01)
    stats = loader.stats()
    assert stats["batches"] == 4 and stats["samples"] == 20 and 0 <= stats["wait_s"] < 60


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"threads": 0}, "threads"),
        ({"prefetch": -1}, "prefetch"),
        ({"on_error": "ignore"}, "on_error"),
        ({"cache": "device"}, "engine='cuda' only"),
        ({"engine": "gpu"}, "unknown engine"),
        ({"fields": ["image", "lable"]}, "did you mean 'label'"),
        ({"fields": []}, "fields"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"dtype": "uint8"}, "leave Normalize out"),
        ({"indices": [99]}, "index 99"),
        ({"indices": []}, "no samples"),
        ({"weights": [1, 2]}, "weights"),
        ({"weights": "even"}, "balanced"),
        ({"rank": 3}, "rank"),
        ({"rank": "a"}, "rank must be an integer"),
        ({"seed": 1.7}, "seed must be an integer"),
        ({"seed": True}, "seed must be an integer"),
        ({"device": "foo"}, "device must be"),
        ({"weights": ["a"] * 20}, "weights must be numbers"),
        ({"transforms": T.CenterCrop(4)}, "list or tuple"),
        ({"decode": "slow"}, "decode"),
    ],
)
def test_wrong_arguments(small, options, words):
    with pytest.raises((UsageError, DataError), match=words):
        Loader(small, **{"batch_size": 4, "transforms": T.train(32), **options})


def test_states_are_checked(small):
    loader = Loader(small, 6, transforms=T.train(32), seed=3)
    for state, words in (
        ({"seed": 4, "epoch": 0, "position": 0}, "seed 4"),
        ({"seed": 3, "epoch": 0, "position": 7}, "end of a batch"),
        ({"seed": 3, "epoch": 0, "position": 600}, "outside"),
        ({"seed": 3}, "seed, epoch and position"),
    ):
        with pytest.raises(UsageError, match=words):
            loader.load_state_dict(state)


def test_balanced_weights_reach_the_batches(beton_file):
    ds = dataset.open(beton_file(count=40)).subset([i for i in range(40) if i % 4 == 0 or i < 8])
    loader = Loader(ds, 50, transforms=T.train(32), weights="balanced", shuffle=True)
    labels = torch.cat([b.label for _ in range(60) for b in loader])
    assert (torch.bincount(labels, minlength=4) / len(labels) - 0.25).abs().max() < 0.06


def test_a_sample_drawn_twice_looks_different_each_time(small):
    weights = [0.0] * 19 + [1.0]
    for options in ({"weights": weights, "shuffle": True}, {"indices": [19] * 20}):
        batch = next(iter(Loader(small, 20, transforms=T.train(32), **options)))
        assert batch.index.tolist() == [19] * 20
        assert len({image.numpy().tobytes() for image in batch.image}) == 20
        again = next(iter(Loader(small, 20, transforms=T.train(32), threads=1, **options)))
        assert torch.equal(batch.image, again.image)


@pytest.mark.parametrize(("size", "padding"), [(4, 60), (8, 30)])
def test_a_crop_may_lie_in_the_padding(small, size, padding):
    images = next(
        iter(Loader(small, 20, transforms=(T.RandomCrop(size, padding=padding, fill=(7, 8, 9)),)))
    ).image
    painted = (images == torch.tensor([7, 8, 9], dtype=torch.uint8).view(1, 3, 1, 1)).all(1)
    assert painted.any() and images.shape == (20, 3, size, size)


def test_batches_and_datasets_can_be_pickled(small):
    batch = next(iter(Loader(small, 4, transforms=T.eval(32))))
    twin = pickle.loads(pickle.dumps(batch))
    assert (
        torch.equal(twin.image, batch.image)
        and torch.equal(twin.index, batch.index)
        and twin["label"] is twin.label
    )
    ds = dataset.open(small).subset([4, 2])
    data = pickle.dumps(ds)
    assert len(data) < 2000 and np.array_equal(pickle.loads(data)[1]["image"], ds[1]["image"])


def test_closing_ends_iteration(small):
    loader = Loader(small, 2, transforms=T.eval(32))
    iterator = iter(loader)
    next(iterator)
    loader.close()
    assert list(iterator) == [] and loader_threads() == 0
    with pytest.raises(UsageError, match="closed"):
        iter(loader)
    with dataset.open(small) as ds:
        kept = Loader(ds, 2, transforms=T.eval(32))
    with pytest.raises(UsageError, match="is closed"):
        list(kept)


def test_an_old_iterator_does_not_move_the_state(small):
    loader = Loader(small, 2, transforms=T.eval(32))
    old = iter(loader)
    next(old)
    loader.set_epoch(0)
    new = iter(loader)
    next(new)
    for _ in range(3):
        next(old)
    assert loader.state_dict()["position"] == 2


def test_threads_can_be_pinned_and_make_the_same_batches(small, monkeypatch):
    pinned = {}
    original = os.sched_setaffinity

    def recorded(thread, cores):
        original(thread, cores)
        pinned[thread] = os.sched_getaffinity(thread)

    monkeypatch.setattr(os, "sched_setaffinity", recorded)
    mine = os.sched_getaffinity(0)
    options = {"transforms": T.train(24), "shuffle": True, "threads": 3}
    batches = [b.image.clone() for b in Loader(small, 4, pin_threads=True, **options)]
    assert pinned and all(len(cores) == 1 and cores <= mine for cores in pinned.values())
    assert set.union(*pinned.values()) == set(sorted(mine)[: len(pinned)])
    assert os.sched_getaffinity(0) == mine  # the caller's own thread is where it was
    assert all(torch.equal(a, b.image) for a, b in zip(batches, Loader(small, 4, **options)))


def test_files_are_read_ahead_until_they_have_been_read(beton_file, monkeypatch):
    from fastload import feeds as room

    path = beton_file(count=12, size=(200, 300))
    asked = []
    monkeypatch.setattr(
        room, "read_ahead", lambda file, starts, sizes: asked.append((len(file), starts, sizes))
    )
    loader = Loader(path, 4, transforms=T.eval(24))
    list(loader)
    ds = loader.dataset
    assert [len(starts) for _, starts, _ in asked] == [4, 4, 4]
    for i in range(12):
        file, starts, sizes = asked[i // 4]
        assert file == os.path.getsize(path) and sizes[i % 4] == ds.encoded(i).data.nbytes
        at = int(starts[i % 4])
        assert np.array_equal(ds._readers[0].data[at : at + sizes[i % 4]], ds.encoded(i).data)
    list(loader)
    assert len(asked) == 3  # the page cache has it now
    monkeypatch.setattr(room, "ram_bytes", lambda: 1000)
    large = Loader(path, 4, transforms=T.eval(24))
    list(large), list(large)
    assert len(asked) == 9  # it will not


def test_reading_ahead_brings_a_file_into_the_page_cache(tmp_path):
    from fastload.benchmarks.machine import cached_share
    from fastload.system import read_ahead

    path = tmp_path / "large"
    path.write_bytes(os.urandom(1 << 23))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(path) != 0:
        pytest.skip("this file system keeps its files in memory")
    memory = np.asarray(np.memmap(path, np.uint8, "r"))
    starts, sizes = np.array([0, -1, 4_000_000, 8_000_000]), np.array([1_000_000, 10**6, 1_000_000, 10**12])
    read_ahead(memory, starts, sizes)
    for _ in range(100):
        share = cached_share(path)
        if share >= 2_000_000 / (1 << 23):
            break
        time.sleep(0.02)
    assert 2_000_000 / (1 << 23) <= share < 0.6


def test_a_file_that_was_deleted_after_it_was_opened_is_still_loaded(beton_file):
    path = beton_file("gone.beton")
    ds = dataset.open(path)
    os.unlink(path)
    assert sum(len(b.label) for b in Loader(ds, 8, transforms=T.eval(24))) == 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_engine_of_a_gpu_needs_one(small):
    with pytest.raises(UsageError, match="not available here"):
        Loader(small, engine="cuda", transforms=T.eval(32))
