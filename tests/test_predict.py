"""Prediction against a forward pass written out by hand."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import fastload
from fastload.cli import main
from fastload.errors import DataError, UsageError
from fastload.train import Config, Trainer, predict
from fastload.train.infer import infer

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
    assert got.labels.tolist() == labels and got.accuracy == 1.0 and got.macro_f1 == 1.0
    one = predict(run, data, batch_size=1, device="cpu", progress=False)
    np.testing.assert_allclose(one.probs, got.probs, atol=1e-5)


def test_inference_is_in_eval_mode_and_gives_the_model_back_as_it_was():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5), torch.nn.Flatten()).train()
    images = torch.randn(4, 3, 1, 1)
    got = infer(model, [(images[:3],), (images[3:],)], torch.device("cpu"), total=4, progress=False)
    want = (images.flatten(1) / (1 + 1e-5) ** 0.5).softmax(
        1
    )  # running mean 0 and variance 1, nothing dropped
    np.testing.assert_allclose(got, want.numpy(), atol=1e-6)
    assert model.training and model[0].num_batches_tracked == 0


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
