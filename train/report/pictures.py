"""Small pictures of some images of a dataset, as data URIs for a page that loads nothing.

>>> Pictures("photos.beton").find(["id-1"])["id-1"]
'data:image/jpeg;base64,...'
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastload.dataset import Dataset
from fastload.dataset import open as open_file
from fastload.errors import FastloadError

SIDE = 176  # pixels of the longer side: sharp on a screen of two dots a pixel


class Pictures:
    """``sources``: datasets or paths of ``.beton`` files, searched in this order. ``problem``: why pictures are missing, or empty."""

    def __init__(self, *sources: Dataset | str | Path) -> None:
        self.problem = "" if sources else "The run does not say which file it learned from."
        self.datasets: list[Dataset] = []
        for source in dict.fromkeys(sources):
            try:
                self.datasets.append(source if isinstance(source, Dataset) else open_file(source))
            except (FastloadError, OSError) as error:
                self.problem = f"{error}."

    def find(self, ids: Iterable[str]) -> dict[str, str]:
        """A data URI for each id that is there and can be decoded."""
        wanted, found = set(ids), {}
        for dataset in self.datasets:
            places = {id: i for i, id in enumerate(dataset.ids) if id in wanted and id not in found}
            for id, place in places.items():
                try:
                    found[id] = _encode(dataset[place][dataset.image_field])
                except FastloadError as error:
                    self.problem = f"{error}."
        if len(found) < len(wanted) and not self.problem:
            self.problem = f"{len(wanted) - len(found)} of {len(wanted)} images are not in the data."
        return found


def _encode(image: Any) -> str:
    """(H, W, 3) uint8 as a small JPEG."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
