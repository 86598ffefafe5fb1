"""Searches: what a space may hold, trials that can be repeated, failed, pruned and killed ones, several processes."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score

import fastload
from fastload.cli import main
from fastload.errors import DataError, UsageError
from fastload.train import Config, Predictions, Trainer

optuna = pytest.importorskip("optuna")
from fastload.train.tune_space import read_space, suggestions  # noqa: E402
from fastload.train.tuning import read_search, tune  # noqa: E402

tune_module = sys.modules[tune.__module__]

COLOURS = [(40, 40, 200), (40, 200, 40), (200, 40, 40)]
CFG = Config(
    model="test_resnet", epochs=2, size=32, batch_size=16, augment="light", ema=0.5, device="cpu", threads=1
)
SPACE = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "optimizer": ["adamw", "sgd"], "epochs": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """48 images of 32 px whose colour says their class, if not clearly."""
    rng = np.random.default_rng(0)
    items = []
    for i in range(48):
        image = 80 + 0.3 * np.array(COLOURS[i % 3]) + rng.integers(-60, 60, (32, 32, 3))
        items.append({"image": np.clip(image, 0, 255).astype(np.uint8), "label": i % 3})
    path = tmp_path_factory.mktemp("data") / "photos.beton"
    fastload.convert(items, path, classes=["blue", "green", "red"], store="raw", progress=False)
    return path


@pytest.fixture
def no_training(monkeypatch):
    """Trials whose score is how near their learning rate is to 1e-3; returns the learning rates as they are tried."""
    tried = []

    def score(self, trial):
        lr = self.search.config.with_values(self.suggest(trial)).lr
        tried.append(lr)
        return -abs(np.log10(lr) + 3)

    monkeypatch.setattr(tune_module._Worker, "_score", score)
    monkeypatch.setattr(tune_module.Search, "best_config", CFG)
    monkeypatch.setattr(tune_module.Search, "plot", lambda self: [])
    return tried


def params(search):
    return [trial.params for trial in search.trials]


def rows(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


# --- the space


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"lrr": [1, 2]}, "did you mean.*'lr'"),
        ({"metric": ["accuracy", "macro_f1"]}, "could not be compared"),
        ({"lr": {"low": 1e-4, "hihg": 1}}, "unknown word in the range of lr.*high"),
        ({"lr": {"low": 1e-4}}, "needs low and high"),
        ({"lr": {"low": 1, "high": 0.1}}, "low below high"),
        ({"lr": {"low": 0, "high": 1, "log": True}}, "true only above 0"),
        ({"lr": {"low": 0.1, "high": 1, "log": True, "step": 0.1}}, "without a step"),
        ({"lr": {"low": -1, "high": 1}}, "lr.*must be above 0, got -1"),
        ({"epochs": {"low": 0.5, "high": 2}}, "whole numbers"),
        ({"optimizer": {"low": 1, "high": 2}}, "has no range"),
        ({"flip": {"low": 0, "high": 1}}, "has no range"),
        ({"batch_size": [16, 0]}, "batch_size.*at least 1, got 0"),
        ({"schedule": ["cosine", "cosin"]}, "did you mean 'cosine'"),
        ({"lr": []}, "needs values"),
        ({"lr": 1e-3, "epochs": 3}, "nothing to choose from"),
        ({"warmup_epochs": {"low": 3, "high": 8}, "epochs": [2, 3]}, "warm-up must end"),
        (lambda trial: {"lrr": 1}, "did you mean.*'lr'"),
        (lambda trial: {"lr": -trial.suggest_float("lr", 1, 2)}, "must be above 0"),
        (lambda trial: None, "got None"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_space_is_said_before_the_first_trial(space, words, photos, tmp_path):
    with pytest.raises(UsageError, match=words):
        tune(photos, CFG, space, trials=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trials_draw_what_the_file_says(tmp_path):
    (tmp_path / "space.yaml").write_text(
        "lr: {low: 1e-4, high: 1e-2, log: true}\nbatch_size: {low: 16, high: 64, step: 16}\nflip: [true, false]\n"
        "epochs: 9\nmilestones: [[2, 4], [3]]\ndrop: {low: 0, high: 0.5, step: 0.25}\nwarmup_epochs: {low: 0, high: 3}\n"
    )
    suggest = suggestions(
        read_space(tmp_path / "space.yaml"), CFG
    )  # warm-up of 3 does not fit CFG's 2 epochs
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    found = [CFG.with_values(suggest(study.ask())) for _ in range(200)]
    lrs = np.log10([cfg.lr for cfg in found])
    assert lrs.min() >= -4 and lrs.max() <= -2
    assert abs((lrs < -3).mean() - 0.5) < 0.15  # even in the exponent
    assert {cfg.batch_size for cfg in found} == {16, 32, 48, 64}
    assert {cfg.milestones for cfg in found} == {(2.0, 4.0), (3.0,)}
    assert {cfg.drop for cfg in found} == {0.0, 0.25, 0.5}
    assert {cfg.flip for cfg in found} == {True, False} and {cfg.epochs for cfg in found} == {9}


def test_a_list_option_may_be_fixed(tmp_path):
    suggest = suggestions({"milestones": [2, 4], "flip": [True, False]}, replace(CFG, epochs=5))
    drawn = suggest(optuna.create_study().ask())
    assert CFG.with_values(drawn).milestones == (2, 4)


def test_values_that_fit_only_beside_others_may_be_searched():
    suggestions({"warmup_epochs": {"low": 0, "high": 5}, "epochs": [3, 9]}, CFG)  # 5 with 9


def test_a_space_in_python(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def space(trial):\n    lr = trial.suggest_float('lr', 1e-4, 1e-3)\n    return {'lr': lr, 'min_lr': lr / 2}\n"
    )
    drawn = suggestions(read_space(f"{file}:space"), CFG)(optuna.create_study().ask())
    assert drawn["min_lr"] == drawn["lr"] / 2 and 1e-4 <= drawn["lr"] <= 1e-3
    with pytest.raises(UsageError, match=r"unknown function 'spce'.*did you mean 'space'"):
        read_space(f"{file}:spce")
    with pytest.raises(UsageError, match="no such Python file"):
        read_space(f"{tmp_path / 'other.py'}:space")
    with pytest.raises(UsageError, match="cannot read the space"):
        read_space(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- lr\n")
    with pytest.raises(DataError, match="must hold"):
        read_space(tmp_path / "list.yaml")


# --- trials that train


@pytest.fixture(scope="module")
def searched(photos, tmp_path_factory):
    return tune(photos, CFG, SPACE, trials=3, out=tmp_path_factory.mktemp("runs") / "tune", progress=False)


def test_each_trial_is_a_run_on_the_same_split(searched):
    assert len(searched.trials) == 3
    split = {tuple(row[:2]) for row in rows(searched.folder / "split.csv")}
    assert {fold for _, fold in split} == {"fold", "train", "valid"}
    for trial in searched.trials:
        folder = searched.folder_of(trial.number)
        cfg = Config.load(folder / "config.yaml")
        assert (cfg.lr, cfg.optimizer, cfg.epochs) == (trial.params["lr"], trial.params["optimizer"], 1)
        assert {tuple(row[:2]) for row in rows(folder / "split.csv")} == split
        held = Predictions.load(folder)
        assert trial.value == pytest.approx(accuracy_score(held.labels, held.probs.argmax(1)))
    assert searched.best_score == max(trial.value for trial in searched.trials)


def test_the_folder_holds_what_is_promised(searched):
    names = {path.name for path in searched.folder.iterdir() if not path.name.startswith("trial-")}
    assert names == {
        "config.yaml", "run.json", "split.csv", "study.db", "tune.lock", "best.yaml", "history.png", "slices.png",
        *(["importances.png"] if len({trial.value for trial in searched.trials}) > 1 else []),
    }  # fmt: skip
    assert Config.load(searched.folder / "best.yaml") == searched.best_config
    for path in searched.folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    table = searched.table().splitlines()
    assert table[0].split() == ["trial", "accuracy", "lr", "optimizer"] and len(table) == 4
    assert table[1].split()[0] == str(searched.best_trial.number)
    assert searched._repr_html_().count("<tr>") == 4


def test_the_best_trial_can_be_repeated_from_its_file(searched, tmp_path):
    cfg = Config.load(searched.folder / "best.yaml")
    again = Trainer(cfg).fit(out=tmp_path / "again", progress=False)
    before = Predictions.load(searched.folder_of(searched.best_trial.number))
    assert again.score == searched.best_score
    np.testing.assert_array_equal(again.oof.probs, before.probs)
    assert again.oof.ids == before.ids


def test_folds_are_pooled_and_the_same_for_all(photos, tmp_path):
    tune(photos, CFG, SPACE, trials=1, out=tmp_path / "t", folds=2, progress=False)
    search = tune(out=tmp_path / "t", trials=2, resume=True, progress=False)
    split = rows(search.folder / "split.csv")
    assert len(split) == 49 and {row[1] for row in split[1:]} == {"0", "1"}
    for trial in search.trials:
        folder = search.folder_of(trial.number)
        assert rows(folder / "folds.csv") == split
        pooled = Predictions.load(folder)
        assert len(pooled) == 48
        assert trial.value == pytest.approx(accuracy_score(pooled.labels, pooled.probs.argmax(1)))
        assert sorted(trial.intermediate_values) == [1, tune_module.STRIDE + 1]


def test_leaks_are_looked_for_once(photos, tmp_path, monkeypatch):
    calls = []

    def guard(datas, folds, *, labels, threads=None, paths=True):
        calls.append(len(datas))
        return ["images 1 and 2 are alike"] if len(calls) > 2 else []

    monkeypatch.setattr("fastload.train.data.guard", guard)
    tune(photos, CFG, SPACE, trials=2, out=tmp_path / "a", progress=False)
    assert calls == [2]
    tune(photos, CFG, SPACE, trials=1, out=tmp_path / "b", folds=2, progress=False)
    assert calls == [2, 1]
    for folds in (None, 2):
        with pytest.raises(DataError, match="leaks"):
            tune(photos, CFG, SPACE, trials=1, out=tmp_path / "c", folds=folds, progress=False)
        assert not (tmp_path / "c").exists()


def test_a_trial_that_falls_behind_is_stopped(photos, tmp_path):
    cfg = replace(CFG, epochs=4)
    space = {"lr": {"low": 1e-4, "high": 1e-2}}
    search = tune(photos, cfg, space, trials=1, out=tmp_path / "t", progress=False)
    lr = search.trials[0].distributions["lr"]
    ahead = dict.fromkeys((1, 2, 3, 4), 1.5)  # better than any training can be, though not chosen in the end
    done = optuna.trial.create_trial(
        value=-1, params={"lr": 1e-3}, distributions={"lr": lr}, intermediate_values=ahead
    )
    for _ in range(5):
        search.study.add_trial(done)
    tune(out=tmp_path / "t", trials=7, resume=True, progress=False)
    tune(out=tmp_path / "t", trials=8, resume=True, progress=False, pruner="none")
    behind, free = read_search(tmp_path / "t").trials[6:]
    assert behind.state.name == "PRUNED" and sorted(behind.intermediate_values) == [1, 2]
    assert len((search.folder_of(behind.number) / "log.jsonl").read_text().splitlines()) == 2
    assert not (search.folder_of(behind.number) / "result.json").exists()
    assert free.state.name == "COMPLETE" and sorted(free.intermediate_values) == [1, 2, 3, 4]
    assert "pruned" in search.table()


def test_failed_trials_are_recorded_and_the_search_goes_on(photos, tmp_path, capsys):
    (tmp_path / "space.yaml").write_text("optimizer: [adamw, addamw]\nlr: [1e-3, 1e30]\nepochs: 1\n")
    line = [
        "tune", str(photos), "--space", str(tmp_path / "space.yaml"), "--model", "test_resnet", "--size", "32", "--augment", "light",
        "--batch-size", "16", "--device", "cpu", "--threads", "1", "--trials", "8", "-o", str(tmp_path / "t"), "--json",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as done:
        main(line)
    out = capsys.readouterr().out
    assert done.value.code == 0, out
    figures = json.loads(out.splitlines()[-1])
    search = read_search(tmp_path / "t")
    reasons = {
        tuple(t.params.values()): t.user_attrs["reason"] for t in search.trials if t.state.name == "FAIL"
    }
    good = [t for t in search.trials if t.params == {"optimizer": "adamw", "lr": "1e-3"}]
    assert figures["failed"] == 8 - len(good) and figures["complete"] == len(good) > 0
    for (optimizer, lr), reason in reasons.items():
        assert ("addamw" in reason) if optimizer == "addamw" else ("diverged" in reason and lr == "1e30")
    assert {optimizer for optimizer, _ in reasons} == {"adamw", "addamw"}, "both kinds of failure were tried"
    assert out.count("failed: ") == figures["failed"] and "best: trial" in out
    assert Config.load(search.folder_of(0) / "config.yaml").optimizer == search.trials[0].params["optimizer"]


KILLED = """
import os, signal, sys
from fastload.cli import main
from fastload.train.tuning import _Report

def on_step(self, session, loss):
    if self.trial.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)

_Report.on_step = on_step
main(sys.argv[1:])
"""


def test_a_killed_search_goes_on_to_the_total(photos, tmp_path, searched):
    """The options that are tried are those of a search that was not killed."""
    out = tmp_path / "t"
    (tmp_path / "space.yaml").write_text(json.dumps(SPACE))
    line = [
        sys.executable, "-c", KILLED, "tune", str(photos), "--space", str(tmp_path / "space.yaml"), "--trials", "3",
        "-o", str(out), "--config", str(searched.folder / "config.yaml"), "--set", "split=none",
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    stopped = read_search(out)
    assert [trial.state.name for trial in stopped.study.trials] == ["COMPLETE", "RUNNING"]
    assert len(stopped.trials) == 1
    done = tune(out=out, trials=3, resume=True, progress=False)
    assert [trial.state.name for trial in done.study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert params(done) == params(searched)
    assert [trial.value for trial in done.trials] == [trial.value for trial in searched.trials]
    assert not list(out.glob("trial-*.lock"))


def test_two_workers_share_the_trials(photos, tmp_path):
    told = []
    search = tune(photos, CFG, SPACE, trials=4, out=tmp_path / "t", workers=2, on_trial=told.append)
    assert sorted(trial.number for trial in told) == [0, 1, 2, 3] == [t.number for t in search.study.trials]
    assert {trial.state.name for trial in search.trials} == {"COMPLETE"}
    assert len({trial.params["lr"] for trial in search.trials}) == 4
    logs = [(search.folder / f"worker-{i}.log").read_text() for i in (0, 1)]
    ran = [[line.split()[1] for line in log.splitlines() if line.startswith("trial   ")] for log in logs]
    assert sorted(ran[0] + ran[1]) == ["0", "1", "2", "3"]
    for trial in search.trials:
        log = (search.folder_of(trial.number) / "log.jsonl").read_text()
        assert len(log.splitlines()) == 1
    assert (search.folder / "best.yaml").is_file()


def test_a_worker_that_cannot_start_is_told_of(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="2 of 2 workers ended with an error and 3 trials are missing"):
        tune(photos, CFG, SPACE, trials=3, out=tmp_path / "t", workers=2)
    with pytest.raises(UsageError, match="by its path"):
        tune(photos, CFG, lambda trial: {"lr": 1e-3}, trials=3, out=tmp_path / "u", workers=2)


# --- which trials are run


def test_a_search_in_parts_tries_the_same_as_one_at_once(photos, tmp_path, no_training):
    whole = tune(photos, CFG, SPACE, trials=12, out=tmp_path / "a")
    first = list(no_training)
    no_training.clear()
    for trials in (3, 3, 12):
        parts = tune(photos, CFG, SPACE, trials, tmp_path / "b", resume=True)
        assert len(parts.trials) == trials
    assert no_training == first and params(parts) == params(whole)
    assert len(set(first)) == 12
    other = tune(photos, replace(CFG, seed=1), SPACE, trials=3, out=tmp_path / "c")
    assert params(other) != params(whole)[:3]
    assert whole.best_score == max(-abs(np.log10(lr) + 3) for lr in first)


def test_a_loss_is_made_small(photos, tmp_path, no_training):
    search = tune(photos, replace(CFG, metric="log_loss"), SPACE, trials=5, out=tmp_path / "a")
    assert search.best_score == min(-abs(np.log10(lr) + 3) for lr in no_training)
    assert search.study.direction.name == "MINIMIZE"


def test_unforeseen_errors_end_the_search_and_the_trial_is_repeated(
    photos, tmp_path, no_training, monkeypatch
):
    score = tune_module._Worker._score

    def broken(self, trial):
        value = score(self, trial)
        if len(no_training) in (2, 4, 5):
            raise RuntimeError("a bug")
        return value

    monkeypatch.setattr(tune_module._Worker, "_score", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        tune(photos, CFG, SPACE, trials=4, out=tmp_path / "t")
    with pytest.raises(RuntimeError, match="a bug"):  # trial 1 again, which works now, and the next
        tune(out=tmp_path / "t", trials=4, resume=True)
    with pytest.raises(RuntimeError, match="a bug"):
        tune(out=tmp_path / "t", trials=4, resume=True)
    search = tune(out=tmp_path / "t", trials=4, resume=True)
    again = [lr == before for before, lr in pairwise(no_training)]
    assert again == [False, True, False, True, False]
    assert [t.state.name for t in search.trials] == [
        "COMPLETE",
        "COMPLETE",
        "FAIL",
        "COMPLETE",
    ]  # not a third time
    assert "killed" in tune_module.trial_line(search.trials[2], "accuracy")


def _work(folder: Path, total: int) -> None:
    def score(self, trial):
        lr = self.suggest(trial)["lr"]
        with open(folder / "ran.txt", "a") as file:
            file.write(f"{trial.number} {os.getpid()}\n")
        time.sleep(0.02)
        return lr

    tune_module._Worker._score = score
    tune_module.Search.best_config = CFG
    tune_module.Search.plot = lambda self: []
    tune(out=folder, trials=total, resume=True)


def test_no_trial_is_run_twice_however_many_processes_there_are(photos, tmp_path, no_training):
    out = tmp_path / "t"
    tune(photos, CFG, SPACE, trials=1, out=out)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_work, args=(out, 17)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    numbers = [int(line.split()[0]) for line in (out / "ran.txt").read_text().splitlines()]
    assert sorted(numbers) == list(range(1, 17))
    search = read_search(out)
    assert len(search.study.trials) == 17 and len({t.params["lr"] for t in search.trials}) == 17


def test_time_over(photos, tmp_path, no_training):
    search = tune(photos, CFG, SPACE, trials=5, out=tmp_path / "t", timeout=0)
    assert search.trials == [] and "0 trials" in search._repr_html_() and search.table()
    with pytest.raises(UsageError, match=r"no trial in .* was completed"):
        _ = search.best_trial


def test_a_metric_that_is_no_number_fails_the_trial(photos, tmp_path, monkeypatch):
    class Done:
        score = float("nan")

    monkeypatch.setattr(tune_module.Trainer, "fit", lambda self, data, **options: Done())
    search = tune(photos, CFG, SPACE, trials=1, out=tmp_path / "t")
    assert search.trials[0].state.name == "FAIL" and "not defined" in search.trials[0].user_attrs["reason"]
    with pytest.raises(UsageError, match="not defined"):
        _ = search.best_score


# --- folders and calls


def test_what_is_there_is_not_lost(photos, tmp_path, no_training, searched):
    out = tmp_path / "t"
    tune(photos, CFG, SPACE, trials=1, out=out)
    with pytest.raises(UsageError, match="--resume goes on"):
        tune(photos, CFG, SPACE, trials=1, out=out)
    with pytest.raises(UsageError, match=r"other options \(model 'test_resnet' -> 'test_vit'\)"):
        tune(photos, replace(CFG, model="test_vit"), SPACE, trials=2, out=out, resume=True)
    with pytest.raises(UsageError, match=r"other options \(folds None -> 3, space"):
        tune(photos, CFG, {"lr": [1e-3, 1e-2]}, trials=2, out=out, folds=3, resume=True)
    with pytest.raises(UsageError, match="no search of fastload is in it"):
        tune(photos, CFG, SPACE, trials=1, out=searched.folder_of(0), resume=True)
    with pytest.raises(UsageError, match="no search in the folder"):
        read_search(tmp_path / "nothing")
    assert len(tune(photos, replace(CFG, threads=2), SPACE, trials=2, out=out, resume=True).trials) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"pruner": "medain"}, "did you mean 'median'"),
        ({"space": None}, "nothing to search"),
        ({"data": None}, "nothing to train on"),
        ({"folds": 2, "cfg": replace(CFG, valid="x.beton")}, "exclude.*'x.beton'"),
        ({"storage": "nosuch://x"}, "storage cannot be used"),
    ],
)
def test_wrong_calls(options, words, photos, tmp_path):
    with pytest.raises(UsageError, match=words):
        tune(**{"data": photos, "cfg": CFG, "space": SPACE, "trials": 1, "out": tmp_path / "t", **options})


def test_one_storage_for_several_searches(photos, tmp_path, no_training):
    url = f"sqlite:///{tmp_path / 'all.db'}"
    for name in ("a", "b"):
        tune(photos, CFG, SPACE, trials=2, out=tmp_path / name, storage=url)
    assert optuna.get_all_study_names(url) == ["a", "b"] and not (tmp_path / "a" / "study.db").exists()
    with pytest.raises(UsageError, match="has a search of this name"):
        tune(photos, CFG, SPACE, trials=2, out=tmp_path / "other" / "a", storage=url)


def test_the_command_line_asks_for_what_is_missing(photos, tmp_path, capsys):
    (tmp_path / "space.yaml").write_text(json.dumps(SPACE))
    for line, words in (
        (["tune", str(photos), "-o", str(tmp_path / "t")], "--space"),
        (
            ["tune", str(photos), "-o", str(tmp_path / "t"), "--space", str(tmp_path / "space.yaml")],
            "--model",
        ),
    ):
        with pytest.raises(SystemExit) as done:
            main(line)
        assert done.value.code == 2 and words in capsys.readouterr().err
