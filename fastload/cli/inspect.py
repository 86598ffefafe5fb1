"""``fastload inspect``: what is in a `.beton` file."""

from __future__ import annotations

import json

import click


@click.command("inspect")
@click.argument("data", type=click.Path())
@click.option(
    "--pixels",
    default=500,
    show_default=True,
    type=click.IntRange(0),
    help="Images to decode for mean and std; 0: none.",
)
@click.option("--classes", default=20, show_default=True, type=click.IntRange(0), help="Classes to list.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line.")
def command(data: str, pixels: int, classes: int, as_json: bool) -> None:
    """Fields, sizes, classes, resolutions, storage, and the mean and std of pixels of DATA (a .beton file)."""
    from fastload.dataset import open as open_dataset
    from fastload.summary import summarise

    with open_dataset(data) as dataset:
        summary = summarise(dataset, pixels, progress=True)
    click.echo(summary.text(classes))
    if as_json:
        click.echo(json.dumps(summary.to_json()))
