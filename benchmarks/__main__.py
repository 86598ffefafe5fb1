"""Comparisons behind the project's claims: ``python -m fastload.benchmarks compare photos.tar --peers cpu,ffcv``.

The same as ``fastload bench DATA --compare``, with all options, for those who measure the project and not their own data.
"""

from __future__ import annotations

import json
import sys

import click

from fastload.benchmarks.compare_options import compare_flags
from fastload.errors import FastloadError, UsageError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Measure fastload beside its peers."""


@cli.command("compare")
@click.argument("data", type=click.Path())
@click.option("--peers", default="cpu,ffcv", show_default=True, help="Comma-separated, or all.")
@compare_flags
@click.option(
    "--rounds", default=5, show_default=True, help="Rounds in which the peers take turns, at least 5."
)
@click.option(
    "--threads", type=int, default=None, help="Threads or workers of each peer. [default: all cores]"
)
@click.option("--batch-size", default=64, show_default=True, help="Images a batch.")
@click.option("--out", type=click.Path(), default=None, help="Append each record to this JSON-lines file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array as the last line.")
def compare(
    data: str,
    peers: str,
    workloads: str,
    baseline: str | None,
    install: bool,
    images: int,
    rounds: int,
    threads: int | None,
    batch_size: int,
    out: str | None,
    as_json: bool,
) -> None:
    """Peers on the same work with DATA: a folder of class folders with photographs, a tar of one, or a .beton of JPEG images."""
    from fastload.benchmarks.compare import run
    from fastload.benchmarks.compare_table import table

    records = run(
        data,
        peers,
        workloads,
        baseline=baseline,
        rounds=rounds,
        images=images,
        threads=threads,
        batch_size=batch_size,
        install=install,
        out=out,
        done=lambda record: click.echo(table(record) + "\n"),
    )
    if out is not None:
        click.echo(f"Records: {out}")
    if as_json:
        click.echo(json.dumps(records))


@cli.command("accuracy")
@click.argument("data", type=click.Path())
@click.option("--arms", default="ffcv,cpu", show_default=True, help="Two peers that read a .beton.")
@click.option(
    "--seeds", default="0,1,2", show_default=True, help="Comma-separated; each arm trains once a seed."
)
@click.option("--model", default="test_resnet", show_default=True, help="A timm model.")
@click.option("--size", default=64, show_default=True, help="Side of the square the model sees, in pixels.")
@click.option(
    "--resize", default=73, show_default=True, help="Shorter side of validation images before the cut."
)
@click.option("--epochs", default=14, show_default=True, help="Epochs of each training.")
@click.option("--batch-size", default=32, show_default=True, help="Images a step.")
@click.option("--threads", type=int, default=None, help="Threads of loader and model. [default: all cores]")
@click.option("--out", type=click.Path(), default=None, help="Append the record to this JSON-lines file.")
def accuracy(
    data: str,
    arms: str,
    seeds: str,
    model: str,
    size: int,
    resize: int,
    epochs: int,
    batch_size: int,
    threads: int | None,
    out: str | None,
) -> None:
    """The accuracy of a model trained on each of two loaders' crops of DATA, a .beton with a field `label`."""
    from fastload.benchmarks.accuracy import run, text
    from fastload.system import usable_cores

    record = run(
        data,
        arms=arms.split(","),
        seeds=_numbers(seeds),
        out=out,
        say=lambda line: click.echo(line, err=True),
        model=model,
        size=size,
        resize=resize,
        epochs=epochs,
        batch=batch_size,
        threads=usable_cores() if threads is None else threads,
    )
    click.echo(text(record))
    click.echo(json.dumps(record))


@cli.command("leakage")
@click.option(
    "--seeds", default="0,1,2", show_default=True, help="Comma-separated; a data set and a split each."
)
@click.option("--subjects", default=200, show_default=True, help="People in the data, seven photos each.")
@click.option("--new-subjects", default=400, show_default=True, help="People that give the true score.")
@click.option("--epochs", default=15, show_default=True, help="Epochs of each fold.")
@click.option("--folds", default=5, show_default=True, help="Folds of each split.")
@click.option("--model", default="test_resnet", show_default=True, help="A timm model.")
@click.option("--out", type=click.Path(), default=None, help="Append the record to this JSON-lines file.")
def leakage(
    seeds: str, subjects: int, new_subjects: int, epochs: int, folds: int, model: str, out: str | None
) -> None:
    """What a split by images, and one by people, say of models whose true score is known; made data, no download."""
    from fastload.benchmarks.leakage import People, run, text

    record = run(
        People(subjects=subjects, new_subjects=new_subjects), seeds=_numbers(seeds), epochs=epochs, folds=folds, model=model,
        out=out, say=lambda line: click.echo(line, err=True),
    )  # fmt: skip
    click.echo(text(record))
    click.echo(json.dumps(record))


@cli.command("gpu")
@click.argument("data", type=click.Path(), required=False)
@click.option(
    "--seconds", type=float, default=None, help="Budget of all parts. [default: 400, or 20 with --small]"
)
@click.option("--out", type=click.Path(), default=None, help="Append the record to this JSON-lines file.")
@click.option("--small", is_flag=True, help="Few images and one small model: to see that it runs.")
@click.option(
    "--skip",
    default="",
    help="Parts to leave out, with commas: tests,scaling,decode,kernel,loaders,models,stall.",
)
def gpu(data: str | None, seconds: float | None, out: str | None, small: bool, skip: str) -> None:
    """Tests, decoders, kernel, loaders, models and stall on a GPU, in under eight minutes; what needs one is left out without it.

    DATA: a folder of class folders with photographs, a tar of one, or a .beton of JPEG images; made up where it is not given.
    """
    from fastload.benchmarks.gpu import GpuOptions, ending, run

    skipped = tuple(name.strip() for name in skip.split(",") if name.strip())
    record = run(data, GpuOptions(seconds, small, skipped), out=out, say=lambda text: click.echo(text + "\n"))
    click.echo(ending(record))
    if out is not None:
        click.echo(f"Record: {out}")
    click.echo(json.dumps(record))


def _numbers(seeds: str) -> tuple[int, ...]:
    try:
        return tuple(int(seed) for seed in seeds.split(","))
    except ValueError:
        raise UsageError(f"--seeds are whole numbers with commas between, got {seeds!r}") from None


def main() -> None:
    """Run the group; an error that a user can cure is one line."""
    try:
        cli.main(prog_name="python -m fastload.benchmarks", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    except FastloadError as error:
        click.echo(f"error: {error}", err=True)
        for note in getattr(error, "__notes__", ()):
            click.echo(f"  {note}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
