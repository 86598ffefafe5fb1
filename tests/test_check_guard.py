"""The guard before training: leaks are told, proper splits are not."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
from check_pictures import crops, jpeg, write
from PIL import Image, ImageOps

from fastload.check import guard, hashing, leaks


def spread(labels, folds=5, seed=0):
    """Stratified folds of single images, (N,) int64."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % folds
    return fold


def noise(seed, size=8):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def people(tmp_path, pattern, persons=30, photos=5):
    """Tiny pictures, all different, whose paths tell the person; labels by person; returns the data and the persons."""
    rows = [
        (noise(p * 100 + k), pattern.format(p=p, k=k, c="abc"[p % 3]), p % 3)
        for p in range(persons)
        for k in range(photos)
    ]
    return write(tmp_path / "people.beton", rows), np.repeat(np.arange(persons), photos)


@pytest.mark.parametrize(
    ("pattern", "cure"),
    [
        ("{c}/person{p}/img{k}.jpg", "--groups parent keeps"),
        ("person{p}/view{k}/{k}.jpg", "a field that names it"),  # the parent is not the person
        ("{c}/s{p:03d}_{k}.jpg", "a field that names it"),
    ],
)
def test_one_person_in_several_folds_is_told_by_paths(tmp_path, pattern, cure):
    data, persons = people(tmp_path, pattern)
    told = guard([data], [spread(data.labels)], labels=[data.labels])
    assert len(told) == 1 and "(100.0%)" in told[0] and cure in told[0] and "\n" not in told[0]
    assert guard([data], [persons % 5], labels=[data.labels]) == []
    fold = np.where(persons < 6, 0, -1)
    assert guard([data], [fold], labels=data.labels) == []
    fold[0] = -1  # one photo of a held-out person is in training: that person's other four are touched
    told = guard([data], [fold], labels=data.labels)
    assert len(told) == 1 and "4 of 29 held-out images" in told[0] and "(training)" in told[0]
    # Without a held-out image, or without another side, there is nothing to leak.
    assert guard([data], [np.full(150, -1)], labels=data.labels) == []
    assert guard([data], [np.zeros(150, int)], labels=data.labels) == []


def test_two_files_are_compared_with_each_other(tmp_path):
    pictures = crops(30)
    train = write(
        tmp_path / "train.beton", [(jpeg(p), f"a/{i * 7}.jpg", i % 3) for i, p in enumerate(pictures)]
    )
    valid_rows = [(jpeg(np.fliplr(p), 80), f"b/{i * 13}.jpg", i % 3) for i, p in enumerate(pictures[:10])]
    valid = write(tmp_path / "valid.beton", valid_rows)
    sides = [np.full(30, -1), np.zeros(10, int)]
    told = guard([train, valid], sides, labels=[train.labels, valid.labels])
    assert len(told) == 1 and "10 of 10 held-out images (100.0%) have a look-alike" in told[0]
    assert "'a/0.jpg' (training) and 'b/0.jpg' (fold 0)" in told[0]
    assert guard([train.subset(np.arange(10, 30)), valid], [sides[0][:20], sides[1]], labels=None) == []


def test_exact_copies_count_from_the_first_and_look_alikes_from_two_percent(tmp_path):
    pictures = crops(40)
    rows = [(jpeg(p), f"{'ab'[i % 2]}/{i}.jpg", i % 2) for i, p in enumerate(pictures)]
    rows += [(noise(i), f"{'ab'[i % 2]}/n{i}.jpg", i % 2) for i in range(100)]
    mirrored = [(jpeg(np.fliplr(p)), f"a/m{i}.jpg", 0) for i, p in enumerate(pictures[:3])]
    data = write(tmp_path / "data.beton", [*rows, *mirrored, rows[7], rows[60]])
    fold = np.full(145, -1)
    fold[:140] = 0
    assert guard([data.subset(np.arange(142))], [fold[:142]], labels=None) == [], (
        "two look-alikes are not told"
    )
    told = guard([data.subset(np.arange(143))], [fold[:143]], labels=None)
    assert len(told) == 1 and "3 of 140 held-out images (2.1%) have a look-alike" in told[0]
    kept = np.r_[0:140, 143]
    told = guard([data.subset(kept)], [fold[kept]], labels=None)
    assert len(told) == 1 and "1 of 140 held-out images (0.7%) have an exact copy" in told[0]
    kept = np.r_[0:140, 144]
    assert "an exact copy" in guard([data.subset(kept)], [fold[kept]], labels=None)[0], "of a tiny image too"
    told = guard([data], [fold], labels=None)
    assert "5 of 140" in told[0] and "2 of them an exact copy" in told[0]


def test_blank_copies_are_no_leak(tmp_path):
    blank = np.full((64, 64, 3), 255, np.uint8)
    rows = [(blank if i % 2 else noise(i, 64), f"{i}.jpg", i % 3) for i in range(40)]
    data = write(tmp_path / "blank.beton", rows)
    assert guard([data], [np.arange(40) // 8], labels=data.labels) == []


def test_beyond_the_limit_only_exact_copies_are_looked_for(tmp_path, monkeypatch):
    pictures = crops(20)
    rows = [(jpeg(p), f"{i}.jpg", 0) for i, p in enumerate(pictures)]
    rows += [(jpeg(np.fliplr(p)), f"m{i}.jpg", 0) for i, p in enumerate(pictures)]
    data = write(tmp_path / "many.beton", [*rows, rows[3]])
    fold = np.r_[np.zeros(20, int), np.full(21, -1)]
    assert "20 of 20" in guard([data], [fold], labels=None)[0]
    monkeypatch.setattr(leaks, "MOST_HASHED", 40)
    told = guard([data], [fold], labels=None)
    assert "1 of 20" in told[0] and "look-alikes were not searched for: 41 images are more than 40" in told[0]
    assert (
        guard([data.subset(np.r_[0:40]), data.subset([20])], [fold[:40], np.array([-1])], labels=None) == []
    )


def test_random_splits_of_photographs_are_silent(tmp_path, shared_data):
    """500 unrelated photographs, turned and mirrored ones of each other sought: not one pair; nor of paths."""
    rows = []
    with tarfile.open(shared_data("imagenet_photos.tar")) as archive:
        for member in archive:
            if member.isfile() and len(rows) < 500:
                image = Image.open(io.BytesIO(archive.extractfile(member).read()))
                image.draft("RGB", (160, 160))
                rows.append((jpeg(image), member.name.split("/", 1)[1], len(rows) % 10))
    data = write(tmp_path / "photos.beton", rows, classes=[str(c) for c in range(10)])
    assert len(hashing.look_alikes(hashing.look_at([data])).first) == 0
    for seed in range(3):
        assert (
            guard(
                [data.subset(np.arange(seed * 30, 400 + seed * 30))],
                [spread(data.labels[:400], seed=seed)],
                labels=None,
            )
            == []
        )


def test_random_splits_of_small_photographs_are_silent(tmp_path, shared_data):
    """4,000 pictures of CIFAR-10 in its class folders: what it has of real look-alikes stays below what is told."""
    rows = []
    with zipfile.ZipFile(shared_data("cifar10.zip")) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith("jpg") and "/train/" in name)
        classes = sorted({name.split("/")[-2] for name in names})
        for name in np.random.default_rng(0).permutation(names)[:4000].tolist():
            pixels = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
            rows.append((pixels, "/".join(name.split("/")[-2:]), classes.index(name.split("/")[-2])))
    data = write(tmp_path / "cifar.beton", rows, classes)
    assert guard([data], [spread(data.labels)], labels=[data.labels]) == []
    # And it would see them: a mirrored copy of every tenth.
    copies = [
        (np.ascontiguousarray(np.asarray(ImageOps.mirror(Image.fromarray(row[0])))), row[1], row[2])
        for row in rows[::10]
    ]
    held = write(tmp_path / "held.beton", copies, classes)
    told = guard([data, held], [np.full(4000, -1), np.zeros(400, int)], labels=None)
    assert len(told) == 1 and "of 400 held-out images" in told[0]
    found = int(told[0].split(" of ")[0])
    assert found >= 0.97 * 400
