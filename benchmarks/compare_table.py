"""Records of a comparison as text: a table for the terminal, Markdown for the README, and what the README promises.

All of it is a function of the records alone, so the README can be checked against the committed file. The trade-off: a record
that was written by hand is believed.

>>> print(table(records[0])); print(markdown(records))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from fastload.benchmarks.harness import NOISY

# Workload -> how many times as fast as FFCV the "cpu" peer is at least, by the median of the ratios within a round.
CLAIMS = {
    "train500": 4.0,
    "original": 4.0,
    "large": 4.0,
    "eval": 2.5,
    "raw": 4.0,
    "small": 2.5,
    "convert": 1.8,
    "start": 4.0,
}
CLAIMED, RIVAL = "cpu", "ffcv"

Record = dict[str, Any]


def row_name(row: Record) -> str:
    """Title and resize filter: figures with different filters are not the same work."""
    return row["title"] if row["filter"] in ("", "none") else f"{row['title']} ({row['filter']})"


def table(record: Record) -> str:
    """One workload for people: best first, then each peer without a figure and why."""
    rows = [_cells(record, row) for row in record["rows"]]
    head = _head(record)
    used = [i for i in range(len(head)) if i < 2 or any(cells[i] for cells in rows)]
    lines = [f"{record['workload']}: {record['what']}", _conditions(record)]
    if rows:
        widths = [max(len(cells[i]) for cells in [head, *rows]) for i in range(len(head))]
        for cells in (head, *rows):
            parts = [cells[i].ljust(widths[i]) if i == 0 else cells[i].rjust(widths[i]) for i in used]
            lines.append("  ".join(parts).rstrip())
    else:
        lines.append("no peer has a figure")
    lines += [f"{failed['peer']}: no figure: {failed['reason']}" for failed in record["failed"]]
    lines += [f"note: {note}" for note in record["notes"]]
    return "\n".join(lines)


def markdown(records: Iterable[Record]) -> str:
    """A table for each workload, in the order of the records, under a line that says what was done."""
    return "\n\n".join(_markdown(record) for record in records)


def summary(records: Sequence[Record]) -> str:
    """One Markdown table of all records in images/s: a line a peer, a column a workload, each figure with its ratio to the baseline.

    Peers stand in the order of the first record, whose baseline's name is in the head; of the workload "threads" nothing is shown.
    """
    shown = [record for record in records if record["unit"] == "images/s" and record["workload"] != "threads"]
    titles: dict[str, str] = {}
    for record in shown:
        for row in record["rows"]:
            titles.setdefault(row["peer"], row_name(row) if record["workload"] != "convert" else row["title"])
    lines = [
        "| | " + " | ".join(f"{record['workload']}, {record['unit']}" for record in shown) + " |",
        "|---|" + "---:|" * len(shown),
    ]
    for peer, title in titles.items():
        cells = []
        for record in shown:
            row = next((row for row in record["rows"] if row["peer"] == peer), None)
            cells.append(_short(row, _best(record) is row) if row else "")
        lines.append(f"| {_escape(title)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claims(records: Iterable[Record]) -> dict[str, Record]:
    """For each promise of the README that ``records`` can tell of: what is claimed, what was measured, whether it holds.

    Measured is the median of FFCV's and fastload's ratios round by round, whatever baseline the record has.
    """
    found = {}
    for record in records:
        name = record["workload"]
        rows = {row["peer"]: row["figure"]["rounds"] for row in record["rows"]}
        if name in CLAIMS and CLAIMED in rows and RIVAL in rows:
            pairs = zip(rows[CLAIMED], rows[RIVAL])
            lower = record["better"] == "lower"
            value = median(theirs / ours if lower else ours / theirs for ours, theirs in pairs)
            found[name] = {"claim": CLAIMS[name], "measured": round(value, 3), "holds": value >= CLAIMS[name]}
    return found


def claims_table(records: Sequence[Record]) -> str:
    """What is promised beside what was measured, as a Markdown table: one line a workload."""
    found = claims(records)
    lines = ["| workload | at least | measured | |", "|---|---:|---:|---|"]
    for record in records:
        if claim := found.get(record["workload"]):
            name, what = record["workload"], _escape(record["what"])
            lines.append(f"| {name} | {claim['claim']:g}x | **{claim['measured']:.2f}x** | {what} |")
    return "\n".join(lines)


def _best(record: Record) -> Record | None:
    return record["rows"][0] if record["rows"] else None


def _head(record: Record) -> list[str]:
    title = _baseline_title(record)
    return [
        "",
        f"{record['unit']}, median [range]",
        f"ratio to {title}",
        "CPU s/1,000",
        "peak MiB",
        "more",
        "noise",
    ]


def _baseline_title(record: Record) -> str:
    rows = [row for row in record["rows"] if row["peer"] == record["baseline"]]
    return rows[0]["title"] if rows else record["baseline"]


def _cells(record: Record, row: Record) -> list[str]:
    name = row_name(row)
    if record["workload"] == "threads":
        name += f", {row['threads']} thread{'s' if row['threads'] != 1 else ''}"
    cpu, figure = row["cpu_s_per_1000"], row["figure"]
    steady = record["workload"] == "memory" or figure["noise"] <= NOISY
    return [
        name,
        _figure(figure),
        _figure(row["ratio"]) if row["ratio"] else "",
        f"{cpu['median']:,.2f}" if cpu else "",
        f"{row['peak_mib']:,.0f}" if row["peak_mib"] else "",
        _more(row["extra"]),
        "" if steady else f"±{figure['noise']:.0%}",
    ]


def _more(extra: Record) -> str:
    """What only some workloads know."""
    parts = []
    if "loader_s" in extra:
        parts.append(f"import {extra['import_s']:.2f} s, loader {extra['loader_s']:.2f} s")
    if "bytes" in extra:
        parts.append(f"{extra['bytes'] / 2**20:,.1f} MiB written")
    if "growth_mib" in extra:
        parts.append(f"grew {extra['growth_mib']:+,.1f} MiB over {len(extra['mib_by_epoch'])} epochs")
    return ", ".join(parts)


def _figure(series: Record) -> str:
    """Median [least-most], three digits or all before the point."""
    digits = 0 if series["median"] >= 100 else 1 if series["median"] >= 10 else 2
    return f"{series['median']:,.{digits}f} [{series['min']:,.{digits}f}-{series['max']:,.{digits}f}]"


def _short(row: Record, best: bool) -> str:
    text = f"{row['figure']['median']:,.0f}"
    if row["ratio"]:
        text += f" ({row['ratio']['median']:.2f}x)"
    return f"**{text}**" if best else text


def _conditions(record: Record) -> str:
    settings, environment = record["settings"], record["environment"]
    threads = "" if record["workload"] == "threads" else f"{settings['threads']} threads or workers each, "
    size = f"{settings['images_in_set']:,} images, " if "images_in_set" in settings else ""
    return (
        f"{environment.get('cpu', 'unknown CPU')}, {environment.get('cores', '?')} cores, {threads}batches of {settings['batch']}, "
        f"{size}{settings['rounds']} rounds in turns, page cache {environment.get('page_cache', 'unknown')}"
    )


def _markdown(record: Record) -> str:
    rows = [_cells(record, row) for row in record["rows"]]
    head = _head(record)
    used = [i for i in range(len(head)) if i < 2 or any(cells[i] for cells in rows)]
    lines = [f"**{record['workload']}**: {record['what']}. {_conditions(record)}.", ""]
    if rows:
        lines.append("| " + " | ".join(_escape(head[i]) for i in used) + " |")
        lines.append("|" + "".join("---|" if i == 0 else "---:|" for i in used))
        lines += ["| " + " | ".join(_escape(cells[i]) for i in used) + " |" for cells in rows]
    else:
        lines.append("No peer has a figure.")
    if record["failed"]:
        reasons = "; ".join(f"{failed['peer']}: {failed['reason']}" for failed in record["failed"])
        lines += ["", f"Without a figure: {_escape(reasons)}."]
    return "\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
