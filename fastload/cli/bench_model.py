"""``fastload bench model --models resnet18,convnext_tiny``: which of channels_last, AMP, compile and CUDA graphs pays."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import click


@click.command("model")
@click.option("--models", required=True, metavar="A,B,C", help="Names of timm models.")
@click.option("--size", default=224, show_default=True, help="Side of the images in pixels.")
@click.option("--batch-size", default=64, show_default=True, help="Images a step.")
@click.option("--device", default=None, help="cpu, cuda, cuda:1, mps. [default: the best there is]")
@click.option("--classes", default=1000, show_default=True, help="Classes of the model.")
@click.option(
    "--seconds", default=60.0, show_default=True, help="Time for each model; compiling comes on top."
)
@click.option(
    "--rounds", default=5, show_default=True, help="Alternating rounds of every figure, at least 5."
)
@click.option(
    "--compile/--no-compile", "compile", default=None, help="Run torch.compile. [default: on CUDA only]"
)
@click.option("--out", type=click.Path(), default=None, help="Append the record to this JSON-lines file.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as one JSON object, last.")
def command(models: str, out: str | None, as_json: bool, **given: Any) -> None:
    """Images/s of a training step of each model on random images, plain and with channels_last, AMP, torch.compile and CUDA
    graphs.

    Says which of them pays, which variant is best, and how fast a loader must be for it never to wait. A variant whose loss is
    not that of the plain one shows no speed.
    """
    from tqdm.auto import tqdm

    from fastload.benchmarks.harness import write_jsonl
    from fastload.benchmarks.model import ModelOptions, measure
    from fastload.benchmarks.model_table import table

    options = ModelOptions(tuple(name.strip() for name in models.split(",") if name.strip()), **given)
    if out is not None:
        write_jsonl(out, [])  # a file that cannot be written is said now, and not after minutes
    with tqdm(desc="bench model", unit="job", leave=False) as bar:

        def say(text: str) -> None:
            bar.set_postfix_str(text)
            bar.update(1)

        record = measure(options, say)
    click.echo(f"Training steps on {record['settings']['device']}\n")
    click.echo(table(record) + "\n")
    for row in record["rows"]:
        click.echo(textwrap.fill(row["sentence"], 100))
    for note in record["notes"]:
        click.echo(textwrap.fill(f"Note: {note}", 100, subsequent_indent=" " * 6))
    if out is not None:
        click.echo(f"Record: {write_jsonl(out, [record])}")
    if as_json:
        click.echo(json.dumps(record))
