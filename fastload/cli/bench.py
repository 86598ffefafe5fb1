"""``fastload bench photos.beton --model resnet18``: which side is the bottleneck, in one sentence."""

from __future__ import annotations

import json
import textwrap

import click


@click.command("bench")
@click.argument("data", type=click.Path())
@click.option("--model", default="resnet18", show_default=True, help="Name of a timm model.")
@click.option(
    "--size", default=224, show_default=True, help="Side of the square that the model sees, in pixels."
)
@click.option("--batch-size", default=64, show_default=True, help="Images a step.")
@click.option("--threads", type=int, default=None, help="Threads of the loader. [default: all cores]")
@click.option("--device", default=None, help="cpu, cuda, cuda:1, mps. [default: the best there is]")
@click.option(
    "--seconds", default=40.0, show_default=True, help="Time budget; the number of steps adapts to it."
)
@click.option(
    "--transforms",
    "preset",
    type=click.Choice(["train", "eval"]),
    default="train",
    show_default=True,
    help="Which preset the loader runs.",
)
@click.option("--out", type=click.Path(), default=None, help="Append the record to this JSON-lines file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def command(
    data: str,
    model: str,
    size: int,
    batch_size: int,
    threads: int | None,
    device: str | None,
    seconds: float,
    preset: str,
    out: str | None,
    as_json: bool,
) -> None:
    """Measure the loader alone, the model alone and both together on DATA (a .beton file), and name the bottleneck.

    The model side is what `fastload train` does for one batch: forward, backward and optimizer, with the same AMP and memory
    layout. About a minute at the default settings.
    """
    from fastload import transforms
    from fastload.benchmarks.bench import bench
    from fastload.benchmarks.harness import write_jsonl

    pipeline = transforms.eval(size) if preset == "eval" else transforms.train(size)
    result = bench(
        data,
        model,
        size=size,
        batch_size=batch_size,
        device=device,
        threads=threads,
        seconds=seconds,
        transforms=pipeline,
    )
    s = result.settings
    click.echo(
        f"{model} at {size} px, batches of {s['batch_size']}, {s['device']}, AMP {s['amp']}, "
        f"{s['threads']} loader threads, {s['images']:,} {s['store']} images"
    )
    click.echo(result.table())
    click.echo("")
    click.echo(textwrap.fill(f"Verdict: {result.verdict.sentence}", 100))
    for note in result.notes:
        click.echo(textwrap.fill(f"Note: {note}", 100, subsequent_indent="      "))
    if out is not None:
        click.echo(f"Record: {write_jsonl(out, [result.to_json()])}")
    if as_json:
        click.echo(json.dumps(result.to_json()))
