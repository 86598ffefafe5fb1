"""``fastload verify``: every checksum, and every image decodes."""

from __future__ import annotations

import json

import click

from fastload.errors import DataError


@click.command("verify")
@click.argument("data", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line.")
def command(data: str, as_json: bool) -> None:
    """Check each checksum of DATA (a .beton file) and decode each image. Exit code 1 and a list if any is bad."""
    from fastload.dataset import open as open_dataset
    from fastload.dataset import verify

    with open_dataset(data) as dataset:
        result = verify(dataset, progress=True)
    for bad in result.bad:
        which = "" if bad["index"] is None else f"sample {bad['index']}, id {bad['id']!r}, source "
        click.echo(f"{which}{bad['source']!r}: {bad['reason']}")
    what = (
        "decodes and matches its checksum" if result.has_checksums else "decodes (the file has no checksums)"
    )
    if result.ok:
        click.echo(f"{data}: each of {result.samples:,} samples {what}")
    if as_json:
        click.echo(
            json.dumps({"samples": result.samples, "checksums": result.has_checksums, "bad": result.bad})
        )
    if not result.ok:
        raise DataError(
            f"{data}: {len(result.bad):,} damaged places in {result.samples:,} samples; fetch or convert the file again, "
            "or load it with on_error='replace'"
        )
