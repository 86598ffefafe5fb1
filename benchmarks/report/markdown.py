"""The newest records as Markdown: the tables that stand in the README, and the verdicts.

Comparisons are written by :mod:`fastload.benchmarks.compare_table`, so that README and report cannot differ. The trade-off: no
plots, which only the page has.

>>> print(markdown(load(["results.jsonl"])))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastload.benchmarks.harness import Series
from fastload.benchmarks.report import texts
from fastload.benchmarks.report.records import Bench, Failed, Model, Record, Tune
from fastload.errors import DataError

if TYPE_CHECKING:
    from fastload.benchmarks.report import Report

SPECIAL = re.compile(r"([\\`*\[\]|])")


def markdown(report: Report) -> str:
    """Sections of the newest records, in the order of the page, ending with a line feed."""
    parts: list[str] = []
    for record in report.newest():
        body = record.body
        if isinstance(body, Bench):
            parts.append(_bench(record, body))
        elif isinstance(body, Tune):
            parts.append(_tune(record, body))
        elif isinstance(body, Model):
            parts.append(_model(record, body))
        else:
            parts.append(_compare(record))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def cell(text: str) -> str:
    """A text of a file as Markdown shows it and as nothing else: no tag, no link, no new cell."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(r"\\\1", flat)


def code(text: str) -> str:
    """A setting to paste, in a code span that it cannot leave."""
    flat = " ".join(text.split())
    if not flat:
        return ""
    runs = [len(run) for run in re.findall("`+", flat)]
    fence = "`" * (max(runs, default=0) + 1)
    room = " " if runs else ""
    return f"{fence}{room}{flat}{room}{fence}".replace("|", "\\|")


def block(text: str) -> str:
    """Lines to paste, in a fence that they cannot close."""
    if not text.strip():
        return ""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text.strip()}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose first ``left`` columns are texts and whose others are numbers; cells are Markdown already."""
    rules = [":--" if i < left else "--:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rules, *rows))


def _series(series: Series) -> list[str]:
    return [texts.median(series), texts.spread(series)]


def _head(record: Record) -> str:
    return f"### {cell(texts.title(record))}"


def _facts(record: Record) -> str:
    settings = [(key, value) for key, value in texts.details(record) if key not in ("System", "File size")]
    first = "; ".join(f"{key.lower()}: {cell(value)}" for key, value in texts.facts(record))
    second = "; ".join(f"{cell(key)}: {cell(value)}" for key, value in settings)
    return f"{first[0].upper()}{first[1:]}." + (f" Settings: {second}." if second else "")


def _notes(record: Record) -> list[str]:
    return [f"- Note: {cell(note)}" for note in texts.notes(record)]


def _failed(failed: Iterable[Failed], word: str) -> list[str]:
    return [f"- {word}: {cell(one.name)}: {cell(one.reason)}" for one in failed]


def _join(*blocks: str | Sequence[str]) -> str:
    flat = [block if isinstance(block, str) else "\n".join(block) for block in blocks]
    return "\n\n".join(block for block in flat if block)


def _bench(record: Record, body: Bench) -> str:
    sides = [
        ("loader alone", body.loader),
        ("loader without PerImage", body.plain),
        ("model alone", body.model),
        ("both together", body.both),
    ]
    figures = table(
        ("Side", "Images/s", "Range"), [(name, *_series(one)) for name, one in sides if one is not None]
    )
    beside = [f"waiting for images {body.stall.median:.1%} of the time"] if body.stall else []
    if body.first_batch_s is not None:
        beside.append(f"start to first batch {texts.number(body.first_batch_s)} s")
    beside += [
        f"{name} {texts.number(body.resources[key])} {unit}"
        for key, (name, unit) in texts.RESOURCES.items()
        if key in body.resources
    ]
    total = sum(stage.us for stage in body.stages) or 1.0
    stages = [
        (cell(texts.stage(s.name)), texts.number(s.us), f"{s.us / total:.0%}", texts.size(s.bytes))
        for s in body.stages
    ]
    changes = [
        (
            cell(c.what),
            code(c.setting),
            cell(c.cost),
            texts.median(c.figure),
            f"{texts.times(c.ratio)} ({texts.spread(c.ratio)})" if c.ratio else "",
            "yes" if c.gain else "no",
        )
        for c in body.changes
    ]
    limits = [
        (name, f"{texts.number(body.limits[key])} {unit}")
        for key, (name, unit) in texts.LIMITS.items()
        if key in body.limits
    ]
    shares = [f"{cell(texts.share_name(key, share))} {share:.0%}" for key, share in body.shares.items()]
    return _join(
        _head(record),
        f"**{cell(body.sentence)}**",
        cell(body.doubt),
        figures,
        f"Beside them: {texts.listed(beside)}." if beside else "",
        table(("Stage, one image on one thread", "µs", "Share", "Bytes"), stages) if stages else "",
        table(("Change", "Setting", "Cost", "Images/s", "Ratio", "Gain"), changes, left=3) if changes else "",
        _failed(body.not_run, "Not run"),
        table(("Limit of this machine", "Measured"), limits) if limits else "",
        f"Share of the limits reached: {texts.listed(shares)}." if shares else "",
        _notes(record),
        _facts(record),
    )


def _tune(record: Record, body: Tune) -> str:
    tried = [
        (
            *("" if value is None else str(value) for value in (one.threads, one.prefetch, one.batch_size)),
            texts.number(one.images_s),
        )
        for one in sorted(body.tried, key=lambda one: -one.images_s)
    ]
    best = ""
    if body.figure is not None:
        against = (
            f", {texts.times(body.ratio)} of the defaults in the same rounds ({texts.spread(body.ratio)})"
            if body.ratio
            else ""
        )
        best = f"Best settings: {texts.median(body.figure)} {cell(body.figure.unit)} ({texts.spread(body.figure)}){against}."
    return _join(
        _head(record),
        f"**{cell(body.sentence)}**" if body.sentence else "",
        cell(body.doubt),
        best,
        block(body.paste),
        table(("Threads", "Prefetch", "Batch", "Images/s"), tried, left=0) if tried else "",
        _notes(record),
        _facts(record),
    )


def _model(record: Record, body: Model) -> str:
    rows, failed = [], []
    for row in body.rows:
        for variant in sorted(row.variants, key=lambda v: -v.figure.median):
            best = variant.name == row.best
            needs = texts.number(row.loader_needs) if best and row.loader_needs is not None else ""
            name = cell(variant.name)
            rows.append(
                (
                    cell(row.model),
                    f"**{name}**" if best else name,
                    cell(variant.cost),
                    *_series(variant.figure),
                    texts.times(variant.ratio),
                    needs,
                )
            )
        failed += [Failed(f"{row.model}, {one.name}", one.reason) for one in row.failed]
    head = ("Model", "Variant", "Cost", "Images/s", "Range", "Ratio to plain", "Loader must make")
    return _join(
        _head(record),
        [f"- **{cell(row.sentence)}**{f' {cell(row.doubt)}' if row.doubt else ''}" for row in body.rows],
        table(head, rows, left=3) if rows else "",
        _failed(failed, "Without a figure"),
        _notes(record),
        _facts(record),
    )


def _compare(record: Record) -> str:
    """The very text of the README; a record that it cannot be made of is damaged."""
    from fastload.benchmarks.compare_table import markdown as tables

    try:
        return tables([_harmless(record.raw)])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{record.file} line {record.line}: no table can be made of this comparison "
            f"({type(error).__name__}: {error}); remove the line or measure again"
        ) from error


def _harmless(value: Any) -> Any:
    """The record with tags, links and line ends taken out of its texts; a text without them stays as it is."""
    if isinstance(value, dict):
        return {key: _harmless(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_harmless(inside) for inside in value]
    if isinstance(value, str):
        flat = " ".join(value.splitlines())
        return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", flat).replace("](", "]\\(")
    return value
