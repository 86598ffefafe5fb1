"""``fastload train photos.beton --model resnet18 -o runs/photos``: learn, validate, keep the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fastload.cli.options import Sections, epoch_line, resolve, told_warnings, training_options
from fastload.errors import UsageError


@click.command(cls=Sections)
@click.argument("data", required=False)
@click.option("-o", "--out", help="Run folder.  [default: runs/MODEL]")
@click.option("--resume", is_flag=True, help="Go on with the run in the folder, with its own options.")
@click.option("--overwrite", is_flag=True, help="Start anew in a folder that holds a run.")
@click.option("--json", "as_json", is_flag=True, help="Last line of the output: one JSON object.")
@training_options(without=("data",))
def command(
    data: str | None,
    out: str | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    config_file: str | None,
    sets: tuple[str, ...],
    **options: Any,
) -> None:
    """Train a timm model on DATA (.beton) and write a run folder.

    Under torchrun (torchrun --nproc-per-node N -m fastload train ...) the processes share each epoch.
    """
    from fastload.train import Config, Trainer
    from fastload.train.callbacks import Callback
    from fastload.train.runs import CONFIG

    if options["valid"] is not None and options["valid_fraction"] is not None:
        raise UsageError(
            "--valid names the validation data and --valid-fraction holds some out; give one of them"
        )
    folder = Path(out if out is not None else f"runs/{options['model'] or Config.model}")
    known = resume and (folder / CONFIG).is_file()
    cfg = resolve(
        {**options, "data": data}, config_file, sets, Config.load(folder / CONFIG) if known else None
    )
    if (
        not known
        and options["model"] is None
        and config_file is None
        and not any(s.startswith("model=") for s in sets)
    ):
        raise UsageError("say which model to train, for example --model resnet18")

    class Show(Callback):
        def on_epoch(self, session: Any, line: dict[str, Any]) -> None:
            if line["epoch"] == 1 and cfg.engine != "cpu":
                click.echo(f"loader: {next(iter(session.feeds.values())).chosen}")
            click.echo(epoch_line(line, cfg.epochs, cfg.metric))

    with told_warnings():
        run = Trainer(cfg).fit(out=folder, resume=resume, overwrite=overwrite, callbacks=[Show()])
    averaged = f" ({run.best['average']})" if "average" in run.best else ""
    click.echo(
        f"best: epoch {run.best_epoch} of {len(run.history)}{averaged}, accuracy {run.accuracy:.4f}, macro-F1 {run.macro_f1:.4f} "
        f"on {run.valid_images:,} images held apart from {run.train_images:,}\n"
        f"speed: {run.images_per_s:,.0f} images/s, {run.stall:.0%} of the time waiting for data, {run.seconds:.1f} s in all\n"
        f"run: {run.folder}"
    )
    if as_json:
        click.echo(json.dumps(run.figures()))
