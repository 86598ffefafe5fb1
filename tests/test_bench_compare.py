"""Peers side by side: right work gets a row, everything else one sentence; the pictures, the reference and the tables are checked
against Pillow, torchvision and sums made by hand."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

import fastload
from fastload.benchmarks import compare as comparing
from fastload.benchmarks import compare_measure, compare_table, environments, machine, reference
from fastload.benchmarks.compare_options import CompareOptions, names
from fastload.benchmarks.harness import Series, read_jsonl
from fastload.benchmarks.peers import PEERS
from fastload.benchmarks.peers.base import Files, Pixels, Work
from fastload.benchmarks.photos import Photos, evenly, is_plain_jpeg, photo_files, unpack
from fastload.benchmarks.picture import statistics
from fastload.benchmarks.workloads import WORKLOADS, make_work, thread_counts
from fastload.errors import DataError, MissingExtraError, UsageError

linux = pytest.mark.skipif(sys.platform != "linux", reason="peers are stopped and measured through /proc")
COUNT, CLASSES = 60, 4

# A peer that is right, and others with one thing wrong each.
FAKES = r'''
import os, time
import numpy as np
from PIL import Image
from fastload.benchmarks.peers.base import Files, Peer, Pixels


class Plain(Peer):
    """Pillow and numpy, nothing else: the right work, slowly."""
    name, title, settings = "plain", "Pillow loop", "a loop"
    crops = {"train": "antialiased bilinear", "eval": "antialiased bilinear", "pad": "none"}
    stores = ("jpeg", "raw")
    def imports(self): pass
    def load(self, work):
        from fastload.benchmarks.reference import _crop
        self.work, self.crop, self.rng = work, _crop, np.random.default_rng(7)
        self.data = Pixels(work.pixels) if work.pixels else Files(work.folder)
    def picture(self, i):
        if self.work.pixels:
            return Image.fromarray(self.data.image(i))
        return Image.open(self.data.paths[i]).convert("RGB")
    def epoch(self):
        order = self.rng.permutation(len(self.data))
        for start in range(0, len(order), self.work.batch):
            part = order[start:start + self.work.batch]
            images = np.stack([self.crop(self.picture(i), self.work, False, self.rng) for i in part])
            if self.work.normalise:
                images = (images - np.float32([123.675, 116.28, 103.53])) / np.float32([58.395, 57.12, 57.375])
            yield images, self.data.labels[part]


class Swapped(Plain):
    title = "blue first"
    def epoch(self):
        for images, labels in super().epoch():
            yield images[..., ::-1], labels


class Closer(Plain):
    title = "small crops"
    def picture(self, i):
        image = super().picture(i)
        width, height = image.size
        left, top = (self.rng.integers(int(side * 0.6)) for side in image.size)
        return image.crop((left, top, left + int(width * 0.4), top + int(height * 0.4)))


class Forgetful(Plain):
    title = "labels lost"
    def epoch(self):
        for images, labels in super().epoch():
            yield images, labels * 0


class Short(Plain):
    title = "an image short"
    def epoch(self):
        for images, labels in super().epoch():
            yield (images[1:], labels[1:]) if len(images) < self.work.batch else (images, labels)


class Floats(Plain):
    title = "another type"
    def epoch(self):
        for images, labels in super().epoch():
            yield images.astype(np.float32), labels


class Smaller(Plain):
    title = "smaller images"
    def epoch(self):
        for images, labels in super().epoch():
            yield images[:, ::2, ::2], labels


class Dies(Plain):
    """Dies in its third measured round: after a check of 2 epochs, a warm-up of 1 and 2 rounds."""
    title, epochs = "dies", 0
    def epoch(self):
        self.epochs += 1
        if self.epochs > AFTER:
            os._exit(9)
        yield from super().epoch()


class Raises(Plain):
    title, epochs = "raises", 0
    def epoch(self):
        self.epochs += 1
        if self.epochs > AFTER:
            raise RuntimeError("a made failure, on two\n lines")
        yield from super().epoch()


class Sleeps(Plain):
    title = "sleeps"
    def load(self, work):
        time.sleep(600)


class Absent(Plain):
    title, modules, requires = "absent", ("no_such_module",), ("no-such-distribution",)


class OnlyJpeg(Plain):
    title, stores, crops = "JPEG only", ("jpeg",), {"train": "area"}


class Writes(Plain):
    title, converts, quality, side = "writes", True, 90, 500
    def convert(self, job):
        import fastload
        fastload.convert(job.source, job.target, max_side=self.side, quality=self.quality, store="jpeg",
                         reencode="always", workers=job.threads, progress=False)
        return len(Files(job.source)) - self.lost
    lost = 0


class Loses(Writes):
    title, lost = "converts half", 30


class Coarse(Writes):
    title, quality = "low quality", 40


class Large(Writes):
    title, side = "not made smaller", 4000
'''
CHECKED = 120  # images of a check: 2 epochs of 60
AFTER = CHECKED // COUNT + 1 + 2


def made(i):
    """A smooth, reddish picture of low contrast, so that few crops already agree on average."""
    rng = np.random.default_rng(i)
    coarse = np.clip(np.array([150, 120, 95]) + rng.normal(0, 14, (6, 8, 3)), 0, 255).astype(np.uint8)
    size = tuple(int(side) for side in rng.integers(230, 330, 2))
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(image) + rng.normal(0, 3, (*size[::-1], 1))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of class folders with 60 made JPEG files, two of them larger than 500 px."""
    folder = tmp_path_factory.mktemp("made") / "photos"
    for i in range(COUNT):
        target = folder / f"class {i % CLASSES}"
        target.mkdir(parents=True, exist_ok=True)
        image = made(i)
        (image.resize((700, 560)) if i < 2 else image).save(target / f"{i}.jpg", quality=95)
    return folder


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """The folder with the module ``fakes``, importable here and in the peers' processes."""
    (tmp_path / "fakes.py").write_text(f"AFTER = {AFTER}\n{FAKES}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(reference, "CHECK_IMAGES", CHECKED)
    monkeypatch.setattr(reference, "CROPS", 600)
    yield tmp_path
    sys.modules.pop("fakes", None)


def small_options(pictures, *peers, workloads=("train500",), **more):
    given = {
        "images": COUNT,
        "copies": 1,
        "batch": 16,
        "threads": 2,
        "small_images": 2000,
        "subset_images": 30,
        "epochs": 4,
    }
    return CompareOptions(str(pictures), peers, workloads, **{**given, **more})


def compare(options):
    return {record["workload"]: record for record in comparing.compare(options)}


# ---- the whole way ----


@linux
def test_failures_are_one_sentence_each_and_leave_the_others_alone(pictures, fakes):
    bad = {
        "fakes:Swapped": "mean picture differs from Pillow's",
        "fakes:Closer": "contrast",
        "fakes:Forgetful": "the labels of its epoch are not those of the files (60 labels of 1 classes, expected 60 of 4)",
        "fakes:Short": "(59 labels",
        "fakes:Floats": "its batches are 224x224x3 float32 instead of 224x224x3 uint8",
        "fakes:Smaller": "its batches are 112x112x3 uint8 instead of 224x224x3 uint8",
        "fakes:Dies": "died at 'run' (exit code 9)",
        "fakes:Raises": "RuntimeError: a made failure, on two lines",
        "fakes:Absent": "needs the module 'no_such_module'",
        "fakes:Sleeps": "gave no answer to 'load' within 6 s",
    }
    options = small_options(pictures, "fakes:Plain", *bad, "fakes:OnlyJpeg", timeout=6.0)
    record = compare(options)["train500"]
    rows = {row["peer"]: row for row in record["rows"]}
    assert set(rows) == {"fakes:OnlyJpeg", "fakes:Plain"}
    for row in rows.values():
        assert row["figure"]["n"] == row["ratio"]["n"] == row["cpu_s_per_1000"]["n"] == 5
    assert {failed["peer"] for failed in record["failed"]} == set(bad)
    for failed in record["failed"]:
        assert bad[failed["peer"]] in failed["reason"], failed
        assert "\n" not in failed["reason"] and len(failed["reason"]) <= 400
    plain, other = rows["fakes:Plain"], rows["fakes:OnlyJpeg"]
    assert plain["ratio"]["rounds"] == [1.0] * 5  # no ffcv here, so the first peer is the baseline
    a, b = (np.array(row["figure"]["rounds"]) for row in (other, plain))
    np.testing.assert_allclose(other["ratio"]["rounds"], a / b, atol=2e-4)
    medians = [row["figure"]["median"] for row in record["rows"]]
    assert medians == sorted([np.median(a), np.median(b)], reverse=True)
    assert plain["check"]["passed"] and plain["peak_mib"] > 10 and plain["threads"] == 2
    assert record["settings"]["images_in_set"] == COUNT and "page_cache" in record["environment"]
    assert json.loads(json.dumps(record)) == record


@linux
def test_without_the_baseline_there_are_no_ratios(pictures, fakes):
    record = compare(small_options(pictures, "fakes:Absent", "fakes:Plain"))["train500"]
    assert [row["ratio"] for row in record["rows"]] == [None]
    assert any("no ratios" in note for note in record["notes"])


@linux
def test_start_threads_and_originals(pictures, fakes, monkeypatch):
    monkeypatch.setattr(compare_measure, "thread_counts", lambda cores: [1, 2])
    options = small_options(
        pictures, "fakes:Plain", "fakes:OnlyJpeg", workloads=("original", "start", "threads")
    )
    records = compare(options)
    assert list(records) == ["original", "start", "threads"]
    assert all(not record["failed"] for record in records.values())
    medians = [row["figure"]["median"] for row in records["start"]["rows"]]
    assert medians == sorted(medians) and records["start"]["unit"] == "s"  # the soonest is the best
    start = {row["peer"]: row for row in records["start"]["rows"]}
    one, other = start["fakes:Plain"], start["fakes:OnlyJpeg"]
    np.testing.assert_allclose(
        other["ratio"]["rounds"],
        np.array(one["figure"]["rounds"]) / np.array(other["figure"]["rounds"]),
        rtol=2e-3,
    )
    parts = sum(one["extra"][f"{part}_s"] for part in ("process", "import", "loader"))
    assert parts == pytest.approx(one["figure"]["median"], rel=0.3)
    threads = [(row["peer"], row["threads"]) for row in records["threads"]["rows"]]
    assert len(threads) == 4 and {count for _, count in threads[:2]} == {1}


@linux
def test_the_other_workloads_with_our_own_loader(pictures, fakes):
    options = small_options(pictures, "cpu", "fakes:OnlyJpeg", workloads=("eval", "raw", "small", "memory"))
    records = compare(options)
    reasons = {
        "eval": "JPEG only does not make this crop ('eval')",
        "raw": "JPEG only does not read decoded pixels",
        "small": "JPEG only does not read decoded pixels",
    }
    for name, record in records.items():
        found = {failed["peer"]: failed["reason"] for failed in record["failed"]}
        assert found == ({"fakes:OnlyJpeg": reasons[name]} if name in reasons else {}), name
        assert all(row["check"]["passed"] for row in record["rows"])
        assert record["unit"] == ("MiB" if name == "memory" else "images/s")
    for row in records["memory"]["rows"]:
        assert len(row["extra"]["mib_by_epoch"]) == row["figure"]["n"] == 4 and row["ratio"] is None
        assert row["figure"]["max"] == max(row["extra"]["mib_by_epoch"])
    small = records["small"]["settings"]
    assert small["batch"] == 512 and small["images_in_set"] == 2040


@linux
@pytest.mark.parametrize("peer, workload", [("torch", "train500"), ("ffcv", "convert")])
def test_other_libraries_do_the_same_work(pictures, fakes, peer, workload):
    """FFCV's loader compiles for half a minute: its crops are in tests/test_bench_peers.py, its writer is quick."""
    try:
        environments.locate(peer)
    except (MissingExtraError, UsageError) as error:
        pytest.skip(str(error))
    record = compare(small_options(pictures, "cpu", peer, workloads=(workload,)))[workload]
    assert {row["peer"] for row in record["rows"]} == {"cpu", peer}, record["failed"]
    assert record["baseline"] == ("ffcv" if peer == "ffcv" else "cpu")
    assert set(compare_table.claims([record])) == ({"convert"} if peer == "ffcv" else set())


@linux
def test_conversions_that_do_less_get_no_speed(pictures, fakes):
    record = compare(
        small_options(
            pictures,
            "fakes:Writes",
            "fakes:Loses",
            "fakes:Coarse",
            "fakes:Large",
            "fakes:Plain",
            workloads=("convert",),
        )
    )["convert"]
    reasons = {failed["peer"]: failed["reason"] for failed in record["failed"]}
    assert [row["peer"] for row in record["rows"]] == ["fakes:Writes"]
    assert reasons["fakes:Plain"] == "Pillow loop has no conversion to compare"
    assert reasons["fakes:Loses"] == "it wrote 30 of 60 images"
    assert "times the bytes that Pillow takes" in reasons["fakes:Coarse"]
    assert reasons["fakes:Large"] == "its file holds an image of 700 px instead of at most 500 px"
    assert record["rows"][0]["extra"]["bytes"] > 10_000


def test_a_peer_is_not_started_without_memory(pictures, fakes, monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 1 << 30)
    record = compare(small_options(pictures, "fakes:Plain"))["train500"]
    assert record["rows"] == [] and "only 1.0 GiB of memory were free" in record["failed"][0]["reason"]
    assert "no peer has a figure" in compare_table.table(record)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_free_memory_is_a_part_of_all():
    assert 0 < machine.available_bytes() <= machine.ram_bytes()


# ---- what is said before anything runs ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peers": ("cpu", "fcv")}, r"unknown peer 'fcv'; did you mean 'ffcv'\?"),
        ({"peers": ()}, "name at least one peer"),
        ({"peers": ("cpu", "cpu")}, "name each peer once, got cpu,cpu"),
        ({"workloads": ("train50",)}, "unknown workload 'train50'; did you mean 'train500'"),
        ({"baseline": "dali"}, "unknown baseline 'dali'"),
        ({"rounds": 4}, "at least 5 rounds, got 4"),
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"timeout": 0}, "timeout must be above 0 s, got 0"),
        ({"data": "/nowhere"}, "no folder, tar or .beton file at '/nowhere'"),
    ],
)
def test_wrong_options_are_usage_errors(changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        CompareOptions(**{"data": str(tmp_path), **changes})


def test_names_and_baseline(tmp_path):
    assert names("cpu, ffcv,", PEERS) == ("cpu", "ffcv")
    assert names("all", PEERS) == tuple(PEERS)
    assert CompareOptions(str(tmp_path), ("cpu", "ffcv")).baseline_name == "ffcv"
    assert CompareOptions(str(tmp_path), ("torch", "cpu")).baseline_name == "torch"
    assert CompareOptions(str(tmp_path), ("cpu", "ffcv"), baseline="cpu").baseline_name == "cpu"
    assert [thread_counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_the_command_says_a_wrong_peer_and_an_unwritable_file_at_once(pictures, tmp_path):
    def run(*more):
        command = [sys.executable, "-m", "fastload.benchmarks", "compare", str(pictures), *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    wrong = run("--peers", "cpu,dalli")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: unknown peer 'dalli'; did you mean 'dali'?")
    (tmp_path / "file").write_text("")
    blocked = run("--out", str(tmp_path / "file" / "x.jsonl"))
    assert blocked.returncode == 2 and "choose another --out" in blocked.stderr


def test_records_are_written_as_they_come(monkeypatch, tmp_path):
    out, seen = tmp_path / "out.jsonl", []

    def two(options, progress):
        yield {"workload": "a"}
        seen.extend(read_jsonl(out))
        raise DataError("the second broke")

    monkeypatch.setattr(comparing, "compare", two)
    told = []
    with pytest.raises(DataError, match="the second broke"):
        comparing.run(tmp_path, out=out, progress=False, done=told.append)
    assert seen == told == read_jsonl(out) == [{"workload": "a"}]


# ---- the pictures ----


def test_all_forms_of_a_set_are_the_same_pictures(pictures, tmp_path):
    before = digest(pictures)
    photos = Photos(str(pictures), tmp_path / "scratch", images=120, small_images=200)
    five = photos.get("500")
    files = Files(five.folder)
    assert len(files) == 2 * COUNT == len(five.labels) and five.copies == 2
    assert (
        five.labels == sorted(list(range(CLASSES)) * (2 * COUNT // CLASSES)) == sorted(files.labels.tolist())
    )
    with fastload.open(five.beton) as dataset:
        assert sorted(dataset.labels.tolist()) == five.labels
        by_class = {name: [] for name in range(CLASSES)}
        for i in range(len(dataset)):
            by_class[int(dataset.labels[i])].append(pixels(bytes(dataset.encoded(i).data)))
    theirs = {name: [] for name in range(CLASSES)}
    for path, label in zip(files.paths, files.labels.tolist()):
        theirs[label].append(pixels(path))
    assert {k: sorted(v) for k, v in by_class.items()} == {k: sorted(v) for k, v in theirs.items()}
    with Image.open(files.paths[0]) as image:
        assert max(image.size) <= 500 and image.format == "JPEG"
    raw = photos.get("raw")
    decoded = Pixels(raw.pixels)
    assert len(decoded) == COUNT and raw.copies == 1
    stored = [hashlib.sha256(decoded.image(i).tobytes()).hexdigest() for i in range(COUNT)]
    for label, value in zip(decoded.labels.tolist(), stored):
        assert value in theirs[label]
    assert len(set(stored)) == COUNT
    with fastload.open(raw.beton) as dataset:
        assert set(dataset.modes.tolist()) == {1}
        np.testing.assert_array_equal(dataset[3]["image"], decoded.image(3))
        np.testing.assert_array_equal(dataset.labels, decoded.labels)
    large = photos.get("large")
    with fastload.open(large.beton) as dataset:
        assert len(dataset) == len(large.labels) == 12 and large.copies == 1
        assert dataset.heights.tolist() == [1500] * 12 and dataset.widths.tolist() == [2000] * 12
        first = large.sources.image(0).crop((500, 0, 1000, 375)).resize((50, 37))  # the second of its sixteen
    with Image.open(photos.encoded[1].path) as image:
        second = np.asarray(image.convert("RGB").resize((50, 37)), float)
    assert np.abs(np.asarray(first, float) - second).mean() < 12
    small = photos.get("small")
    assert len(Pixels(small.pixels)) == 240 and Pixels(small.pixels).stacked().shape == (240, 32, 32, 3)
    assert digest(pictures) == before


def pixels(source):
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()


def digest(folder):
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_a_beton_and_a_tar_give_the_same_files(pictures, tmp_path):
    fastload.convert(pictures, tmp_path / "all.beton", store="jpeg", reencode="never", progress=False)
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(pictures, "wrapped/photos")
    found = []
    for name in ("all.beton", "all.tar"):
        photos = Photos(str(tmp_path / name), tmp_path / f"scratch-{name}", images=COUNT)
        files = Files(photos.get("original").folder)
        assert {os.path.basename(os.path.dirname(path)) for path in files.paths} == {
            f"{k:05d}" for k in range(CLASSES)
        }
        found.append(sorted((label, pixels(path)) for path, label in zip(files.paths, files.labels.tolist())))
    assert found[0] == found[1]
    assert len(found[0]) == COUNT


def test_odd_originals_are_left_out_for_all_and_counted(tmp_path):
    folder = tmp_path / "odd" / "a"
    folder.mkdir(parents=True)
    image = made(1)
    image.save(folder / "plain.jpg", quality=90)
    image.convert("L").save(folder / "grey.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "progressive.jpg", progressive=True)
    image.save(folder / "png.jpg", "PNG")
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(folder / "turned.jpg", exif=turned)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    assert [path.name for path in sorted(folder.iterdir()) if is_plain_jpeg(path)] == ["plain.jpg"]
    photos = Photos(str(tmp_path / "odd"), tmp_path / "scratch", images=7)
    original = photos.get("original")
    assert len(original.sources) == 1
    assert any("5 original files were left out" in note for note in original.notes)
    assert any("1 files that Pillow cannot decode" in note for note in photos.notes)
    assert len(photos.get("500").sources) == 6
    with Image.open(
        photos.encoded[[i.path.name for i in photos.originals].index("000006.jpg")].path
    ) as upright:
        assert upright.size == image.size[::-1]


def test_many_pictures_are_thinned_evenly(pictures, tmp_path):
    photos = Photos(str(pictures), tmp_path / "scratch", images=20)
    assert len(photos.originals) == 20 and any("20 of 60 pictures" in note for note in photos.notes)
    assert {item.label for item in photos.originals} == set(range(CLASSES))
    assert evenly(10, 5) == [0, 2, 4, 6, 8] and evenly(3, 5) == [0, 1, 2]


def test_where_there_are_no_pictures(tmp_path):
    with pytest.raises(UsageError, match=r"no folder, tar or \.beton"):
        unpack(str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(DataError, match="no images"):
        unpack(str(tmp_path), tmp_path)
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"not a tar file" * 100)
    with pytest.raises(DataError, match="cannot unpack"):
        unpack(str(broken), tmp_path)


def test_a_folder_inside_the_tar_is_found(tmp_path):
    target = tmp_path / "wrapped" / "photos" / "cat"
    target.mkdir(parents=True)
    (tmp_path / "wrapped" / "photos" / "dog").mkdir()
    Image.new("RGB", (8, 8)).save(target / "a.jpg")
    found = unpack(str(tmp_path / "wrapped"), tmp_path)
    assert found == tmp_path / "wrapped" / "photos"
    assert [path.name for path in photo_files(found)] == ["a.jpg"]


# ---- the reference ----


def work(crop, size=224, **more):
    return Work("w", crop, "jpeg", "", "", "", "", size=size, **more)


def test_the_reference_draws_crops_as_torchvision_does():
    transforms = pytest.importorskip("torchvision.transforms")
    torch = pytest.importorskip("torch")
    from scipy.stats import ks_2samp

    torch.manual_seed(0)
    width, height, count = 320, 200, 800
    image = Image.new("RGB", (width, height))
    rng = np.random.default_rng(0)
    ours = np.array([reference._train_box(width, height, rng) for _ in range(count)])
    ours = np.stack([ours[:, 1], ours[:, 0], ours[:, 3] - ours[:, 1], ours[:, 2] - ours[:, 0]], 1)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)]
    )
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3


def test_the_eval_crop_is_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    steps = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    image = made(3)
    found = reference._crop(image, work("eval"), False, np.random.default_rng(0))
    assert np.abs(found.astype(float) - np.asarray(steps(image)).astype(float)).mean() < 1.0


def test_the_pad_crops_mean_is_the_mean_of_all_81_shifts():
    small = np.stack([np.asarray(made(i).resize((32, 32))) for i in range(8)])
    want = reference.expected(
        reference.Sources(small), [0] * 8, work("pad", 32, normalise=True), "none", 8000
    )
    padded = np.pad(small.astype(float).mean(0), ((4, 4), (4, 4), (0, 0)))
    exact = np.mean([padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)], axis=0)
    exact = (exact + exact[:, ::-1]) / 2
    np.testing.assert_allclose(want.mean_picture, exact.reshape(8, 4, 8, 4, 3).mean((1, 3)), atol=1.5)
    assert want.dtype == "float32"


@pytest.mark.parametrize("size, grid", [(30, 6), (32, 8), (224, 7), (45, 5)])
def test_statistics_are_plain_means_and_deviations(size, grid):
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    cells, contrast = statistics(image)
    side = size // grid
    np.testing.assert_allclose(cells, image.reshape(grid, side, grid, side, 3).mean((1, 3)), rtol=1e-6)
    assert contrast == pytest.approx(image.astype(float).std((0, 1)).mean(), rel=1e-5)


def answer(want, **changes):
    base = {
        "shapes": [[224, 224, 3]],
        "dtypes": ["uint8"],
        "labels": [0, 1],
        "mean_picture": want.mean_picture.tolist(),
        "contrast": want.contrast,
        "images": 10,
    }
    return {**base, **changes}


@pytest.fixture(scope="module")
def wanted():
    picture = np.zeros((7, 7, 3)) + [100, 120, 140]
    return reference.Expected(picture, 50.0, [0, 1], 224, "uint8")


def test_right_work_passes(wanted):
    found = reference.check_work(wanted, answer(wanted, mean_picture=(wanted.mean_picture + 1).tolist()))
    assert found == {
        "passed": True,
        "worst_cell_levels": 1.0,
        "mean_levels": 1.0,
        "contrast_difference": 0.0,
        "images": 10,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"shapes": [[112, 112, 3]]},
        {"shapes": [[224, 224, 3], [224, 225, 3]]},
        {"dtypes": ["float32"]},
        {"labels": [0, 0]},
        {"labels": [0]},
        {"contrast": 51.5},
        {"contrast": 48.5},
        {"mean_picture": (np.zeros((7, 7, 3)) + [140, 120, 100]).tolist()},
        {"mean_picture": (np.zeros((7, 7, 3)) + [103, 120, 140]).tolist()},
        {"mean_picture": np.full((7, 7, 3), math.nan).tolist()},
    ],
)
def test_wrong_work_does_not(wanted, changes):
    with pytest.raises(DataError):
        reference.check_work(wanted, answer(wanted, **changes))


def test_one_wrong_cell_is_seen(wanted):
    picture = wanted.mean_picture.copy()
    picture[6, 0, 1] += 5.5
    with pytest.raises(DataError, match=r"worst cell 5\.5"):
        reference.check_work(wanted, answer(wanted, mean_picture=picture.tolist()))


def test_filters_that_do_not_antialias_have_a_reference_of_their_own(tmp_path):
    """Noise tells the two filters apart: averaging takes its contrast away, sampling keeps it."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 900, 900, 3), np.uint8)
    both = [
        reference.expected(reference.Sources(noise), [0] * 4, work("eval"), name).contrast
        for name in ("antialiased bilinear", "bilinear, not antialiased")
    ]
    assert both[1] > 1.5 * both[0]


# ---- tables ----


def series(*rounds, unit="images/s"):
    return Series("x", rounds, unit).to_json()


def record(workload="train500", rows=(), failed=(), **more):
    chosen = WORKLOADS[workload]
    return {
        "kind": "compare",
        "workload": workload,
        "what": "the work",
        "unit": chosen.unit,
        "better": chosen.better,
        "baseline": "ffcv",
        "rows": list(rows),
        "failed": list(failed),
        "settings": {"threads": 2, "batch": 64, "rounds": 5, "images_in_set": 2000},
        "environment": {"cpu": "A CPU", "cores": 2, "page_cache": "warm"},
        "notes": [],
        **more,
    }


def row(peer, title, filter, figure, ratio=None, cpu=None, peak=None, **extra):
    return {
        "peer": peer,
        "title": title,
        "filter": filter,
        "figure": figure,
        "ratio": ratio,
        "cpu_s_per_1000": cpu,
        "peak_mib": peak,
        "threads": 2,
        "check": {"passed": True},
        "extra": extra,
    }


OURS = row(
    "cpu",
    "fastload",
    "antialiased bilinear",
    series(3000, 3100, 2900, 3200, 3000),
    series(2, 2.5, 2.25, 3, 2),
    series(0.5, 0.6, 0.7, 0.6, 0.6),
    885.4,
)
FFCV = row("ffcv", "FFCV", "area", series(1500, 1240, 1289, 1067, 2000), series(1, 1, 1, 1, 1), None, None)


def test_the_table_says_all_that_was_found():
    text = compare_table.table(
        record(rows=[OURS, FFCV], failed=[{"peer": "dali", "reason": "it is not here"}], notes=["busy"])
    )
    lines = text.splitlines()
    assert lines[0] == "train500: the work"
    assert (
        lines[1]
        == "A CPU, 2 cores, 2 threads or workers each, batches of 64, 2,000 images, 5 rounds in turns, page cache warm"
    )
    assert lines[2].split("  ")[-1] == "noise" and "ratio to FFCV" in lines[2]
    assert lines[3].split() == [
        "fastload", "(antialiased", "bilinear)", "3,000", "[2,900-3,200]", "2.25", "[2.00-3.00]", "0.60", "885",
    ]  # fmt: skip
    assert lines[4].split()[-1] == "±36%"  # (2000 - 1067) / 2 / 1289
    assert lines[5:] == ["dali: no figure: it is not here", "note: busy"]
    assert len({line.index("[") for line in lines[3:5]}) <= 2


def test_markdown_has_a_row_for_each_peer_and_no_empty_column():
    text = compare_table.markdown([record(rows=[OURS, FFCV], failed=[{"peer": "dali", "reason": "a|b"}])])
    lines = text.splitlines()
    assert lines[2] == "|  | images/s, median [range] | ratio to FFCV | CPU s/1,000 | peak MiB | noise |"
    assert (
        lines[4]
        == "| fastload (antialiased bilinear) | 3,000 [2,900-3,200] | 2.25 [2.00-3.00] | 0.60 | 885 |  |"
    )
    assert lines[5] == "| FFCV (area) | 1,289 [1,067-2,000] | 1.00 [1.00-1.00] |  |  | ±36% |"
    assert lines[-1] == "Without a figure: dali: a\\|b."
    bare = compare_table.markdown([record(rows=[row("cpu", "fastload", "none", series(1, 1, 1, 1, 1))])])
    assert "| fastload | 1.00 [1.00-1.00] |" in bare and "peak" not in bare and "ratio" not in bare


def test_workloads_with_figures_of_their_own():
    start = row(
        "cpu",
        "fastload",
        "none",
        series(2, 2, 2, 2, 2, unit="s"),
        import_s=1.25,
        loader_s=0.5,
        process_s=0.25,
    )
    assert "import 1.25 s, loader 0.50 s" in compare_table.table(record("start", [start]))
    written = row("cpu", "fastload", "none", series(9, 9, 9, 9, 9), bytes=3 << 20)
    assert "3.0 MiB written" in compare_table.table(record("convert", [written]))
    held = row(
        "cpu", "fastload", "none", series(100, 900, unit="MiB"), mib_by_epoch=[100, 900], growth_mib=800.0
    )
    text = compare_table.table(record("memory", [held]))
    assert "grew +800.0 MiB over 2 epochs" in text and "±" not in text
    assert "fastload, 2 threads" in compare_table.table(
        record("threads", [row("cpu", "fastload", "none", series(9, 9))])
    )


def test_the_summary_has_a_column_for_each_rate():
    other = record("eval", [FFCV, OURS])
    text = compare_table.summary([record(rows=[OURS, FFCV]), other, record("start"), record("threads")])
    assert text.splitlines() == [
        "| | train500, images/s | eval, images/s |",
        "|---|---:|---:|",
        "| fastload (antialiased bilinear) | **3,000 (2.25x)** | 3,000 (2.25x) |",
        "| FFCV (area) | 1,289 (1.00x) | **1,289 (1.00x)** |",
    ]


def test_claims_are_medians_of_ratios_within_a_round(monkeypatch):
    monkeypatch.setattr(compare_table, "CLAIMS", {"train500": 2.0, "convert": 1.5, "start": 20.0})
    seconds = [
        row("cpu", "f", "none", series(1, 1, 2, 1, 1, unit="s")),
        row("ffcv", "F", "none", series(9, 9, 9, 9, 9, unit="s")),
    ]
    found = compare_table.claims(
        [
            record(rows=[OURS, FFCV]),
            record("start", seconds),
            record("eval", [OURS, FFCV]),
            record("convert", [OURS]),
        ]
    )
    want = sorted(a / b for a, b in zip((3000, 3100, 2900, 3200, 3000), (1500, 1240, 1289, 1067, 2000)))[2]
    assert found["train500"] == {"claim": 2.0, "measured": round(want, 3), "holds": True}
    assert found["start"] == {"claim": 20.0, "measured": 9.0, "holds": False}
    assert compare_table.claims_table(
        [record(rows=[OURS, FFCV]), record("eval", [OURS, FFCV])]
    ).splitlines() == [
        "| workload | at least | measured | |",
        "|---|---:|---:|---|",
        f"| train500 | 2x | **{want:.2f}x** | {record()['what']} |",
    ]
    assert set(found) == {"train500", "start"}  # convert has no FFCV here


def test_a_work_names_the_peers_own_folder(pictures, tmp_path):
    photos = Photos(str(pictures), tmp_path / "scratch", images=60)
    made_work = make_work(WORKLOADS["train500"], photos.get("500"), tmp_path / "own", threads=3, batch=32)
    assert os.path.isdir(made_work.scratch) and (made_work.threads, made_work.batch, made_work.normalise) == (
        3,
        32,
        False,
    )
    assert os.path.isabs(made_work.folder) and os.path.isfile(made_work.beton)
