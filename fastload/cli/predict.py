"""``fastload predict runs/a runs/b test.beton -o out.csv --tta hflip``: class probabilities, or a submission file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastload.cli.options import told_warnings
from fastload.errors import UsageError

if TYPE_CHECKING:
    from fastload.dataset import Dataset
    from fastload.train.predictions import Predictions


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="RUN... DATA")
@click.option("-o", "--out", required=True, help="CSV file to write: id, prediction, p_<class> ...")
@click.option("--sample", help="Sample submission: the output has its ids, order and columns.")
@click.option(
    "--tta",
    help="Views at test time, such as hflip or hflip+shifts; used if they help on the held-out images.",
)
@click.option("--tta-always", is_flag=True, help="Use them without trying.")
@click.option(
    "--merge",
    type=click.Choice(["mean", "geometric"]),
    default="mean",
    show_default=True,
    help="Of the views.",
)
@click.option(
    "--flip-labels",
    metavar="A=B,...",
    help="Classes that a mirror image changes into each other, such as left=right.",
)
@click.option(
    "--ensemble",
    is_flag=True,
    help="Weigh the runs as their held-out probabilities say.  [default: plain mean]",
)
@click.option("--metric", help="What --ensemble is to be best in.  [default: the metric of the first run]")
@click.option(
    "--which", type=click.Choice(["best", "last"]), default="best", show_default=True, help="Checkpoint."
)
@click.option("--batch-size", type=int, default=64, show_default=True, help="Images per forward pass.")
@click.option("--threads", type=int, help="Loader threads.")
@click.option("--device", help="cuda, cuda:1, mps, cpu.  [default: the best there is]")
@click.option("--json", "as_json", is_flag=True, help="Last line of the output: one JSON object.")
def command(
    paths: tuple[str, ...],
    out: str,
    sample: str | None,
    tta: str | None,
    tta_always: bool,
    merge: str,
    flip_labels: str | None,
    ensemble: bool,
    metric: str | None,
    which: str,
    batch_size: int,
    threads: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Predict the classes of DATA (.beton) with one or more runs.

    RUN is a run folder of 'train' or 'cv', a checkpoint, or a saved ensemble (.json). Several are averaged.
    """
    from fastload.train.data import open_data
    from fastload.train.submission import check_sample, write_submission

    *runs, data = paths
    if not runs:
        raise UsageError(
            f"predict needs a run and then the data, as in: fastload predict runs/a test.beton -o out.csv; got {data!r}"
        )
    if metric is not None and not ensemble:
        raise UsageError(f"--metric is what --ensemble searches for; give both or none, got {metric!r}")
    options: dict[str, Any] = {
        "batch_size": batch_size, "device": device, "which": which, "tta": tta, "merge": merge, "always_tta": tta_always,
        "flip_labels": _pairs(flip_labels), "threads": threads,
    }  # fmt: skip
    images = open_data(data)
    if sample is not None:
        check_sample(sample, [str(id) for id in images.ids])
    with told_warnings():
        result = _ensemble(runs, metric, images, options) if ensemble else _mean(runs, images, options)
    submission = None
    if sample is None:
        result.write_csv(out)
    else:
        submission = write_submission(result, sample, out)
    click.echo(f"{len(result):,} images, {result.images_per_s:,.0f} images/s, written to {out}")
    for note in (result.note, submission.note if submission else ""):
        if note:
            click.echo(note)
    summary = result.summary() if result.labels is not None else {}
    if summary:
        click.echo(
            f"accuracy {summary['accuracy']:.4f}, macro-F1 {summary['macro_f1']:.4f} against the labels in {data}"
        )
    if as_json:
        figures = {
            "images": len(result), "out": out, "runs": runs, "accuracy": summary.get("accuracy"),
            "macro_f1": summary.get("macro_f1"), "loss": summary.get("log_loss"), "images_per_s": result.images_per_s,
            "seconds": result.seconds, "note": result.note, "unused": submission.unused if submission else 0,
        }  # fmt: skip
        click.echo(json.dumps(figures))


def _mean(runs: list[str], images: Dataset, options: dict[str, Any]) -> Predictions:
    """The mean of all runs; a saved ensemble is one of them."""
    from fastload.train.predicting import average, predict

    parts = []
    for run in runs:
        if run.endswith(".json"):
            from fastload.train.ensemble import Ensemble

            parts.append(Ensemble.load(run).predict(images, **options))
        else:
            parts.append(predict(run, images, **options))
    return parts[0] if len(parts) == 1 else average(parts)


def _ensemble(runs: list[str], metric: str | None, images: Dataset, options: dict[str, Any]) -> Predictions:
    """The runs put together in the way that is best on what was held out from each."""
    from fastload.train.config import Config
    from fastload.train.ensemble import Ensemble
    from fastload.train.runs import CONFIG

    if len(runs) < 2 or not all((Path(run) / CONFIG).is_file() for run in runs):
        raise UsageError(
            f"--ensemble weighs two run folders at least by their held-out probabilities, got {', '.join(runs)!r}"
        )
    goal = metric or Config.load(Path(runs[0]) / CONFIG).metric
    found = Ensemble(runs).search(goal)
    click.echo(f"ensemble: {found.method}, {goal} {found.score:.4f} on held-out images")
    return found.predict(images, **options)


def _pairs(text: str | None) -> dict[str, str] | None:
    """``left=right,up=down`` as a dict."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(sign and old and new for old, sign, new in pairs):
        raise UsageError(f"--flip-labels takes pairs of classes such as left=right,up=down, got {text!r}")
    return {old.strip(): new.strip() for old, _, new in pairs}
