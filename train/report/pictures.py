"""Small pictures of some images of a dataset, as data URIs for a page that loads nothing.

>>> find(["id-1"], ["photos.beton"])
({'id-1': 'data:image/jpeg;base64,...'}, '')
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fastload.dataset import Dataset
from fastload.dataset import open as open_file
from fastload.errors import CorruptError, FastloadError

SIDE = 176  # pixels of the longer side: sharp where they are shown, also on most phones


def find(ids: Iterable[str], sources: Sequence[Dataset | str | Path]) -> tuple[dict[str, str], str]:
    """A data URI for each id that is in the ``sources`` (datasets or ``.beton`` files, the first that has it), and why some lack."""
    wanted, found = set(ids), dict[str, str]()
    problem = "" if sources else "the run does not say which file it learned from."
    with contextlib.ExitStack() as stack:
        for source in dict.fromkeys(sources):
            try:
                dataset = source if isinstance(source, Dataset) else stack.enter_context(open_file(source))
                for i, id in enumerate(dataset.ids):
                    if id in wanted and id not in found:
                        with contextlib.suppress(CorruptError):  # the others can be shown
                            found[id] = _encode(dataset[i][dataset.image_field])
            except (FastloadError, OSError) as error:
                problem = f"{error}."
    if len(found) == len(wanted):
        return found, ""
    return (
        found,
        problem or f"{len(wanted) - len(found)} of {len(wanted)} images are not in the data, or damaged.",
    )


def _encode(image: np.ndarray) -> str:
    """(H, W, 3) uint8 as a small JPEG."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
