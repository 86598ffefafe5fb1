"""``fastload preview``: a PNG contact sheet."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Any

import click

from fastload.errors import DataError, UsageError


@click.command("preview")
@click.argument("data", type=click.Path())
@click.option("-o", "--out", default="preview.png", show_default=True, help="The PNG file to write.")
@click.option("--count", default=24, show_default=True, type=click.IntRange(1, 2000), help="Images to show.")
@click.option("--columns", default=6, show_default=True, type=click.IntRange(1, 100))
@click.option(
    "--size", default=160, show_default=True, type=click.IntRange(16, 1024), help="Pixels of a tile."
)
@click.option("--augment/--no-augment", default=False, help="As training would see them: crop, flip, colour.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the augmentation."
)
@click.option("--class", "class_name", help="Only images of this class.")
def command(
    data: str, out: str, count: int, columns: int, size: int, augment: bool, seed: int, class_name: str | None
) -> None:
    """Draw a contact sheet of DATA (a .beton file), evenly spread over it."""
    from fastload.dataset import open as open_dataset
    from fastload.errors import unknown
    from fastload.summary import contact_sheet, spread

    folder = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(folder):
        raise UsageError(f"cannot write {out}: there is no folder {folder}; make it first")
    if os.path.isdir(out):
        raise UsageError(
            f"cannot write {out}: it is a folder; name a file, as in -o {os.path.join(out, 'preview.png')}"
        )
    with open_dataset(data) as dataset:
        if class_name is not None:
            if class_name not in dataset.classes:
                raise unknown("class", class_name, dataset.classes)
            dataset = dataset.subset(dataset.labels == dataset.classes.index(class_name))
        chosen = spread(len(dataset), count).tolist()
        sheet = contact_sheet(dataset, chosen, min(columns, max(len(chosen), 1)), size, augment, seed)
        _save(sheet, out)
    click.echo(f"{out}: {len(chosen)} of {len(dataset):,} images, {sheet.width} x {sheet.height} pixels")


def _save(sheet: Any, out: str) -> None:
    """Write under another name first, so that a full disk leaves no half picture."""
    partial = f"{out}.partial"
    try:
        sheet.save(partial, format="PNG")
        os.replace(partial, out)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"cannot write {out}: {error.strerror}; make room or choose another disk"
            ) from error
        raise UsageError(
            f"cannot write {out}: {error.strerror or error}; choose another place with -o"
        ) from error
