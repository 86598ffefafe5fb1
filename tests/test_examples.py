"""Every example runs as a reader would run it: a process of its own, on a converted file."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastload

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--size", "32", "--batch-size", "8"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Class folders of JPEG files, converted: 30 images whose colour says their class."""
    folder = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(0)
    for name, colour in (("dark", 40), ("light", 200)):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(15):
            pixels = np.clip(colour + rng.integers(-40, 40, (48, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.jpg", quality=95)
    fastload.convert(folder / "photos", folder / "photos.beton", progress=False)
    return folder / "photos.beton"


def run(name: str, *args: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, args)]
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "PASSIVE",
    }  # on a busy machine torch's threads must not spin
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss ([0-9.]+)", text)]


def test_plain_loop(photos):
    text = run("plain_loop.py", photos, "--model", "test_resnet", "--epochs", 6, *SMALL)
    found = losses(text)
    assert len(found) == 6 and found[-1] < 0.5 * found[0]
    assert text.splitlines()[-1].endswith("accuracy 1.0000")


def test_lightning(photos, tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="needs pip install 'fastload[test]'")
    monkeypatch.chdir(tmp_path)  # where Lightning would leave its logs
    text = run("lightning_module.py", photos, "--model", "test_resnet", "--epochs", 3, "--steps", 10, *SMALL)
    assert "steps 10," in text  # ceil(30 / 8) batches an epoch, so the third is left early
    assert losses(text)[-1] < 0.69


def test_accelerate(photos):
    pytest.importorskip("accelerate", reason="needs pip install 'fastload[test]'")
    found = losses(
        run("accelerate_loop.py", photos, "--model", "test_resnet", "--epochs", 6, "--steps", 3, *SMALL)
    )
    assert len(found) == 6 and found[-1] < 0.5 * found[0]


@pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="needs the extra 'ffcv'")
def test_ffcv_reads_our_file(photos):
    text = run("ffcv_reads_our_file.py", photos, *SMALL)
    assert "30 images, labels equal: True" in text
    colours = [float(v) for v in re.findall(r"[0-9.]+", text.split("mean colour")[1])]
    want = np.mean([item["image"].mean(axis=(0, 1)) for item in fastload.open(photos)], axis=0)
    assert colours == pytest.approx(want.tolist(), abs=3)


def test_every_example_is_run_here():
    here = Path(__file__).read_text()
    assert all(f'"{path.name}"' in here for path in EXAMPLES.glob("*.py"))
