"""``fastload convert SRC DST``: images into one .beton file.

>>> fastload convert photos/ photos.beton --max-side 500
"""

from __future__ import annotations

import json
import os
import shlex
from typing import Any

import click

from fastload.errors import DataError, UsageError


def _list(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """``a,b,c`` or ``@file`` with one name per line."""
    if value is None:
        return None
    if not value.startswith("@"):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    try:
        with open(value[1:], encoding="utf-8-sig") as file:
            return tuple(line.strip() for line in file if line.strip())
    except OSError as error:
        raise UsageError(
            f"--{param.name} cannot read {value[1:]!r} ({error.strerror}); check the name"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{value[1:]!r} is not UTF-8 text; save it as UTF-8") from error


@click.command()
@click.argument("src")
@click.argument("dst", required=False)
@click.option("--max-side", type=int, help="Longer side at most this many pixels.")
@click.option("--short-side", type=int, help="Shorter side at most this many pixels.")
@click.option("--quality", type=int, default=90, show_default=True, help="JPEG quality, 1 to 100.")
@click.option("--store", default="auto", show_default=True, help="jpeg, raw, or auto (raw for small images).")
@click.option(
    "--reencode",
    default="auto",
    show_default=True,
    help="auto keeps an original JPEG that needs no change; always; never.",
)
@click.option(
    "--label-from",
    default="auto",
    show_default=True,
    help="parent, none, column:NAME, or regex:PATTERN with named groups (label, group, ...).",
)
@click.option(
    "--label", "labels", multiple=True, help="Label column of a CSV or key of a tar's .json; may be repeated."
)
@click.option("--label-sep", help="Split the label column at this text: several labels an image.")
@click.option("--classes", callback=_list, help="Class names in order: a,b,c or @file with one a line.")
@click.option("--path-column", help="CSV column of the images' paths (found by itself as a rule).")
@click.option("--id-column", help="CSV column of unique ids; default: the path.")
@click.option("--root", help="Folder that relative paths of a CSV start from; default: the CSV's folder.")
@click.option("--crop-box", callback=_list, help="Four CSV columns of a bounding box, such as x0,y0,x1,y1.")
@click.option("--crop-margin", type=float, default=0.0, help="Fraction of the box to add on each side.")
@click.option(
    "--crop-format",
    default="xyxy",
    show_default=True,
    help="xyxy or xywh in pixels, or rel: x0,y0,x1,y1 from 0 to 1.",
)
@click.option("--shard-ids", is_flag=True, help="Put the shard's name before each key of a tar.")
@click.option(
    "--on-error", default="raise", show_default=True, help="raise at the first bad image, or skip it."
)
@click.option("--workers", type=int, help="Threads; default: one for each core.")
@click.option("--limit", type=int, help="Only the first N images.")
@click.option("--resume", is_flag=True, help="Go on after an interrupted run with the same options.")
@click.option("--overwrite", is_flag=True, help="Replace DST.")
@click.option(
    "--plan", is_flag=True, help="Convert a sample in several ways and show size, time and loading speed."
)
@click.option("--plan-sample", type=int, default=200, show_default=True, help="Images of that sample.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON in the last line.")
def command(src: str, dst: str | None, plan: bool, plan_sample: int, as_json: bool, **options: Any) -> None:
    """Images into one .beton file that loads fast.

    SRC is a folder of class folders, a flat folder, a CSV file, WebDataset tar shards ("train-{000..012}.tar"), or another .beton file.
    """
    if plan:
        from fastload.plan import plan as make_plan

        table = make_plan(src, sample=plan_sample, **options)
        click.echo(str(table))
        if as_json:
            click.echo(json.dumps(table.to_json()))
        return
    if dst is None:
        raise UsageError(f"name the file to write: fastload convert {shlex.quote(src)} images.beton")
    from fastload.converter import convert

    try:
        report = convert(src, dst, **options)
    except KeyboardInterrupt:
        if os.path.exists(f"{dst}.journal"):  # it may have been stopped before the first image
            click.echo("stopped; what is done is kept: run the same command with --resume to go on", err=True)
        raise
    click.echo(str(report))
    if as_json:
        click.echo(json.dumps(report.to_json(), ensure_ascii=False))
