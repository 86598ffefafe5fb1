"""Comparisons behind the project's claims: ``python -m fastload.benchmarks vs-ffcv --data photos.tar``.

Not part of the ``fastload`` command, because a user's question is answered by ``fastload bench``.
"""

from __future__ import annotations

import json
import sys

import click

from fastload.errors import FastloadError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Measure fastload beside its peers."""


@cli.command("vs-ffcv")
@click.option(
    "--data", required=True, type=click.Path(), help="Folder of class folders with photos, or a tar of one."
)
@click.option("--rounds", default=7, show_default=True, help="Alternating rounds, at least 5.")
@click.option("--images", default=2000, show_default=True, help="Images a round (whole epochs).")
@click.option("--copies", default=4, show_default=True, help="How often each photo stands in the file.")
@click.option("--threads", default=2, show_default=True, help="Threads or workers of each peer.")
@click.option("--out", type=click.Path(), default=None, help="Append the record to this JSON-lines file.")
def vs_ffcv(data: str, rounds: int, images: int, copies: int, threads: int, out: str | None) -> None:
    """Load, start and convert beside FFCV 1.0.2, alternating, on the same file. A few minutes."""
    from tqdm.auto import tqdm

    from fastload.benchmarks.harness import write_jsonl
    from fastload.benchmarks.vs_ffcv import VsOptions, compare, table

    options = VsOptions(data, rounds=rounds, images=images, copies=copies, threads=threads)
    with tqdm(desc="vs-ffcv", unit="job", leave=False) as bar:

        def say(text: str) -> None:
            bar.set_postfix_str(text)
            bar.update(1)

        record = compare(options, say)
    click.echo(table(record))
    if out is not None:
        click.echo(f"record: {write_jsonl(out, [record])}")
    click.echo(json.dumps(record))


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
