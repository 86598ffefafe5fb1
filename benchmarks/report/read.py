"""Result files read with every text and number checked where it enters.

A page is made only of what passed here, so that a damaged line is one sentence with its file and number instead of a broken
plot. The trade-off: medians are computed again from the rounds, and a record whose stored median is another one is refused.

>>> [record.kind for record in read(["benchmarks/results/compare.jsonl"])]
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastload.benchmarks.harness import Series
from fastload.benchmarks.report.records import (
    Bench,
    Change,
    Compare,
    Failed,
    Model,
    ModelRow,
    Record,
    Row,
    Stage,
    Step,
    Tried,
    Tune,
    Variant,
)
from fastload.errors import DataError, FastloadError, UsageError

KINDS = ("bench", "compare", "model", "tune")


class _Damaged(Exception):
    """What is wrong with a record; :func:`read` adds the file and the line."""


class _Node:
    """An object of the file with the name that a message gives it; every getter checks what it returns."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _Damaged(f"{where or 'the line'} is no JSON object")
        self.value = value
        self.where = where

    def name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def has(self, key: str) -> bool:
        return self.value.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        value = self.value.get(key, default)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise _Damaged(f"{self.name(key)!r} must be a text, got {_short(value)}")
        return value

    def number(self, key: str) -> float:
        return _number(self.value.get(key), self.name(key))

    def maybe(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def whole(self, key: str) -> int | None:
        return int(self.number(key)) if self.has(key) else None

    def list(self, key: str) -> list[Any]:
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise _Damaged(f"{self.name(key)!r} must be a list, got {_short(value)}")
        return value

    def nodes(self, key: str) -> Iterator[_Node]:
        for i, value in enumerate(self.list(key)):
            yield _Node(value, f"{self.name(key)}[{i}]")

    def node(self, key: str) -> _Node:
        return _Node(self.value.get(key) or {}, self.name(key))

    def numbers(self, key: str) -> dict[str, float]:
        """The finite numbers of an object; what is null or an object itself is left out."""
        inside = self.node(key)
        return {
            str(name): _number(value, inside.name(name))
            for name, value in inside.value.items()
            if value is not None and not isinstance(value, (dict, list, str, bool))
        }

    def series(self, key: str, label: str) -> Series:
        inside = _Node(self.value.get(key), self.name(key))
        rounds = tuple(_number(value, inside.name("rounds")) for value in inside.list("rounds"))
        if not rounds:
            raise _Damaged(f"{inside.name('rounds')!r} holds no figure")
        if min(rounds) < 0:
            raise _Damaged(f"{inside.name('rounds')!r} holds a figure below 0")
        series = Series(label, rounds, inside.text("unit", ""))
        stored = inside.maybe("median")
        if stored is not None and not math.isclose(stored, series.median, rel_tol=1e-3, abs_tol=2e-4):
            raise _Damaged(
                f"{inside.name('median')!r} is {stored:g} but the median of its rounds is {series.median:g}"
            )
        return series

    def maybe_series(self, key: str, label: str) -> Series | None:
        return self.series(key, label) if self.has(key) else None


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e300:
        raise _Damaged(f"{name!r} must be a number, got {_short(value)}")
    return float(value)


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read(files: Sequence[str | os.PathLike[str]]) -> list[Record]:
    """All records of the files, oldest first; of the same date, in the order of files and lines.

    Raises ``UsageError`` for a file that cannot be read, ``DataError`` with file and line for one that is no result file.
    """
    if not files:
        raise UsageError("a report needs at least one result file, got none")
    found = [record for path in files for record in _read_file(os.fspath(path))]
    return sorted(found, key=lambda record: record.date)


def _read_file(path: str) -> list[Record]:
    try:
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        raise UsageError(
            f"cannot read results from {path!r} ({error.strerror or error}); "
            "pass JSON-lines files that `fastload bench --out` wrote"
        ) from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(_record(_parse(line), os.path.basename(path), number))
        except _Damaged as error:
            raise DataError(f"{path} line {number}: {error}; remove the line or measure again") from error
    if not records:
        raise DataError(f"{path} holds no records; `fastload bench --out {path}` appends one")
    return records


def _parse(line: bytes) -> Any:
    def refuse(name: str) -> float:
        raise _Damaged(f"{name} is no JSON number")

    try:
        value = json.loads(line.decode("utf-8"), parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode(
            "utf-8"
        )  # half a surrogate pair could be read but not written
    except UnicodeDecodeError as error:
        raise _Damaged(f"this is no text in UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise _Damaged(f"this is no JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"this is no JSON that can be read ({error})") from error
    return value


def _record(value: Any, file: str, line: int) -> Record:
    top = _Node(value, "")
    kind = top.text("kind", "")
    if kind not in READERS:
        known = ", ".join(KINDS)
        raise _Damaged(f"unknown kind of record {_short(kind) if kind else 'without a kind'}; known: {known}")
    notes = tuple(note for note in top.list("notes") if isinstance(note, str))
    return Record(
        kind=kind,
        body=READERS[kind](top),
        settings=top.node("settings").value,
        environment=top.node("environment").value,
        notes=notes,
        file=file,
        line=line,
        raw=top.value,
    )


def _failures(top: _Node, key: str, name: str, reason: str = "reason") -> tuple[Failed, ...]:
    return tuple(
        Failed(item.text(name, "?"), item.text(reason, "no reason was given")) for item in top.nodes(key)
    )


def _compare(top: _Node) -> Compare:
    workload, unit = top.text("workload"), top.text("unit", "images/s")
    rows, failed = [], list(_failures(top, "failed", "peer"))
    for item in top.nodes("rows"):
        name = item.text("peer")
        if item.node("check").value.get("passed") is False:
            failed.append(Failed(name, "the check of its work failed, so no speed is shown"))
            continue
        title = item.text("title", name)
        epochs = item.node("extra").list("mib_by_epoch")
        threads, resize = item.whole("threads"), item.text("filter", "")
        label = f"{title}, {threads} threads" if workload == "threads" else title
        rows.append(
            Row(
                peer=name,
                title=title,
                filter=resize if resize != "none" else "",
                figure=item.series("figure", label),
                ratio=item.maybe_series("ratio", f"{label}, ratio"),
                cpu_s_per_1000=item.maybe_series("cpu_s_per_1000", f"{label}, CPU seconds"),
                peak_mib=item.maybe("peak_mib"),
                settings=item.text("settings", ""),
                versions={str(k): str(v) for k, v in item.node("versions").value.items()},
                python=item.text("python", ""),
                threads=threads,
                extra=item.numbers("extra"),
                mib_by_epoch=tuple(_number(mib, item.name("extra.mib_by_epoch")) for mib in epochs),
            )
        )
    return Compare(
        workload=workload,
        what=top.text("what", ""),
        unit=unit,
        baseline=top.text("baseline", ""),
        rows=tuple(rows),
        failed=tuple(failed),
        less_is_better=top.text("better", "lower" if unit in ("s", "MiB") else "higher") == "lower",
    )


def _bench(top: _Node) -> Bench:
    from fastload.benchmarks.verdict import from_record

    stages = tuple(Stage(s.text("stage"), s.number("us"), s.maybe("bytes")) for s in top.nodes("stages"))
    if any(stage.us < 0 for stage in stages):
        raise _Damaged("'stages' holds a time below 0")
    changes = tuple(
        Change(
            what=c.text("what"),
            setting=c.text("setting", ""),
            side=c.text("side", ""),
            figure=c.series("figure", c.text("what")),
            ratio=c.maybe_series("ratio", f"{c.text('what')}, ratio"),
            cost=c.text("cost", ""),
            gain=bool(c.value.get("gain")),
        )
        for c in top.nodes("changes")
    )
    steps = [Step(s.number("t"), s.number("wait_s"), s.number("step_s")) for s in top.nodes("timeline")]
    if any(min(step.t, step.wait_s, step.step_s) < 0 for step in steps):
        raise _Damaged("'timeline' holds a time below 0")
    sentence, doubt = _said(top, "verdict", lambda record: from_record(record).sentence)
    return Bench(
        loader=top.series("loader", "loader alone"),
        plain=top.maybe_series("loader_without_per_image", "loader without PerImage"),
        model=top.maybe_series("model", "model alone"),
        both=top.maybe_series("both", "both together"),
        stall=top.maybe_series("stall", "waiting for images"),
        first_batch_s=top.maybe("first_batch_s"),
        stages=stages,
        resources=top.numbers("resources"),
        limits=top.numbers("limits"),
        shares=top.node("limits").numbers("shares"),
        ceilings=_ceilings(top.node("limits").node("rounds")),
        changes=changes,
        not_run=_failures(top, "not_run", "what", "why"),
        timeline=tuple(sorted(steps, key=lambda step: step.t)),
        bottleneck=top.text("bottleneck", ""),
        sentence=sentence,
        doubt=doubt,
    )


def _ceilings(rounds: _Node) -> tuple[Series, ...]:
    from fastload.benchmarks.limits import noisy

    for name in rounds.value:
        rounds.series(name, name)  # refuses what is no series
    return tuple(noisy({"rounds": rounds.value}))


def _said(top: _Node, key: str, of_figures: Callable[[dict[str, Any]], str]) -> tuple[str, str]:
    """The sentence that the figures give, and what is to be said if the file holds another one."""
    stored = top.text(key, "")
    try:
        sentence = of_figures(top.value)
    except (FastloadError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if not stored:
            raise _Damaged(f"it holds no {key}, and its figures give none ({error})") from error
        return stored, f"This sentence is the file's own: its figures give none ({error})."
    if stored and stored != sentence:
        return sentence, f"The file holds another sentence than its figures give: “{stored}”"
    return sentence, ""


def _tried(item: _Node) -> Tried:
    images_s = item.maybe("images_s")
    return Tried(item.whole("threads"), item.whole("prefetch"), item.whole("batch_size"), images_s or 0.0)


def _tune(top: _Node) -> Tune:
    from fastload.benchmarks.tune import sentence as of_figures

    sentence, doubt = _said(top, "sentence", of_figures)
    return Tune(
        tried=tuple(_tried(item) for item in top.nodes("tried")),
        default=_tried(top.node("default")) if top.has("default") else None,
        best=_tried(top.node("best")) if top.has("best") else None,
        figure=top.maybe_series("figure", "the best"),
        default_figure=top.maybe_series("default_figure", "the defaults"),
        ratio=top.maybe_series("ratio", "best settings, ratio"),
        sentence=sentence,
        doubt=doubt,
        paste=top.text("paste", ""),
    )


def _model(top: _Node) -> Model:
    from fastload.benchmarks.model_table import sentence as of_figures

    rows = []
    for item in top.nodes("rows"):
        model = item.text("model")
        variants = tuple(
            Variant(
                name=v.text("name"),
                figure=v.series("figure", f"{model}, {v.text('name')}"),
                ratio=v.maybe_series("ratio", f"{model}, {v.text('name')}, ratio"),
                cost=v.text("cost", ""),
            )
            for v in item.nodes("variants")
        )
        sentence, doubt = _said(item, "sentence", of_figures)
        rows.append(
            ModelRow(
                model=model,
                size=item.whole("size"),
                batch_size=item.whole("batch_size"),
                variants=variants,
                best=item.text("best", ""),
                loader_needs=item.maybe("loader_needs_images_s"),
                failed=_failures(item, "failed", "name"),
                sentence=sentence,
                doubt=doubt,
            )
        )
    return Model(tuple(rows))


READERS: dict[str, Any] = {"bench": _bench, "compare": _compare, "model": _model, "tune": _tune}
