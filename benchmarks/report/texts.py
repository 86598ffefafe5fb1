"""Words and numbers that the Markdown and the page share, so that both say the same.

>>> number(3357.47), number(2.457)
('3,357', '2.46')
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from fastload.benchmarks.harness import Series, noise_notes
from fastload.benchmarks.report.records import Bench, Compare, Model, Record, Row, Tune

EN_DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
STAGES = {
    "draw": "draw random numbers",
    "read": "read",
    "crop": "crop in the compressed domain",
    "decode": "decode",
    "resize": "resize",
    "colour": "colour",
    "normalise": "normalise",
    "mix": "mix",
    "per_image": "PerImage",
    "copy": "copy to the device",
}
WORKLOADS = {
    "train500": "Training crop, 500 px photos",
    "original": "Training crop, photos of original size",
    "large": "Training crop, photos of 2,000 px",
    "eval": "Evaluation crop",
    "raw": "Raw store",
    "small": "Small images, 32 px",
    "start": "Cold start to the first batch",
    "convert": "Conversion",
    "threads": "Thread scaling",
    "memory": "Memory over epochs",
}
RESOURCES = {
    "peak_mib": ("peak memory", "MiB"),
    "cpu_s_per_1000_images": ("CPU time for 1,000 images", "s"),
    "gpu_peak_mib": ("peak GPU memory", "MiB"),
}
LIMITS = {
    "memory_gb_s": ("memory bandwidth", "GB/s"),
    "copy_gb_s": ("copy to the device", "GB/s"),
    "decoder_images_s": ("whole images decoded on all loader threads", "images/s"),
    "disk_mb_s": ("disk", "MB/s"),
    "model_tflops": ("matrix products", "TFLOP/s"),
}
SHARES = {"memory": "memory bandwidth", "decoder": "JPEG decoder", "model": "matrix products"}


def share_name(key: str, share: float) -> str:
    """A limit beside the share of it that was reached; more than the whole decoder is explained."""
    name = SHARES.get(key, key)
    if key == "decoder" and share > 1:
        return f"{name} (of whole images: the loader decodes only what a crop needs)"
    return name


def number(value: float) -> str:
    """Three significant digits or all before the point, with commas: what a person compares."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 or size == 0 else 3
    return f"{value:,.{digits}f}"


def digits(series: Series) -> int:
    """Decimals at which median and range of a series are shown, the same for the three."""
    return 0 if series.median >= 100 else 1 if series.median >= 10 else 2


def median(series: Series) -> str:
    return f"{series.median:,.{digits(series)}f}"


def spread(series: Series) -> str:
    places = digits(series)
    return f"{series.low:,.{places}f}{EN_DASH}{series.high:,.{places}f}"


def times(ratio: Series | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f}{TIMES}"


def size(count: float | None) -> str:
    if not count:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count:,.0f} B"


def stage(name: str) -> str:
    return STAGES.get(name, name.replace("_", " "))


def workload(name: str) -> str:
    return WORKLOADS.get(name, name)


def plain(value: Any) -> str:
    """A setting for people: lists by commas, objects as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no"}.get(value, "none")  # type: ignore[arg-type]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, dict) and all(isinstance(item, (str, int, float)) for item in value.values()):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    return json.dumps(value, ensure_ascii=False)


def day(record: Record) -> str:
    """Date and minute of a record, as its machine wrote it in UTC."""
    date = record.date
    if len(date) >= 16 and date[10] == "T":
        return f"{date[:10]} {date[11:16]}" + (" UTC" if date.endswith("+00:00") else "")
    return date or "date unknown"


def gpu(environment: dict[str, Any]) -> str:
    found = environment.get("gpu") or environment.get("gpus")
    return plain(found) if found else ""


def machine(record: Record) -> str:
    env = record.environment
    cores = env.get("cores")
    parts = [plain(env.get("cpu") or "unknown CPU")]
    if cores is not None:
        parts.append(f"{plain(cores)} core{'' if cores == 1 else 's'}")
    if env.get("ram_gib") is not None:
        parts.append(f"{plain(env['ram_gib'])} GiB")
    parts += [plain(part) for part in (gpu(env), env.get("hardware")) if part]
    return ", ".join(parts)


EXTRA = {
    "import_s": "import\N{NO-BREAK SPACE}{:.2f}\N{NO-BREAK SPACE}s",
    "loader_s": "loader\N{NO-BREAK SPACE}{:.2f}\N{NO-BREAK SPACE}s",
    "growth_mib": "grew by {:+,.1f}\N{NO-BREAK SPACE}MiB",
}


def more(row: Row) -> str:
    """Resize filter and what only some workloads know, for the line under a peer's name."""
    parts = [row.filter, *(text.format(row.extra[key]) for key, text in EXTRA.items() if key in row.extra)]
    if "bytes" in row.extra:
        parts.append(f"{size(row.extra['bytes'])} written")
    return listed(parts)


def baseline(body: Compare) -> str:
    return next((row.title for row in body.rows if row.peer == body.baseline), body.baseline)


def all_series(record: Record) -> list[Series]:
    """The measured figures of a record; ratios are left out, since they are made of the same rounds."""
    body = record.body
    if isinstance(body, Bench):
        found = [
            body.loader,
            body.plain,
            body.model,
            body.both,
            *(c.figure for c in body.changes),
            *body.ceilings,
        ]
    elif isinstance(body, Compare):
        found = [row.figure for row in body.rows]
    elif isinstance(body, Tune):
        found = [body.figure, body.default_figure]
    else:
        found = [variant.figure for row in body.rows for variant in row.variants]
    return [series for series in found if series is not None]


def rounds(record: Record) -> str:
    counts = sorted({series.n for series in all_series(record)})
    if not counts:
        return plain(record.settings.get("rounds", "unknown"))
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def notes(record: Record) -> list[str]:
    """What the record says beside its figures, and every series whose rounds lie over 15% apart."""
    said = [note for note in record.notes if ": rounds differ by" not in note]
    # Memory is one reading after another of something that may grow: its range is a result and no noise.
    return said + noise_notes(series for series in all_series(record) if series.unit != "MiB")


def facts(record: Record) -> list[tuple[str, str]]:
    """What stands beside every figure: machine, date, commit, rounds, page cache."""
    env = record.environment
    return [
        ("Machine", machine(record)),
        ("Date", day(record)),
        ("Commit", plain(env.get("commit") or "unknown")),
        ("Rounds", rounds(record)),
        ("Page cache", plain(env.get("page_cache") or "not stated")),
    ]


def details(record: Record) -> list[tuple[str, str]]:
    """The rest of the circumstances: system, versions, load, and every setting."""
    env = record.environment
    versions = env.get("versions")
    found = [("System", env.get("system")), ("Python", env.get("python")), ("Versions", versions)]
    found += [("Load average before", env.get("load_average")), ("File size", size(env.get("file_bytes")))]
    found += [(key.replace("_", " "), value) for key, value in record.settings.items()]
    return [(key, plain(value)) for key, value in found if value not in (None, "", {}, [])]


def title(record: Record) -> str:
    body, settings = record.body, record.settings
    if isinstance(body, Compare):
        return workload(body.workload)
    data = plain(settings.get("data") or "")
    if isinstance(body, Bench):
        return f"{plain(settings.get('model', 'model'))} on {data or 'the data'}"
    if isinstance(body, Tune):
        return f"Threads, prefetch and batch size{f' for {data}' if data else ''}"
    return f"Models{f' on {plain(settings[name])}' if (name := 'device') in settings else ''}"


def headline(record: Record) -> str:
    """One record in one line, for the list of all."""
    body = record.body
    if isinstance(body, Bench):
        return body.sentence
    if isinstance(body, Tune):
        return body.sentence
    if isinstance(body, Compare):
        if not body.rows:
            return f"no figures; {len(body.failed)} failed"
        best = body.rows[0]
        return f"{best.title} first of {len(body.rows)} rows: {median(best.figure)} {body.unit}"
    return _needs(body)


def _needs(body: Model) -> str:
    return "; ".join(
        f"{row.model}: best {row.best}"
        + (f", needs {number(row.loader_needs)} images/s" if row.loader_needs is not None else "")
        for row in body.rows
    )


def listed(items: Iterable[str]) -> str:
    return ", ".join(item for item in items if item)
