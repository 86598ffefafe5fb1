"""``fastload demo``: the whole job with the public commands, on images that come with scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("demo")
@click.option(
    "--out", type=click.Path(), default="./fastload-demo", show_default=True, help="Folder for all it makes."
)
@click.option("--overwrite", is_flag=True, help="Replace the files of an earlier demo in that folder.")
@click.option("--keep/--no-keep", default=True, show_default=True, help="Keep the folder at the end.")
@click.option("--epochs", type=int, default=None, help="Epochs of training. [default: what reaches 97%]")
def command(out: str, overwrite: bool, keep: bool, epochs: int | None) -> None:
    """Convert, inspect, bench, train and predict on real images, without a network. Under 3 minutes on 2 cores.

    Each command is printed before it runs. The last line is one JSON object with the figures. Exit code 1 if the test
    accuracy is not above 97%.
    """
    from fastload.demo import DemoOptions, check_accuracy, demo

    options = DemoOptions() if epochs is None else DemoOptions(epochs=epochs)
    figures = demo(Path(out), options, overwrite=overwrite, keep=keep, echo=click.echo)
    click.echo(json.dumps(figures))
    check_accuracy(figures)
