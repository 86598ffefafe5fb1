"""What the parts of the GPU suite share: time, rows whose speed is shown only where a check has passed, and a run that goes on.

A part is a function that yields rows. It may say that it cannot run here (:class:`NotRun`); it may raise anything, which is recorded,
and the next part begins. The trade-off of one budget for all: a part that starts late has less time, and says so in its spread.

>>> budget = Budget(420, {"kernel": 1, "models": 3}); budget.share("kernel")
105.0
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fastload.benchmarks.harness import Series
from fastload.errors import UsageError

DONE, NOT_RUN, FAILED = "done", "not run", "failed"


class NotRun(Exception):
    """A part, or a row, cannot be measured here; the text is the reason."""


class Budget:
    """Seconds shared out by weight. What a part leaves is for those after it, and what it takes too much is taken from them."""

    def __init__(
        self, seconds: float, weights: Mapping[str, float], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if not seconds > 0:
            raise UsageError(f"seconds must be above 0, got {seconds}")
        self._clock, self._until, self._weights = clock, clock() + seconds, dict(weights)

    @property
    def left(self) -> float:
        return max(0.0, self._until - self._clock())

    def share(self, name: str) -> float:
        """Seconds for this part, which from now on is no longer among those to come."""
        whole = sum(self._weights.values())
        return self.left * self._weights.pop(name) / whole


def row(
    name: str,
    figure: Series | None = None,
    *,
    engine: str = "",
    check: str = "",
    wrong: str = "",
    reason: str = "",
    **more: Any,
) -> dict[str, Any]:
    """A row of a record. ``check`` says what was looked at, ``wrong`` what was found wrong: then there is no figure."""
    if wrong:
        figure, reason = None, f"no speed is shown, because {wrong}"
    return {
        "name": name,
        "engine": engine,
        "figure": None if figure is None else figure.to_json(),
        "check": {"passed": not wrong if check or wrong else None, "text": check or wrong},
        **({"reason": reason} if reason else {}),
        **more,
    }


def hide(rows: Sequence[dict[str, Any]], red: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows without the figures of engines (by name in ``red``) whose tests failed."""
    shown = []
    for one in rows:
        why = red.get(one["engine"])
        if why is not None:
            kept = {key: one[key] for key in ("arm", "file") if key in one}
            one = row(one["name"], engine=one["engine"], wrong=why, **kept)
        shown.append(one)
    return shown


def run_part(
    name: str,
    title: str,
    measure: Callable[[float, list[str]], Iterator[dict[str, Any]]],
    seconds: float,
    red: Mapping[str, str],
    least: float = 0.0,
) -> dict[str, Any]:
    """One part's record. ``measure`` is given its seconds and a list for notes; rows made before it fails are kept."""
    part: dict[str, Any] = {"name": name, "title": title, "status": DONE, "rows": [], "notes": []}
    part["budget_s"] = round(seconds, 1)
    clock, rows = time.perf_counter(), []
    try:
        if seconds < least:
            raise NotRun(
                f"{seconds:.0f} s are left for it and it needs about {least:.0f}; give more --seconds, or --skip other parts"
            )
        for one in measure(seconds, part["notes"]):
            rows.append(one)  # noqa: PERF402 (what came before an error is kept)
    except NotRun as why:
        part["status"], part["reason"] = NOT_RUN, str(why)
    except Exception as error:  # drivers, libraries and our own mistakes: the other parts go on
        text = " ".join(str(error).split())[:300]
        part["status"], part["reason"] = FAILED, f"{type(error).__name__}: {text}"
    part["rows"] = hide(rows, red)
    part["seconds"] = round(time.perf_counter() - clock, 1)
    return part


def table(record: Mapping[str, Any]) -> str:
    """The record for people: each part with its rows, checks, reasons and notes."""
    return "\n\n".join(part_table(part) for part in record["parts"])


def part_table(part: Mapping[str, Any]) -> str:
    """One part of a record for people."""
    lines = [f"{part['title']} ({part['seconds']:.0f} s)"]
    width = max((len(one["name"]) for one in part["rows"]), default=0)
    for one in part["rows"]:
        text = one.get("reason") or "no figure"
        if one["figure"] is not None:
            figure = one["figure"]
            text = str(Series(one["name"], tuple(figure["rounds"]), figure["unit"]))
        elif one.get("text"):
            text = one["text"]
        elif one["check"]["passed"] is not False and one.get("reason"):
            text = f"not run: {text}"
        checked = f"  ({one['check']['text']})" if one["check"]["passed"] and one["check"]["text"] else ""
        said = f"  {one['text']}" if one["figure"] is not None and one.get("text") else ""
        lines.append(f"  {one['name']:<{width}}  {text}{said}{checked}")
    if part["status"] != DONE:
        lines.append(f"  {part['status']}: {part['reason']}")
    lines += [f"  Note: {note}" for note in part["notes"]]
    return "\n".join(lines)
