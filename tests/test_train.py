"""Whole trainings of a very small model on made images: what is learned, written, resumed and refused."""

from __future__ import annotations

import csv
import json
import shutil
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn

import fastload
from fastload import transforms
from fastload.cli import main
from fastload.errors import DataError, UsageError
from fastload.train import Callback, Config, Step, Trainer, load_run, predict
from fastload.train import trainer as trainer_module
from fastload.train.data import TrainWarning, make_split

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}
NAMES = list(COLOURS)
CFG = Config(
    model="test_resnet", epochs=2, size=32, batch_size=8, lr=3e-3, augment="light", ema=0.9, device="cpu", threads=1
)  # fmt: skip

LEAKY = replace(CFG, allow_leak=True)  # for files whose pictures are the same on purpose


def write(
    path: Path,
    labels: list[int],
    names: list[str] | None = None,
    groups: list[int] | None = None,
    seed: int = 0,
) -> Path:
    """A file of 32 px images whose colour says their class; ``names`` orders the classes."""
    names = names or NAMES
    rng = np.random.default_rng(seed)
    items = []
    for i, label in enumerate(labels):
        noise = rng.integers(-40, 40, (32, 32, 3))
        image = np.clip(np.array(COLOURS.get(names[label], (90, 90, 90))) + noise, 0, 255).astype(np.uint8)
        items.append({"image": image, "label": label} | ({} if groups is None else {"group": groups[i]}))
    fastload.convert(items, path, classes=names, store="raw", progress=False)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "photos.beton", [0, 1, 2] * 13 + [0, 0])


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return Trainer(replace(CFG, epochs=4)).fit(photos, out=out, progress=False)


def read_split(folder: Path) -> list[dict[str, str]]:
    with open(folder / "split.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same(a, b) -> bool:
    """Whether two checkpoints hold the same values, bit for bit; times are not compared."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        timed = {"seconds", "images_per_s", "stall", "threads"}
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in timed)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


# --- what a run is


def test_it_learns_and_says_how_well(trained):
    assert trained.accuracy > 0.9
    assert 0 <= trained.stall <= 1 and trained.images_per_s > 0
    assert trained.classes == NAMES
    lines = [json.loads(line) for line in (trained.folder / "log.jsonl").read_text().splitlines()]
    assert lines == trained.history and [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert trained.best == lines[trained.best_epoch - 1]


def test_the_folder_holds_what_is_promised_and_nothing_else(trained):
    names = {path.name for path in trained.folder.iterdir()}
    assert names == {
        "config.yaml", "run.json", "split.csv", "log.jsonl", "best.pt", "last.pt", "valid_probs.npz", "last_probs.npz",
        "result.json",
    }  # fmt: skip
    content = json.loads((trained.folder / "run.json").read_text())
    assert Config.load(trained.folder / "config.yaml") == trained.config
    assert content["resolved"]["amp"] == "off" and content["resolved"]["lr"] == 3e-3
    assert content["data"]["classes"] == NAMES


def test_the_score_is_the_one_of_the_written_probabilities(trained, photos):
    kept = np.load(trained.folder / "valid_probs.npz")
    predicted = kept["probs"].argmax(1)
    assert accuracy_score(kept["labels"], predicted) == pytest.approx(trained.accuracy)
    assert f1_score(kept["labels"], predicted, average="macro") == pytest.approx(trained.macro_f1)
    np.testing.assert_allclose(kept["probs"].sum(1), 1, atol=1e-5)
    data = fastload.open(photos)
    truth = dict(zip(data.ids, data.labels.tolist()))
    assert [truth[str(id)] for id in kept["ids"]] == kept["labels"].tolist()
    assert [str(c) for c in kept["classes"]] == NAMES
    rows = read_split(trained.folder)
    assert [row["id"] for row in rows if row["fold"] == "valid"] == kept["ids"].tolist()


def test_the_split_is_stratified_and_complete(trained, photos):
    rows = read_split(trained.folder)
    assert Counter(row["id"] for row in rows) == Counter(fastload.open(photos).ids)
    held = Counter(row["label"] for row in rows if row["fold"] == "valid")
    assert held == {"blue": 3, "green": 3, "red": 3}


def test_best_and_last_checkpoints(trained):
    best = torch.load(trained.folder / "best.pt", weights_only=True)
    last = torch.load(trained.folder / "last.pt", weights_only=True)
    assert best["epoch"] == trained.best_epoch and last["epoch"] == 4
    assert best["classes"] == NAMES and "step" not in best
    loaded = load_run(trained, "last", "cpu")
    name, weight = next(iter(loaded.model.named_parameters()))
    assert torch.equal(weight, last["step"]["ema"][name])
    assert not torch.equal(weight, last["step"]["model"][name])


def test_the_best_checkpoint_gives_the_probabilities_that_were_scored(trained, photos):
    kept = np.load(trained.folder / "valid_probs.npz")
    data = fastload.open(photos)
    place = {id: i for i, id in enumerate(data.ids)}
    again = predict(
        trained, data.subset([place[str(id)] for id in kept["ids"]]), device="cpu", progress=False
    )
    np.testing.assert_allclose(again.probs, kept["probs"], atol=1e-6)
    assert again.accuracy == trained.accuracy


def test_the_callers_random_state_is_left_alone(photos, tmp_path):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    Trainer(replace(CFG, epochs=1)).fit(photos, out=tmp_path / "r", progress=False)
    assert torch.equal(torch.rand(3), want)


def test_mixing_accumulation_and_no_average(photos, tmp_path):
    cfg = replace(
        CFG, epochs=1, mixup=0.4, cutmix=1.0, accumulate=3, ema=0.0, batch_size=4, augment="default"
    )
    run = Trainer(cfg).fit(photos, out=tmp_path / "r", progress=False)
    last = torch.load(tmp_path / "r" / "last.pt", weights_only=True)
    assert last["step"]["ema"] is None
    assert last["step"]["updates"] == 3  # 32 images: eight batches of 4, in windows of 3, 3 and 2
    assert run.train_images == 32


@pytest.mark.parametrize("slow", ["loader", "model"])
def test_stall_is_the_share_of_time_spent_waiting_for_images(photos, tmp_path, monkeypatch, slow):
    normal = trainer_module.train_pipeline

    def wait(image):
        time.sleep(0.02 if slow == "loader" else 0.0)
        return image

    def pipeline(cfg, mean, std, size):
        *steps, last = normal(cfg, mean, std, size)
        return (*steps, transforms.PerImage(wait), last)

    def step(self, images, labels, *rest):
        time.sleep(0.3 if slow == "model" else 0.0)
        return torch.zeros(())

    monkeypatch.setattr(trainer_module, "train_pipeline", pipeline)
    monkeypatch.setattr(Step, "__call__", step)
    run = Trainer(replace(CFG, epochs=1)).fit(photos, out=tmp_path / "run", progress=False)
    assert run.stall > 0.8 if slow == "loader" else run.stall < 0.4
    # 32 images at 20 ms each on one thread, or 4 batches of 8 at 300 ms each
    assert run.images_per_s < (50 if slow == "loader" else 27)


# --- the same result, whatever happens in between


class Interrupted(Exception):
    pass


def with_dropout(num_classes):
    """A model that draws random numbers in training and has batch norm, so that both must survive a resume."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )  # fmt: skip


@pytest.mark.parametrize("where", ["boundary", "middle", "inside", "before"])
def test_a_resumed_run_ends_like_one_never_interrupted(photos, tmp_path, monkeypatch, where):
    cfg = replace(CFG, epochs=3, accumulate=2, save_minutes=0.0 if where == "inside" else 5.0)
    whole = Trainer(cfg, model=with_dropout).fit(photos, out=tmp_path / "whole", progress=False)

    class Stop(Callback):
        def on_epoch(self, session, line):
            if where == "boundary" and line["epoch"] == 2:
                raise Interrupted

    real, calls = Step.__call__, []

    def failing(self, images, labels, *rest):
        calls.append(1)
        if len(calls) == {"boundary": 0, "middle": 7, "inside": 8, "before": 2}[where]:
            raise Interrupted
        return real(self, images, labels, *rest)

    monkeypatch.setattr(Step, "__call__", failing)
    with pytest.raises(Interrupted):
        Trainer(cfg, model=with_dropout).fit(photos, out=tmp_path / "cut", progress=False, callbacks=[Stop()])
    monkeypatch.setattr(Step, "__call__", real)
    assert (tmp_path / "cut" / "last.pt").exists() == (where != "before")
    if where == "inside":  # it goes on where the last step was written, not at the epoch's beginning
        assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["inside"]["batch"] == 2
    torch.manual_seed(123)
    run = Trainer(replace(cfg, threads=2), model=with_dropout).fit(
        photos, out=tmp_path / "cut", resume=True, progress=False
    )
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(tmp_path / kind / name, weights_only=True) for kind in ("whole", "cut"))
        assert same(a, b), name
    assert run.best_epoch == whole.best_epoch and len(run.history) == 3
    kept = [np.load(tmp_path / kind / "valid_probs.npz")["probs"] for kind in ("whole", "cut")]
    assert np.array_equal(*kept)
    assert len((tmp_path / "cut" / "log.jsonl").read_text().splitlines()) == 3


def test_a_finished_run_is_not_trained_again(trained, photos, tmp_path, monkeypatch):
    shutil.copytree(trained.folder, tmp_path / "copy")
    monkeypatch.setattr(Step, "__call__", None)
    again = Trainer(trained.config).fit(photos, out=tmp_path / "copy", resume=True, progress=False)
    assert again.figures() == {**trained.figures(), "run": str(tmp_path / "copy")}


def test_another_seed_gives_other_weights(photos, tmp_path):
    weights = []
    for k, seed in enumerate((1, 1, 2)):
        Trainer(replace(CFG, epochs=1, seed=seed)).fit(photos, out=tmp_path / str(k), progress=False)
        weights.append(torch.load(tmp_path / str(k) / "last.pt", weights_only=True)["step"]["model"])
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


def test_resume_only_what_it_was(trained, photos, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "copy")
    with pytest.raises(UsageError, match=r"epochs 4 -> 9"):
        Trainer(replace(trained.config, epochs=9)).fit(photos, out=tmp_path / "copy", resume=True)
    other = write(tmp_path / "other.beton", [0, 1, 2] * 5)
    with pytest.raises(DataError, match="other images"):
        Trainer(trained.config).fit(other, out=tmp_path / "copy", resume=True)


# --- folders


def test_a_folder_that_is_not_empty(trained, photos, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "copy")
    with pytest.raises(UsageError, match=r"--resume.*--overwrite"):
        Trainer(CFG).fit(photos, out=tmp_path / "copy")
    before = sorted(path.name for path in (tmp_path / "copy").iterdir())
    with pytest.raises(UsageError, match="test_resnot"):
        Trainer(replace(CFG, model="test_resnot")).fit(photos, out=tmp_path / "copy", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == before  # a typo costs nothing
    run = Trainer(replace(CFG, epochs=1)).fit(photos, out=tmp_path / "copy", overwrite=True, progress=False)
    assert len(run.history) == 1
    with pytest.raises(UsageError, match="both"):
        Trainer(CFG).fit(photos, out=tmp_path / "copy", overwrite=True, resume=True)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no run of fastload"):
        Trainer(CFG).fit(photos, out=foreign, overwrite=True)
    assert (foreign / "chapter1.txt").read_text() == "years of work"
    with pytest.raises(UsageError, match="no run of fastload"):
        Trainer(CFG).fit(photos, out=foreign, resume=True)
    assert [path.name for path in foreign.iterdir()] == ["chapter1.txt"]
    with pytest.raises(UsageError, match="must not be a file"):
        Trainer(CFG).fit(photos, out=foreign / "chapter1.txt")


# --- labels, classes and groups


def test_classes_are_matched_by_name(tmp_path):
    train = write(tmp_path / "train.beton", [0, 1, 2] * 12)
    valid = write(tmp_path / "valid.beton", [0, 1, 1], names=["red", "blue", "unused"], seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainWarning)
        run = Trainer(replace(CFG, epochs=5)).fit(train, valid, tmp_path / "run", progress=False)
    assert np.load(run.folder / "valid_probs.npz")["labels"].tolist() == [2, 0, 0]
    assert run.accuracy == 1.0
    assert [row["label"] for row in read_split(run.folder)][-3:] == ["red", "blue", "blue"]


def test_a_class_that_training_never_saw(tmp_path):
    train = write(tmp_path / "train.beton", [0, 1, 2] * 4)
    valid = write(tmp_path / "valid.beton", [0, 1], names=["red", "purple"])
    with pytest.raises(DataError, match="'purple'"):
        make_split(train, valid, CFG)


def test_one_class_only(tmp_path):
    with pytest.raises(DataError, match="'green'"):
        make_split(write(tmp_path / "one.beton", [1] * 6), None, CFG)


def test_labels_that_are_missing_or_of_no_use(tmp_path):
    image = np.zeros((32, 32, 3), np.uint8)
    fastload.convert([{"image": image}] * 4, tmp_path / "none.beton", progress=False)
    with pytest.raises(DataError, match="no field 'label'"):
        make_split(tmp_path / "none.beton", None, CFG)
    many = [{"image": image, "label": np.array([0.3, 0], np.float32)}] * 4
    fastload.convert(many, tmp_path / "many.beton", progress=False)
    with pytest.raises(DataError, match="other than 0 and 1"):
        make_split(tmp_path / "many.beton", None, CFG)


def test_labels_without_names_are_named_by_number(tmp_path):
    items = [{"image": np.zeros((32, 32, 3), np.uint8), "label": i % 3} for i in range(9)]
    fastload.convert(items, tmp_path / "n.beton", progress=False)
    assert make_split(tmp_path / "n.beton", None, replace(CFG, allow_leak=True)).classes == ["0", "1", "2"]


def test_empty_data(photos):
    with pytest.raises(DataError, match="no images"):
        make_split(fastload.open(photos).subset([]), None, CFG)


def test_a_class_with_one_image_stays_in_training(tmp_path):
    data = write(tmp_path / "d.beton", [0] * 6 + [1] * 6 + [2])
    with pytest.warns(TrainWarning, match=r"1 of 3 classes have no validation image: 'red'"):
        split = make_split(data, None, CFG)
    assert 2 in split.train_labels and 2 not in split.valid_labels


def test_validation_on_training_images_is_refused(photos):
    data = fastload.open(photos)
    with pytest.raises(DataError, match="training images too"):
        make_split(data, photos, CFG)
    assert len(make_split(data.subset(range(20)), data.subset(range(20, 30)), CFG).valid) == 10


def test_validation_on_one_of_joined_training_files_is_refused(photos, tmp_path):
    other = write(tmp_path / "other.beton", [0, 1, 2] * 4)
    joined = fastload.concat([fastload.open(other), fastload.open(photos)])
    with pytest.raises(DataError, match="3 of 9 validation images are training images too"):
        make_split(joined.subset(range(15)), fastload.open(photos).subset(range(9)), CFG)
    assert (
        len(make_split(joined.subset(range(15)), fastload.open(photos).subset(range(3, 9)), LEAKY).valid) == 6
    )


def test_labels_that_are_no_class_numbers(tmp_path):
    items = [(np.full((8, 8, 3), 9, np.uint8), 10**9 + i % 2) for i in range(4)]
    fastload.convert(items, tmp_path / "d.beton", progress=False)
    with pytest.raises(DataError, match="number the classes from 0, got 1000000001"):
        make_split(tmp_path / "d.beton", None, CFG)


def test_groups(tmp_path):
    people = [i // 4 for i in range(48)]
    data = write(tmp_path / "g.beton", [i % 3 for i in range(48)], groups=people)
    split = make_split(data, None, CFG)  # the field is called group, so it is used without being asked for
    assert split.group_field == "group"
    assert not set(split.train_groups) & set(split.valid_groups)
    assert {row[2] for row in split.rows()} == {str(p) for p in people}
    free = make_split(data, None, replace(LEAKY, groups="none"))
    assert free.group_field is None and {row[2] for row in free.rows()} == {""}
    with pytest.raises(UsageError, match=r"groop.*group"):
        make_split(data, None, replace(CFG, groups="groop"))
    other = write(tmp_path / "v.beton", [0, 1], groups=[3, 99])
    with pytest.raises(DataError, match=r"1 values of 'group'.*'3'"):
        make_split(data, other, CFG)
    with pytest.warns(TrainWarning, match="'red'"):
        assert len(make_split(data, other, replace(LEAKY, groups="none")).valid) == 2


def test_groups_may_be_text(tmp_path):
    people = ["anna", "börje", "chen", "dina"]
    image = np.zeros((8, 8, 3), np.uint8)
    items = [{"image": image, "label": i % 2, "person": people[i // 6]} for i in range(24)]
    fastload.convert(items, tmp_path / "p.beton", store="raw", progress=False)
    split = make_split(tmp_path / "p.beton", None, replace(CFG, groups="person", allow_leak=True))
    assert {row[2] for row in split.rows()} == set(people)
    assert not set(split.train_groups) & set(split.valid_groups)


# --- what goes wrong on the way


def test_a_training_that_diverges(photos, tmp_path):
    cfg = replace(CFG, optimizer="sgd", lr=1e30, clip_grad=0.0, warmup_epochs=0.0)
    with pytest.raises(DataError, match=r"epoch 1.*lower --lr"):
        Trainer(cfg).fit(photos, out=tmp_path / "r", progress=False)
    assert not (tmp_path / "r" / "last.pt").exists()


def small_memory(most: int):
    """Makes a model that runs out of memory in training with more than ``most`` images, as a GPU does."""

    class Small(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = nn.Linear(4, classes)

        def forward(self, images):
            if self.training and len(images) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.head(self.body(images))

    return Small


def test_micro_batches_when_asked_for_give_the_same_weights(photos, tmp_path):
    cfg = replace(CFG, accumulate=2, clip_grad=0.1)
    Trainer(replace(cfg, oom="micro"), model=small_memory(3)).fit(photos, out=tmp_path / "a", progress=False)
    Trainer(cfg, model=small_memory(99)).fit(photos, out=tmp_path / "b", progress=False)
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True)["step"] for n in "ab")
    assert a["micro"] == 2 and b["micro"] == 8 and a["updates"] == b["updates"]
    for name, value in a["model"].items():
        torch.testing.assert_close(value, b["model"][name], rtol=1e-4, atol=1e-6)


def test_out_of_memory_names_the_cure(photos, tmp_path):
    with pytest.raises(UsageError, match=r"--batch-size 2 --accumulate 4"):
        Trainer(CFG, model=small_memory(3)).fit(photos, out=tmp_path / "r", progress=False)
    with pytest.raises(UsageError, match="even one image"):
        Trainer(CFG, model=small_memory(0)).fit(photos, out=tmp_path / "s", progress=False)


def test_batch_norm_on_one_image_names_the_cure(photos, tmp_path):
    with pytest.raises(UsageError, match="raise --batch-size"):
        Trainer(replace(CFG, batch_size=1, size=32)).fit(photos, out=tmp_path / "r", progress=False)


def test_no_full_batch(photos, tmp_path):
    with pytest.raises(UsageError, match="no full batch"):
        Trainer(replace(CFG, batch_size=100, drop_last=True)).fit(photos, out=tmp_path / "r")


def test_a_tail_of_one_image_is_left_out(photos, tmp_path):
    """Batch norm refuses to learn from one value per channel, which 1 image at 1x1 pixels is."""
    data = fastload.open(photos)
    train, valid = data.subset(range(17)), data.subset(range(20, 30))
    run = Trainer(replace(CFG, epochs=1)).fit(train, valid, tmp_path / "r", progress=False)
    assert torch.load(run.folder / "last.pt", weights_only=True)["step"]["updates"] == 2


# --- the command


def call(capsys, *args) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_command(photos, tmp_path, capsys):
    out = tmp_path / "run"
    args = ["train", photos, "-o", out, "--device", "cpu", "--json"]
    sizes = [
        "--model",
        "test_resnet",
        "--epochs",
        2,
        "--size",
        32,
        "--batch-size",
        8,
        "--augment",
        "light",
        "--no-flip",
    ]
    code, text, _ = call(capsys, *args, *sizes)
    assert code == 0
    figures = json.loads(text.splitlines()[-1])
    assert {"accuracy", "macro_f1", "best_epoch", "run", "images_per_s", "stall", "seconds"} <= figures.keys()
    assert text.count("epoch ") >= 3 and figures["epochs"] == 2
    options = Config.load(out / "config.yaml")
    assert options.flip is False and options.size == 32 and options.weight_decay == Config.weight_decay

    code, _, err = call(capsys, *args, *sizes)
    assert code == 2 and "--resume" in err and "Traceback" not in err
    code, text, _ = call(capsys, *args, "--resume")  # with the options of the run
    assert code == 0 and json.loads(text.splitlines()[-1]) == figures
    code, _, err = call(capsys, *args, "--resume", "--epochs", 5)
    assert code == 2 and "epochs 2 -> 5" in err


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        ([], 2, "--model"),
        (["--model", "test_resnetx"], 2, "test_resnet"),
        (["--model", "test_resnet", "--epochs", "0"], 2, "at least 1"),
        (["--model", "test_resnet", "--amp", "fp8"], 2, "fp8"),
        (["--model", "test_resnet", "--groups", "person"], 2, "person"),
        (["--model", "test_resnet", "--valid", "none.beton"], 2, "none.beton"),
        (["--model", "test_resnet", "--valid", "x", "--valid-fraction", "0.1"], 2, "--valid-fraction"),
        (["--model", "test_resnet", "--device", "cuda:77"], 2, "cuda:77"),
    ],
)
def test_wrong_calls(photos, tmp_path, capsys, extra, code, words):
    got, _, err = call(capsys, "train", photos, "-o", tmp_path / "r", *extra)
    assert got == code and words in err and "Traceback" not in err
    assert not (tmp_path / "r").exists()
