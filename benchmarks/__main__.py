"""Comparisons behind the project's claims: ``python -m fastload.benchmarks compare photos.tar --peers cpu,ffcv``.

The same as ``fastload bench DATA --compare``, with all options, for those who measure the project and not their own data.
"""

from __future__ import annotations

import json
import sys

import click

from fastload.benchmarks.compare_options import compare_flags
from fastload.errors import FastloadError


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
