"""One page from the records: styles, tables and plots in a single file that loads nothing.

What each section shows is decided here, how it looks in ``template.html.j2``; every text of a file is escaped by the template
engine, and the page forbids itself scripts and network by its content policy. The trade-off: no sorting, no zooming.

>>> Path("page.html").write_text(page(load(["results.jsonl"]), "Results"), encoding="utf-8")
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

from fastload.benchmarks.report import plots, texts
from fastload.benchmarks.report.records import Bench, Compare, Model, Record, Row, Tried, Tune

if TYPE_CHECKING:
    from fastload.benchmarks.report import Report

TEMPLATE = "template.html.j2"
FEW = 5  # steps; fewer show nothing over time


def page(report: Report, title: str) -> str:
    """The whole page as text."""
    import jinja2

    source = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(t=texts, plots=plots)
    newest = report.newest()
    shown = [_section(record, place) for place, record in enumerate(newest)]
    places = {id(record): section["id"] for record, section in zip(newest, shown)}
    return environment.from_string(source).render(
        title=title,
        groups=[
            (kind, name, found) for kind, name in KINDS if (found := [s for s in shown if s["kind"] == kind])
        ],
        every=[(record, places.get(id(record))) for record in reversed(report.records)],
    )


KINDS = (
    ("bench", "Loader against model"),
    ("tune", "Best settings"),
    ("model", "Model variants"),
    ("compare", "Beside other loaders"),
)


def _section(record: Record, place: int) -> dict[str, Any]:
    body = record.body
    common = {
        "id": f"s{place + 1}",
        "kind": record.kind,
        "title": texts.title(record),
        "record": record,
        "facts": texts.facts(record),
        "details": texts.details(record),
        "notes": texts.notes(record),
        "body": body,
    }
    if isinstance(body, Bench):
        return {**common, **_bench(body)}
    if isinstance(body, Compare):
        return {**common, **_compare(body)}
    if isinstance(body, Tune):
        return {**common, **_tune(body)}
    return {**common, **_model(body)}


def _bench(body: Bench) -> dict[str, Any]:
    sides = [
        ("loader alone", body.loader, "limit" if body.bottleneck == "loader" else "other"),
        ("loader without PerImage", body.plain, "other"),
        ("model alone", body.model, "limit" if body.bottleneck == "model" else "other"),
        ("both together", body.both, "ours"),
    ]
    kept = [(name, series, style) for name, series, style in sides if series is not None]
    top = plots.ceiling([series.high for _, series, _ in kept])
    figures = [("waiting for images", f"{body.stall.median:.1%} of the time")] if body.stall else []
    if body.first_batch_s is not None:
        figures.append(("start to first batch", f"{texts.number(body.first_batch_s)} s"))
    figures += [
        (name, f"{texts.number(body.resources[key])} {unit}")
        for key, (name, unit) in texts.RESOURCES.items()
        if key in body.resources
    ]
    ratios = [change.ratio for change in body.changes if change.ratio is not None]
    scale = plots.around(1.0, [value for ratio in ratios for value in (ratio.low, ratio.high)])
    changes = [
        (
            change,
            plots.bar(change.ratio, scale[1], "ours" if change.gain else "other", 1.0, scale[0])
            if change.ratio
            else "",
        )
        for change in body.changes
    ]
    total = sum(stage.us for stage in body.stages)
    return {
        "sides": [(name, series, plots.bar(series, top, style)) for name, series, style in kept],
        "figures": figures,
        "stages": list(zip(body.stages, plots.waterfall(body.stages))),
        "stages_us": total,
        "changes": changes,
        "limits": [
            (name, f"{texts.number(body.limits[key])} {unit}")
            for key, (name, unit) in texts.LIMITS.items()
            if key in body.limits
        ],
        "shares": [
            (
                texts.share_name(key, share),
                share,
                plots.meter(share, f"{texts.share_name(key, share)}: {share:.0%} reached"),
            )
            for key, share in body.shares.items()
        ],
        "timeline": plots.timeline(body.timeline) if len(body.timeline) >= FEW else "",
    }


def _compare(body: Compare) -> dict[str, Any]:
    top = plots.ceiling([row.figure.high for row in body.rows])
    scaling = scaling_curves(body.rows) if body.workload == "threads" else []
    memory = [
        plots.Curve(row.title, tuple(range(1, 1 + len(row.mib_by_epoch))), row.mib_by_epoch, ours=row.ours)
        for row in body.rows
        if row.mib_by_epoch
    ]
    versions: dict[str, str] = {}
    for row in body.rows:
        found = texts.listed([f"{k} {v}" for k, v in row.versions.items()])
        versions[row.title] = texts.listed([found, f"Python {row.python}" if row.python else ""])
    return {
        "rows": [(row, plots.bar(row.figure, top, "ours" if row.ours else "other")) for row in body.rows],
        "scaling": list(zip(scaling, plots.panels(scaling, unit=body.unit, x_unit="thread", ideal=True)))
        if scaling
        else [],
        "counts": sorted({count for curve in scaling for count in curve.xs}),
        "memory": list(zip(memory, plots.panels(memory, unit="MiB", x_unit="epoch", dots=False)))
        if memory
        else [],
        "settings": list(dict.fromkeys((row.title, row.settings) for row in body.rows if row.settings)),
        "versions": [(title, found) for title, found in versions.items() if found],
        "varied": len({row.threads for row in body.rows}) > 1,
        "ratio": any(row.ratio is not None for row in body.rows),
        "cpu": any(row.cpu_s_per_1000 is not None for row in body.rows),
        "mib": any(row.peak_mib is not None for row in body.rows),
    }


def scaling_curves(rows: tuple[Row, ...]) -> list[plots.Curve]:
    """A curve a peer, over its thread counts; peers in the order of their best figure."""
    peers: dict[str, list[Row]] = {}
    for row in rows:
        if row.threads is not None:
            peers.setdefault(row.title, []).append(row)
    curves = []
    for title, found in peers.items():
        found = sorted(found, key=lambda row: row.threads or 0)
        curves.append(
            plots.Curve(
                name=title,
                xs=tuple(float(row.threads or 0) for row in found),
                ys=tuple(row.figure.median for row in found),
                low=tuple(row.figure.low for row in found),
                high=tuple(row.figure.high for row in found),
                ours=found[0].ours,
            )
        )
    return curves


def _tune(body: Tune) -> dict[str, Any]:
    tried = sorted(body.tried, key=lambda one: -one.images_s)
    top = plots.ceiling([one.images_s for one in tried])

    def same(one: Tried, other: Tried | None) -> bool:
        return other is not None and (one.threads, one.prefetch, one.batch_size) == (
            other.threads,
            other.prefetch,
            other.batch_size,
        )

    rows = []
    for one in tried:
        best, default = same(one, body.best), same(one, body.default)
        label = f"{one.threads} threads, prefetch {one.prefetch}, batches of {one.batch_size}: {texts.number(one.images_s)} images/s"
        plot = plots.plain_bar(one.images_s, top, "ours" if best else "other", label)
        rows.append((one, plot, texts.listed(["best" if best else "", "default" if default else ""])))
    sides = [("the best", body.figure, "ours"), ("the defaults", body.default_figure, "other")]
    kept = [(name, series, style) for name, series, style in sides if series is not None]
    most = plots.ceiling([series.high for _, series, _ in kept])
    return {
        "tried": rows,
        "sides": [(name, series, plots.bar(series, most, style)) for name, series, style in kept],
    }


def _model(body: Model) -> dict[str, Any]:
    rows = []
    for row in body.rows:
        top = plots.ceiling([variant.figure.high for variant in row.variants])
        bars = [
            (v, plots.bar(v.figure, top, "ours" if v.name == row.best else "other"))
            for v in sorted(row.variants, key=lambda v: -v.figure.median)
        ]
        rows.append((row, bars))
    needs = plots.ceiling([row.loader_needs or 0.0 for row in body.rows])
    return {
        "models": rows,
        "needs": [
            (
                row,
                plots.plain_bar(
                    row.loader_needs,
                    needs,
                    "ours",
                    f"{row.model}: the loader must make {texts.number(row.loader_needs)} images/s",
                ),
            )
            for row in body.rows
            if row.loader_needs is not None
        ],
    }
