"""Peers: the work of each is right by an independent reference, and the registry is complete."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastload
from fastload.benchmarks import environments
from fastload.benchmarks.peers import PEERS, peer_class
from fastload.benchmarks.peers.base import MEAN, STD, Peer, Work
from fastload.benchmarks.process import PeerProcess
from fastload.errors import MissingExtraError, UsageError

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
COUNT, SIZE, RESIZE, SMALL = 40, 112, 128, 32
NAMES = ("cpu", "cpu-exact", "cuda", "ffcv", "torch", "torch-gpu", "timm", "dali", "albumentations")
# Mean absolute difference in levels to Pillow's antialiased bilinear. Measured on these pictures: 0.0 to 0.37 for the antialiased
# filters, 0.25 for the other (they are smooth), 1.2 for FFCV, whose decoder alone is 0.7 darker; two pixels beside give 4.2.
TOLERANCE = {"antialiased bilinear": 0.5, "area": 1.5, "bilinear, not antialiased": 0.5}
NOISE = 7  # the label of a picture of pure noise, which tells the filters apart

# -- the data: each picture is a class of its own, so that a label tells which picture it must be ------------------------------


def write_pixels(folder, images):
    folder.mkdir()
    index, at = [], 0
    with open(folder / "pixels.bin", "wb") as file:
        for label, image in enumerate(images):
            file.write(image.tobytes())
            index.append((at, *image.shape[:2], label))
            at += image.nbytes
    np.save(folder / "index.npy", np.array(index, np.int64))


@pytest.fixture(scope="module")
def works(tmp_path_factory, picture):
    """The workloads by name, over 40 made pictures."""
    root, rng = tmp_path_factory.mktemp("peers"), np.random.default_rng(0)
    for i in range(COUNT):
        for kind in ("jpeg", "small"):
            (root / kind / f"class{i:02}").mkdir(parents=True)
        height, width = (int(side) for side in rng.integers(140, 300, 2))
        made = Image.fromarray(picture(height // 8, width // 8, i)).resize((width, height), BICUBIC)
        if i == NOISE:
            made = Image.fromarray(rng.integers(0, 256, (600, 600, 1), np.uint8).repeat(3, 2))
        made.save(root / f"jpeg/class{i:02}/{i}.jpg", quality=92)
        Image.fromarray(picture(SMALL, SMALL, 100 + i)).save(root / f"small/class{i:02}/{i}.png")
    files = {kind: sorted((root / kind).glob("*/*")) for kind in ("jpeg", "small")}
    write_pixels(root / "pixels", [decoded(path) for path in files["jpeg"]])
    write_pixels(root / "small-pixels", [decoded(path) for path in files["small"]])
    for target, source, store in (
        ("jpeg", "jpeg", "jpeg"),
        ("raw", "jpeg", "raw"),
        ("small", "small", "raw"),
    ):
        fastload.convert(root / source, root / f"{target}.beton", store=store, progress=False)

    def work(crop, store, beton, **more):
        return Work(
            name=crop,
            crop=crop,
            store=store,
            folder=str(root / "jpeg") if store == "jpeg" else "",
            beton=str(root / f"{beton}.beton"),
            pixels="" if store == "jpeg" else str(root / ("small-pixels" if crop == "pad" else "pixels")),
            scratch=str(root / "scratch"),
            **{"size": SIZE, "resize": RESIZE, "batch": 16, "threads": 2, **more},
        )

    return {
        "eval": work("eval", "jpeg", "jpeg"),
        "train": work("train", "jpeg", "jpeg"),
        "train, normalised": work("train", "jpeg", "jpeg", normalise=True),
        "raw eval": work("eval", "raw", "raw"),
        "pad": work("pad", "raw", "small", size=SMALL),
        "pad, normalised": work("pad", "raw", "small", size=SMALL, normalise=True),
    }


def decoded(path):
    return np.asarray(Image.open(path).convert("RGB"))


def reference_eval(path):
    """Shorter side to RESIZE, centre SIZE x SIZE, by Pillow alone: the right answers, each (SIZE, SIZE, 3) float.

    There are several, since the longer side may be rounded or cut, and the centre of an odd rest lies between two pixels.
    """
    image = Image.open(path).convert("RGB")
    exact = [RESIZE * side / min(image.size) for side in image.size]
    found = []
    for width, height in itertools.product(*({int(side), round(side)} for side in exact)):
        resized = np.asarray(image.resize((width, height), BILINEAR)).astype(float)
        rests = ({(side - SIZE) // 2, (side - SIZE + 1) // 2} for side in (width, height))
        found += [resized[top : top + SIZE, left : left + SIZE] for left, top in itertools.product(*rests)]
    return found


@pytest.fixture(scope="module")
def answers(request, works, tmp_path_factory):
    """The function that gives what a peer answered, for each workload it takes: its check and two epochs of its batches."""
    asked = [name for name in NAMES if any(item.name.endswith(f"[{name}]") for item in request.session.items)]
    folders = {name: tmp_path_factory.mktemp(name) for name in asked}
    with ThreadPoolExecutor(2) as pool:  # FFCV compiles for half a minute: the others run meanwhile
        order = sorted(asked, key=lambda name: name != "ffcv")
        waiting = {name: pool.submit(collect, name, works, folders[name]) for name in order}

        def ask(name):
            try:
                return waiting[name].result()
            except (MissingExtraError, UsageError) as error:
                pytest.skip(str(error))

        yield ask


def collect(name, works, folder):
    kind, found = peer_class(name), {}
    with PeerProcess(name, environments.locate(name).python, timeout=120) as peer:
        found["import"] = peer.ask(do="import")
        for title, work in works.items():
            if work.crop not in kind.crops or work.store not in kind.stores:
                continue
            if name == "ffcv" and title in ("raw eval", "train, normalised", "pad"):
                continue  # the same steps as in others, each of which it would compile again
            peer.ask(do="prepare", work=work.to_json())
            peer.ask(do="load", work=work.to_json())
            epochs = []
            for turn in range(2):
                path = folder / f"{len(found)}-{turn}.npz"
                peer.ask(do="dump", path=str(path))
                with np.load(path) as arrays:
                    epochs.append((arrays["images"], arrays["labels"]))
            found[title] = {"check": peer.ask(do="check", images=1), "epochs": epochs}
        found["run"] = peer.ask(do="run", images=2 * COUNT)
        found["left early"] = peer.ask(do="epochs", count=2, images=1)
        found["after"] = peer.ask(do="check", images=1)
        if kind.converts:
            path = str(folder / "made.beton")
            job = {"source": works["eval"].folder, "target": path, "max_side": 100}
            found["convert"] = peer.ask(do="convert", job=job), path
    return found


# -- the work of each peer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_what_was_asked_for(answers, works, name):
    found = answers(name)
    assert found["import"]["versions"] and found["import"]["seconds"] > 0
    seen = set(found) & set(works)
    assert seen >= {"eval", "train"}
    for title in seen:
        work, check = works[title], found[title]["check"]
        assert check["shapes"] == [[work.size, work.size, 3]]
        assert check["dtypes"] == ["float32" if work.normalise else "uint8"]
        assert check["labels"] == list(range(COUNT)), f"{title}: an epoch must give every sample once"
        cells = 7 if work.size == SIZE else 8
        assert np.shape(check["mean_picture"]) == (cells, cells, 3)
        assert 20 < np.mean(check["mean_picture"]) < 235, "levels of 0 to 255, normalised batches too"
    assert found["run"]["images"] >= 2 * COUNT and found["run"]["cpu_s"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_training_epochs_are_in_random_order(answers, name):
    found = answers(name)
    for title in set(found) & {"train", "pad", "pad, normalised"}:
        first, second = (labels.tolist() for _, labels in found[title]["epochs"])
        assert sorted(first) == sorted(second) == list(range(COUNT))
        assert first != second or first != sorted(first)


@pytest.mark.parametrize("name", NAMES)
def test_eval_crop_is_pillows_within_the_filters_tolerance(answers, works, name):
    found = answers(name)
    paths = sorted(Path(works["eval"].folder).glob("*/*"))
    tolerance = TOLERANCE[peer_class(name).crops["eval"]]
    for title in set(found) & {"eval", "raw eval"}:
        near, beside = [], []
        for image, label in zip(*found[title]["epochs"][0]):
            if label != NOISE:
                wanted = reference_eval(paths[label])
                near.append(min(np.abs(image - one).mean() for one in wanted))
                beside.append(min(np.abs(np.roll(image, 2, 1) - one).mean() for one in wanted))
        assert np.mean(near) < tolerance
        assert np.mean(beside) > 2 * tolerance, "or a shift would pass"


@pytest.mark.parametrize("name", NAMES)
def test_the_filter_does_what_the_rows_name_says(answers, name):
    images, labels = answers(name)["eval"]["epochs"][0]
    noise = images[labels.tolist().index(NOISE)].astype(float).std()
    # Pure noise, 4.7 times smaller: a filter that antialiases averages some 20 pixels, the other takes 4.
    if peer_class(name).crops["eval"] == "bilinear, not antialiased":
        assert noise > 30
    else:
        assert noise < 22


@pytest.mark.parametrize("name", NAMES)
def test_pad_crop_is_a_window_of_the_padded_picture_and_half_are_flipped(answers, works, name):
    found = answers(name)
    assert ("pad, normalised" in found) == ("pad" in peer_class(name).crops)
    pictures = [decoded(p) for p in sorted(Path(works["pad"].pixels).parent.glob("small/*/*"))]
    for title in set(found) & {"pad", "pad, normalised"}:
        windows, flips = set(), 0
        for images, labels in found[title]["epochs"]:
            if works[title].normalise:
                levels = images * np.array(STD) + np.array(MEAN)
                images = levels.round()
                assert np.abs(images - levels).max() < 0.01
            for image, label in zip(images, labels):
                padded = np.pad(pictures[label], ((4, 4), (4, 4), (0, 0)))
                places = [
                    (y, x, flip)
                    for y in range(9)
                    for x in range(9)
                    for flip in (False, True)
                    if np.array_equal(padded[y : y + SMALL, x : x + SMALL][:, :: -1 if flip else 1], image)
                ]
                assert places, f"label {label}: no window of its picture"
                windows.add(places[0][:2])
                flips += places[0][2]
        assert len(windows) > 30 and 0.2 < flips / (2 * COUNT) < 0.8


@pytest.mark.parametrize("name", NAMES)
def test_normalised_crops_are_levels_before_they_were_normalised(answers, name):
    found = answers(name)
    if "train, normalised" not in found:
        assert name == "ffcv"  # its normalised batches are compared pixel by pixel above
        return
    plain, floats = (found[title]["check"] for title in ("train", "train, normalised"))
    assert np.abs(np.mean(plain["mean_picture"]) - np.mean(floats["mean_picture"])) < 6
    assert abs(plain["contrast"] / floats["contrast"] - 1) < 0.15


@pytest.mark.parametrize("name", [name for name in NAMES if peer_class(name).converts])
def test_every_image_is_converted(answers, name):
    answer, path = answers(name)["convert"]
    with fastload.open(path) as made:
        assert len(made) == answer["images"] == COUNT
        assert max(int(made.heights.max()), int(made.widths.max())) == 100
        assert sorted(made.column("label").tolist()) == list(range(COUNT))
    assert answer["bytes"] == os.path.getsize(path)
    assert answer["cpu_s"] > 0 and answer["peak_bytes"] > 2**20


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_that_was_left_early_does_not_spoil_the_next(answers, name):
    found = answers(name)
    assert found["left early"]["images"] == 2 * 16 and len(found["left early"]["mib_by_epoch"]) == 2
    assert found["after"]["labels"] == list(range(COUNT))


# -- the registry --------------------------------------------------------------------------------------------------------------


def test_every_peer_describes_itself():
    for name in PEERS:
        kind = peer_class(name)
        assert issubclass(kind, Peer) and kind.name == name
        assert kind.title and kind.requires and kind.modules and len(kind.settings) > 20
        assert set(kind.crops) <= {"train", "eval", "pad"} and "train" in kind.crops
        assert set(kind.stores) <= {"jpeg", "raw"} and kind.stores
        filters = {"antialiased bilinear", "area", "bilinear, not antialiased"}
        assert {f for crop, f in kind.crops.items() if crop != "pad"} <= filters
        assert kind.crops.get("pad", "none") == "none"
        for method in ("imports", "load", "epoch"):
            assert getattr(kind, method) is not getattr(Peer, method), (name, method)
        assert kind.converts == (kind.convert is not Peer.convert) or kind.name.startswith("c")


def test_a_peer_is_described_without_its_library():
    code = """
        import sys
        BANNED = {"torch", "torchvision", "ffcv", "nvidia", "timm", "albumentations", "cv2", "spdl", "grain", "tensorflow",
                  "webdataset", "litdata", "streaming", "numba", "simplejpeg"}
        class Ban:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in BANNED:
                    raise ImportError("banned: " + name)
        sys.meta_path.insert(0, Ban())
        from fastload.benchmarks.peers import PEERS, make
        for name in PEERS:
            make(name).versions()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wrong_name_is_one_sentence():
    with pytest.raises(UsageError, match="unknown peer 'fcvv'; did you mean 'ffcv'"):
        peer_class("fcvv")
    with pytest.raises(UsageError, match="cannot be imported"):
        peer_class("nowhere_at_all.peer:Mine")
    with pytest.raises(UsageError, match="has no class 'Mine'"):
        peer_class("json:Mine")
    with pytest.raises(UsageError, match=r"made from fastload\.benchmarks\.peers\.base\.Peer"):
        peer_class("json:JSONDecoder")
