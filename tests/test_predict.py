"""Prediction against a forward pass written out by hand."""

from __future__ import annotations

import csv
import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import fastload
from fastload.cli import main
from fastload.errors import DataError, UsageError
from fastload.train import Config, Trainer, checkpoint, cross_validate, predict
from fastload.train.data import TrainWarning
from fastload.train.ensemble import Ensemble
from fastload.train.infer import infer
from fastload.train.predicting import average
from fastload.train.predictions import Predictions
from fastload.train.runs import load_run

NAMES = ["blue, dark", "green", "red"]
COLOURS = np.array([(40, 40, 200), (40, 200, 40), (200, 40, 40)])


def pictures(labels: list[int], seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-40, 40, (len(labels), 32, 32, 3))
    return np.clip(COLOURS[labels][:, None, None] + noise, 0, 255).astype(np.uint8)


def write(
    path: Path, images: np.ndarray, labels: list[int] | None = None, names: list[str] | None = None
) -> Path:
    items = [{"image": image} for image in images]
    if labels is not None:
        items = [item | {"label": label} for item, label in zip(items, labels)]
    fastload.convert(
        items, path, store="raw", progress=False, **({} if labels is None else {"classes": names or NAMES})
    )
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    labels = [0, 1, 2] * 12
    data = write(folder / "train.beton", pictures(labels), labels)
    cfg = Config(
        model="test_resnet", epochs=8, size=32, batch_size=8, lr=3e-3, augment="light", ema=0.5, device="cpu", threads=1
    )  # fmt: skip
    return Trainer(cfg).fit(data, out=folder / "run", progress=False)


def by_hand(run, images: np.ndarray) -> np.ndarray:
    """Probabilities without any code of fastload: timm's model, the saved weights, the model's own mean and std."""
    state = torch.load(run.folder / "best.pt", weights_only=True)
    model = timm.create_model("test_resnet", num_classes=3)
    model.load_state_dict(state["weights"])
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        return model.eval()(x).softmax(1).numpy()


def test_probabilities_equal_a_forward_pass_by_hand(run, tmp_path):
    labels = [2, 0, 1, 1, 0, 2, 2]
    images = pictures(labels, seed=3)
    data = write(tmp_path / "test.beton", images, labels)
    got = predict(run.folder, data, batch_size=3, device="cpu", progress=False)
    np.testing.assert_allclose(got.probs, by_hand(run, images), atol=2e-3)
    assert got.ids == list(fastload.open(data).ids)
    assert got.predicted.tolist() == labels and got.accuracy == 1.0 and got.macro_f1 == 1.0
    one = predict(run, data, batch_size=1, device="cpu", progress=False)
    np.testing.assert_allclose(one.probs, got.probs, atol=1e-5)


def test_inference_is_in_eval_mode_and_gives_the_model_back_as_it_was():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5), torch.nn.Flatten()).train()
    model[0].eval()  # a frozen norm layer
    images = torch.randn(4, 3, 1, 1)
    got = infer(model, [(images[:3],), (images[3:],)], torch.device("cpu"), total=4, progress=False)
    want = (images.flatten(1) / (1 + 1e-5) ** 0.5).softmax(
        1
    )  # running mean 0 and variance 1, nothing dropped
    np.testing.assert_allclose(got, want.numpy(), atol=1e-6)
    assert [module.training for module in model.modules()] == [True, False, True, True]


class Overflowing(torch.nn.Module):
    """Logits are the first pixel of each channel; ``bad`` in place of those above 100, under autocast or always."""

    def __init__(self, bad: float, always: bool = False) -> None:
        super().__init__()
        self.bad, self.always, self.calls = bad, always, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        reduced = torch.is_autocast_enabled("cpu")
        self.calls.append((len(images), reduced))
        logits = images[:, :, 0, 0]
        return torch.where(logits > 100, self.bad, logits) if reduced or self.always else logits


def batches(values: list[list[float]]) -> list[tuple[torch.Tensor]]:
    """One batch for each list; each value is the first channel of an image, the others are 0."""
    return [(torch.tensor([[v, 0.0, 0.0] for v in row])[:, :, None, None],) for row in values]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_overflows_is_repeated_in_fp32(bad):
    loader, model = batches([[1, 2], [3, 101], [102, 4], [5]]), Overflowing(bad)
    with pytest.warns(TrainWarning, match="2 of 4 batches .* in bf16 .* all are numbers now"):
        got = infer(
            model, loader, torch.device("cpu"), total=7, amp="bf16", activation=torch.sigmoid, progress=False
        )
    want = torch.cat([batch[0] for batch in loader])[:, :, 0, 0].sigmoid()
    np.testing.assert_array_equal(got, want.numpy())
    assert model.calls == [(2, True)] * 3 + [(1, True)] + [(2, False)] * 2


def test_what_is_no_number_in_fp32_either_stays_nan():
    loader, model = batches([[1, 2], [3, 101]]), Overflowing(float("inf"), always=True)
    with pytest.warns(TrainWarning, match="1 images still have none"):
        got = infer(model, loader, torch.device("cpu"), total=4, activation=torch.sigmoid, progress=False)
    assert np.isnan(got).all(axis=1).tolist() == [False, False, False, True]


def test_classes_excluded_by_a_logit_of_minus_infinity_are_no_fault():
    class Excluding(torch.nn.Module):
        def forward(self, images):
            return images[:, :, 0, 0] + torch.tensor([0.0, 0.0, -torch.inf])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = infer(Excluding(), batches([[0, 0]]), torch.device("cpu"), total=2, progress=False)
    np.testing.assert_allclose(got, [[0.5, 0.5, 0]] * 2)


def test_results_are_fetched_once_whatever_the_number_of_batches(monkeypatch):
    """On a GPU each of these would make the host wait for the device."""
    counts = []
    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__array__", "is_nonzero"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, _real=real, _name=name, **k: counts.append(_name) or _real(*a, **k)
        )
    model, seen = Overflowing(0.0), []
    for number in (1, 8):
        counts.clear()
        infer(
            model,
            batches([[1, 2]] * number),
            torch.device("cpu"),
            total=2 * number,
            amp="bf16",
            progress=False,
        )
        seen.append(list(counts))
    assert seen[0] == seen[1] and "cpu" in seen[0]


def test_the_csv_file(run, tmp_path):
    images = pictures([0, 2], seed=4)
    data = write(tmp_path / "test.beton", images)
    got = predict(run, data, device="cpu", out=tmp_path / "deep" / "out.csv", progress=False)
    with open(tmp_path / "deep" / "out.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["id", "prediction", "p_blue, dark", "p_green", "p_red"]
    assert [row[1] for row in rows[1:]] == ["blue, dark", "red"]
    np.testing.assert_allclose(np.array([row[2:] for row in rows[1:]], float), got.probs, rtol=1e-5)
    assert [row[0] for row in rows[1:]] == got.ids
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out.csv"]
    assert got.accuracy is None and "no labels" in got.note


def test_classes_in_another_order_are_compared_by_name(run, tmp_path):
    images = pictures([2, 2, 0], seed=5)
    data = write(tmp_path / "t.beton", images, [0, 0, 1], names=["red", "blue, dark"])
    got = predict(run, data, device="cpu", progress=False)
    assert got.accuracy == 1.0 and got.classes == NAMES


def test_strange_classes_give_no_score_but_predictions(run, tmp_path):
    data = write(tmp_path / "t.beton", pictures([0, 1]), [0, 1], names=["cat", "green"])
    got = predict(run, data, device="cpu", progress=False)
    assert got.accuracy is None and "'cat'" in got.note and got.probs.shape == (2, 3)


def test_last_and_a_checkpoint_by_its_path(run, tmp_path):
    data = write(tmp_path / "t.beton", pictures([0, 1]))
    last = predict(run, data, device="cpu", which="last", progress=False)
    path = predict(run.folder / "last.pt", data, device="cpu", progress=False)
    assert np.array_equal(last.probs, path.probs)


def test_what_is_not_a_run(run, tmp_path):
    data = write(tmp_path / "t.beton", pictures([0, 1]))
    with pytest.raises(UsageError, match="no checkpoint"):
        predict(tmp_path, data)
    with pytest.raises(UsageError, match="at least 1, got 0"):
        predict(run, data, batch_size=0)
    with pytest.raises(UsageError, match="best"):
        predict(run, data, which="middle")
    shutil.copytree(run.folder, tmp_path / "copy")
    whole = (tmp_path / "copy" / "best.pt").read_bytes()
    (tmp_path / "copy" / "best.pt").write_bytes(whole[:1000])
    with pytest.raises(DataError, match="damaged"):
        predict(tmp_path / "copy", data)
    state = torch.load(run.folder / "best.pt", weights_only=True)
    torch.save({**state, "classes": ["a", "b"]}, tmp_path / "copy" / "best.pt")
    with pytest.raises(DataError, match="do not fit"):
        predict(tmp_path / "copy", data)


def test_weights_that_are_no_numbers(run, tmp_path):
    data = write(tmp_path / "t.beton", pictures([0, 1]))
    state = torch.load(run.folder / "best.pt", weights_only=True)
    state["weights"] = {
        k: v * float("nan") if v.is_floating_point() else v for k, v in state["weights"].items()
    }
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(DataError, match="no numbers"):
        predict(tmp_path / "nan.pt", data, out=tmp_path / "o.csv", progress=False)
    assert not (tmp_path / "o.csv").exists()


# -- several labels, folds, what was trained on --------------------------------------------------------------------


@pytest.fixture(scope="module")
def cv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cv")
    labels = [0, 1, 2] * 6
    data = write(folder / "train.beton", pictures(labels), labels)
    cfg = Config(
        model="test_resnet", epochs=1, size=32, batch_size=6, lr=3e-3, augment="light", ema=0, device="cpu", threads=1,
        allow_leak=True,
    )  # fmt: skip
    return cross_validate(data, cfg, folds=2, out=folder / "cv", progress=False)


def test_a_cross_validation_predicts_with_the_mean_of_its_folds(cv, tmp_path):
    data = write(tmp_path / "t.beton", pictures([0, 1, 2, 2], seed=9), [0, 1, 2, 2])
    got = predict(cv.folder, data, device="cpu", progress=False)
    folds = [predict(cv.folder / f"fold{k}", data, device="cpu", progress=False).probs for k in (0, 1)]
    assert np.abs(folds[0] - folds[1]).max() > 1e-4  # two models indeed
    np.testing.assert_allclose(got.probs, np.mean(folds, axis=0), atol=1e-6)
    np.testing.assert_array_equal(cv.predict(data, device="cpu", progress=False).probs, got.probs)
    np.testing.assert_array_equal(predict(cv, data, device="cpu", progress=False).probs, got.probs)


def test_images_that_were_trained_on_are_said_to_be(run, cv, tmp_path):
    trained = fastload.open(run.config.data)
    note = predict(run, trained, device="cpu", progress=False).note
    assert f"{run.train_images} of these {len(trained)} images" in note and "means nothing" in note
    held = set(run.oof.ids)
    rest = trained.subset([i for i, id in enumerate(trained.ids) if id in held])
    assert "trained on" not in predict(run, rest, device="cpu", progress=False).note
    assert "18 of these 18 images (100%)" in predict(cv, cv.config.data, device="cpu", progress=False).note
    other = write(tmp_path / "t.beton", pictures([0, 1]), [0, 1])  # the same ids, another file
    assert "trained on" not in predict(run, other, device="cpu", progress=False).note


def test_a_loaded_run_serves_too(run, tmp_path):
    data = write(tmp_path / "t.beton", pictures([0, 1]))
    want = predict(run, data, device="cpu", progress=False)
    np.testing.assert_array_equal(
        predict(load_run(run, device="cpu"), data, progress=False).probs, want.probs
    )


def test_an_average_matches_classes_by_name(run):
    a = Predictions(["1", "2"], np.array([[0.9, 0.1], [0.2, 0.8]], np.float32), ["x", "y"])
    b = Predictions(["2", "1"], np.array([[0.4, 0.6], [0.5, 0.5]], np.float32), ["y", "x"])
    np.testing.assert_allclose(average([a, b]).probs, [[0.7, 0.3], [0.4, 0.6]], atol=1e-6)
    with pytest.raises(DataError, match="different classes"):
        average([a, Predictions(["1", "2"], a.probs, ["x", "z"])])


# -- views at test time: used only if they help --------------------------------------------------------------------


class Sides(torch.nn.Module):
    """Class 1 for bright images, and also for those that are brighter on the right: a mirror image takes the fault back."""

    def __init__(self, level: float, side: float) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.tensor([level, side]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        right, left = images[:, :, :, 16:].mean(dim=(1, 2, 3)), images[:, :, :, :16].mean(dim=(1, 2, 3))
        z = self.weights[0] * (right + left) + self.weights[1] * (right - left)
        return torch.stack([-z, z], dim=1)


def sided(folder: Path, model: Sides, by: str, metric: str = "accuracy") -> Path:
    """A run folder of ``model`` and its data: 24 of 40 images held out, their class by their level or by their brighter side."""
    rng = np.random.default_rng(0)
    level, tilt = rng.choice([-30, 30], 40), rng.choice([-20, 20], 40)
    images = np.full((40, 32, 32, 3), 128) + level[:, None, None, None]
    images[:, :, 16:] += tilt[:, None, None, None]
    images[:, :, :16] -= tilt[:, None, None, None]
    labels = ((level if by == "level" else tilt) > 0).astype(int)
    data = write(folder / "data.beton", images.astype(np.uint8), labels.tolist(), ["dark", "bright"])
    cfg = Config(data=str(data), model="<Sides>", size=32, augment="none", metric=metric, device="cpu")
    cfg.save(folder / "run" / "config.yaml")
    state = {
        "config": cfg.to_dict(), "classes": ["dark", "bright"], "mean": [0.5] * 3, "std": [0.25] * 3, "epoch": 1,
        "multilabel": False, "weights": model.state_dict(),
    }  # fmt: skip
    checkpoint.save(folder / "run" / "best.pt", state)
    ids = list(fastload.open(data).ids)[16:]
    held = Predictions(ids[::-1], np.full((24, 2), 0.5, np.float32), ["dark", "bright"], labels[16:][::-1])
    held.save(folder / "run" / "valid_probs.npz")
    return folder / "run"


def ask(folder: Path, model: Sides, **options) -> Predictions:
    return predict(folder, folder.parent / "data.beton", device="cpu", progress=False, model=model, **options)


def test_views_that_help_on_the_held_out_images_are_used(tmp_path):
    model = Sides(1.0, 3.0)  # the side outweighs the level, so half of the plain answers are wrong
    folder = sided(tmp_path, model, "level")
    plain, got = ask(folder, model), ask(folder, model, tta="hflip")
    held = plain.take(range(16, 40))
    assert held.accuracy < 0.8 and got.accuracy == 1.0
    assert (
        f"tta hflip is used, since it helps: accuracy {held.accuracy:.4f} without, 1.0000 with it on 24"
        in got.note
    )
    np.testing.assert_array_equal(got.probs, ask(folder, model, tta="hflip", always_tta=True).probs)


def test_views_that_do_not_help_are_not_used_and_it_is_said(tmp_path):
    model = Sides(0.0, 1.0)
    folder = sided(tmp_path, model, "side")
    plain, got = ask(folder, model), ask(folder, model, tta="hflip")
    assert plain.accuracy == 1.0 and np.array_equal(got.probs, plain.probs)
    assert (
        "tta hflip is not used, since it does not help" in got.note and "accuracy 1.0000 without" in got.note
    )
    always = ask(folder, model, tta="hflip", always_tta=True)
    np.testing.assert_allclose(always.probs, 0.5, atol=1e-6)
    mapped = ask(folder, model, tta="hflip", always_tta=True, flip_labels={"dark": "bright"})
    assert mapped.accuracy == 1.0


def test_the_metric_of_the_run_decides(tmp_path):
    """Of a log loss less is better."""
    model = Sides(1.0, 0.5)
    folder = sided(tmp_path, model, "level", metric="log_loss")
    got = ask(folder, model, tta="hflip")
    assert "log_loss" in got.note and ("is used" in got.note) == (
        ask(folder, model, tta="hflip", always_tta=True).loss < ask(folder, model).loss
    )


def test_the_trial_is_kept_and_made_again_for_a_newer_model(tmp_path):
    model = Sides(1.0, 3.0)
    folder = sided(tmp_path, model, "level")
    before = ask(folder, model, tta="hflip")
    kept = Predictions.load(folder / "tta_hflip_mean_best.npz")
    assert kept.accuracy == 1.0 and kept.ids == Predictions.load(folder / "valid_probs.npz").ids
    data = write(tmp_path / "t.beton", pictures([0, 1]))
    (tmp_path / "data.beton").rename(tmp_path / "gone")
    again = predict(folder, data, device="cpu", progress=False, model=model, tta="hflip")
    assert again.note.split(";")[0] == before.note.split(";")[0]
    newer = (folder / "tta_hflip_mean_best.npz").stat().st_mtime + 10
    os.utime(folder / "best.pt", (newer, newer))
    with pytest.raises(UsageError, match="--tta-always"):
        predict(folder, data, device="cpu", progress=False, model=model, tta="hflip")
    assert (
        len(predict(folder, data, device="cpu", progress=False, model=model, tta="hflip", always_tta=True))
        == 2
    )


def test_a_trial_that_cannot_be_made(tmp_path):
    model = Sides(1.0, 3.0)
    folder = sided(tmp_path, model, "level")
    (folder / "valid_probs.npz").rename(folder / "away.npz")
    with pytest.raises(UsageError, match=r"no predictions at .*valid_probs.*--tta-always.*got tta='hflip'"):
        ask(folder, model, tta="hflip")
    held = Predictions.load(folder / "away.npz")
    Predictions(["x", *held.ids[1:]], held.probs, held.classes, held.labels).save(folder / "valid_probs.npz")
    with pytest.raises(UsageError, match="lacks 1 of them, such as 'x'"):
        ask(folder, model, tta="hflip")


def test_each_fold_is_tried_on_its_own_held_out_side(cv, tmp_path):
    data = write(tmp_path / "t.beton", pictures([0, 1]))
    note = predict(cv, data, device="cpu", progress=False, tta="hflip").note
    assert "with it on 18 held-out images" in note
    for k in (0, 1):
        kept = Predictions.load(cv.folder / f"fold{k}" / "tta_none_best.npz")
        np.testing.assert_allclose(kept.probs, cv.runs[k].oof.probs, atol=1e-5)


def call(capsys, *args) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_command(run, tmp_path, capsys):
    data = write(tmp_path / "t.beton", pictures([0, 1, 2]), [0, 1, 1])
    code, text, _ = call(
        capsys, "predict", run.folder, data, "-o", tmp_path / "o.csv", "--device", "cpu", "--json"
    )
    assert code == 0
    figures = json.loads(text.splitlines()[-1])
    assert figures["accuracy"] == pytest.approx(2 / 3) and figures["images"] == 3
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 4
    code, _, err = call(capsys, "predict", tmp_path / "nothing", data, "-o", tmp_path / "o2.csv")
    assert code == 2 and "Traceback" not in err and not (tmp_path / "o2.csv").exists()
    code, _, err = call(capsys, "predict", run.folder, data, "-o", tmp_path)
    assert code == 2 and "cannot write" in err


def test_command_with_several_runs_and_a_template(run, cv, tmp_path, capsys):
    data = write(tmp_path / "t.beton", pictures([0, 1, 2, 1], seed=6), [0, 1, 2, 1])
    out = tmp_path / "o.csv"
    code, text, _ = call(capsys, "predict", run.folder, cv.folder, data, "-o", out, "--device", "cpu")
    assert code == 0 and "accuracy" in text
    parts = [predict(one, data, device="cpu", progress=False).probs for one in (run, cv)]
    np.testing.assert_allclose(Predictions.load(out).probs, np.mean(parts, axis=0), atol=1e-5)

    ids = list(fastload.open(data).ids)
    (tmp_path / "sample.csv").write_text("image,answer\n" + "".join(f"{id},0\n" for id in ids[:0:-1]))
    code, text, _ = call(
        capsys,
        "predict",
        run.folder,
        data,
        "-o",
        out,
        "--sample",
        tmp_path / "sample.csv",
        "--device",
        "cpu",
        "--json",
    )
    want = predict(run, data, device="cpu", progress=False).predicted.tolist()
    assert out.read_text().splitlines() == ["image,answer", *(f"{ids[i]},{want[i]}" for i in (3, 2, 1))]
    assert code == 0 and "class numbers" in text and json.loads(text.splitlines()[-1])["unused"] == 1

    code, text, _ = call(
        capsys, "predict", run.folder, data, "-o", out, "--tta", "hflip", "--tta-always", "--device", "cpu"
    )
    want = predict(run, data, device="cpu", tta="hflip", always_tta=True, progress=False)
    np.testing.assert_allclose(Predictions.load(out).probs, want.probs, atol=1e-5)


def test_command_with_an_ensemble(cv, tmp_path, capsys):
    other = cross_validate(
        cv.config.data, replace(cv.config, seed=1), folds=cv.folds, out=tmp_path / "cv", progress=False
    )
    data, out = write(tmp_path / "t.beton", pictures([0, 1, 2, 2], seed=7)), tmp_path / "o.csv"
    args = ["predict", cv.folder, other.folder, data, "-o", out, "--device", "cpu"]
    code, text, _ = call(capsys, *args, "--ensemble", "--metric", "log_loss")
    found = Ensemble([cv, other]).search("log_loss")
    want = found.predict(data, device="cpu", progress=False)
    assert code == 0 and f"ensemble: {found.method}, log_loss {found.score:.4f}" in text
    np.testing.assert_allclose(Predictions.load(out).probs, want.probs, atol=1e-5)
    assert "accuracy" in call(capsys, *args, "--ensemble")[1]  # the metric of the runs
    found.save(tmp_path / "both.json")
    code, _, _ = call(capsys, "predict", tmp_path / "both.json", data, "-o", out, "--device", "cpu")
    np.testing.assert_allclose(Predictions.load(out).probs, want.probs, atol=1e-5)


def test_command_called_wrongly(run, tmp_path, capsys):
    data = write(tmp_path / "t.beton", pictures([0, 1]))
    for args, said in (
        ([data], "needs a run and then the data"),
        ([run.folder, data, "--metric", "accuracy"], "--ensemble searches for"),
        ([run.folder, data, "--ensemble"], "two run folders at least"),
        ([run.folder, data, "--tta", "hflap"], "did you mean 'hflip'"),
        ([run.folder, data, "--tta", "hflip", "--flip-labels", "left"], "pairs of classes"),
        ([run.folder, data, "--tta", "hflip", "--flip-labels", "left=right"], "unknown class in flip_labels"),
        ([run.folder, data, "--sample", tmp_path / "none.csv", "--device", "cpu"], "sample submission"),
    ):
        code, _, err = call(capsys, "predict", *args, "-o", tmp_path / "o.csv")
        assert code == 2 and said in err and "Traceback" not in err
    assert not (tmp_path / "o.csv").exists()
