"""``fastload tune photos.beton --model resnet18 --space space.yaml --trials 20 -o runs/tune``: search options with Optuna."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from fastload.cli.options import Sections, resolve, told_warnings, training_options
from fastload.errors import UsageError


@click.command(cls=Sections)
@click.argument("data", required=False)
@click.option("-o", "--out", default="runs/tune", show_default=True, help="Folder of the search.")
@click.option("--space", help="What to try: a YAML file, or file.py:function with a function space(trial).")
@click.option(
    "--trials", type=int, default=20, show_default=True, help="Trials in all, with those of before."
)
@click.option("--timeout", type=float, metavar="MINUTES", help="No new trial after this time.")
@click.option("--folds", type=int, help="Score by cross-validation with so many folds, not by one hold-out.")
@click.option("--storage", help="Database URL of Optuna.  [default: study.db in the folder]")
@click.option(
    "--pruner", type=click.Choice(("median", "none")), help="Stop trials that fall behind.  [default: median]"
)
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that share the trials.")
@click.option("--resume", is_flag=True, help="Go on with the search in the folder, with its own options.")
@click.option("--json", "as_json", is_flag=True, help="Last line of the output: one JSON object.")
@training_options(without=("data",))
def command(
    data: str | None,
    out: str,
    space: str | None,
    trials: int,
    timeout: float | None,
    folds: int | None,
    storage: str | None,
    pruner: str | None,
    workers: int,
    resume: bool,
    as_json: bool,
    config_file: str | None,
    sets: tuple[str, ...],
    **options: Any,
) -> None:
    """Search options of a training on DATA (.beton). A space in YAML has one option a line:

    \b
    lr: {low: 1e-4, high: 1e-2, log: true}
    batch_size: {low: 16, high: 64, step: 16}
    optimizer: [adamw, sgd]
    epochs: 10
    """
    from fastload.train import Config
    from fastload.train.runs import CONFIG
    from fastload.train.tune_space import read_space
    from fastload.train.tuning import BEST, trial_line, tune

    folder = Path(out)
    known = resume and (folder / CONFIG).is_file()
    cfg = resolve(
        {**options, "data": data}, config_file, sets, Config.load(folder / CONFIG) if known else None
    )
    if not known:
        if space is None:
            raise UsageError("say what to search, for example --space space.yaml")
        found = read_space(space)
        named = [options["model"], config_file, *(s for s in sets if s.startswith("model="))]
        if not any(named) and not callable(found) and "model" not in found:
            raise UsageError("say which model to train, for example --model resnet18")
    with told_warnings():
        search = tune(
            data, cfg, space, trials, folder, folds=folds, timeout=timeout, storage=storage, pruner=pruner, workers=workers,
            resume=resume, progress=sys.stderr.isatty(), on_trial=lambda trial: click.echo(trial_line(trial, cfg.metric)),
        )  # fmt: skip
    best = search.best_trial
    click.echo(search.table())
    click.echo(
        f"best: trial {best.number} of {len(search.trials)}, {cfg.metric} {search.best_score:.4f}; chosen as the best of them, so "
        f"somewhat too good\nrun: {search.folder_of(best.number)}\noptions: {folder / BEST}"
    )
    if as_json:
        click.echo(json.dumps(search.figures()))
