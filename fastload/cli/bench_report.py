"""``fastload bench report results.jsonl --html page.html``: result files as Markdown and as one page with plots."""

from __future__ import annotations

import click


@click.command("report")
@click.argument("files", nargs=-1, required=True, type=click.Path(), metavar="FILES...")
@click.option("--html", type=click.Path(), default=None, help="Write one page that needs nothing else.")
@click.option(
    "--markdown", type=click.Path(), default=None, help="Write the Markdown here. [default: to the screen]"
)
@click.option("--title", default="fastload bench", show_default=True, help="Heading of the page.")
def command(files: tuple[str, ...], html: str | None, markdown: str | None, title: str) -> None:
    """Tables and plots of result FILES (JSON lines, as `fastload bench --out` writes them).

    The newest record of each measurement counts; the page lists the others by date. Nothing is measured again: the verdict is
    computed from the figures, and the same files give the same bytes.
    """
    from fastload.benchmarks.report import load
    from fastload.train.files import write_text

    report = load(files)
    if html is not None:
        write_text(html, report.html(title))
        click.echo(f"page: {html}")
    if markdown is not None:
        write_text(markdown, report.markdown())
        click.echo(f"Markdown: {markdown}")
    if html is None and markdown is None:
        click.echo(report.markdown(), nl=False)
