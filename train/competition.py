"""The whole competition in one call: folds of every model, test-time augmentation if it helps, ensemble, submission, page.

``compete("train.beton", "test.beton", [cfg1, cfg2], out="runs/all", sample="sample_submission.csv")``. Nothing here is special: each
step is the public function of its name and leaves its files, so any of them can be done again by hand. What is done already is not
done twice. The trade-off: all models share one split and the ensemble's choice is by out-of-fold score only.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastload.dataset import Dataset
from fastload.errors import UsageError
from fastload.train.config import Config
from fastload.train.cv import FOLDS, CvRun, cross_validate
from fastload.train.data import open_data
from fastload.train.ensemble import Ensemble
from fastload.train.predictions import Predictions
from fastload.train.report import report
from fastload.train.submission import Submission, check_sample, write_submission

SUBMISSION, PREDICTIONS, ENSEMBLE, PAGE = "submission.csv", "predictions.csv", "ensemble.json", "report.html"


@dataclass(frozen=True)
class Competition:
    """What came out. ``scores``: the pooled score of each model; ``ensemble``: searched; ``test``: its predictions."""

    folder: Path
    runs: list[CvRun]
    ensemble: Ensemble
    test: Predictions
    submission: Submission | None

    @property
    def scores(self) -> dict[str, float]:
        return {run.folder.name: run.score for run in self.runs}

    def figures(self) -> dict[str, Any]:
        """The outcome as plain values, for JSON."""
        return {
            "folder": str(self.folder), "metric": self.runs[0].config.metric, "scores": self.scores,
            "ensemble": self.ensemble.method, "ensemble_score": self.ensemble.score, "table": self.ensemble.table,
            "test_images": len(self.test), "note": self.test.note,
        }  # fmt: skip

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{score:.4f}</td></tr>"
            for name, score in self.scores.items()
        )
        return f"<table>{rows}<tr><td>ensemble ({self.ensemble.method})</td><td>{self.ensemble.score:.4f}</td></tr></table>"


def compete(
    data: Dataset | str | Path,
    test: Dataset | str | Path,
    configs: Sequence[Config],
    out: str | Path = "runs/competition",
    *,
    folds: int | str | Path = 5,
    tta: str | None = None,
    sample: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], object] = print,
    progress: bool = True,
    **options: Any,
) -> Competition:
    """Cross-validate every config on one split, search the ensemble, predict ``test`` and write what is to be handed in.

    ``options`` go to :func:`cross_validate`; ``tta`` is used for a model only if it improves its out-of-fold score. ``sample``: the
    competition's template, of which a ``submission.csv`` is made; ``predictions.csv`` has the probabilities in any case. ``say``
    gets a line after each step. UsageError and DataError as the steps raise them, the template's before anything is trained.
    """
    if not configs:
        raise UsageError("a competition needs at least one config, got none")
    if len({cfg.metric for cfg in configs}) > 1:
        raise UsageError(
            f"all configs must choose by one metric, got {sorted({cfg.metric for cfg in configs})}"
        )
    images = open_data(test)
    if sample is not None:
        check_sample(sample, [str(id) for id in images.ids])
    folder = Path(out)
    runs: list[CvRun] = []
    for name, cfg in zip(_names(configs), configs):
        place = folder / name
        split = folds if not runs else runs[0].folder / FOLDS
        going_on = resume and place.is_dir() and any(place.iterdir())
        run = cross_validate(
            data, cfg, split, out=place, resume=going_on, overwrite=overwrite, progress=progress, **options
        )
        low, high = run.interval
        say(f"{name}: {cfg.metric} {run.score:.4f} [{low:.4f}, {high:.4f}] pooled over {len(run.runs)} folds")
        runs.append(run)
    metric = configs[0].metric
    ensemble = Ensemble(runs, seed=configs[0].seed).search(metric)
    ensemble.save(folder / ENSEMBLE)
    say(f"ensemble: {ensemble.method}, {metric} {ensemble.score:.4f} (its choice nested)")
    predicted = ensemble.predict(images, tta=tta, progress=progress)
    predicted.write_csv(folder / PREDICTIONS)
    submission = None if sample is None else write_submission(predicted, sample, folder / SUBMISSION)
    if predicted.note:
        say(predicted.note)
    if submission is not None and submission.note:
        say(submission.note)
    report([*runs], folder / PAGE)
    return Competition(folder, runs, ensemble, predicted, submission)


def _names(configs: Sequence[Config]) -> list[str]:
    """A folder for each config: its model, numbered where one comes twice."""
    models = [cfg.model.replace("/", "_").replace(":", "_").strip("<>") for cfg in configs]
    return [
        name if models.count(name) == 1 else f"{name}-{models[: i + 1].count(name)}"
        for i, name in enumerate(models)
    ]
