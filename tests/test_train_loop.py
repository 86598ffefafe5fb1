"""What the loop offers beyond the plain run: each option has the effect that its name says."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastload
from fastload.errors import DataError, UsageError
from fastload.train import Callback, Config, Trainer, load_run, predict
from fastload.train.data import TrainWarning
from fastload.train.model import head_of

CFG = Config(
    model="test_resnet", epochs=3, size=32, batch_size=8, lr=3e-3, augment="light", ema=0.0, device="cpu", threads=1,
    allow_leak=True,
)  # fmt: skip
COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)])


def write(path: Path, labels, several: bool = False, size: int = 32) -> Path:
    """Pictures of one colour and noise for each class; with ``several`` the left and the right half say two labels."""
    rng = np.random.default_rng(0)
    items = []
    for label in labels:
        image = np.clip(COLOURS[label] + rng.integers(-40, 40, (size, size, 3)), 0, 255).astype(np.uint8)
        value = label
        if several:
            other = (label + 1) % 3
            image[:, size // 2 :] = np.clip(
                COLOURS[other] + rng.integers(-40, 40, (size, size // 2, 3)), 0, 255
            )
            value = np.zeros(3, np.float32)
            value[[label, other]] = 1
        items.append({"image": image, "label": value})
    fastload.convert(items, path, classes=["red", "green", "blue"], store="raw", progress=False)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "photos.beton", [0, 1, 2] * 14)


class Watch(Callback):
    """Keeps what ``look(session)`` gives after each epoch, and counts the calls."""

    def __init__(self, look):
        self.look, self.seen, self.calls = look, [], []

    def on_start(self, session):
        self.calls.append("start")

    def on_step(self, session, loss):
        assert loss.ndim == 0 and not loss.requires_grad
        self.calls.append("step")

    def on_epoch(self, session, line):
        self.calls.append("epoch")
        self.seen.append(self.look(session))

    def on_end(self, session, run):
        self.calls.append("end")


def fit(cfg, photos, out, *callbacks, **options):
    return Trainer(cfg, **options).fit(photos, out=out, callbacks=callbacks, progress=False)


def last(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def test_callbacks_are_called_in_order(photos, tmp_path):
    watch = Watch(lambda s: (s.epoch, len(s.history), s.valid.score("accuracy")))
    run = fit(replace(CFG, epochs=2), photos, tmp_path / "r", watch)
    steps = json.loads((run.folder / "run.json").read_text())["resolved"]["steps_per_epoch"]
    assert steps == run.train_images // 8  # a tail of one image is left out
    assert watch.calls == ["start", *(["step"] * steps + ["epoch"]) * 2, "end"]
    assert watch.seen == [(1, 1, run.history[0]["accuracy"]), (2, 2, run.history[1]["accuracy"])]


def test_a_callback_can_stop(photos, tmp_path):
    class Stop(Callback):
        def on_epoch(self, session, line):
            session.stop = line["epoch"] == 2

    assert len(fit(replace(CFG, epochs=50), photos, tmp_path / "r", Stop()).history) == 2


def test_freezing_leaves_the_body_alone(photos, tmp_path):
    def look(session):
        return {k: v.clone() for k, v in session.step.model.state_dict().items()}

    watch = Watch(look)
    fit(replace(CFG, freeze_epochs=2, optimizer="adamw"), photos, tmp_path / "r", watch)
    one, two, three = watch.seen
    head = {id(p) for p in head_of(fastload.train.create_model("test_resnet", 3)).parameters()}
    assert len(head) == 2
    for name in one:
        same = torch.equal(one[name], two[name])
        assert same != name.startswith("fc."), name  # batch norm's statistics too
    assert not all(torch.equal(two[n], three[n]) for n in two if not n.startswith("fc."))


def test_images_grow_from_epoch_to_epoch(photos, tmp_path, monkeypatch):
    seen = []
    real = fastload.train.Step.__call__

    def spy(self, images, labels, *rest):
        seen.append(images.shape[-1])
        return real(self, images, labels, *rest)

    monkeypatch.setattr(fastload.train.Step, "__call__", spy)
    run = fit(replace(CFG, epochs=4, start_size=16), photos, tmp_path / "r")
    per_epoch = -(-run.train_images // 8)
    assert seen[0] == 16 and seen[-1] == 32
    assert [line["size"] for line in run.history] == seen[::per_epoch]


def test_early_stop_waits_as_long_as_it_says(photos, tmp_path):
    # A learning rate of almost nothing: the first epoch stays the best.
    run = fit(replace(CFG, epochs=30, early_stop=2, lr=1e-12), photos, tmp_path / "r")
    assert len(run.history) == run.best_epoch + 2
    again = Trainer(run.config).fit(photos, out=tmp_path / "r", resume=True, progress=False)
    assert len(again.history) == len(run.history)


def test_plateau_looks_at_the_scores(photos, tmp_path):
    cfg = replace(
        CFG,
        epochs=5,
        lr=1e-12,
        schedule="plateau",
        plateau_epochs=1,
        gamma=0.5,
        warmup_epochs=0.0,
        metric="loss",
    )
    run = fit(replace(cfg, model="test_vit", drop=0.0), photos, tmp_path / "r")
    rates = [line["lr"] / 1e-12 for line in run.history]
    assert rates[0] == pytest.approx(1) and rates[-1] < 0.6


def test_swa_is_the_mean_of_the_last_epochs(photos, tmp_path):
    watch = Watch(lambda s: {k: v.clone() for k, v in s.step.model.state_dict().items()})
    run = fit(replace(CFG, epochs=4, average="swa", swa_start=0.5, lr=1e-3), photos, tmp_path / "r", watch)
    state = last(tmp_path / "r")["swa"]
    assert state["count"] == 2
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    averaged = "average" in result["best"]
    # Made to win, so that the weights can be looked at.
    forced = Trainer(replace(run.config, metric="loss"))
    assert forced.cfg.metric == "loss"
    want = {
        k: (watch.seen[2][k] + watch.seen[3][k]) / 2
        for k in watch.seen[0]
        if watch.seen[0][k].is_floating_point()
    }
    kept = state["weights"]
    for name, value in want.items():
        if "running" not in name:
            torch.testing.assert_close(kept[name].float(), value, rtol=1e-5, atol=1e-6)
    best = torch.load(tmp_path / "r" / "best.pt", weights_only=True)
    assert (best["scores"].get("average") == "swa of 2") == averaged


def test_greedy_soup_is_never_worse_than_the_best_epoch(photos, tmp_path):
    run = fit(
        replace(CFG, epochs=4, average="soup", soup_size=3, metric="loss", lr=5e-3), photos, tmp_path / "r"
    )
    best_epoch = min(line["valid_loss"] for line in run.history)
    assert run.best["valid_loss"] <= best_epoch
    again = predict(run, fastload.open(photos), device="cpu", progress=False)
    kept = run.oof
    rows = again.aligned(kept.ids, kept.classes)
    np.testing.assert_allclose(rows.probs, kept.probs, atol=1e-5)


@pytest.mark.parametrize("average", ["swa", "soup"])
def test_averages_survive_a_kill(photos, tmp_path, average):
    class Cut(Exception):
        pass

    class Stop(Callback):
        def on_epoch(self, session, line):
            if line["epoch"] == 3:
                raise Cut

    cfg = replace(CFG, epochs=4, average=average, swa_start=0.3, save_minutes=0.0)
    fit(cfg, photos, tmp_path / "whole")
    with pytest.raises(Cut):
        fit(cfg, photos, tmp_path / "cut", Stop())
    Trainer(cfg).fit(photos, out=tmp_path / "cut", resume=True, progress=False)
    a, b = (torch.load(tmp_path / n / "best.pt", weights_only=True)["weights"] for n in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_several_labels_an_image(tmp_path):
    data = write(tmp_path / "m.beton", [0, 1, 2] * 16, several=True)
    with pytest.raises(UsageError, match="bce"):
        fit(replace(CFG, loss="cross_entropy"), data, tmp_path / "x")
    cfg = replace(CFG, loss="bce", epochs=10, metric="macro_f1", lr=1e-2, augment="none", label_smoothing=0.0)
    run = fit(cfg, data, tmp_path / "r")
    oof = run.oof
    assert oof.multilabel and oof.true.shape == oof.probs.shape
    assert not np.allclose(oof.probs.sum(1), 1)
    assert run.macro_f1 > 0.9
    got = predict(run, data, device="cpu", progress=False)
    assert got.multilabel and got.score("macro_f1") > 0.9
    rows = (tmp_path / "r" / "split.csv").read_text().splitlines()[1:]
    assert {row.rsplit(",", 1)[1] for row in rows} == {"red green", "green blue", "red blue"}


def test_bootstrap_draws_with_replacement_from_the_training_side_only(photos, tmp_path, monkeypatch):
    seen = []
    real = fastload.train.trainer.Loader

    def spy(data, *args, **options):
        seen.append(data)
        return real(data, *args, **options)

    monkeypatch.setattr(fastload.train.trainer, "Loader", spy)
    run = fit(replace(CFG, epochs=1, sampling="bootstrap"), photos, tmp_path / "r")
    held, learned = seen
    assert len(learned) == run.train_images
    assert len(set(learned.indices.tolist())) < len(learned)
    assert not set(learned.indices.tolist()) & set(held.indices.tolist())


@pytest.mark.parametrize(
    ("sampling", "low", "high"), [("none", 0.05, 0.08), ("balanced", 0.35, 0.65), ("sqrt", 0.12, 0.34)]
)
def test_sampling_shows_a_rare_class_more_often(tmp_path, monkeypatch, sampling, low, high):
    data = write(tmp_path / "u.beton", [0] * 300 + [1] * 20)
    seen = []
    monkeypatch.setattr(
        fastload.train.Step,
        "__call__",
        lambda self, images, labels, *rest: seen.append(labels) or torch.zeros(()),
    )
    with pytest.warns(TrainWarning, match="'blue'"):
        run = fit(replace(CFG, epochs=1, sampling=sampling, seed=1), data, tmp_path / "r")
    labels = torch.cat(seen)
    assert len(labels) == run.train_images == 256
    assert low < (labels == 1).float().mean() < high


def test_class_weights_come_from_the_training_side(tmp_path, monkeypatch):
    data = write(tmp_path / "u.beton", [0] * 30 + [1] * 10 + [2] * 20)
    seen = []
    real = fastload.train.losses.make_loss
    monkeypatch.setattr(
        fastload.train.losses,
        "make_loss",
        lambda cfg, weights, several: seen.append(weights) or real(cfg, weights, several),
    )
    fit(replace(CFG, epochs=1, class_weights="balanced"), data, tmp_path / "r")
    np.testing.assert_allclose(seen[0].numpy(), 48 / 3 / np.array([24, 8, 16]), rtol=1e-5)


def test_a_module_of_ones_own(photos, tmp_path):
    def make(classes):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, classes),
        )

    torch.manual_seed(3)
    module = make(3)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    run = fit(CFG, photos, tmp_path / "r", model=module)
    assert run.config.model == "<Sequential>"
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())  # a copy was trained
    with pytest.raises(UsageError, match="model="):
        load_run(run, device="cpu")
    assert load_run(run, device="cpu", model=make).classes == ["red", "green", "blue"]


def test_a_model_by_its_import_path(photos, tmp_path, monkeypatch):
    (tmp_path / "mymodels.py").write_text(
        "from torch import nn\n"
        "def small(classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = fit(replace(CFG, model="mymodels:small", epochs=1), photos, tmp_path / "r")
    assert len(predict(run.folder, photos, device="cpu", progress=False)) == 42
    with pytest.raises(UsageError, match="mymodels:none"):
        fit(replace(CFG, model="mymodels:none"), photos, tmp_path / "x")


def test_weights_from_a_file(photos, tmp_path):
    first = fit(replace(CFG, epochs=2), photos, tmp_path / "a")
    watch = Watch(lambda s: None)
    start = {}

    class Start(Callback):
        def on_start(self, session):
            start.update({k: v.clone() for k, v in session.step.model.state_dict().items()})

    trained = torch.load(tmp_path / "a" / "best.pt", weights_only=True)["weights"]
    fit(replace(CFG, epochs=1, weights=str(first.folder)), photos, tmp_path / "b", watch, Start())
    assert all(torch.equal(start[k], trained[k]) for k in trained)
    # Another number of classes: all but the head.
    other = {k: v for k, v in trained.items() if not k.startswith("fc.")} | {
        "fc.weight": torch.zeros(9, 64),
        "fc.bias": torch.zeros(9),
    }
    torch.save(other, tmp_path / "nine.pt")
    fit(replace(CFG, epochs=1, weights=str(tmp_path / "nine.pt")), photos, tmp_path / "c", Start())
    assert all(torch.equal(start[k], trained[k]) for k in trained if not k.startswith("fc."))
    with pytest.raises(UsageError, match="another model"):
        fit(replace(CFG, model="test_vit", weights=str(first.folder)), photos, tmp_path / "d")
    (tmp_path / "bad.pt").write_bytes(b"no")
    with pytest.raises(DataError, match="no weights"):
        fit(replace(CFG, weights=str(tmp_path / "bad.pt")), photos, tmp_path / "e")


def test_the_resolved_file_alone_repeats_the_run(photos, tmp_path):
    run = fit(replace(CFG, epochs=2, mixup=0.2, valid_fraction=0.3), photos, tmp_path / "a")
    again = Trainer(Config.load(run.folder / "config.yaml")).fit(out=tmp_path / "b", progress=False)
    a, b = (torch.load(tmp_path / n / "best.pt", weights_only=True)["weights"] for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "a" / "split.csv").read_text() == (tmp_path / "b" / "split.csv").read_text()
    assert again.history[-1]["valid_loss"] == run.history[-1]["valid_loss"]


def test_a_saved_split_serves_another_model(photos, tmp_path):
    run = fit(replace(CFG, epochs=1, seed=5), photos, tmp_path / "a")
    cfg = replace(CFG, epochs=1, model="test_vit", split=str(run.folder / "split.csv"))
    other = fit(cfg, photos, tmp_path / "b")
    assert other.oof.ids == run.oof.ids


def test_deterministic_mode_is_left_again(photos, tmp_path):
    seen = []

    class Look(Callback):
        def on_epoch(self, session, line):
            seen.append(torch.are_deterministic_algorithms_enabled())

    fit(replace(CFG, epochs=1, deterministic=True), photos, tmp_path / "r", Look())
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()


def test_gradient_checkpointing_gives_the_same_weights(photos, tmp_path):
    for name, on in (("a", False), ("b", True)):
        fit(replace(CFG, model="test_vit", epochs=1, grad_checkpointing=on), photos, tmp_path / name)
    a, b = (last(tmp_path / n)["step"]["model"] for n in "ab")
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=1e-4, atol=1e-6)


# --- killed


SERVER = """
import os, sys
import numpy, scipy.special, timm, torch
import fastload.kernels.batch, fastload.train.cv
from fastload.train import Config, Trainer
for line in sys.stdin:  # a child for each line: it has all imports already
    child = os.fork()
    if child == 0:
        print(os.getpid(), flush=True)
        Trainer(Config.load(sys.argv[1])).fit(out=line.strip(), resume=True, progress=False)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print("killed" if os.WIFSIGNALED(status) else "ended", os.waitstatus_to_exitcode(status), flush=True)
"""


def test_killed_twenty_times_it_ends_like_one_never_killed(photos, tmp_path):
    """SIGKILL at random moments, whatever the process is doing, also while it writes."""
    cfg = replace(
        CFG, epochs=4, drop=0.2, ema=0.9, mixup=0.2, average="swa", accumulate=2, save_minutes=0.0, data=str(photos),
        batch_size=4,
    )  # fmt: skip
    cfg.save(tmp_path / "cfg.yaml")
    whole, out, rng = tmp_path / "whole", tmp_path / "cut", random.Random(0)
    threads = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path / "cfg.yaml")], env={**os.environ, **threads}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip

    def begin(folder):
        server.stdin.write(f"{folder}\n")
        return int(server.stdout.readline())

    def end():
        return server.stdout.readline().split()

    killed, cut_off = 0, set()
    try:
        begin(whole)
        begun = time.monotonic()
        while not (whole / "last.pt").exists():
            time.sleep(0.01)
        first = time.monotonic() - begun
        assert end() == ["ended", "0"]
        learning = time.monotonic() - begun - first
        # Where other work slows it down it gets no further than before; then it is given more time, and killed more often.
        while killed < 20 or (len(cut_off) < 4 and killed < 60):
            child = begin(out)
            time.sleep(0.8 * first + rng.uniform(0, 0.2 * first + learning / 6) * (1 + killed / 20))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            how, _ = end()
            killed += how == "killed"
            if how == "ended":  # done before the signal came: from the start again
                shutil.rmtree(out)
            elif (out / "last.pt").exists():
                state = torch.load(out / "last.pt", weights_only=True)
                cut_off.add((state["epoch"], (state["inside"] or {"batch": 0})["batch"]))
        begin(out)
        assert end() == ["ended", "0"]
    finally:
        server.kill()
        server.wait()
    assert len(cut_off) >= 4, cut_off  # it was killed at different places
    a, b = (torch.load(p / "best.pt", weights_only=True) for p in (whole, out))
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])
    timed = {"seconds", "images_per_s", "stall"}
    logs = [[json.loads(line) for line in (p / "log.jsonl").read_text().splitlines()] for p in (whole, out)]
    one, two = ([{k: v for k, v in line.items() if k not in timed} for line in log] for log in logs)
    assert one == two and len(one) == 4
    assert np.array_equal(*(fastload.train.Predictions.load(p).probs for p in (whole, out)))


# --- several processes


WORKER = """
import os, sys
from fastload.train import Config, Trainer
Trainer(Config.load(sys.argv[1])).fit(out=sys.argv[2], resume="--resume" in sys.argv, progress=False)
"""


def test_two_processes_learn_what_one_learns_from_batches_twice_as_large(tmp_path):
    """37 training images in batches of 2 x 4: the last batches are short, and one process has none at the end."""
    data = write(tmp_path / "d.beton", [0, 1, 2] * 15 + [0])
    from fastload.train.folds import Folds  # which of them are held out does not matter, only how many

    ids = list(fastload.open(data).ids)
    fold = np.where(np.arange(len(ids)) < 37, -1, 0)[None]
    Folds(ids, fold, ["x"] * len(ids), None, "given").save(tmp_path / "split.csv")
    cfg = replace(
        CFG, model="test_vit", epochs=2, batch_size=4, data=str(data), split=str(tmp_path / "split.csv"), lr=1e-3, clip_grad=0.1,
        optimizer="sgd", accumulate=2,
    )  # fmt: skip
    cfg.save(tmp_path / "two.yaml")
    (tmp_path / "w.py").write_text(WORKER)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", str(tmp_path / "w.py"), str(tmp_path / "two.yaml"), str(tmp_path / "two"),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = fit(replace(cfg, batch_size=8), data, tmp_path / "one")
    two = fastload.train.Run.read(tmp_path / "two")
    assert two.valid_images == one.valid_images == len(two.oof.ids) == len(set(two.oof.ids))
    assert two.oof.ids == one.oof.ids
    np.testing.assert_allclose(two.oof.probs, one.oof.probs, atol=1e-4)
    a, b = (last(tmp_path / n)["step"] for n in ("one", "two"))
    assert a["updates"] == b["updates"]
    for name, value in a["model"].items():
        torch.testing.assert_close(value, b["model"][name], rtol=1e-3, atol=1e-5)
    assert two.history[-1]["train_loss"] == pytest.approx(one.history[-1]["train_loss"], rel=1e-4)


def test_a_leaking_split_is_refused_and_can_be_allowed(tmp_path):
    rng = np.random.default_rng(1)
    pictures = [
        np.kron(rng.integers(0, 255, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(30)
    ]
    items = [{"image": p, "label": i % 3} for i, p in enumerate(pictures) for _ in range(2)]  # each twice
    fastload.convert(items, tmp_path / "d.beton", classes=["a", "b", "c"], store="raw", progress=False)
    cfg = replace(CFG, allow_leak=False, epochs=1)
    with pytest.raises(DataError, match=r"leaks.*--groups duplicates"):
        fit(cfg, tmp_path / "d.beton", tmp_path / "r")
    assert not (tmp_path / "r").exists()
    run = fit(replace(cfg, groups="duplicates"), tmp_path / "d.beton", tmp_path / "g")
    names = {
        row.split(",")[2]: row.split(",")[1]
        for row in (run.folder / "split.csv").read_text().splitlines()[1:]
    }
    assert len(names) == 30
    fit(replace(cfg, allow_leak=True), tmp_path / "d.beton", tmp_path / "a")


def test_warnings_are_of_one_class():
    assert issubclass(TrainWarning, UserWarning)
