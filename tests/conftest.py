"""Shared test data: made pictures, small files, and the real images beside the project, where they are."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

# Before torch is imported: its threads would spin while the loader's work (see fastload.cli.main).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest

from fastload import beton, codecs

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def make_picture(height, width, seed=0):
    """(height, width, 3) uint8: shapes that a resize or a shift would betray, and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    phase = rng.uniform(0, 6, 3)
    base = (
        127
        + 60 * np.sin(y / (6 + seed % 5))[..., None]
        + 55 * np.cos(x[..., None] / (5 + np.arange(3)) + phase)
    )
    return np.clip(base + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def make_beton(path, count=20, classes=4, store="jpeg", size=None, seed=0, extra=()):
    """A small file with fields image and label (and those in ``extra``); returns the path."""
    rng = np.random.default_rng(seed)
    fields = [beton.Field("image", "image"), beton.Field("label", "int"), *extra]
    writer = beton.Writer(path, fields, count)
    for i in range(count):
        height, width = size or (int(rng.integers(40, 120)), int(rng.integers(40, 160)))
        pixels = make_picture(height, width, seed * 1000 + i)
        raw = store == "raw" or (store == "mixed" and i % 2)
        data = pixels if raw else codecs.encode_jpeg(pixels)
        values = {
            "image": beton.EncodedImage("raw" if raw else "jpeg", height, width, data),
            "label": i % classes,
        }
        for field in extra:
            if field.kind == "int":
                values[field.name] = i * 10
            elif field.kind == "float":
                values[field.name] = i / 4
            elif field.kind == "bytes":
                values[field.name] = f"text {i}".encode() if i else b""
            elif field.kind == "json":
                values[field.name] = {"number": i, "list": [i] * 3}
            else:
                values[field.name] = np.full(field.shape, i, field.dtype)
        writer.add(values, id=f"id-{i}", source=f"class{i % classes}/{i}.jpg")
    writer.finish({"classes": {"label": [f"class{c}" for c in range(classes)]}, "created_by": "tests"})
    return path


@pytest.fixture(scope="session")
def picture():
    """The function that makes a picture: (height, width, seed=0) to (height, width, 3) uint8."""
    return make_picture


@pytest.fixture
def beton_file(tmp_path):
    """The function that makes a small file: (name, **options of make_beton) to its path."""
    return lambda name="made.beton", **options: str(make_beton(tmp_path / name, **options))


@pytest.fixture
def small(beton_file):
    """Twenty JPEG samples of different sizes in four classes."""
    return beton_file("small.beton")


@pytest.fixture(scope="session")
def shared_data():
    """The function that gives the path of a real data archive, or skips with the reason."""

    def find(name):
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"the real images are not here: no {name} in ../shared/data")
        return path

    return find


@pytest.fixture(scope="session")
def photos(shared_data):
    """The first 60 real photographs as encoded bytes."""
    found = []
    with tarfile.open(shared_data("imagenet_photos.tar")) as archive:
        for member in archive:
            if member.isfile():
                found.append(archive.extractfile(member).read())
            if len(found) == 60:
                break
    return found


@pytest.fixture
def make():
    """The function that makes a CUDA engine, on the CPU if nothing else is said, which is closed after the test."""
    from fastload.draws import Plan
    from fastload.engines.cuda import CudaEngine

    made = []

    def engine(ds, plan, **options):
        options = {"batch_size": 16, "threads": 2, "device": "cpu", **options}
        made.append(CudaEngine(ds, plan if isinstance(plan, Plan) else Plan(plan), **options))
        return made[-1]

    yield engine
    for one in made:
        one.close()
