"""The pure parts of the trainer, each against an independent oracle."""

from __future__ import annotations

import csv
import errno
import json
import os
import resource
import signal

import pytest
import torch

from fastload.errors import DataError, UsageError
from fastload.train import checkpoint
from fastload.train.config import Config, differences
from fastload.train.files import write_atomic, write_csv, write_json

# --- options


def test_config_goes_through_json_and_back():
    cfg = Config(model="test_vit", lr=0.01, threads=3, flip=False)
    assert Config.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_unknown_option_names_the_nearest():
    with pytest.raises(UsageError, match=r"batchsize.*batch_size"):
        Config.from_dict({"batchsize": 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("epochs", 1.5), ("epochs", True), ("batch_size", -1), ("lr", 0.0), ("lr", float("nan")), ("lr", "1e-3"),
        ("weight_decay", -0.1), ("label_smoothing", 1.0), ("ema", 1.0), ("amp", "fp8"), ("augment", "strong"),
        ("metric", "auc"), ("valid_fraction", 1.0), ("valid_fraction", 0.0), ("seed", -1), ("flip", 1), ("model", ""),
        ("clip_grad", -1.0), ("accumulate", 0), ("threads", 0), ("size", 0), ("device", 3), ("warmup_epochs", 20.0),
    ],
)  # fmt: skip
def test_bad_option_is_an_error_that_ends_with_its_value(name, value):
    with pytest.raises(UsageError) as caught:
        Config(**{name: value})
    assert repr(value) in str(caught.value)


def test_learning_rate_defaults():
    assert Config().peak_lr == 1e-3
    assert Config(pretrained=True).peak_lr == 2e-4
    assert Config(optimizer="sgd").peak_lr == pytest.approx(0.05)
    assert Config(optimizer="sgd", lr=0.3).peak_lr == 0.3


def test_differences_ignore_what_does_not_change_the_weights():
    old = Config(epochs=3, threads=1, device="cpu")
    assert differences(old, Config(epochs=3, threads=2)) == {}
    assert differences(old, Config(epochs=4, device="cpu")) == {"epochs": (3, 4)}


# --- files and checkpoints


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_whoever_reads_the_old_file_reads_it_to_the_end(tmp_path):
    write_json(tmp_path / "a.json", list(range(1000)))
    with open(tmp_path / "a.json") as reader:
        write_json(tmp_path / "a.json", "new")
        assert json.load(reader) == list(range(1000))


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def stop(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x", stop)
    assert os.listdir(tmp_path) == []


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot write"):
        write_json(tmp_path / "file" / "a.json", {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="cannot write"):
        write_json(tmp_path / "folder", {})


def test_csv_survives_commas_quotes_and_letters(tmp_path):
    rows = [["a,b", 'say "x"'], ["ümlaut 猫", "line\nbreak"]]
    write_csv(tmp_path / "t.csv", ["x", "y"], rows)
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["x", "y"], *rows]


def test_checkpoint_round_trip(tmp_path):
    state = {
        "w": torch.arange(6.0).reshape(2, 3),
        "n": [1, 2.5, None, "ä", True],
        "t": (1, 2),
        "d": {3: {"x": torch.ones(1)}},
    }
    checkpoint.save(tmp_path / "c.pt", state)
    got = checkpoint.load(tmp_path / "c.pt")
    assert torch.equal(got["w"], state["w"]) and got["n"] == state["n"] and got["t"] == (1, 2)
    assert torch.equal(got["d"][3]["x"], torch.ones(1))


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "c.pt", {"n": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # The kernel refuses to let a file grow: the same path through torch as a full disk, without filling one.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with pytest.raises(DataError, match="File too large"):
            checkpoint.save(tmp_path / "c.pt", {"w": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert checkpoint.load(tmp_path / "c.pt")["n"] == 1
    assert os.listdir(tmp_path) == ["c.pt"]


def test_checkpoint_takes_no_objects(tmp_path):
    with pytest.raises(TypeError, match="plain values"):
        checkpoint.save(tmp_path / "c.pt", {"x": object()})
    assert os.listdir(tmp_path) == []


class _Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fastload_checkpoint": 1, "x": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match=r"evil\.pt"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "other"])
def test_damaged_checkpoint(tmp_path, damage):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"w": torch.ones(1000)})
    whole = path.read_bytes()
    if damage == "other":
        torch.save({"w": 1}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"hello there", "cut": whole[: len(whole) // 2]}[damage])
    with pytest.raises(DataError, match=r"c\.pt"):
        checkpoint.load(path)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint"):
        checkpoint.load(tmp_path / "none.pt")
