"""A record of ``fastload bench`` as lines for people: figures, stages, limits, changes.

A pure function of the record, so that a file shows what the run showed. The verdict is printed apart, because it is the answer.

>>> print(table(harness.read_jsonl("bench.jsonl")[-1]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastload.benchmarks.harness import Series
from fastload.benchmarks.verdict import rate, times

Rows = list[tuple[str, str]]


def table(record: Mapping[str, Any]) -> str:
    """The figures, one line each, without the verdict."""
    parts = [_lines(_figures(record))]
    if record.get("stages"):
        parts.append("Loader, one image on one thread:\n" + _stages(record["stages"]))
    limits = _limits(record.get("limits") or {})
    if limits:
        parts.append("Limits of this machine:\n" + _lines(limits, "  "))
    if record.get("changes"):
        parts.append("Changes, each run in turns with the unchanged:\n" + _changes(record["changes"]))
    if record.get("not_run"):
        parts.append("Not run:\n" + "\n".join(f"  {e['what']}: {e['why']}" for e in record["not_run"]))
    return "\n\n".join(parts)


def series(entry: Mapping[str, Any], name: str = "") -> Series:
    """A series out of a record."""
    return Series(name, tuple(entry["rounds"]), entry["unit"])


def _figures(record: Mapping[str, Any]) -> Rows:
    rows = [("loader alone", str(series(record["loader"])))]
    if record.get("loader_without_per_image"):
        rows.append(("loader without PerImage", str(series(record["loader_without_per_image"]))))
    batch = record["settings"]["batch_size"]
    if record.get("model"):
        model = series(record["model"])
        rows += [
            ("model alone", f"{model}  ({1000 * batch / model.median:,.0f} ms a step of {batch})"),
            ("both together", str(series(record["both"]))),
            ("waiting for images", f"{record['stall']['median']:.1%} of the time"),
        ]
    rows.append(("loader start to first batch", f"{record['first_batch_s']:.2f} s"))
    used = record.get("resources") or {}
    if used.get("peak_mib") is not None:
        gpu = f", {used['gpu_peak_mib']:,.0f} MiB on the GPU" if used.get("gpu_peak_mib") is not None else ""
        rows.append(("peak memory", f"{used['peak_mib']:,.0f} MiB, file pages included{gpu}"))
    if used.get("cpu_s_per_1000_images") is not None:
        rows.append(("CPU time", f"{used['cpu_s_per_1000_images']:,.2f} s per 1,000 images"))
    return rows


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    width = max(len(stage["stage"]) for stage in stages)
    return "\n".join(
        f"  {s['stage']:<{width}}  {s['us']:>9,.1f} us  {s['share']:>4.0%}  {s['bytes'] / 1000:>9,.1f} kB"
        for s in stages
    )


def _limits(limits: Mapping[str, Any]) -> Rows:
    shares = limits.get("shares") or {}
    shown = (
        ("memory_gb_s", "memory", "{:,.1f} GB/s", "memory"),
        ("copy_gb_s", "copy to the device", "{:,.1f} GB/s", "copy"),
        ("decoder_images_s", "decoder, whole images", "{:,.0f} images/s", "decoder"),
        ("disk_mb_s", "disk", "{:,.0f} MB/s", "disk"),
        ("model_tflops", "matrix products", "{:,.2f} TFLOP/s", "model"),
    )
    rows = []
    for key, name, form, share in shown:
        value = limits.get(key)
        if value is not None:
            reached = shares.get(share)
            rows.append((name, form.format(value) + _reached(share, reached)))
    return rows


def _reached(name: str, share: float | None) -> str:
    """How much of a limit was used. More than the whole decoder is no error: the loader leaves out what its crops do not need."""
    if share is None:
        return ""
    if name == "decoder" and share > 1:
        return f", exceeded: the loader makes {times(share)} as many, since it decodes only what a crop needs"
    most = "at most " if name == "memory" else ""
    return f", of which {most}{share:.0%} is reached"


def _changes(changes: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for change in changes:
        by = series(change["ratio"])
        gain = "" if change["gain"] else "  no gain"
        rows.append(
            f"  {times(by.median):>6} [{by.low:.2f}-{by.high:.2f}]  {rate(change['figure']['median']):>7} images/s  "
            f"{change['what']}: {change['setting']}{gain}\n          cost: {change['cost']}"
        )
    return "\n".join(rows)


def _lines(rows: Rows, indent: str = "") -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{indent}{name:<{width}}  {value}" for name, value in rows)
