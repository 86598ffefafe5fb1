"""What a dataset holds, in figures and in pictures: the work behind ``fastload inspect`` and ``fastload preview``.

>>> print(summarise(fastload.open("photos.beton")).text())
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastload.dataset import Dataset
from fastload.errors import UsageError
from fastload.system import usable_cores

_SIDES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 65536)
_BAR = 24


@dataclass(frozen=True)
class Summary:
    """Figures of a dataset; ``mean`` and ``std`` are of pixels scaled to 0..1, over ``sampled`` images."""

    path: str
    samples: int
    bytes: int
    fields: list[dict[str, Any]]
    storage: dict[str, int]
    classes: dict[str, int]
    sides: dict[str, int]
    height: tuple[int, int, int]
    width: tuple[int, int, int]
    bytes_per_image: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sampled: int
    encoding: dict[str, Any]
    created_by: str
    format_version: int

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    def text(self, most_classes: int = 20) -> str:
        """A table for people."""
        per_image = f"{self.bytes_per_image / 1e3:,.1f} kB an image"
        lines = [
            f"{self.path}",
            f"  samples    {self.samples:,}",
            f"  file size  {self.bytes / 1e6:,.1f} MB, {per_image}",
            f"  written by {self.created_by or 'FFCV or another writer'}"
            + (f" (index version {self.format_version})" if self.format_version else ""),
            "",
            "  field             kind      shape",
        ]
        lines += [f"  {f['name']:<17} {f['kind']:<9} {f['detail']}" for f in self.fields]
        lines += ["", "  storage   " + ", ".join(f"{name} {n:,}" for name, n in self.storage.items() if n)]
        lines += [
            f"  height    {self.height[0]} to {self.height[2]} px, median {self.height[1]}",
            f"  width     {self.width[0]} to {self.width[2]} px, median {self.width[1]}",
            "",
            "  longer side (px)",
            *_bars(self.sides),
        ]
        if self.classes:
            lines += ["", f"  classes ({len(self.classes)})"]
            shown = dict(list(self.classes.items())[:most_classes])
            lines += _bars(shown)
            if len(self.classes) > most_classes:
                counts = list(self.classes.values())
                lines.append(
                    f"    ... {len(counts) - most_classes} more; all: {min(counts)} to {max(counts)} samples a class"
                )
        if self.sampled:
            numbers = [", ".join(f"{v:.4f}" for v in values) for values in (self.mean, self.std)]
            lines += ["", f"  pixels of {self.sampled:,} images: mean ({numbers[0]}), std ({numbers[1]})"]
        return "\n".join(lines)


def _bars(counts: dict[str, int]) -> list[str]:
    most = max(counts.values(), default=0) or 1
    wide = min(max((len(name) for name in counts), default=0), 32)
    return [
        f"    {name[:32]:<{wide}}  {n:>9,} {'#' * math.ceil(_BAR * n / most)}" for name, n in counts.items()
    ]


def spread(total: int, count: int) -> np.ndarray:
    """``count`` indices spread evenly over ``total``, (min(count, total),) int64."""
    return (
        np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
        if total
        else np.empty(0, np.int64)
    )


def summarise(dataset: Dataset, pixel_samples: int = 500, progress: bool = False) -> Summary:
    """Read the tables, and decode ``pixel_samples`` images (evenly spread, 0 for none) for mean and std."""
    heights, widths, modes = dataset.heights, dataset.widths, dataset.modes
    longer = np.maximum(heights, widths)
    sides = {
        (f"{low + 1}-{high}" if high < 65536 else f"over {low}"): int(n)
        for low, high, n in zip(_SIDES, _SIDES[1:], np.histogram(longer, np.array(_SIDES) + 0.5)[0])
        if n
    }
    fields = []
    for name, field in dataset.fields.items():
        names = dataset.class_names(name)
        detail = (
            f"{field.dtype} {field.shape}"
            if field.kind == "ndarray"
            else f"{len(names)} classes"
            if names
            else ""
        )
        title = dataset.info.get("field_titles", {}).get(name, "")
        fields.append({"name": name, "kind": field.kind, "detail": " ".join(p for p in (detail, title) if p)})
    size = sum(os.path.getsize(path) for path in dataset.paths)
    chosen = spread(len(dataset), pixel_samples)
    mean, std = _pixel_statistics(dataset, chosen, progress)
    return Summary(
        path=", ".join(dataset.paths),
        samples=len(dataset),
        bytes=size,
        fields=fields,
        storage={"jpeg": int((modes == 0).sum()), "raw": int((modes == 1).sum())},
        classes=dataset.label_counts()
        if "label" in dataset.fields and dataset.fields["label"].kind != "float"
        else {},
        sides=sides,
        height=_range(heights),
        width=_range(widths),
        bytes_per_image=size / max(len(dataset), 1),
        mean=mean,
        std=std,
        sampled=len(chosen),
        encoding=dict(dataset.info.get("encoding", {})),
        created_by=str(dataset.info.get("created_by", "")),
        format_version=dataset.format_version,
    )


def _range(values: np.ndarray) -> tuple[int, int, int]:
    if not values.size:
        return 0, 0, 0
    return int(values.min()), int(np.median(values)), int(values.max())


def _pixel_statistics(
    dataset: Dataset, chosen: np.ndarray, progress: bool
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    from tqdm.auto import tqdm

    name = dataset.image_field

    def moments(index: int) -> np.ndarray:
        pixels = dataset[int(index)][name].reshape(-1, 3).astype(np.int64)
        return np.stack([np.full(3, len(pixels)), pixels.sum(axis=0), (pixels * pixels).sum(axis=0)]).astype(
            np.float64
        )

    total = np.zeros((3, 3))
    with ThreadPoolExecutor(usable_cores()) as pool:
        for part in tqdm(
            pool.map(moments, chosen),
            total=len(chosen),
            desc="pixels",
            unit="img",
            disable=not progress or not len(chosen),
            leave=False,
        ):
            total += part
    if not total[0, 0]:
        return (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)
    mean = total[1] / total[0]
    std = np.sqrt(np.maximum(total[2] / total[0] - mean**2, 0))
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def contact_sheet(
    dataset: Dataset,
    indices: Sequence[int],
    columns: int,
    size: int,
    augment: bool,
    seed: int = 0,
    epoch: int = 0,
) -> Any:
    """A Pillow image of samples in a grid, captioned with class names; augmented as training would, or whole."""
    from PIL import Image, ImageDraw

    from fastload import transforms
    from fastload.draws import Plan
    from fastload.engines.cpu import EXACT, Engine

    if not indices:
        raise UsageError("a contact sheet needs at least one image, got none")
    caption = 14
    rows = -(-len(indices) // columns)
    sheet = Image.new("RGB", (columns * (size + 4) + 4, rows * (size + caption + 4) + 4), (32, 32, 32))
    draw = ImageDraw.Draw(sheet)
    plan = Plan(transforms.train(size, jitter=0.2)) if augment else None
    engine = Engine(dataset, plan, EXACT) if plan else None
    classes, bases = dataset.classes, dataset.indices
    for place, index in enumerate(indices):
        if plan and engine:
            base = bases[index : index + 1]
            rows_of = dataset.gather(dataset.image_field, base)
            pixels = np.empty((size, size, 3), np.uint8)
            engine.execute(
                int(base[0]), plan.draw(seed, epoch, base, rows_of["height"], rows_of["width"]), 0, pixels
            )
            tile = Image.fromarray(pixels)
        else:
            tile = Image.fromarray(dataset[index][dataset.image_field])
            tile.thumbnail((size, size))
        x = 4 + place % columns * (size + 4)
        y = 4 + place // columns * (size + caption + 4)
        sheet.paste(tile, (x + (size - tile.width) // 2, y + (size - tile.height) // 2))
        text = str(index)
        if "label" in dataset.fields and dataset.fields["label"].kind == "int":
            label = int(dataset.gather("label", bases[index : index + 1])[0])
            text += f" {classes[label] if 0 <= label < len(classes) else label}"
        draw.text(
            (x, y + size + 1), text[: size // 6].encode("ascii", "replace").decode(), fill=(230, 230, 230)
        )
    return sheet
