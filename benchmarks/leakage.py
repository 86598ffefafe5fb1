"""What a split by images does to a score when each person has several photos: ``python -m fastload.benchmarks leakage``.

A data set is made in which the truth can be measured: each subject has a look of its own, seven photos carry it, and the class
only says around which mean a subject's look was drawn, so that a model can know a subject that it has seen and must guess about a
new one. Plain stratified folds put a subject's photos on both sides; grouped folds do not; new subjects, drawn in the same way, give
the true score of the same models. The trade-off: a made look, so the size of the gap is this data set's, and only its sign is
everybody's.

>>> python -m fastload.benchmarks leakage --out leakage.jsonl
"""

from __future__ import annotations

import csv
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import fastload
from fastload.benchmarks import machine
from fastload.benchmarks.harness import write_jsonl
from fastload.errors import DataError

METRIC = "macro_f1"


@dataclass(frozen=True)
class People:
    """``subjects`` of ``classes``, ``photos`` each; ``apart``: distance of the classes' mean looks in standard deviations."""

    subjects: int = 200
    photos: int = 7
    classes: int = 4
    apart: float = 0.35
    new_subjects: int = 400
    size: int = 48
    blocks: int = 4

    def write(self, folder: Path, subjects: int, seed: int) -> Path:
        """JPEG files ``person_0001/3.jpg`` and ``labels.csv`` (path, label, person); the classes are the same for every seed."""
        means = np.random.default_rng(12345).normal(
            0, self.apart, (self.classes, self.blocks, self.blocks, 3)
        )
        rng = np.random.default_rng(seed)
        folder.mkdir(parents=True)
        rows = []
        for subject in range(subjects):
            label = subject % self.classes
            look = means[label] + rng.normal(0, 1, (self.blocks, self.blocks, 3))
            name = f"person_{subject:04}"
            (folder / name).mkdir()
            for photo in range(self.photos):
                path = f"{name}/{photo}.jpg"
                self._photo(look, rng).save(folder / path, quality=90)
                rows.append((path, f"class{label}", name))
        with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "label", "person"), *rows])
        return folder / "labels.csv"

    def _photo(self, look: np.ndarray, rng: np.random.Generator) -> Image.Image:
        """One picture of a look: blurred blocks under another light, shifted, with noise."""
        side = self.size
        light = rng.normal(0, 0.25, 3) + rng.normal(0, 0.25)
        small = np.clip(128 + 40 * (look + light), 0, 255).astype(np.uint8)
        whole = Image.fromarray(small).resize((side + 8, side + 8), Image.Resampling.BICUBIC)
        x, y = rng.integers(0, 9, 2)
        noisy = np.asarray(whole)[y : y + side, x : x + side] + rng.normal(0, 12, (side, side, 3))
        return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def run(
    people: People | None = None,
    *,
    seeds: tuple[int, ...] = (0,),
    epochs: int = 15,
    folds: int = 5,
    model: str = "test_resnet",
    out: str | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Score images-wise and grouped folds, and new subjects by the same models; the record is appended to ``out``."""
    people = people or People()
    found = [_once(people, seed, epochs, folds, model, say) for seed in seeds]
    record = {
        "kind": "leakage", "metric": METRIC, "subjects": people.subjects, "photos": people.photos,
        "classes": people.classes, "new_subjects": people.new_subjects, "model": model, "epochs": epochs, "folds": folds,
        "seeds": list(seeds), "runs": found,
        **{
            name: statistics.fmean(one[name] for one in found)
            for name in ("by_image", "by_image_true", "by_group", "by_group_true")
        },
        "environment": machine.environment(),
    }  # fmt: skip
    if out is not None:
        write_jsonl(out, [record])
    return record


def _once(
    people: People, seed: int, epochs: int, folds: int, model: str, say: Callable[[str], object]
) -> dict[str, Any]:
    from fastload.train import Config, cross_validate

    cfg = Config(
        model=model, epochs=epochs, size=people.size, batch_size=32, lr=3e-3, augment="none", flip=False, metric=METRIC,
        ema=0.0, label_smoothing=0.0, weight_decay=0.0, seed=seed,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fastload-leakage-") as place:
        folder = Path(place)
        for name, subjects, number in (
            ("known", people.subjects, seed),
            ("new", people.new_subjects, 1000 + seed),
        ):
            fastload.convert(
                people.write(folder / name, subjects, number), folder / f"{name}.beton", progress=False
            )
        data, new = folder / "known.beton", folder / "new.beton"
        refused = ""
        try:
            cross_validate(data, cfg, folds, out=folder / "refused", progress=False)
        except DataError as error:
            refused = str(error)
        result: dict[str, Any] = {"seed": seed, "refused": refused}
        say(
            f"seed {seed}, plain stratified folds: {'refused' if refused else 'NOT refused'}: {refused[:200]}"
        )
        for name, options in (
            ("by_image", {"allow_leak": True, "groups": "none"}),
            ("by_group", {"groups": "person"}),
        ):
            cv = cross_validate(data, replace(cfg, **options), folds, out=folder / name, progress=False)
            # Each fold's model by itself: that is what the folds' score is about, not their mean.
            true = [one.predict(new, progress=False).score(METRIC) for one in cv.runs]
            last = cv.scores["last"][METRIC]
            result |= {name: cv.score, f"{name}_true": statistics.fmean(true), f"{name}_last": last}
            result[f"{name}_interval"] = list(cv.interval)
            say(
                f"seed {seed}, {name}: pooled {METRIC} {cv.score:.3f} (last epochs {last:.3f}), on new subjects {statistics.fmean(true):.3f}"
            )
    return result


def text(record: dict[str, Any]) -> str:
    """A record in a few lines for people."""
    return "\n".join(
        f"{title}: {METRIC} {record[name]:.3f} by its folds, {record[name + '_true']:.3f} on {record['new_subjects']} new subjects"
        for name, title in (("by_image", "split by images"), ("by_group", "split by person"))
    )
