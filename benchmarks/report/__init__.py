"""Result files of ``fastload bench`` as Markdown for a README and as one HTML page that needs nothing else.

Both are functions of the files alone: no clock, no random number, no network, so the same files give the same bytes. The
trade-off: a page carries its own styles and plots, some tens of kilobytes, and has no script to zoom with.

>>> report = load(["benchmarks/results/compare.jsonl"]); print(report.markdown())
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastload.benchmarks.report.read import read
from fastload.benchmarks.report.records import Bench, Compare, Model, Record, Tune

__all__ = ["Report", "load"]

# The order of the sections: first the answer to "what is slow here?", then how others fare.
ORDER = ("bench", "tune", "model", "compare")


@dataclass(frozen=True)
class Report:
    """The records of some result files, oldest first."""

    records: tuple[Record, ...]

    def newest(self) -> list[Record]:
        """The newest record of each question (kind, workload or data and model, machine), in the order of the sections."""
        last: dict[tuple[Any, ...], Record] = {}
        for record in self.records:
            key = _key(record)
            last.pop(key, None)
            last[key] = record
        found = list(last.values())
        first = {name: place for place, name in enumerate(_workloads(self.records))}
        return sorted(found, key=lambda record: (ORDER.index(record.kind), first.get(_name(record), 0)))

    def markdown(self) -> str:
        """Tables and verdicts of the newest records, for a README."""
        from fastload.benchmarks.report.markdown import markdown

        return markdown(self)

    def html(self, title: str = "fastload bench") -> str:
        """One page with plots; every record is listed, the newest of each question is shown in full."""
        from fastload.benchmarks.report.html import page

        return page(self, title)


def load(files: Sequence[str | os.PathLike[str]]) -> Report:
    """Read JSON-lines files; ``UsageError`` for what cannot be read, ``DataError`` with file and line for what is damaged."""
    return Report(tuple(read(files)))


def _name(record: Record) -> str:
    return record.body.workload if isinstance(record.body, Compare) else ""


def _workloads(records: Sequence[Record]) -> list[str]:
    """Workloads in the order in which they were first measured."""
    return list(dict.fromkeys(_name(record) for record in records))


def _key(record: Record) -> tuple[Any, ...]:
    env, settings = record.environment, record.settings
    machine = repr([env.get(name) for name in ("cpu", "cores", "gpu")])
    asks: dict[type, tuple[str, ...]] = {
        Bench: ("data", "model", "size", "device", "transforms"),
        Tune: ("data", "size", "device"),
        Model: ("models", "size", "device"),
        Compare: (),
    }
    return (
        record.kind,
        _name(record),
        machine,
        repr([settings.get(name) for name in asks[type(record.body)]]),
    )
