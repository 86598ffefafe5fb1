"""The whole job in under three minutes, on real images that come with scikit-learn: ``fastload demo``.

1,797 handwritten digits are learned and its two photographs are cut into many for the throughput figures. Everything after
writing the image files is done by the public commands, each printed before it runs, so a reader can do the same with images of
their own. The trade-off: subprocesses import torch once each, about two seconds, and in return nothing here is a special path.

>>> demo(Path("fastload-demo"))["accuracy"]
"""

from __future__ import annotations

import contextlib
import csv
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastload.benchmarks.sample_photos import write_photos
from fastload.errors import DataError, UsageError

TARGET_ACCURACY = 0.97
MADE = (
    "digits",
    "photos",
    "train.beton",
    "test.beton",
    "photos.beton",
    "run",
    "predictions.csv",
    "demo.json",
)
Echo = Callable[[str], object]


@dataclass(frozen=True)
class DemoOptions:
    """``photos``: JPEG files cut from the two photographs. ``bench_seconds``: budget of the throughput measurement."""

    model: str = "test_resnet"
    bench_model: str = "resnet18"
    size: int = 32
    epochs: int = 10
    batch_size: int = 64
    photos: int = 600
    bench_seconds: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "photos"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")


def demo(
    out: Path,
    options: DemoOptions | None = None,
    *,
    overwrite: bool = False,
    keep: bool = True,
    echo: Echo = print,
) -> dict[str, Any]:
    """Make the images, run convert, inspect, bench, train and predict, and return the figures.

    ``keep=False`` removes what was made at the end. Raises ``UsageError`` if ``out`` holds files and ``overwrite`` is False,
    and ``DataError`` if a command fails; whether the accuracy is good enough is for :func:`check_accuracy` to say.
    """
    options = options or DemoOptions()
    prepare(out, overwrite)
    started = time.perf_counter()
    echo(f"Writing image files to {out}: scikit-learn's digits, and crops of its two photographs")
    counts = write_digits(out / "digits", options.size, options.seed)
    counts["photos"] = write_photos(out / "photos", options.photos, options.seed)
    echo(
        f"  {counts['train']:,} digits to train, {counts['test']:,} to test, {counts['photos']:,} photographs"
    )
    steps = Steps(echo)
    steps.done["images"] = time.perf_counter() - started
    train, test, photos, run = (
        str(out / name) for name in ("train.beton", "test.beton", "photos.beton", "run")
    )
    answers = convert_all(steps, out, train, test, photos)
    steps.run("inspect", ["inspect", photos])
    answers["bench"] = steps.run(
        "bench",
        [
            "bench",
            photos,
            "--model",
            options.bench_model,
            "--seconds",
            f"{options.bench_seconds:g}",
            "--json",
        ],
    )
    answers["train"] = steps.run("train", train_command(train, run, options))
    predictions = out / "predictions.csv"
    steps.run("predict", ["predict", run, test, "-o", str(predictions)])
    accuracy = accuracy_of(predictions, test)
    figures = summary(options, answers, accuracy, steps.done, time.perf_counter() - started, counts)
    figures["made"] = made(out) if keep else {}
    (out / "demo.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    echo("")
    echo(table(figures))
    if not keep:
        remove(out)
    return figures


def check_accuracy(figures: dict[str, Any]) -> None:
    """DataError unless the demo learned what it should have."""
    if not figures["accuracy"] > TARGET_ACCURACY:
        raise DataError(
            f"the demo's test accuracy is {figures['accuracy']:.2%} and over {TARGET_ACCURACY:.0%} was expected; "
            "run it again with more --epochs, and report it if that does not help"
        )


def train_command(train: str, run: str, options: DemoOptions) -> list[str]:
    """Arguments of ``fastload train`` for the digits: small pictures, light augmentation, never mirrored."""
    return [
        *("train", train, "--model", options.model, "--size", str(options.size)),
        *("--epochs", str(options.epochs), "--batch-size", str(options.batch_size)),
        *(
            "--augment",
            "light",
            "--no-flip",
            "--lr",
            "3e-3",
            "--ema",
            "0.98",
            "--valid-fraction",
            "0.1",
            "-o",
            run,
            "--json",
        ),
    ]


def convert_all(steps: Steps, out: Path, train: str, test: str, photos: str) -> dict[str, Any]:
    """The three conversions; digits are stored raw because a 32 px JPEG saves little, photographs as JPEG."""
    digits = out / "digits"
    return {
        "convert_train": steps.run(
            "convert", ["convert", str(digits / "train"), train, "--store", "raw", "--json"]
        ),
        "convert_test": steps.run(
            "convert", ["convert", str(digits / "test"), test, "--store", "raw", "--json"]
        ),
        "convert_photos": steps.run(
            "convert", ["convert", str(out / "photos"), photos, "--max-side", "500", "--json"]
        ),
    }


class Steps:
    """Runs public commands as a user would, echoes what they print, and adds up the seconds of each name."""

    def __init__(self, echo: Echo) -> None:
        self.echo = echo
        self.done: dict[str, float] = {}

    def run(self, name: str, arguments: list[str]) -> dict[str, Any]:
        """One command. Its last line is returned as a dict where it is JSON, and not echoed."""
        self.echo("")
        self.echo("$ " + shlex.join(["fastload", *arguments]))
        clock = time.perf_counter()
        answer: dict[str, Any] = {}
        command = [sys.executable, "-m", "fastload", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
            for line in child.stdout or ():
                if line.startswith("{"):
                    with contextlib.suppress(json.JSONDecodeError):
                        answer = json.loads(line)
                        continue
                self.echo("  " + line.rstrip("\n"))
        self.done[name] = self.done.get(name, 0.0) + time.perf_counter() - clock
        if child.returncode != 0:
            raise DataError(
                f"'fastload {name}' ended with exit code {child.returncode}, so the demo stops; "
                "its message is above, and 'fastload doctor' says what is broken here"
            )
        return answer


def prepare(out: Path, overwrite: bool) -> None:
    """An empty folder for the demo. Only names that the demo makes are ever removed, and only with ``overwrite``."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder, and there is a file at {str(out)!r}; give another path")
    inside = {path.name for path in out.iterdir()} if out.exists() else set()
    if inside and not overwrite:
        raise UsageError(
            f"the folder {str(out)!r} is not empty; give another --out, or --overwrite to replace the demo"
        )
    foreign = sorted(name for name in inside if not _ours(name))
    if foreign:
        raise UsageError(
            f"the folder {str(out)!r} holds files that are not the demo's ({', '.join(foreign[:3])}); give another --out"
        )
    try:
        remove(out)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {str(out)!r} ({error.strerror}); give another --out") from error


def _ours(name: str) -> bool:
    return any(name == known or name.startswith(f"{known}.") for known in MADE)


def remove(out: Path) -> None:
    """Remove what the demo made, and the folder if nothing else is in it."""
    if not out.exists():
        return
    for path in [path for path in out.iterdir() if _ours(path.name)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not any(out.iterdir()):
        out.rmdir()


def write_digits(folder: Path, size: int, seed: int) -> dict[str, int]:
    """scikit-learn's 8x8 digits as ``size`` px PNG files, ``train/<digit>/`` and a stratified fifth in ``test/<digit>/``."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm.auto import tqdm

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), values 0-16 in the source
    train, test = train_test_split(
        np.arange(len(pixels)), test_size=0.2, stratify=data.target, random_state=seed
    )
    side = {int(i): "test" for i in test} | {int(i): "train" for i in train}
    for index in tqdm(range(len(pixels)), desc="digits", unit="file", leave=False):
        target = folder / side[index] / str(data.target[index])
        target.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels[index]).resize((size, size), Image.Resampling.BICUBIC)
        picture.save(target / f"{index:04d}.png")
    return {"train": len(train), "test": len(test)}


def accuracy_of(predictions: Path, test: str) -> float:
    """Share of the test images whose predicted class is the one in the test file."""
    import fastload

    with open(predictions, encoding="utf-8", newline="") as file:
        said = {row["id"]: row["prediction"] for row in csv.DictReader(file)}
    with fastload.open(test) as dataset:
        names = dataset.classes
        right = [said.get(str(id)) == names[int(label)] for id, label in zip(dataset.ids, dataset.labels)]
    if not right or len(said) != len(right):
        raise DataError(
            f"{predictions} has {len(said)} rows for {len(right)} test images; run the demo again"
        )
    return sum(right) / len(right)


def summary(
    options: DemoOptions,
    answers: dict[str, Any],
    accuracy: float,
    seconds: dict[str, float],
    total: float,
    counts: dict[str, int],
) -> dict[str, Any]:
    """The figures of the run as one JSON-able dict."""
    bench, train = answers["bench"], answers["train"]
    return {
        "accuracy": round(accuracy, 4),
        "test_images": counts["test"],
        "loader_images_per_s": bench["loader"]["median"],
        "model_images_per_s": bench["model"]["median"],
        "both_images_per_s": bench["both"]["median"],
        "stall": bench["stall"]["median"],
        "bottleneck": bench["bottleneck"],
        "verdict": bench["verdict"],
        "bench_model": options.bench_model,
        "train_model": options.model,
        "train_images_per_s": train.get("images_per_s"),
        "train_stall": train.get("stall"),
        "valid_accuracy": train.get("accuracy"),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "total_seconds": round(total, 1),
    }


def made(out: Path) -> dict[str, str]:
    """What the demo left behind, by what it is."""
    names = {
        "image files": "digits",
        "photographs": "photos",
        "training file": "train.beton",
        "test file": "test.beton",
        "photo file": "photos.beton",
        "trained run": "run",
        "predictions": "predictions.csv",
        "figures": "demo.json",
    }
    return {what: str(out / name) for what, name in names.items()}


def table(figures: dict[str, Any]) -> str:
    """A short table for people."""
    return "\n".join(_rows(figures))


def _rows(f: dict[str, Any]) -> Iterator[str]:
    from fastload.benchmarks.verdict import rate

    yield "Result"
    yield f"  test accuracy         {f['accuracy']:.2%} of {f['test_images']} digits ({f['train_model']})"
    yield f"  loader alone          {rate(f['loader_images_per_s'])} images/s (photographs, random crop 224, normalised)"
    yield f"  model alone           {rate(f['model_images_per_s'])} images/s ({f['bench_model']}, forward, backward, optimizer)"
    yield f"  both together         {rate(f['both_images_per_s'])} images/s, waiting for images {f['stall']:.1%} of the time"
    steps = ", ".join(f"{name} {value:.0f}" for name, value in f["seconds"].items())
    yield f"  seconds               {f['total_seconds']:.0f} in all ({steps})"
    for what, path in f["made"].items():
        yield f"  {what:<21} {path}"
