"""The leak that a split by images has, on made people: refused, and measurably false when it is allowed."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fastload.benchmarks.__main__ import cli
from fastload.benchmarks.harness import read_jsonl
from fastload.benchmarks.leakage import People, run, text


def test_the_made_photos(tmp_path):
    people = People(subjects=8, photos=3, classes=2, apart=3.0)
    with open(people.write(tmp_path / "a", 8, 1), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and {row["label"] for row in rows} == {"class0", "class1"}
    looks: dict[str, list[np.ndarray]] = {}
    for row in rows:
        image = Image.open(tmp_path / "a" / row["path"])
        assert image.size == (48, 48)
        looks.setdefault(row["person"], []).append(np.asarray(image.resize((4, 4))).astype(float))
    within = np.mean([np.std(photos, axis=0).mean() for photos in looks.values()])
    between = np.std([np.mean(photos, axis=0) for photos in looks.values()], axis=0).mean()
    assert between > 2 * within  # who it is, is plainer to see than the light
    kinds = [
        np.mean([looks[r["person"]][0] for r in rows if r["label"] == c], axis=0)
        for c in ("class0", "class1")
    ]
    assert np.abs(kinds[0] - kinds[1]).mean() > 40


def test_the_record(tmp_path):
    out = tmp_path / "r.jsonl"
    lines = []
    record = run(
        People(subjects=60, photos=5, classes=2, apart=0.2, new_subjects=40, size=32), seeds=(1,), epochs=12, folds=2,
        out=str(out), say=lines.append,
    )  # fmt: skip
    assert json.loads(json.dumps(record)) == read_jsonl(out)[0]
    (one,) = record["runs"]
    assert "leak" in one["refused"] and "refused" in lines[0]
    assert one["by_image"] > one["by_group"] and one["by_image"] > one["by_image_true"] + 0.1
    assert abs(one["by_group"] - one["by_group_true"]) < 0.2
    assert "split by person" in text(record)


def test_command_with_wrong_seeds():
    result = CliRunner().invoke(cli, ["leakage", "--seeds", "a"])
    assert result.exit_code != 0 and "whole numbers" in str(result.exception)


@pytest.mark.parametrize("name", ["by_image", "by_image_true", "by_group", "by_group_true"])
def test_the_committed_record_holds_what_is_asked(name):
    from pathlib import Path

    record = read_jsonl(Path(__file__).parents[1] / "benchmarks" / "results" / "leakage.jsonl")[-1]
    assert record["subjects"] == 200 and record["photos"] == 7 and record["folds"] == 5
    assert all("leak" in one["refused"] for one in record["runs"])
    assert record["by_image"] > 0.95 and record["by_image"] - record["by_image_true"] >= 0.15
    assert abs(record["by_group"] - record["by_group_true"]) <= 0.05
    assert record[name] == pytest.approx(np.mean([one[name] for one in record["runs"]]))
