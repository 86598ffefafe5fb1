"""From two files to what is handed in, by one command, on real images: the face masks in the wild, and the digits."""

from __future__ import annotations

import csv
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

import fastload
from fastload.cli import main
from fastload.demo import write_digits
from fastload.train import Ensemble, Predictions, read_run

GROUPED = r"regex:(?P<label>[^/]+)/(?P<group>.+?)( copy.*)?\.\w+$"


def call(capsys, *args) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def checked(folder: Path, out: Path, text: str, models: list[str], asked: list[str]) -> dict:
    """What holds for any competition: every row asked for is answered, and the ensemble is not worse than its best member."""
    figures = json.loads(text.splitlines()[-1])
    runs = [read_run(out / name) for name in models]
    assert figures["scores"] == {name: run.score for name, run in zip(models, runs)}
    first = runs[0].oof
    for run in runs[1:]:  # one split for all
        assert run.oof.ids == first.ids and run.oof.folds.tolist() == first.folds.tolist()
    loaded = Ensemble.load(out / "ensemble.json")
    nested = [row["score"] for row in figures["table"]]
    assert max(nested) >= max(figures["scores"].values()) - 1e-12
    assert loaded.method == figures["ensemble"]
    with open(out / "submission.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows[1:]] == asked
    page = (out / "report.html").read_text()
    assert all(name in page for name in models)
    return figures


def test_face_masks(tmp_path, shared_data, capsys):
    with tarfile.open(shared_data("face_masks.tar")) as archive:
        archive.extractall(tmp_path, filter="data")
    # A fifth of the photographs, with all their copies, become a flat folder of test images without labels.
    hidden, truth = tmp_path / "test", {}
    hidden.mkdir()
    names = sorted(p for p in (tmp_path / "face_masks").rglob("*") if p.is_file())
    stem = {p: re.sub(r"( copy.*)?\.\w+$", "", p.name) for p in names}
    chosen = set(
        np.random.default_rng(0).permutation(sorted(set(stem.values())))[: len(set(stem.values())) // 5]
    )
    for path in names:
        if stem[path] in chosen:
            place = f"{len(truth):03}{path.suffix}"
            shutil.move(path, hidden / place)
            truth[place] = path.parent.name
    fastload.convert(
        tmp_path / "face_masks", tmp_path / "train.beton", max_side=128, label_from=GROUPED, progress=False
    )
    fastload.convert(hidden, tmp_path / "test.beton", max_side=128, progress=False)
    asked = sorted(truth, reverse=True)
    with open(tmp_path / "sample.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "label"), *((Path(name).stem, "with_mask") for name in asked)])
    out = tmp_path / "runs"
    command = [
        "compete", tmp_path / "train.beton", "--test", tmp_path / "test.beton", "--models", "test_resnet,test_efficientnet",
        "--sample", tmp_path / "sample.csv", "--folds", 5, "--tta", "hflip", "--epochs", 3, "--size", 48, "--batch-size", 32, "--lr",
        "4e-3", "--metric", "macro_f1", "--device", "cpu", "-o", out, "--json",
    ]  # fmt: skip
    code, text, err = call(capsys, *command)
    assert code == 0, err
    models = ["test_resnet", "test_efficientnet"]
    figures = checked(tmp_path, out, text, models, [Path(name).stem for name in asked])
    assert max(figures["scores"].values()) > 0.7
    with open(out / "submission.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right = np.mean([row["label"] == truth[name] for name, row in zip(asked, rows)])
    assert right > 0.7
    oof = read_run(out / "test_resnet").oof
    sides: dict[str, set[int]] = {}
    for group, fold in zip(oof.groups, oof.folds):
        sides.setdefault(str(group), set()).add(int(fold))
    assert all(len(side) == 1 for side in sides.values())
    # Nothing is trained twice, and without --resume nothing is overwritten.
    code, _, err = call(capsys, *command)
    assert code == 2 and "--resume" in err
    before = (out / "test_resnet" / "fold3" / "last.pt").stat().st_mtime_ns
    code, again, _ = call(capsys, *command, "--resume")
    assert code == 0 and json.loads(again.splitlines()[-1])["scores"] == figures["scores"]
    assert (out / "test_resnet" / "fold3" / "last.pt").stat().st_mtime_ns == before


def test_digits(tmp_path, capsys):
    write_digits(tmp_path / "digits", 32, 0)
    for side in ("train", "test"):
        fastload.convert(tmp_path / "digits" / side, tmp_path / f"{side}.beton", progress=False)
    test = fastload.open(tmp_path / "test.beton")
    ids = list(test.ids)
    with open(tmp_path / "sample.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", *(f"{c}" for c in range(10))), *((id, *[0.1] * 10) for id in ids)])
    out = tmp_path / "runs"
    code, text, err = call(
        capsys, "compete", tmp_path / "train.beton", "--test", tmp_path / "test.beton", "--models", "test_resnet,test_vit",
        "--sample", tmp_path / "sample.csv", "--tta", "shifts", "--epochs", 3, "--size", 32, "--batch-size", 32, "--lr", "4e-3",
        "--augment", "light", "--no-flip", "--device", "cpu", "-o", out, "--json",
    )  # fmt: skip
    assert code == 0, err
    figures = checked(tmp_path, out, text, ["test_resnet", "test_vit"], ids)
    assert figures["ensemble_score"] > 0.9
    predicted = Predictions.load(out / "predictions.csv")
    assert (predicted.probs.argmax(1) == test.labels).mean() > 0.9
    with open(out / "submission.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    np.testing.assert_allclose(np.array([row[1:] for row in rows], float), predicted.probs, atol=1e-5)


def test_the_template_is_looked_at_before_anything_is_trained(tmp_path, capsys):
    items = [{"image": np.full((16, 16, 3), i, np.uint8), "label": i % 2} for i in range(8)]
    fastload.convert(items, tmp_path / "a.beton", store="raw", progress=False)
    (tmp_path / "sample.csv").write_text("id,label\nnobody,0\n")
    code, _, err = call(
        capsys, "compete", tmp_path / "a.beton", "--test", tmp_path / "a.beton", "--sample", tmp_path / "sample.csv", "-o",
        tmp_path / "out",
    )  # fmt: skip
    assert code == 1 and "nobody" in err and not (tmp_path / "out").exists()
