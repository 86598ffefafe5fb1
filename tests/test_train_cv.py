"""Cross-validation: every image scored once by a model that never saw it, resumable fold by fold."""

from __future__ import annotations

import csv
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

import fastload
from fastload.cli import main
from fastload.errors import DataError, UsageError
from fastload.train import Callback, Config, Trainer, cross_validate, read_run
from fastload.train.cv import pool
from fastload.train.data import TrainWarning, make_split
from fastload.train.folds import make_folds
from fastload.train.predictions import Predictions

CFG = Config(
    model="test_resnet", epochs=2, size=32, batch_size=8, lr=3e-3, augment="light", ema=0.0, device="cpu", threads=1
)  # fmt: skip
COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)])


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """60 images of 20 people: whose hue says the class."""
    rng = np.random.default_rng(0)
    items = []
    for i in range(60):
        image = np.clip(COLOURS[i % 3] + rng.integers(-60, 60, (32, 32, 3)), 0, 255).astype(np.uint8)
        items.append({"image": image, "label": i % 3, "person": f"p{i // 3:02}", "part": i % 4})
    path = tmp_path_factory.mktemp("data") / "people.beton"
    fastload.convert(items, path, classes=["red", "green", "blue"], store="raw", progress=False)
    return path


@pytest.fixture(scope="module")
def cv(people, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cv"
    return cross_validate(people, replace(CFG, epochs=3), folds=3, groups="person", out=out, progress=False)


def test_every_image_is_scored_once_by_a_model_that_never_saw_it(cv, people):
    data = fastload.open(people)
    oof = cv.oof
    assert oof.ids == list(data.ids)
    assert oof.true.tolist() == data.labels.tolist()
    assert sorted(set(oof.folds.tolist())) == [0, 1, 2]
    for k, run in enumerate(cv.runs):
        with open(run.folder / "split.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        held = {row["id"] for row in rows if row["fold"] == "valid"}
        learned = {row["id"] for row in rows if row["fold"] == "train"}
        assert held == {id for id, fold in zip(oof.ids, oof.folds) if fold == k} and not held & learned
        assert not {r["group"] for r in rows if r["fold"] == "valid"} & {
            r["group"] for r in rows if r["fold"] == "train"
        }
        part = run.oof.aligned([id for id in oof.ids if id in held], oof.classes)
        np.testing.assert_array_equal(part.probs, oof.take(oof.folds == k).probs)


def test_the_pooled_score_is_scikit_learns(cv):
    oof = cv.oof
    scores = json.loads((cv.folder / "scores.json").read_text())
    want = f1_score(oof.true, oof.probs.argmax(1), average="macro")
    assert scores["best"]["macro_f1"] == pytest.approx(want)
    assert scores["metric"] == "accuracy" and cv.score == pytest.approx(
        (oof.true == oof.probs.argmax(1)).mean()
    )
    low, high = cv.interval
    assert low <= cv.score <= high
    assert scores["last"]["images"] == 60 and len(scores["folds"]) == 3
    assert cv.score > 0.8


def test_it_is_read_again(cv):
    again = read_run(cv.folder)
    assert again.figures() == cv.figures() and again.config == cv.config
    assert isinstance(read_run(cv.runs[0].folder).score, float)
    assert "fold" in cv._repr_html_() and "accuracy" in cv.runs[0]._repr_html_()


def test_a_fold_is_repeated_from_its_file_alone(cv, tmp_path):
    cfg = Config.load(cv.folder / "fold1" / "config.yaml")
    Trainer(cfg).fit(out=tmp_path / "again", progress=False)
    a, b = (
        torch.load(p / "best.pt", weights_only=True)["weights"]
        for p in (cv.runs[1].folder, tmp_path / "again")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_it_goes_on_with_the_fold_that_was_interrupted(cv, people, tmp_path):
    class Cut(Exception):
        pass

    class Stop(Callback):
        def on_epoch(self, session, line):
            if session.cfg.fold == 1 and line["epoch"] == 2:
                raise Cut

    options = {"folds": 3, "groups": "person", "out": tmp_path / "cv", "progress": False}
    with pytest.raises(Cut):
        cross_validate(people, replace(CFG, epochs=3), **options, callbacks=[Stop()])
    with pytest.raises(UsageError, match="not finished"):
        read_run(tmp_path / "cv")
    before = (tmp_path / "cv" / "fold0" / "last.pt").stat().st_mtime_ns
    again = cross_validate(people, replace(CFG, epochs=3), **options, resume=True)
    assert (tmp_path / "cv" / "fold0" / "last.pt").stat().st_mtime_ns == before
    assert np.array_equal(again.oof.probs, cv.oof.probs)
    with pytest.raises(UsageError, match="other folds"):
        cross_validate(people, replace(CFG, epochs=3), **{**options, "folds": 4}, resume=True)
    over = cross_validate(people, replace(CFG, epochs=1), **{**options, "folds": 2}, overwrite=True)
    assert len(over.runs) == 2 and len(over.oof) == 60


def test_folds_of_a_column_and_of_another_run(cv, people, tmp_path):
    cfg = replace(CFG, epochs=1)
    by = cross_validate(people, cfg, column="part", out=tmp_path / "a", progress=False)
    assert by.oof.folds.tolist() == [i % 4 for i in range(60)]
    other = cross_validate(
        people, replace(cfg, model="test_vit"), cv.folder / "folds.csv", out=tmp_path / "b", progress=False
    )
    assert (
        other.oof.folds.tolist() == cv.oof.folds.tolist()
        and other.oof.groups.tolist() == cv.oof.groups.tolist()
    )
    with pytest.raises(UsageError, match="'nothing'"):
        cross_validate(people, cfg, column="nothing", out=tmp_path / "c")


def test_repeats_are_averaged_for_each_image():
    labels = np.arange(12) % 2
    ids = [f"i{i}" for i in range(12)]
    table = make_folds(ids, labels, ["a", "b"], scheme="stratified", folds=2, repeats=2, seed=1)
    parts = []
    for k in range(table.count):
        held = table.sides(k)[1]
        probs = np.full((len(held), 2), 0.5, np.float32)
        probs[:, 0] = 0.2 * (k + 1) / 2
        probs[:, 1] = 1 - probs[:, 0]
        parts.append(Predictions([ids[i] for i in held], probs, ["a", "b"], labels[held]))
    whole = pool(parts, table)
    assert whole.ids == ids and whole.true.tolist() == labels.tolist()
    for i in range(12):
        mine = [k for k in range(4) if i in table.sides(k)[1]]
        assert len(mine) == 2
        assert whole.probs[i, 0] == pytest.approx(np.mean([0.1 * (k + 1) for k in mine]))
        assert whole.folds[i] == mine[0]


def test_a_split_that_leaks_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    items = []
    for person in range(30):
        look = np.kron(rng.integers(0, 255, (8, 8, 3)), np.ones((4, 4, 1)))
        for _ in range(2):
            image = np.clip(look + rng.integers(-6, 6, (32, 32, 3)), 0, 255).astype(np.uint8)
            items.append({"image": image, "label": person % 3, "person": person})
    fastload.convert(items, tmp_path / "d.beton", store="raw", progress=False)
    with pytest.raises(DataError, match="leak"):
        cross_validate(tmp_path / "d.beton", CFG, folds=3, out=tmp_path / "cv", progress=False)
    assert not (tmp_path / "cv").exists()
    cfg = replace(CFG, epochs=1)
    cross_validate(tmp_path / "d.beton", cfg, folds=2, groups="person", out=tmp_path / "g", progress=False)
    cross_validate(
        tmp_path / "d.beton", replace(cfg, allow_leak=True), folds=2, out=tmp_path / "l", progress=False
    )


def call(capsys, *args) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_command(people, tmp_path, capsys):
    args = [
        "cv", people, "--model", "test_resnet", "--folds", "2", "--groups", "person", "--epochs", "1", "--size", "32", "--batch-size",
        "8", "--augment", "light", "--device", "cpu", "-o", tmp_path / "cv", "--json",
    ]  # fmt: skip
    code, text, err = call(capsys, *args)
    assert code == 0, err
    lines = text.splitlines()
    assert lines[0].startswith("fold 0: accuracy") and "pooled over 2 folds, 60 images" in text
    assert json.loads(lines[-1])["best"]["images"] == 60
    code, _, err = call(capsys, *args)
    assert code == 2 and "--resume" in err
    code, text, _ = call(capsys, "cv", "-o", tmp_path / "cv", "--resume", "--folds", "2")
    assert code == 0 and "pooled over 2 folds" in text
    code, _, err = call(capsys, "cv", people, "--folds", "1", "-o", tmp_path / "x")
    assert code == 2 and "Traceback" not in err


def test_look_alikes_beside_groups_are_a_warning_that_keeps_the_groups(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [
        np.kron(rng.integers(0, 255, (8, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8) for _ in range(20)
    ]
    items = [
        {"image": pictures[i % 20], "label": i % 2, "person": i} for i in range(40)
    ]  # each picture is of two people
    fastload.convert(items, tmp_path / "d.beton", store="raw", progress=False)
    with pytest.warns(TrainWarning, match=r"--groups person\+duplicates"):
        make_split(tmp_path / "d.beton", None, replace(CFG, groups="person"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_split(tmp_path / "d.beton", None, replace(CFG, groups="person+duplicates"))
