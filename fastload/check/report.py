"""What the checks found, as text, as JSON, and as one HTML page with the pictures side by side.

The page is self-contained: thumbnails are inside of it and it has no script, which costs some kilobytes a picture, so the number
of pictures is limited and JSON has the whole list.

>>> report.text(); report.to_json()["problems"]; report.write_html("check.html")
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastload.check.drift import PROPERTIES, Drift
from fastload.dataset import Dataset
from fastload.errors import DataError, FastloadError, UsageError

SHOWN_CLUSTERS, SHOWN_PICTURES, SHOWN_CLASSES = 30, 8, 40
# Of a cluster, what is worst about it first: a title, and what it means.
TITLES = {
    "conflict": ("Copies with several labels", "The same picture is labelled in more than one way."),
    "sides": ("Copies in training and in test data", "The score on these says what a model remembers."),
    "folds": ("Copies in several folds", "Validation sees what training has seen."),
    "copies": ("Exact copies alone", "The same bytes more than once, and nothing else that looks like them."),
    "alike": (
        "Look-alikes",
        "The same picture, turned, mirrored, resized or encoded again; exact copies of it too.",
    ),
}
SEVERE = ("conflict", "sides", "folds")
_THUMBNAIL = 144  # pixels of the longer side


@dataclass(frozen=True)
class Picture:
    """One image: ``side`` 0 is the data and 1 the test data, ``index`` its place there; ``turn`` says how the first picture of its
    cluster must be turned to look like it ("" for not at all, or known only through others)."""

    side: int
    index: int
    source: str
    id: str = ""
    label: str = ""
    fold: int | None = None
    turn: str = ""


@dataclass(frozen=True)
class Cluster:
    """Images that are copies or look-alikes of one another; ``copies``: how many of them have another one's very bytes; ``score``: the
    least cosine of two that look alike."""

    pictures: list[Picture]
    copies: int
    score: float
    conflict: bool
    across_sides: bool
    across_folds: bool

    @property
    def exact(self) -> bool:
        """All of them have the same bytes as another one."""
        return self.copies == len(self.pictures)


@dataclass(frozen=True)
class Groups:
    """Probable groups by paths: ``count`` of them with ``images`` in all, ``alike`` of which also look like another one of theirs."""

    rule: str
    why: str
    count: int
    images: int
    alike: int
    examples: list[list[Picture]]


@dataclass(frozen=True)
class Balance:
    """Images of each class; ``ratio`` of the largest to the smallest that has any; ``rare``: classes with few images, and how many."""

    counts: dict[str, int]
    ratio: float
    rare: dict[str, int]


@dataclass(frozen=True)
class Report:
    """Outcome of :func:`fastload.check.check`. ``problems`` are sentences, ``skipped`` pairs of a check and why it was not made.

    ``paths`` and ``images`` have one entry, or two with test data; ``balance`` and ``groups`` are None where there are none. Pictures are
    read from the files when the page is written.
    """

    paths: list[str]
    images: list[int]
    damaged: int
    balance: Balance | None
    groups: Groups | None
    clusters: list[Cluster]
    drift: list[Drift]
    skipped: list[tuple[str, str]]
    problems: list[str]
    datasets: tuple[Dataset, ...] = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON-able values."""
        kept = {name: value for name, value in vars(self).items() if name != "datasets"}
        return {"kind": "check", **{name: _plain(value) for name, value in kept.items()}}

    def text(self) -> str:
        """For a terminal: the problems, then the figures behind them."""
        lines = [f"{path}: {count:,} images" for path, count in zip(self.paths, self.images)]
        lines += ["", "problems" if self.problems else "no problems found"]
        lines += [f"  {n}. {problem}" for n, problem in enumerate(self.problems, 1)]
        if self.balance is not None:
            counts = self.balance.counts
            lines += [
                "",
                f"classes: {len(counts)}, {min(counts.values()):,} to {max(counts.values()):,} images each",
            ]
        if self.groups is not None:
            lines += [
                f"groups by paths ({self.groups.rule}): {self.groups.count:,} with {self.groups.images:,} images"
            ]
        for kind, chosen in self._kinds().items():
            count = sum(len(cluster.pictures) for cluster in chosen)
            lines += ["", f"{TITLES[kind][0].lower()}: {count:,} images in {len(chosen):,} clusters"]
            for cluster in chosen[:5]:
                names = [self._name(picture) for picture in cluster.pictures[:4]]
                more = len(cluster.pictures) - len(names)
                lines.append(f"  {', '.join(names)}{f' and {more} more' if more else ''}")
        if self.drift:
            lines += ["", "test against training data", *(f"  {row.sentence}" for row in self.drift)]
        if self.skipped:
            lines += ["", "not checked", *(f"  {what}: {why}" for what, why in self.skipped)]
        return "\n".join(lines)

    def html(self) -> str:
        """The page as text."""
        from importlib.resources import files

        import jinja2

        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        template = environment.from_string((files("fastload.check") / "template.html.j2").read_text("utf-8"))
        kinds = self._kinds()
        counts = sorted(self.balance.counts.items(), key=lambda kv: -kv[1]) if self.balance else []
        return template.render(
            report=self,
            worst=[(kind, found) for kind, found in kinds.items() if kind in SEVERE],
            rest=[(kind, found) for kind, found in kinds.items() if kind not in SEVERE],
            titles=TITLES,
            counts=counts
            if len(counts) <= SHOWN_CLASSES
            else counts[: SHOWN_CLASSES // 2] + counts[-SHOWN_CLASSES // 2 :],
            left_out=max(len(counts) - SHOWN_CLASSES, 0),
            thumbnail=self._thumbnail,
            name=self._name,
            caption=self._caption,
            steps=_steps,
            properties=PROPERTIES,
            most=SHOWN_CLUSTERS,
            most_pictures=SHOWN_PICTURES,
        )

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Write the page, whole or not at all."""
        name = os.fspath(path)
        text = self.html()
        partial = f"{name}.partial"
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(partial, name)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise UsageError(
                f"the page cannot be written ({error.strerror}); choose another place, got {name!r}"
            ) from error

    def _repr_html_(self) -> str:
        points = "".join(f"<li>{html.escape(problem)}</li>" for problem in self.problems)
        title = html.escape(", ".join(self.paths))
        return f"<b>{title}</b>: {len(self.problems) or 'no'} problems<ol>{points}</ol>"

    def _kinds(self) -> dict[str, list[Cluster]]:
        """Clusters by what is worst about them, the keys of ``TITLES`` in order."""
        found: dict[str, list[Cluster]] = {kind: [] for kind in TITLES}
        for cluster in self.clusters:
            marks = (cluster.conflict, cluster.across_sides, cluster.across_folds, cluster.exact, True)
            found[next(kind for kind, mark in zip(TITLES, marks) if mark)].append(cluster)
        return {kind: clusters for kind, clusters in found.items() if clusters}

    def _name(self, picture: Picture) -> str:
        return f"test:{picture.source}" if picture.side else picture.source

    def _caption(self, picture: Picture) -> str:
        fold = "" if picture.fold is None else f"fold {picture.fold}" if picture.fold >= 0 else "training"
        parts = ["test" if picture.side else "", picture.label, fold]
        return " · ".join(part for part in parts if part)

    def _thumbnail(self, picture: Picture) -> str:
        """A data URI of a small JPEG; empty for an image that cannot be decoded."""
        from PIL import Image

        data = self.datasets[picture.side]
        try:
            image = Image.fromarray(data[picture.index][data.image_field])
        except DataError:
            return ""
        except FastloadError as error:
            raise UsageError(f"the pictures cannot be read any more: {error}") from error
        image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=82)
        return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _steps(shares: Sequence[float], top: float) -> str:
    """Points of a histogram's outline in a box of 100 x 40, for an SVG polyline."""
    width = 100 / len(shares)
    corners = [(0.0, 0.0)]
    for at, share in enumerate(shares):
        corners += [(at * width, share / top), ((at + 1) * width, share / top)]
    corners.append((100.0, 0.0))
    return " ".join(f"{x:.2f},{40 - 38 * y:.2f}" for x, y in corners)
