"""``fastload export runs/photos -o model.onnx``: a trained run as one file that needs no fastload."""

from __future__ import annotations

import json

import click

from fastload.errors import UsageError


@click.command()
@click.argument("run")
@click.option("-o", "--out", required=True, help="A .onnx or .pt2 (torch.export) file, or a folder for both.")
@click.option(
    "--which", type=click.Choice(["best", "last"]), default="best", show_default=True, help="Checkpoint."
)
@click.option("--json", "as_json", is_flag=True, help="Last line of the output: one JSON object.")
def command(run: str, out: str, which: str, as_json: bool) -> None:
    """Write the model of RUN with its preprocessing, and check that its outputs agree.

    RUN is a run folder of 'train' or 'cv' (then the mean of the folds' models), or a checkpoint. The model takes uint8 pixels
    (batch, size, size, 3) and gives probabilities.
    """
    if run.endswith(".beton"):
        raise UsageError(f"RUN must be a run folder or a checkpoint, not a dataset, got {run!r}")
    from fastload.train.export import TOLERANCE, export

    done = export(run, out, which=which)
    for name, difference in done.differences.items():
        click.echo(
            f"{name}: differs by {difference:.2g} at most from the PyTorch model on {done.checked_on} (allowed: {TOLERANCE:g})"
        )
    click.echo("written: " + ", ".join(str(path) for path in done.files))
    if as_json:
        click.echo(
            json.dumps({"files": [str(path) for path in done.files], "largest_difference": done.differences})
        )
