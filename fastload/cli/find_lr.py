"""``fastload find-lr photos.beton --model resnet18 --plot lr.png``: a learning rate, from a short rising run."""

from __future__ import annotations

import json
from typing import Any

import click

from fastload.cli.options import Sections, resolve, told_warnings, training_options


@click.command("find-lr", cls=Sections)
@click.argument("data", required=False)
@click.option("--low", type=float, default=1e-6, show_default=True, help="Learning rate of the first step.")
@click.option("--high", type=float, default=1.0, show_default=True, help="Learning rate of the last step.")
@click.option("--steps", type=int, default=100, show_default=True, help="Optimizer steps between the two.")
@click.option("--plot", help="Write the curve to this PNG file.")
@click.option("--json", "as_json", is_flag=True, help="Last line of the output: one JSON object.")
@training_options(without=("data", "lr"))
def command(
    data: str | None,
    low: float,
    high: float,
    steps: int,
    plot: str | None,
    as_json: bool,
    config_file: str | None,
    sets: tuple[str, ...],
    **options: Any,
) -> None:
    """Find a learning rate for a model on DATA (.beton), with the options of the training it is for."""
    from fastload.train.lr_finder import find_lr

    cfg = resolve({**options, "data": data}, config_file, sets)
    with told_warnings():
        curve = find_lr(cfg=cfg, low=low, high=high, steps=steps)
    click.echo(curve.summary())
    if plot is not None:
        curve.plot(plot)
        click.echo(f"plot: {plot}")
    if as_json:
        click.echo(json.dumps(curve.to_json()))
