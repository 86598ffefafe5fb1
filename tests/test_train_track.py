"""Trackers: what they wrote is read back from their own files and compared with the log of the run."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

import fastload
from fastload.errors import MissingExtraError
from fastload.train import Config, Trainer
from fastload.train.predictions import Predictions
from fastload.train.track import EVERY, Wandb, _confusion, make_trackers

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")
CFG = Config(
    model="test_resnet", epochs=2, size=32, batch_size=4, augment="light", device="cpu", threads=1, allow_leak=True,
    track=("tensorboard", "wandb"),
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    items = [
        {"image": rng.integers(0, 256, (20 + i % 9, 30, 3)).astype(np.uint8), "label": i % 3}
        for i in range(60)
    ]
    path = tmp_path_factory.mktemp("data") / "data.beton"
    fastload.convert(items, path, classes=["a", "b", "c"], store="raw", progress=False)
    return path


@pytest.fixture(scope="module")
def tracked(data, tmp_path_factory):
    """A run that was followed by both."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MODE", "offline"), ("PROJECT", "flowers"), ("SILENT", "true")):
            patch.setenv(f"WANDB_{name}", value)
        return Trainer(CFG).fit(data, out=tmp_path_factory.mktemp("runs") / "run", progress=False)


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def records(folder):
    """The records of the one offline run in a ``wandb`` folder: a log in LevelDB's format of protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("offline-run-*/run-*.wandb")
    content, at, whole, found = path.read_bytes(), 7, b"", []
    while at < len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def values_of(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_tensorboard_has_the_log_and_the_losses_of_some_steps(tracked):
    found = events(tracked.folder / "tensorboard")
    steps = 12  # 48 images to learn from in batches of 4
    for name in set(tracked.history[0]):
        points = [(event.step, event.value) for event in found.Scalars(f"epoch/{name}")]
        wanted = [
            ((i + 1) * steps, pytest.approx(line[name], rel=1e-5)) for i, line in enumerate(tracked.history)
        ]
        assert points == wanted, name
    losses = found.Scalars("step/loss")
    assert [event.step for event in losses] == list(range(EVERY, 2 * steps + 1, EVERY))
    assert all(0 < event.value < 20 for event in losses)
    for name, value in tracked.oof.summary().items():
        (event,) = found.Scalars(f"final/{name}")
        assert event.value == pytest.approx(value, rel=1e-5)


def test_tensorboard_has_pictures_and_options(tracked):
    from tensorboard.plugins.hparams import plugin_data_pb2

    found = events(tracked.folder / "tensorboard")
    (samples,), (matrix,) = found.Images("images of the training side"), found.Images("confusion matrix")
    assert samples.encoded_image_string[1:4] == matrix.encoded_image_string[1:4] == b"PNG"
    assert samples.width % 128 == 0 and matrix.width > 200
    started = plugin_data_pb2.HParamsPluginData.FromString(
        found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    assert (
        started.hparams["model"].string_value == "test_resnet"
        and started.hparams["batch_size"].number_value == 4
    )
    assert set(started.hparams) == set(CFG.to_dict())


def test_wandb_has_the_log_the_options_and_the_final_scores(tracked):
    found = records(tracked.folder / "wandb")
    (started,) = (one.run for one in found if one.HasField("run"))
    assert (
        started.project == "flowers"
        and started.display_name == "run"
        and started.run_group == tracked.folder.parent.name
    )
    assert started.run_id == (tracked.folder / "wandb_id.txt").read_text()
    options = values_of(started.config.update)
    assert options.items() >= tracked.config.to_dict().items()
    history = [values_of(one.history.item) for one in found if one.HasField("history")]
    for line in tracked.history:
        (row,) = (row for row in history if row.get("epoch/epoch") == line["epoch"])
        assert {f"epoch/{name}": value for name, value in line.items()}.items() <= row.items()
        assert row["_step"] == 12 * line["epoch"]
    assert [row["_step"] for row in history if "step/loss" in row] == [10, 20]
    summary = {}
    for one in found:
        if one.HasField("summary"):
            summary |= values_of(one.summary.update)
    for name, value in tracked.oof.summary().items():
        assert summary[f"final/{name}"] == pytest.approx(value)
    pictures = [
        path.name for path in (tracked.folder / "wandb").glob("offline-run-*/files/media/images/*.png")
    ]
    assert sum(name.startswith("images of the training side") for name in pictures) == 16
    assert sum(name.startswith("confusion matrix") for name in pictures) == 1


# ---- a run that goes on


def session(folder, updates, dataset=None):
    return SimpleNamespace(
        folder=folder, cfg=CFG, step=SimpleNamespace(updates=updates),
        split=SimpleNamespace(train=dataset, classes=["a", "b", "c"]),
    )  # fmt: skip


def follow(tracker, now, until, value):
    """Steps and epochs of 6 steps from where the session stands."""
    tracker.on_start(now)
    while now.step.updates < until:
        now.step.updates += 1
        tracker.on_step(now, torch.tensor(value))
        if now.step.updates % 6 == 0:
            tracker.on_epoch(now, {"epoch": now.step.updates // 6, "accuracy": value})


class Ended:
    oof = Predictions(["x", "y"], np.eye(2, dtype=np.float32), ["a", "b"], np.array([0, 1]))


def test_what_a_resumed_run_writes_again_replaces_what_was_written(tmp_path, data):
    photos = fastload.open(data)
    killed, again = (make_trackers(Config(track=("tensorboard",)))[0] for _ in range(2))
    follow(killed, session(tmp_path, 0, photos), 30, 0.25)
    killed.writer.close()
    now = session(tmp_path, 12, photos)  # the last checkpoint was older than what had been written
    follow(again, now, 36, 0.75)
    again.on_end(now, Ended())
    finished = make_trackers(Config(track=("tensorboard",)))[0]  # and a finished run is resumed again
    finished.on_start(now)
    finished.on_end(now, Ended())
    found = events(tmp_path / "tensorboard")
    assert [(one.step, one.value) for one in found.Scalars("epoch/accuracy")] == [
        (6, 0.25), (12, 0.25), (18, 0.75), (24, 0.75), (30, 0.75), (36, 0.75),
    ]  # fmt: skip
    assert [(one.step, one.value) for one in found.Scalars("step/loss")] == [
        (10, 0.25),
        (20, 0.75),
        (30, 0.75),
    ]
    assert len(found.Scalars("final/accuracy")) == len(found.Images("images of the training side")) == 1


def test_a_run_that_starts_anew_replaces_everything(tmp_path, data):
    for value in (0.25, 0.75):
        tracker = make_trackers(Config(track=("tensorboard",)))[0]
        follow(tracker, session(tmp_path, 0, fastload.open(data)), 12, value)
        tracker.writer.close()
    found = events(tmp_path / "tensorboard")
    assert [(one.step, one.value) for one in found.Scalars("epoch/accuracy")] == [(6, 0.75), (12, 0.75)]
    assert len(found.Images("images of the training side")) == 1


class FakeWandb:
    """Stands for the package: keeps what it was called with."""

    def __init__(self):
        self.inits, self.rows = [], []

    def Image(self, picture):
        return picture.shape

    def init(self, **options):
        self.inits.append(options)
        log = lambda values, step: self.rows.append((step, values))  # noqa: E731
        return SimpleNamespace(
            id=options["id"] or f"id {len(self.inits)}", log=log, summary={}, finish=lambda: None
        )


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path, data, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    fake = FakeWandb()
    for updates in (0, 12, 0):
        tracker = Wandb()
        tracker.wandb = fake
        follow(tracker, session(tmp_path, updates, fastload.open(data)), updates + 12, 0.5)
    assert [(one["id"], one["resume"]) for one in fake.inits] == [
        (None, None),
        ("id 1", "allow"),
        (None, None),
    ]
    assert (tmp_path / "wandb_id.txt").read_text() == "id 3"
    assert {one["project"] for one in fake.inits} == {"fastload"} and {one["dir"] for one in fake.inits} == {
        tmp_path
    }
    assert Counter(step for step, values in fake.rows if "images of the training side" in values) == {0: 2}
    steps = [step for step, _ in fake.rows]
    first = steps[: steps.index(0, 1)]
    assert first == sorted(first)  # W&B drops what comes after a later step


# ---- small things


def test_steps_do_not_wait_for_the_device():
    """A meta tensor has no value: to read it is an error."""
    tracker = make_trackers(Config(track=("tensorboard",)))[0]
    now = session(None, 0)
    for now.step.updates in range(1, 101):
        tracker.on_step(now, torch.zeros((), device="meta"))
    assert [step for step, _ in tracker.losses] == list(range(EVERY, 101, EVERY))


def test_the_matrix_is_drawn_by_share():
    labels, given = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    held = Predictions(list("abcdef"), np.eye(3, dtype=np.float32)[given], ["a", "b", "c"], labels)
    picture = _confusion(held)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    shades = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
    import matplotlib

    table = confusion_matrix(labels, given)
    for share in (table / table.sum(axis=1, keepdims=True)).ravel():
        assert tuple(matplotlib.colormaps["Blues"](share, bytes=True)[:3]) in shades
    several = Predictions(
        ["a"], np.zeros((1, 2), np.float32), ["a", "b"], np.zeros((1, 2), np.float32), multilabel=True
    )
    assert _confusion(several) is None
    many = Predictions(
        ["a"], np.eye(1, 50, dtype=np.float32), [str(i) for i in range(50)], np.zeros(1, np.int64)
    )
    assert _confusion(many) is None


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_cure(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"'{name}' is needed.*pip install 'fastload\[track\]'"):
        make_trackers(Config(track=(name,)))


def test_nothing_is_imported_unless_asked_for():
    code = (
        "import sys; from fastload.train.track import make_trackers; from fastload.train.config import Config; "
        "assert make_trackers(Config()) == []; "
        "print([m for m in ('tensorboard', 'wandb', 'matplotlib', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
