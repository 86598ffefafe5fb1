"""The accuracy benchmark: its statistics, its split, and a whole small run with fastload in both arms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import fastload
from fastload.benchmarks.__main__ import cli
from fastload.benchmarks.accuracy import judge, noise, run, split, text
from fastload.benchmarks.accuracy_arm import Training, train
from fastload.benchmarks.harness import read_jsonl
from fastload.benchmarks.peers.cpu import Cpu
from fastload.errors import UsageError


def test_noise_is_that_of_the_seeds_or_at_least_of_the_images():
    assert noise([0.5, 0.7, 0.9], 10_000) == pytest.approx(np.var([0.5, 0.7, 0.9], ddof=1))
    assert noise([0.8, 0.8, 0.8], 100) == pytest.approx(0.8 * 0.2 / 100)
    assert noise([0.8], 100) == pytest.approx(0.8 * 0.2 / 100)


def test_a_difference_is_judged_by_its_standard_error():
    found = judge({"ffcv": [0.90, 0.92, 0.94], "cpu": [0.91, 0.93, 0.95]}, 300)
    assert found["difference"] == pytest.approx(0.01) and found["compared"] == "cpu - ffcv"
    variance = max(0.0004, 0.92 * 0.08 / 300) + max(0.0004, 0.93 * 0.07 / 300)
    assert found["standard_error"] == pytest.approx(math.sqrt(variance / 3))
    assert found["within_noise"]
    assert found["arms"]["cpu"]["mean"] == pytest.approx(0.93)
    assert found["arms"]["ffcv"]["spread"] == pytest.approx(0.04)
    apart = judge({"a": [0.95, 0.95, 0.95], "b": [0.85, 0.85, 0.85]}, 1000)
    assert apart["difference"] == pytest.approx(-0.1) and not apart["within_noise"]
    assert "-10.00 points" in text(apart) and "more than noise" in text(apart)


@pytest.mark.parametrize(
    ("accuracies", "images"),
    [
        ({"a": [0.5]}, 10),
        ({"a": [0.5], "b": [0.5, 0.6]}, 10),
        ({"a": [], "b": []}, 10),
        ({"a": [1], "b": [1]}, 0),
    ],
)
def test_what_cannot_be_judged_is_refused(accuracies, images):
    with pytest.raises(UsageError, match=r"arm"):
        judge(accuracies, images)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """Bright and dark pictures, three of each group, which a model learns in a few steps."""
    folder = tmp_path_factory.mktemp("grouped")
    rng = np.random.default_rng(0)
    for i in range(90):
        label = i // 3 % 2
        name = folder / "images" / ("dark", "bright")[label] / f"g{i // 3} copy {i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        level = 200 if label else 40
        Image.fromarray(np.clip(rng.normal(level, 20, (40, 48, 3)), 0, 255).astype(np.uint8)).save(name)
    path = folder / "grouped.beton"
    labels = r"regex:(?P<label>[^/]+)/(?P<group>.+?) copy.*"
    fastload.convert(folder / "images", path, label_from=labels, progress=False)
    return path


def test_the_sides_are_jpeg_and_share_no_group(grouped, tmp_path):
    facts = split(str(grouped), tmp_path)
    assert facts["classes"] == 2 and facts["group_field"] == "group"
    assert facts["train_images"] + facts["valid_images"] == 90 and 9 <= facts["valid_images"] <= 27
    groups = []
    for side in ("train", "valid"):
        with fastload.open(facts[side]) as data:
            assert len(data) == facts[f"{side}_images"]
            assert {data.encoded(i).mode for i in range(len(data))} == {"jpeg"}
            assert data.classes == ["bright", "dark"]
            groups.append({data[i]["group"] for i in range(len(data))})
    assert not groups[0] & groups[1]


def test_an_arm_learns_and_says_how_well(grouped, tmp_path):
    facts = split(str(grouped), tmp_path)
    job = Training(
        facts["train"],
        facts["valid"],
        2,
        facts["train_images"],
        size=32,
        resize=36,
        epochs=6,
        batch=16,
        threads=1,
    )
    found = train(Cpu(), job)
    assert found["images"] == facts["valid_images"]
    assert found["accuracy"] > 0.9 and found["loss"] < 0.69


def test_a_whole_run_from_the_command_line(grouped, tmp_path):
    out = tmp_path / "accuracy.jsonl"
    options = "--arms cpu,cpu --seeds 3 --size 32 --resize 36 --epochs 1 --batch-size 16 --threads 1"
    done = CliRunner().invoke(cli, ["accuracy", str(grouped), *options.split(), "--out", str(out)])
    assert done.exit_code == 0, done.output
    (record,) = read_jsonl(out)
    assert json.loads(done.stdout.splitlines()[-1]) == record
    assert record["seeds"] == [3] and record["training"]["epochs"] == 1 and record["environment"]["cores"]
    # The same arm twice: the same first weights, order, boxes and pixels.
    first, second = record["arms"].values()
    assert first["accuracy"] == second["accuracy"] and record["difference"] == 0 and record["within_noise"]


def test_wrong_arms_and_seeds_are_refused_before_anything_runs(grouped):
    with pytest.raises(UsageError, match="two arms"):
        run(str(grouped), arms=["cpu"])
    with pytest.raises(UsageError, match="one seed"):
        run(str(grouped), arms=["cpu", "cpu"], seeds=[])
