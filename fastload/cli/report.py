"""``fastload report runs/a runs/b -o report.html``: one HTML page about trained runs, with plots and pictures."""

from __future__ import annotations

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "-o", "--out", default="report.html", show_default=True, help="Page to write; needs no other file."
)
@click.option(
    "--data", help="The .beton file with the pictures.  [default: the file that the run learned from]"
)
def command(runs: tuple[str, ...], out: str, data: str | None) -> None:
    """Scores, curves, mistakes and probable label errors of each RUN (a folder of train or cv) on one HTML page.

    Several runs are compared first. A run that is not finished is shown as far as it is.
    """
    from fastload.train.report import Page

    page = Page(runs, data)
    page.write(out)
    click.echo(page.text())
    click.echo(f"page: {out}")
