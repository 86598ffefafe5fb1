"""The messy case, end to end with the public commands: 1,512 photos from the wild, of several formats and wrong names."""

import csv
import json
import os
import subprocess
import sys
import tarfile

import pytest

# `0_0_0 copy 10.jpg` is an altered copy of `0_0_0.jpg`: both must stand on the same side of the split.
LABELS = r"regex:(?P<label>[^/]+)/(?P<group>.+?)( copy.*)?\.\w+$"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_data):
    root = tmp_path_factory.mktemp("masks")
    with tarfile.open(shared_data("face_masks.tar")) as archive:
        archive.extractall(root, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(
            root
        )
    return root


def run(folder, *args):
    """One command; its standard output and the JSON object on the last line."""
    env = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "fastload", *args],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_whole_job(folder):
    converted = run(
        folder, "convert", "face_masks", "masks.beton", "--max-side", "256", "--label-from", LABELS, "--json"
    )
    assert converted["written"] == 1512 and converted["skipped"] == []

    summary = run(folder, "inspect", "masks.beton", "--json")
    assert summary["samples"] == 1512 and set(summary["classes"]) == {"with_mask", "without_mask"}
    assert sum(summary["classes"].values()) == 1512 and max(summary["height"][2], summary["width"][2]) <= 256
    assert {field["name"] for field in summary["fields"]} == {"image", "label", "group"}

    assert run(folder, "verify", "masks.beton", "--json")["bad"] == []

    bench = run(
        folder, "bench", "masks.beton", "--model", "test_resnet", "--size", "96", "--seconds", "4", "--json"
    )
    assert bench["verdict"]

    trained = run(
        folder, "train", "masks.beton", "--model", "test_resnet", "--size", "96", "--epochs", "4", "--seed", "0",
        "-o", "run", "--json",
    )  # fmt: skip
    assert trained["accuracy"] > 0.75 and trained["macro_f1"] > 0.75
    with open(folder / "run" / "split.csv") as file:
        sides: dict[str, set[str]] = {}
        for row in csv.DictReader(file):
            sides.setdefault(row["group"], set()).add(row["fold"])
    assert len(sides) > 100 and all(len(side) == 1 for side in sides.values()), "a copy on the other side"

    predicted = run(folder, "predict", "run", "masks.beton", "-o", "out.csv", "--json")
    with open(folder / "out.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1512 == predicted["images"]
    for row in rows[::100]:
        assert float(row["p_with_mask"]) + float(row["p_without_mask"]) == pytest.approx(1, abs=1e-4)
        best = max(("with_mask", "without_mask"), key=lambda name: float(row[f"p_{name}"]))
        assert row["prediction"] == best
