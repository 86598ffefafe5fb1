"""``fastload preview``: a PNG contact sheet."""

from __future__ import annotations

import os

import click

from fastload.errors import UsageError


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
    with open_dataset(data) as dataset:
        if class_name is not None:
            if class_name not in dataset.classes:
                raise unknown("class", class_name, dataset.classes)
            dataset = dataset.subset(dataset.labels == dataset.classes.index(class_name))
        chosen = spread(len(dataset), count).tolist()
        sheet = contact_sheet(dataset, chosen, min(columns, max(len(chosen), 1)), size, augment, seed)
        sheet.save(out, format="PNG")
    click.echo(f"{out}: {len(chosen)} of {len(dataset):,} images, {sheet.width} x {sheet.height} pixels")
