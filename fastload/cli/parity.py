"""``fastload parity photos.beton --model resnet18``: how far our pixels are from Pillow's and torchvision's."""

from __future__ import annotations

import json
import os

import click

from fastload.errors import DataError, UsageError


@click.command("parity")
@click.argument("data", type=click.Path())
@click.option("--images", default=500, show_default=True, help="Images to compare, spread evenly over DATA.")
@click.option("--size", type=int, help="Side of the crops in pixels.  [default: the run's, else 224]")
@click.option("--model", help="A timm model: compare its logits and accuracy too.")
@click.option(
    "--checkpoint",
    type=click.Path(),
    help="Weights for --model, or the folder of a 'fastload train' run (then --model is not needed).",
)
@click.option("--random-weights", is_flag=True, help="Allow a model that has not learned anything.")
@click.option("--device", help="Of the model: cuda, cuda:1, mps, cpu.  [default: the best there is]")
@click.option("--threads", type=int, help="Loader threads.  [default: all cores]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the random crops.")
@click.option("--out", type=click.Path(), help="Append the record to this JSON-lines file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line.")
def command(
    data: str,
    images: int,
    size: int | None,
    model: str | None,
    checkpoint: str | None,
    random_weights: bool,
    device: str | None,
    threads: int | None,
    seed: int,
    out: str | None,
    as_json: bool,
) -> None:
    """Compare the loader's pixels of DATA (a .beton file) with Pillow's and torchvision's, for random training crops and for the
    evaluation crop, with both ways to decode. Exit code 1 if an error against Pillow exceeds what the README promises.
    """
    from fastload import parity

    options = parity.Options(images, size, seed, threads, model, checkpoint, random_weights, device)
    if out is not None and not os.path.isdir(os.path.dirname(os.path.abspath(out))):
        raise UsageError(f"cannot write {out}: its folder is not there; make it first")
    report = parity.measure(data, options, progress=True)
    click.echo(report.text())
    if out is not None:
        parity.append_record(out, report)
        click.echo(f"Record: {out}")
    if as_json:
        click.echo(json.dumps(report.to_json()))
    if report.exceeded:
        raise DataError(
            "; ".join(report.exceeded)
            + "; where only 'fast' is named, the images have sharper colours than photographs have: use decode='exact'; "
            "'exact' should hold for any image: report it as a bug, with the table"
        )
