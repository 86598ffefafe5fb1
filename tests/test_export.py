"""Exported models, run without fastload, against predictions of the run itself on the same images."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import fastload
from fastload.cli import main
from fastload.errors import DataError, UsageError
from fastload.train import Config, cross_validate, load_run, predict
from fastload.train.export import Deployed, export

module = sys.modules["fastload.train.export"]
NAMES = ["blue", "green", "red"]


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def write(path: Path, images: np.ndarray) -> Path:
    items = [{"image": image, "label": i % 3} for i, image in enumerate(images)]
    fastload.convert(items, path, store="raw", classes=NAMES, progress=False)
    return path


@pytest.fixture(scope="module")
def cv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cv")
    cfg = Config(
        model="test_efficientnet", epochs=1, size=32, batch_size=8, augment="light", ema=0, device="cpu", threads=1,
        allow_leak=True, lr=3e-3,
    )  # fmt: skip
    return cross_validate(
        write(folder / "d.beton", pictures(18)), cfg, folds=2, out=folder / "cv", progress=False
    )


@pytest.fixture(scope="module")
def exported(cv, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return export(cv, out), out


@pytest.fixture(scope="module")
def wanted(cv, tmp_path_factory):
    """Images and the run's own probabilities for them."""
    images = pictures(5, seed=1)
    data = write(tmp_path_factory.mktemp("t") / "t.beton", images)
    return images, predict(cv, data, device="cpu", progress=False).probs


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_both_files_give_the_probabilities_of_the_folds_mean(exported, wanted, batch):
    done, out = exported
    assert done.files == [out / "model.onnx", out / "model.pt2", out / "model.json"]
    images, probs = wanted
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"images": images[:batch]})
    np.testing.assert_allclose(got, probs[:batch], atol=1e-4)
    program = torch.export.load(out / "model.pt2").module()
    np.testing.assert_allclose(
        program(torch.from_numpy(images[:batch])).detach().numpy(), probs[:batch], atol=1e-4
    )
    assert max(done.differences.values()) < 1e-5 and done.checked_on == "8 held-out images"


def test_the_files_say_what_is_needed_to_use_them(exported, cv):
    _, out = exported
    about = json.loads((out / "model.json").read_text())
    assert about["classes"] == NAMES and about["size"] == 32 and about["multilabel"] is False
    assert (
        len(about["runs"]) == 2
        and "shorter side to 32" in about["resize"]
        and about["largest_difference"]["onnx"] < 1e-5
    )
    one = load_run(cv.runs[0].folder, device="cpu")
    model = onnx.load(out / "model.onnx")
    inside = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(inside["classes"]) == NAMES and json.loads(inside["mean"]) == list(one.mean)
    assert json.loads(inside["std"]) == list(one.std) and inside["size"] == "32"
    (images,) = model.graph.input
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    dims = images.type.tensor_type.shape.dim
    assert dims[0].dim_param == "batch" and [d.dim_value for d in dims[1:]] == [32, 32, 3]
    extra = {"fastload.json": ""}
    torch.export.load(out / "model.pt2", extra_files=extra)
    assert json.loads(extra["fastload.json"])["classes"] == NAMES


def test_the_command(cv, wanted, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["export", str(cv.folder / "fold0"), "-o", str(tmp_path / "one.pt2"), "--json"])
    text = capsys.readouterr().out
    assert not caught.value.code and "torch: differs by" in text and "8 held-out images" in text
    assert json.loads(text.splitlines()[-1])["files"] == [
        str(tmp_path / name) for name in ("one.pt2", "one.json")
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.json", "one.pt2"]
    program = torch.export.load(tmp_path / "one.pt2").module()
    images, probs = wanted
    assert (
        np.abs(program(torch.from_numpy(images)).detach().numpy() - probs).max() > 1e-4
    )  # one fold is not the mean


def test_several_labels_and_noise_where_the_data_are_gone(cv, tmp_path):
    one = load_run(cv.runs[0].folder, device="cpu")
    many = replace(
        one, multilabel=True, config=replace(one.config, loss="bce", data=str(tmp_path / "gone.beton"))
    )
    done = export(many, tmp_path / "m.pt2")
    assert done.checked_on == "8 images of noise"
    images = pictures(4, seed=2)
    x = (
        torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(one.mean)[:, None, None]
    ) / torch.tensor(one.std)[:, None, None]
    with torch.no_grad():
        want = one.model(x).sigmoid().numpy()
    got = torch.export.load(tmp_path / "m.pt2").module()(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_model_that_differs_is_not_written(cv, tmp_path, monkeypatch):
    def turned(deployed, program, images, about):
        return b"wrong", lambda x: deployed(torch.from_numpy(255 - x)).detach().numpy()

    monkeypatch.setitem(module._WRITERS, "torch", turned)
    with pytest.raises(DataError, match=r"differs from the PyTorch model by .* not written"):
        export(cv, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(cv, tmp_path, monkeypatch, capsys):
    with pytest.raises(UsageError, match=r"\.onnx or \.pt2, or both into a folder, got .*model\.pth"):
        export(cv, tmp_path / "model.pth")
    with pytest.raises(UsageError, match="unknown export format 'onx'; did you mean 'onnx'"):
        export(cv, tmp_path, formats=["onx"])
    with pytest.raises(UsageError, match="at least"):
        export(cv, tmp_path, formats=[])
    with pytest.raises(SystemExit) as caught:
        main(["export", "photos.beton", "-o", str(tmp_path / "m.onnx")])
    assert caught.value.code == 2 and "run folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"pip install 'fastload\[export\]'"):
        export(cv, tmp_path / "m.onnx")

    class Branching(torch.nn.Module):
        def forward(self, images):
            return images[:, :, 0, 0] * (1 if images.sum().item() > 0 else 2)

    one = load_run(cv.runs[0].folder, device="cpu")
    with pytest.raises(UsageError, match="cannot trace this model"):
        export(replace(one, model=Branching()), tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_the_callers_model_is_left_alone(cv):
    one = load_run(cv.runs[0].folder, device="cpu")
    before = {name: value.stride() for name, value in one.model.state_dict().items()}
    Deployed([one])
    assert {name: value.stride() for name, value in one.model.state_dict().items()} == before
