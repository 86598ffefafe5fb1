"""``fastload compete train.beton --test test.beton --models a,b --sample sample_submission.csv``: from folds to what is handed in."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import click

from fastload.cli.options import Sections, resolve, told_warnings, training_options
from fastload.errors import UsageError


@click.command(cls=Sections)
@click.argument("data")
@click.option("--test", required=True, help="Images to predict (.beton).")
@click.option(
    "--models",
    help="timm models, comma-separated, each cross-validated on the same split.  [default: --model]",
)
@click.option("--sample", help="Sample submission (.csv): submission.csv gets its ids, order and columns.")
@click.option("--folds", default="5", show_default=True, help="How many, or a saved split (folds.csv).")
@click.option(
    "--tta",
    help="Views at test time, such as hflip; used for a model only if they improve its out-of-fold score.",
)
@click.option(
    "-o", "--out", default="runs/competition", show_default=True, help="Folder of all that is made."
)
@click.option("--resume", is_flag=True, help="Go on with what is in the folder.")
@click.option("--overwrite", is_flag=True, help="Start anew in a folder that holds runs.")
@click.option("--json", "as_json", is_flag=True, help="Last line of the output: one JSON object.")
@training_options(without=("data", "valid", "split", "fold", "valid_fraction"))
def command(
    data: str,
    test: str,
    models: str | None,
    sample: str | None,
    folds: str,
    tta: str | None,
    out: str,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    config_file: str | None,
    sets: tuple[str, ...],
    **options: Any,
) -> None:
    """Cross-validate models on DATA, put them together, predict TEST and write the submission and a report."""
    from fastload.train.competition import PAGE, PREDICTIONS, SUBMISSION, compete

    if models is not None and options["model"] is not None:
        raise UsageError(f"--models names all models and --model one; give one of them, got {models!r}")
    cfg = resolve(options, config_file, sets)
    names = [name.strip() for name in (models or cfg.model).split(",") if name.strip()]
    with told_warnings():
        result = compete(
            data, test, [replace(cfg, model=name) for name in names], out, folds=int(folds) if folds.isdigit() else folds, tta=tta,
            sample=sample, resume=resume, overwrite=overwrite, say=click.echo,
        )  # fmt: skip
    made = [PREDICTIONS, *([SUBMISSION] if sample is not None else []), PAGE]
    click.echo(f"{len(result.test):,} test images predicted; {', '.join(made)} in {result.folder}")
    if as_json:
        click.echo(json.dumps(result.figures()))
