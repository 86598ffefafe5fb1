"""JPEGs decoded from their restart segments on the device, also from bytes that stay there: the CUDA engine's other decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_picture
from engine_cases import KINDS, batches, random_pipeline, sizes, write

import fastload
from fastload import concat, dataset
from fastload import transforms as T
from fastload.draws import Plan
from fastload.engines import gpu_decode, staging
from fastload.engines.encoded import Encoded

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """All kinds of images, three of each; those that other decoders must do are among them."""
    ways = list(KINDS.values()) * 3
    images = [(h, w, ways[i](make_picture(h, w, i))) for i, (h, w) in enumerate(sizes(len(ways)))]
    return write(tmp_path_factory.mktemp("segments") / "odd.beton", images)


def encoded_budget(ds):
    """Bytes in which all that can be decoded on the device fits encoded, and pixels do not."""
    bases = np.unique(ds.indices)
    jpegs = Encoded(ds.spans, bases, int(bases.max()) + 1)
    stored = sum(
        int(where.sizes[place])
        for _, places, where in ds.spans(bases)
        for place in places
        if where.raw[place] or jpegs.ok[bases[place]]
    )
    return stored + jpegs.bytes


@pytest.mark.parametrize("seed", range(21))
def test_pixels_are_those_of_libjpeg(odd, make, seed):
    """torchvision's decoder is libjpeg-turbo on the CPU; progressive and CMYK images are ours to decode in both."""
    plan = Plan(random_pipeline(seed))
    engines = [make(odd, plan, decode=way, batch_size=7) for way in ("gpu", "segments")]
    with pytest.warns(UserWarning, match="keeps 15 of 24"):
        engines.append(make(odd, plan, batch_size=7, cache="device", vram=encoded_budget(odd)))
    assert "as they are stored" in engines[2].chosen and "segments on cpu decodes" in engines[2].chosen
    made = [[images for *_, images in batches(engine, odd, plan, 7)] for engine in engines]
    for wanted, *others in zip(*made, strict=True):
        assert all(torch.equal(wanted, one) for one in others)


def test_what_is_kept_encoded_is_not_read_again(beton_file, make, monkeypatch):
    ds, plan = dataset.open(beton_file(count=24)), Plan((T.RandomResizedCrop(24), T.ColorJitter(0.3, 0.3)))
    wanted = [images for *_, images in batches(make(ds, plan), ds, plan, 8)]
    engine = make(ds, plan, cache="device", vram=encoded_budget(ds))
    assert "keeps all 24 images as they are stored" in engine.chosen and not engine.holds_all

    def fail(*_):
        raise AssertionError("this is work of the CPU")

    monkeypatch.setattr(staging.Stager, "prepare", fail)
    monkeypatch.setattr(gpu_decode.Decoder, "images", fail)
    monkeypatch.setattr(staging.Ring, "take", fail)
    for a, (*_, b) in zip(wanted, batches(engine, ds, plan, 8), strict=True):
        assert torch.equal(a, b)


def test_several_files_and_views(beton_file, make):
    parts = [
        dataset.open(beton_file(f"{seed}.beton", count=9, seed=seed, store=store))
        for seed, store in ((1, "jpeg"), (2, "mixed"))
    ]
    ds, plan = concat(parts).subset([17, 3, 12, 3, 0, 8, 9, 10]), Plan((T.Resize(30), T.CenterCrop(24)))
    wanted = [images for *_, images in batches(make(ds, plan), ds, plan, 3)]
    engine = make(ds, plan, cache="device", vram=encoded_budget(ds))
    assert engine.resident.jpegs is not None
    for a, (*_, b) in zip(wanted, batches(engine, ds, plan, 3), strict=True):
        assert torch.equal(a, b)


def test_the_loader_takes_it_by_name_and_by_budget(beton_file):
    path = beton_file(count=30)
    with dataset.open(path) as ds:
        budget = encoded_budget(ds)
    options = {"transforms": T.train(24), "engine": "cuda", "device": "cpu", "shuffle": True, "threads": 2}
    made = [
        fastload.Loader(path, 8, **options, **more)
        for more in ({}, {"gpu_decode": "segments"}, {"cache": "device", "vram": budget})
    ]
    for a, b, c in zip(*made, strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.image, c.image)
    assert "segments" in made[1].chosen and "as they are stored" in made[2].chosen
    # Whoever wants the CPU to decode does not want the GPU to.
    with pytest.warns(UserWarning, match="keeps the first"):
        fastload.Loader(path, 8, gpu_decode="cpu", cache="device", vram=budget, **options)


def test_images_without_restart_markers_are_told(make, tmp_path):
    ways = [KINDS["ours"], KINDS["unindexed"]] * 5
    ds = write(
        tmp_path / "half.beton", [(90, 120, way(make_picture(90, 120, i))) for i, way in enumerate(ways)]
    )
    plan = Plan((T.CenterCrop(40),))
    with pytest.warns(UserWarning, match="keeps 5 of 10 images.*no restart markers"):
        engine = make(ds, plan, cache="device", vram=encoded_budget(ds))
    for (*_, a), (*_, b) in zip(
        batches(make(ds, plan), ds, plan, 4), batches(engine, ds, plan, 4), strict=True
    ):
        assert torch.equal(a, b)


def test_bytes_that_nobody_vouches_for_are_decoded_once_before_they_are_kept(beton_file, make, monkeypatch):
    """As in files of FFCV, which have no checksums: what is damaged there is read from the file, where damage is told."""
    from fastload.beton import Reader

    path = beton_file(count=10, size=(80, 100))
    with dataset.open(path) as ds:
        where = ds.spans(np.array([4]))[0][2]
        middle = int(where.starts[0] + where.sizes[0] // 2)
    with open(path, "r+b") as file:
        file.seek(middle)
        file.write(b"\xff\xd9" * 10)
    monkeypatch.setattr(Reader, "checksum_matches", lambda self, at: None)
    ds, plan = dataset.open(path), Plan((T.CenterCrop(64),))
    engine = make(ds, plan, cache="device", vram=encoded_budget(ds))
    assert np.flatnonzero(~engine.resident.holds(ds.indices)).tolist() == [4]


@needs_gpu
@pytest.mark.parametrize("seed", range(14))
def test_gpu_pixels_are_those_of_the_cpu(odd, make, seed):
    plan = Plan(random_pipeline(seed))
    wanted = [images for *_, images in batches(make(odd, plan, batch_size=7), odd, plan, 7)]
    for more in ({"decode": "segments"}, {"cache": "device", "vram": encoded_budget(odd)}):
        engine = make(odd, plan, batch_size=7, device="cuda", **more)
        for a, (*_, b) in zip(wanted, batches(engine, odd, plan, 7), strict=True):
            # The reference rounds float64 where the kernel rounds float32; a colour matrix multiplies that.
            apart = (a.int() - b.cpu().int()).abs()
            assert apart.max() <= 3 and (apart > 0).float().mean() < 1e-2
