"""One HTML page about one or several runs, that needs nothing else: no network, no script, no other file.

It is a function of the run folders and, for the pictures, of the data. The trade-off: nothing can be sorted or zoomed; what
is worst is on top instead.

>>> report(["runs/a", "runs/b"], "report.html", data="photos.beton")
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastload.errors import UsageError

if TYPE_CHECKING:
    from fastload.dataset import Dataset
    from fastload.train.report.read import Result

__all__ = ["Page", "report"]


def report(runs: Sequence[Any], out: str | Path, *, data: Dataset | str | Path | None = None) -> Path:
    """Write the page about ``runs`` (folders, Run or CvRun objects) to ``out``, and return that path.

    Pictures come from ``data``, else from the files that the runs learned from, where they still are. UsageError: no run there.
    """
    return Page(runs, data).write(out)


class Page:
    """The content of a report. ``text()``: its figures in a few lines; ``html()``: the page; ``write(path)``."""

    def __init__(self, runs: Sequence[Any], data: Dataset | str | Path | None = None) -> None:
        from fastload.train.report.content import comparison, section
        from fastload.train.report.read import read, unique_names

        if not runs:
            raise UsageError("a report needs at least one run folder, got none")
        self.results = unique_names([read(run) for run in runs])
        self.sections = [
            section(one, _sources(one, data), f"r{i}") for i, one in enumerate(self.results, start=1)
        ]
        self.comparison = comparison(self.results, self.sections)

    def text(self) -> str:
        """Score, interval, epochs and what is missing, a few lines a run."""
        from fastload.train.report.content import number

        lines = []
        for one in self.sections:
            head, last = one["headline"], one["last"] if one["headline"] else None
            lines.append(f"{one['name']}:")
            if head:
                lines.append(
                    f"  {one['metric']} {number(head['value'])} ({number(head['low'])} to {number(head['high'])}), best epoch"
                    + (f"; {number(last['value'])} at the last epoch" if last else "")
                )
                lines.append(
                    f"  {one['mistakes']['count']:,} of {head['images']:,} held-out images wrong, "
                    f"{one['label_errors']['images']:,} labels to look at, calibration error {one['calibration']['ece']:.1%}"
                )
            if one["speed"]:
                lines.append(
                    f"  {one['speed']['images_per_s']:,.0f} images/s, {one['speed']['stall']:.0%} of the time waiting for data"
                )
            lines += [f"  {note}" for note in one["notes"]]
        return "\n".join(lines)

    def html(self) -> str:
        """The whole page; every text of a file is escaped by the template engine."""
        import jinja2

        from fastload.train.report import content

        source = resources.files(__package__).joinpath("template.html.j2").read_text(encoding="utf-8")
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.globals.update(number=content.number, duration=content.duration, short=content.short)
        names = " · ".join(one["name"] for one in self.sections)
        return environment.from_string(source).render(
            title=names,
            sections=self.sections,
            comparison=self.comparison,
            names=[one.name for one in self.results],
        )

    def write(self, out: str | Path) -> Path:
        from fastload.train.files import write_text

        write_text(out, self.html())
        return Path(out)


def _sources(result: Result, data: Dataset | str | Path | None) -> list[Any]:
    """The data that was given, or what the run names: held-out images first."""
    if data is not None:
        return [data]
    named = result.info.get("data", {})
    paths = [named.get("valid"), named.get("train"), result.options.get("valid"), result.options.get("data")]
    return [path for path in paths if isinstance(path, str)]
