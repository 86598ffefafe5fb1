"""Plots as inline SVG whose horizontal places are percentages: crisp and legible at any width, coloured by the page's style.

Text stays at the reader's font size because nothing is scaled, and light and dark differ only by CSS. The trade-off: heights are
fixed pixels, and anything that a vertical axis must stretch is drawn in a nested picture of its own.

>>> bar(series, top=4000, style="ours")
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fastload.benchmarks.harness import Series
from fastload.benchmarks.report.records import Stage, Step
from fastload.benchmarks.report.texts import median, number, spread, stage

ROW = 24
PANEL = 110
TIMELINE = 190
MANY = 20  # rounds; more dots on one bar hide each other, and are left out


def _n(value: float) -> str:
    """A coordinate with at most three decimals, written the same on every machine."""
    text = f"{value:.3f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _percent(share: float) -> str:
    return f"{_n(100 * min(max(share, 0.0), 1.0))}%"


def _tag(name: str, *inside: Markup | str, **attributes: object) -> Markup:
    """An element; texts and attributes are escaped, ``class_`` and ``text_anchor`` become their SVG names."""
    pairs = "".join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value is not None
    )
    body = Markup("").join(inside)
    return Markup("<{}{}>{}</{}>").format(Markup(name), Markup(pairs), body, Markup(name))


def _svg(height: float, label: str, *inside: Markup, class_: str = "plot") -> Markup:
    return _tag("svg", *inside, class_=class_, width="100%", height=_n(height), role="img", aria_label=label)


def ceiling(values: Iterable[float]) -> float:
    """The end of an axis: the greatest value, or 1 where there is none above 0."""
    return max([value for value in values if value > 0], default=1.0)


def around(middle: float, values: Iterable[float]) -> tuple[float, float]:
    """Ends of an axis that holds ``middle`` and all values, with a little room on both sides."""
    every = [middle, *values]
    room = 0.03 * ((max(every) - min(every)) or 1.0)
    return min(every) - room, max(every) + room


def ticks(top: float, about: int = 3) -> list[float]:
    """Round values from 0 to at most ``top``, about ``about`` steps of one size."""
    raw = top / about
    scale = 10.0 ** math.floor(math.log10(raw))
    step = min((scale * factor for factor in (1, 2, 2.5, 5, 10)), key=lambda size: abs(size - raw))
    return [round(i * step, 12) for i in range(int(top / step + 1e-9) + 1)]


def bar(series: Series, top: float, style: str, origin: float = 0.0, bottom: float = 0.0) -> Markup:
    """A bar from ``origin`` to the median, the range of the rounds as a whisker, and each round as a dot.

    ``bottom`` and ``top`` are the values at the edges, the same for all rows of one table.
    """

    def x(value: float) -> float:
        return (value - bottom) / (top - bottom)

    middle = ROW / 2
    left, right = sorted((x(origin), x(series.median)))
    text = f"{series.name}: median {median(series)} {series.unit}, {series.n} rounds, {spread(series)}"
    parts = [
        _tag("title", text),
        _tag(
            "rect",
            class_=f"bar {style}",
            x=_percent(left),
            y=_n(middle - 7),
            width=_percent(right - left),
            height=14,
            rx=2,
            data_median=_n(series.median),
        ),
        _line(x(series.low), middle, x(series.high), middle, "whisker"),
        _line(x(series.low), middle - 4, x(series.low), middle + 4, "whisker"),
        _line(x(series.high), middle - 4, x(series.high), middle + 4, "whisker"),
    ]
    for i, value in enumerate(series.rounds if series.n <= MANY else ()):
        title = _tag("title", f"round {i + 1}: {number(value)} {series.unit}")
        parts.append(_tag("circle", title, class_="round", cx=_percent(x(value)), cy=_n(middle), r="2.5"))
    if origin:
        parts.insert(1, _line(x(origin), 0, x(origin), ROW, "origin"))
    return _svg(ROW, text, *parts, class_="plot row")


def plain_bar(value: float, top: float, style: str, label: str) -> Markup:
    """A bar of one figure that has no rounds."""
    rect = _tag(
        "rect",
        class_=f"bar {style}",
        x="0%",
        y=_n(ROW / 2 - 7),
        width=_percent(value / top),
        height=14,
        rx=2,
        data_median=_n(value),
    )
    return _svg(ROW, label, _tag("title", label), rect, class_="plot row")


def meter(share: float, label: str) -> Markup:
    """A share of a limit: a full track is 100%, and more than 100% fills it."""
    y, height = ROW / 2 - 4, 8
    track = _tag("rect", class_="track", x="0%", y=_n(y), width="100%", height=height, rx=4)
    fill = _tag("rect", class_="bar part", x="0%", y=_n(y), width=_percent(share), height=height, rx=4)
    return _svg(ROW, label, _tag("title", label), track, fill, class_="plot row")


def waterfall(stages: Sequence[Stage]) -> list[Markup]:
    """One strip a stage, each beginning where the stage before it ended: all together one image on one thread."""
    total = ceiling([sum(item.us for item in stages)])
    longest = max((item.us for item in stages), default=0.0)
    strips, start = [], 0.0
    for item in stages:
        label = f"{stage(item.name)}: {number(item.us)} µs an image, {item.us / total:.0%} of the sum"
        rect = _tag(
            "rect",
            class_="bar limit" if item.us == longest else "bar part",
            x=_percent(start / total),
            y=_n(ROW / 2 - 7),
            width=_percent(item.us / total),
            height=14,
            rx=1,
            data_us=_n(item.us),
        )
        parts = [_tag("title", label), rect]
        if start:
            parts.append(_line(start / total, -ROW, start / total, ROW / 2 - 7, "drop"))
        strips.append(_svg(ROW, label, *parts, class_="plot row open"))
        start += item.us
    return strips


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return _tag("line", class_=class_, x1=_percent(x1), y1=_n(y1), x2=_percent(x2), y2=_n(y2))


@dataclass(frozen=True)
class Curve:
    """One peer's line. ``low`` and ``high`` are the range of the rounds at each point, or empty."""

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    ours: bool = False


def panels(
    curves: Sequence[Curve], *, unit: str, x_unit: str, ideal: bool = False, dots: bool = True
) -> list[Markup]:
    """Small pictures on one scale, one a curve, with all others faint behind it.

    ``ideal`` draws the line that each would follow if its first figure grew as x does.
    """
    every = [y for curve in curves for y in (*curve.ys, *curve.high)]
    if ideal:
        every += [max(_ideal(curve)) for curve in curves if len(curve.xs) > 1]
    top = ceiling(every) * 1.04
    first = min(x for curve in curves for x in curve.xs)
    last = max(x for curve in curves for x in curve.xs)
    return [_panel(i, curves, top, (first, last), unit, x_unit, ideal, dots) for i in range(len(curves))]


def _ideal(curve: Curve) -> tuple[float, ...]:
    return tuple(curve.ys[0] * x / curve.xs[0] for x in curve.xs)


def _panel(
    chosen: int,
    curves: Sequence[Curve],
    top: float,
    ends: tuple[float, float],
    unit: str,
    x_unit: str,
    ideal: bool,
    dots: bool,
) -> Markup:
    curve = curves[chosen]
    span = (ends[1] - ends[0]) or 1.0

    def x(value: float) -> float:
        return (value - ends[0]) / span

    def y(value: float) -> float:
        return PANEL * (1 - value / top)

    def path(xs: Sequence[float], ys: Sequence[float], class_: str, tag: str = "polyline") -> Markup:
        points = " ".join(f"{_n(100 * x(a))},{_n(y(b))}" for a, b in zip(xs, ys))
        return _tag(tag, class_=class_, points=points, vector_effect="non-scaling-stroke")

    grid = [
        part
        for tick in ticks(top)
        for part in (
            _line(0, y(tick), 1, y(tick), "axis" if tick == 0 else "grid"),
            _tag("text", f"{tick:,.6g}", class_="tick", x="-6", y=_n(y(tick) + 4), text_anchor="end"),
        )
    ]
    shapes = [path(o.xs, o.ys, "faint") for i, o in enumerate(curves) if i != chosen and len(o.xs) > 1]
    style = "ours" if curve.ours else "other"
    if ideal and len(curve.xs) > 1:
        shapes.append(path(curve.xs, _ideal(curve), "ideal"))
    if curve.low and len(curve.xs) > 1:
        around = (*curve.low, *reversed(curve.high))
        shapes.append(path((*curve.xs, *reversed(curve.xs)), around, f"band {style}", "polygon"))
    if len(curve.xs) > 1:
        shapes.append(path(curve.xs, curve.ys, f"line {style}"))
    inner = _tag(
        "svg",
        *shapes,
        width="100%",
        height=PANEL,
        viewBox=f"0 0 100 {PANEL}",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    marks = []
    for a, b in zip(curve.xs, curve.ys):
        title = _tag("title", f"{curve.name}, {number_of(a, x_unit)}: {number(b)} {unit}")
        radius = "3.5" if dots else "5"
        marks.append(
            _tag(
                "circle",
                title,
                class_=f"mark {style}" if dots else "mark hidden",
                cx=_percent(x(a)),
                cy=_n(y(b)),
                r=radius,
            )
        )
    shown = sorted({a for o in curves for a in o.xs})
    shown = shown if len(shown) <= 5 else [shown[0], shown[-1]]
    bottom = [
        _tag(
            "text",
            f"{a:g}",
            class_="tick",
            x=_percent(x(a)),
            y=PANEL + 16,
            text_anchor="middle",
        )
        for a in shown
    ]
    label = f"{curve.name}: " + ", ".join(
        f"{number(b)} {unit} at {number_of(a, x_unit)}"
        for a, b in (zip(curve.xs, curve.ys) if len(curve.xs) <= 8 else [(curve.xs[-1], curve.ys[-1])])
    )
    return _svg(PANEL + 22, label, *grid, inner, *marks, *bottom, class_="plot panel open")


def number_of(value: float, unit: str) -> str:
    """``2 threads``, ``1 thread``, ``epoch 3``: a count with its word."""
    if unit == "epoch":
        return f"epoch {value:g}"
    return f"{value:g} {unit if value == 1 else unit + 's'}"


def timeline(steps: Sequence[Step]) -> Markup:
    """Every step at the time when it began: the model's seconds, and on top of them the wait for images."""
    ends = [step.t + step.wait_s + step.step_s for step in steps]
    begin, end = steps[0].t, max(ends)
    span = (end - begin) or 1.0
    top = ceiling([step.wait_s + step.step_s for step in steps]) * 1.05
    waited, worked = sum(s.wait_s for s in steps), sum(s.step_s for s in steps)
    share = waited / ((waited + worked) or 1.0)
    label = (
        f"{len(steps)} training steps over {number(span)} s: {share:.0%} of the time waiting for images, "
        "the rest in the model"
    )

    def y(value: float) -> float:
        return TIMELINE * (1 - value / top)

    parts = [_tag("title", label)]
    for tick in ticks(top * 1000):
        at = y(tick / 1000)
        parts.append(_line(0, at, 1, at, "axis" if tick == 0 else "grid"))
        parts.append(_tag("text", f"{tick:,.6g}", class_="tick", x="-6", y=_n(at + 4), text_anchor="end"))
    starts = [step.t for step in steps[1:]] + [end]
    for i, (step, following) in enumerate(zip(steps, starts)):
        title = f"step {i + 1}, {step.t - begin:.2f} s: waited {1000 * step.wait_s:.1f} ms, model {1000 * step.step_s:.1f} ms"
        at, width = (step.t - begin) / span, max(following - step.t, 0.0) / span
        for low, high, style in (
            (0.0, step.step_s, "other"),
            (step.step_s, step.step_s + step.wait_s, "limit"),
        ):
            parts.append(
                _tag(
                    "rect",
                    _tag("title", title),
                    class_=f"bar {style}",
                    x=_percent(at),
                    y=_n(y(high)),
                    width=_percent(0.9 * width),
                    height=_n(y(low) - y(high)),
                )
            )
    for tick in ticks(span, 4):
        anchor = "start" if tick == 0 else "end" if tick / span > 0.97 else "middle"
        text = f"{tick:g}" + (" s" if tick == 0 else "")
        parts.append(
            _tag("text", text, class_="tick", x=_percent(tick / span), y=TIMELINE + 17, text_anchor=anchor)
        )
    return _svg(TIMELINE + 24, label, *parts, class_="plot wide open")
