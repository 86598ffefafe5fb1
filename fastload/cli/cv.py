"""``fastload cv photos.beton --model resnet18 --folds 5 --groups person -o runs/cv``: a model for each fold, one true score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastload.cli.options import Sections, epoch_line, resolve, told_warnings, training_options
from fastload.errors import UsageError

if TYPE_CHECKING:
    from fastload.train import CvRun, Run

SCHEMES = ("auto", "kfold", "stratified", "group", "stratified_group")


@click.command(cls=Sections)
@click.argument("data", required=False)
@click.option("-o", "--out", help="Run folder.  [default: runs/MODEL-cv]")
@click.option(
    "--folds", default="5", show_default=True, help="How many, or a saved split (folds.csv of another run)."
)
@click.option(
    "--repeats", type=int, default=1, show_default=True, help="Splits, whose probabilities are averaged."
)
@click.option(
    "--scheme",
    type=click.Choice(SCHEMES),
    default="auto",
    show_default=True,
    help="How images are dealt out.",
)
@click.option("--column", help="A field whose values are the folds.")
@click.option("--resume", is_flag=True, help="Go on with the folds in the folder, with their own options.")
@click.option("--overwrite", is_flag=True, help="Start anew in a folder that holds a run.")
@click.option("--epoch-lines", is_flag=True, help="A line for each epoch, not only for each fold.")
@click.option("--json", "as_json", is_flag=True, help="Last line of the output: one JSON object.")
@training_options(without=("data", "valid", "split", "fold", "valid_fraction"))
def command(
    data: str | None,
    out: str | None,
    folds: str,
    repeats: int,
    scheme: str,
    column: str | None,
    resume: bool,
    overwrite: bool,
    epoch_lines: bool,
    as_json: bool,
    config_file: str | None,
    sets: tuple[str, ...],
    **options: Any,
) -> None:
    """Cross-validate a timm model on DATA (.beton): every image is scored by a model that never saw it."""
    from fastload.train import Config, cross_validate
    from fastload.train.callbacks import Callback
    from fastload.train.runs import CONFIG

    folder = Path(out if out is not None else f"runs/{options['model'] or Config.model}-cv")
    known = resume and (folder / CONFIG).is_file()
    cfg = resolve(
        {**options, "data": data}, config_file, sets, Config.load(folder / CONFIG) if known else None
    )
    if cfg.data is None:
        raise UsageError("there is nothing to train on; give the .beton file, got None")

    class Show(Callback):
        def on_epoch(self, session: Any, line: dict[str, Any]) -> None:
            if epoch_lines:
                click.echo(epoch_line(line, cfg.epochs, cfg.metric))

    def fold_line(number: int, run: Run) -> None:
        click.echo(
            f"fold {number}: {cfg.metric} {run.score:.4f} at epoch {run.best_epoch} of {len(run.history)}, "
            f"{run.valid_images:,} images held apart from {run.train_images:,}, {run.seconds:.1f} s"
        )

    with told_warnings():
        cv = cross_validate(
            cfg.data, cfg, int(folds) if folds.isdigit() else folds, scheme=scheme, repeats=repeats, column=column, out=folder,
            resume=resume, overwrite=overwrite, callbacks=[Show()], on_fold=fold_line,
        )  # fmt: skip
    click.echo(summary(cv))
    if as_json:
        click.echo(json.dumps(cv.figures()))


def summary(cv: CvRun) -> str:
    """The pooled scores as lines for a person."""
    best, last, (low, high) = cv.scores["best"], cv.scores["last"], cv.interval
    metric = cv.scores["metric"]
    grouped = "whole groups drawn" if cv.oof.groups is not None else "images drawn"
    return (
        f"pooled over {len(cv.runs)} folds, {best['images']:,} images: {metric} {cv.score:.4f} [{low:.4f}, {high:.4f}] "
        f"(95%, {grouped}), accuracy {best['accuracy']:.4f}, macro-F1 {best['macro_f1']:.4f}\n"
        f"at the last epochs, which no score has chosen: {metric} {last[metric]:.4f}\n"
        f"run: {cv.folder}"
    )
