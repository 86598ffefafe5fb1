"""Class probabilities of a trained run for new images, as arrays and as a CSV file.

``predict("runs/photos", "test.beton", out="out.csv")``. The images need no labels; if they have labels whose names the
run knows, the score is reported too, matched by the name of the class and never by its number.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastload.dataset import Dataset
from fastload.errors import DataError, UsageError
from fastload.loader import Loader
from fastload.train import metrics
from fastload.train.data import eval_pipeline, match_labels, open_data
from fastload.train.files import write_csv
from fastload.train.infer import infer
from fastload.train.model import resolve_amp
from fastload.train.runs import Run, load_run


@dataclass(frozen=True)
class Predictions:
    """``probs``: (N, C) float32, rows in the order of ``ids``, columns in the order of ``classes``.

    ``accuracy``, ``macro_f1`` and ``loss`` are None where the data have no labels to compare with; ``note`` says why.
    """

    ids: list[str]
    probs: np.ndarray
    classes: list[str]
    accuracy: float | None = None
    macro_f1: float | None = None
    loss: float | None = None
    note: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64: the number of the most probable class."""
        return self.probs.argmax(axis=1)

    @property
    def images_per_s(self) -> float:
        return len(self.ids) / self.seconds if self.seconds else 0.0

    def write_csv(self, path: str | Path) -> None:
        """Columns ``id``, ``prediction`` (a class name), then ``p_<class>`` for every class. Atomic."""
        header = ["id", "prediction", *(f"p_{name}" for name in self.classes)]
        write_csv(path, header, self._rows())

    def _rows(self) -> Iterator[list[Any]]:
        for id, label, row in zip(self.ids, self.labels, self.probs):
            yield [id, self.classes[label], *(f"{p:.6g}" for p in row.tolist())]


def predict(
    run: Run | str | Path,
    data: Dataset | str | Path,
    batch_size: int = 64,
    device: str | None = None,
    out: str | Path | None = None,
    *,
    which: str = "best",
    threads: int | None = None,
    progress: bool = True,
) -> Predictions:
    """Run the model of ``run`` (averaged weights where there are) over all images of ``data``, in their order.

    ``which`` checkpoint: ``best`` or ``last``. ``out``: also write a CSV file. UsageError: no such run, a batch size
    below 1; DataError: empty data, a damaged checkpoint, or a model that gives something other than numbers.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size (--batch-size) must be at least 1, got {batch_size!r}")
    loaded = load_run(run, which, device)
    images = open_data(data)
    cfg = loaded.config
    amp = "off" if cfg.amp == "off" else resolve_amp("auto", loaded.device)
    where = None if loaded.device.type == "cpu" else str(loaded.device)
    start = time.perf_counter()
    loader = Loader(
        images, batch_size, transforms=eval_pipeline(cfg, loaded.mean, loaded.std), threads=threads,
        fields=[images.image_field], device=where,
    )  # fmt: skip
    try:
        probs = infer(loaded.model, loader, loaded.device, total=len(images), amp=amp, progress=progress)
    finally:
        loader.close()
    seconds = time.perf_counter() - start
    if not np.isfinite(probs).all():
        raise DataError(
            f"the model in {loaded.path} gives values that are no numbers; train again with a lower --lr"
        )
    labels, note = _comparable(images, loaded.classes)
    score: dict[str, float] = {} if labels is None else metrics.summary(labels, probs)
    ids = [str(id) for id in images.ids]
    result = Predictions(
        ids,
        probs,
        loaded.classes,
        score.get("accuracy"),
        score.get("macro_f1"),
        score.get("loss"),
        note,
        seconds,
    )
    if out is not None:
        result.write_csv(out)
    return result


def _comparable(data: Dataset, classes: list[str]) -> tuple[np.ndarray | None, str]:
    """Labels of ``data`` as numbers of ``classes``, or None and why there are none."""
    if "label" not in data.fields:
        return None, "the data have no labels, so there is no score"
    try:
        return match_labels(data, classes), ""
    except DataError as error:
        return None, f"no score: {error}"
