"""``fastload check photos.beton``: copies, subjects, wrong labels and a test set that looks different, before they cost a score.

>>> fastload check train.beton --test test.beton --html check.html
"""

from __future__ import annotations

import json
import sys

import click


@click.command("check")
@click.argument("data", type=click.Path())
@click.option("--test", type=click.Path(), help="Test data (.beton): copies of training images, and drift.")
@click.option("--folds", type=click.Path(), help="A saved split (CSV with id and fold): copies across folds.")
@click.option(
    "--near",
    type=float,
    default=0.85,
    show_default=True,
    help="Least likeness of look-alikes, 0.5 to 1; less finds more, and more of it wrong.",
)
@click.option(
    "--json", "json_file", metavar="FILE", help="Write everything found as JSON; - for the output, alone."
)
@click.option("--html", "html_file", type=click.Path(), help="Write one page with the pictures side by side.")
@click.option("--threads", type=click.IntRange(1), help="Threads. [default: one for each core]")
@click.option("--strict", is_flag=True, help="Exit code 1 if there is a problem.")
def command(
    data: str,
    test: str | None,
    folds: str | None,
    near: float,
    json_file: str | None,
    html_file: str | None,
    threads: int | None,
    strict: bool,
) -> None:
    """Look for what makes a score on DATA (a .beton file) untrue.

    Classes with few images, subjects with several images, exact copies and look-alikes (turned and mirrored ones too), copies with
    several labels, and, with --test, copies of training images and a test set that looks different. Nothing is changed.
    """
    from fastload.check import check
    from fastload.errors import DataError, UsageError

    report = check(data, test, folds=folds, near=near, threads=threads)
    if json_file == "-":
        click.echo(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        click.echo(report.text())
        if json_file is not None:
            try:
                with open(json_file, "w", encoding="utf-8") as file:
                    json.dump(report.to_json(), file, ensure_ascii=False, indent=1)
            except OSError as error:
                raise UsageError(
                    f"the JSON cannot be written ({error.strerror}); choose another place, got {json_file!r}"
                ) from error
            click.echo(f"\nJSON: {json_file}")
    if html_file is not None:
        report.write_html(html_file)
        click.echo(f"page: {html_file}", file=sys.stderr if json_file == "-" else None)
    if strict and report.problems:
        raise DataError(f"{data}: {len(report.problems)} problems found, and --strict was given")
