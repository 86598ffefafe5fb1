"""Plots as inline SVG, coloured by the page's style. Along, places are percentages: they fit any width, and text is not scaled.

What a vertical axis must stretch is drawn in a nested picture of its own. The trade-off: heights are fixed pixels.

>>> chart([Line("loss", [1, 2, 3], [0.9, 0.5, 0.4])])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

HEIGHT = 150
LETTER = 7.2  # width of a letter of a label in pixels, at most about


@dataclass(frozen=True)
class Line:
    """A line over epochs; ``style``: ours, other or thin (one fold behind the mean of all)."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "ours"

    def points(self) -> list[tuple[float, float]]:
        """Those that are numbers."""
        return [(x, y) for x, y in zip(self.xs, self.ys) if math.isfinite(y)]


def _n(value: float) -> str:
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def tag(name: str, *inside: Markup | str, **attributes: object) -> Markup:
    """An element; texts and attributes are escaped, ``class_`` and ``text_anchor`` get their SVG names."""
    pairs = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
    ]
    name = Markup(name)
    return Markup("<{}{}>{}</{}>").format(name, Markup("").join(pairs), Markup("").join(inside), name)


def _svg(height: float, label: str, *inside: Markup, width: object = "100%", class_: str = "plot") -> Markup:
    return tag("svg", *inside, class_=class_, width=width, height=_n(height), role="img", aria_label=label)


def _line(x1: str, y1: float, x2: str, y2: float, class_: str) -> Markup:
    return tag("line", class_=class_, x1=x1, y1=_n(y1), x2=x2, y2=_n(y2))


def _text(text: str, x: str, y: float, anchor: str, class_: str = "tick") -> Markup:
    return tag("text", text, class_=class_, x=x, y=_n(y), text_anchor=anchor)


def _ticks(low: float, high: float, steps: int = 4) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(nbins=steps, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(value) for value in found if low - 1e-12 <= value <= high + 1e-12]


def chart(lines: Sequence[Line], *, percent: bool = False, zero: bool = False) -> Markup:
    """Lines over epochs on one scale, from 0 if ``zero``. Every point of a line that is not thin tells its value."""
    points = [point for line in lines for point in line.points()]
    if not points:
        return Markup("")
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    low = min(0.0, low) if zero else low
    room = (0.06 * (high - low)) or abs(high) * 0.1 or 1.0
    low, high = (low if zero else low - room), high + room

    def x(value: float) -> float:
        return 100 * (value - first) / (last - first) if last > first else 50.0

    def y(value: float) -> float:
        return HEIGHT * (1 - (value - low) / (high - low))

    def words(value: float) -> str:
        return f"{100 * value:.4g}%" if percent else f"{value:.4g}"

    back = []
    for tick in _ticks(low, high):
        back += [_line("0%", y(tick), "100%", y(tick), "grid"), _text(words(tick), "-7", y(tick) + 4, "end")]
    drawn, marks = [], []
    for line in sorted(lines, key=lambda one: one.style != "thin"):
        at = line.points()
        text = " ".join(f"{_n(x(a))},{_n(y(b))}" for a, b in at)
        if len(at) > 1:
            drawn.append(
                tag("polyline", class_=f"line {line.style}", points=text, vector_effect="non-scaling-stroke")
            )
        if line.style == "thin" and len(at) > 1:
            continue
        for a, b in at:
            title = tag("title", f"{line.name}, epoch {a:g}: {words(b)}")
            seen = "" if len(at) == 1 else " hidden"
            marks.append(
                tag("circle", title, class_=f"mark {line.style}{seen}", cx=f"{_n(x(a))}%", cy=_n(y(b)), r=4)
            )
    inner = tag(
        "svg", *drawn, width="100%", height=HEIGHT, viewBox=f"0 0 100 {HEIGHT}", preserveAspectRatio="none", aria_hidden="true"
    )  # fmt: skip
    below = [
        _text(f"{value:g}", f"{_n(x(value))}%", HEIGHT + 17, "middle")
        for value in sorted({first, last, *(t for t in _ticks(first, last) if t == int(t) and _clear(x(t)))})
    ]
    label = "; ".join(
        f"{line.name}: {words(at[-1][1])} at epoch {at[-1][0]:g}" for line in lines if (at := line.points())
    )
    return _svg(HEIGHT + 24, label, *back, inner, *marks, *below)


def _clear(place: float) -> bool:
    """Whether a number at ``place`` percent would not touch those at the ends."""
    return 16 <= place <= 84


def interval(value: float, low: float, high: float, ends: tuple[float, float]) -> Markup:
    """A score as a dot on its interval; ``ends``: the scale, the same for all rows of one table."""
    span = (ends[1] - ends[0]) or 1.0

    def x(one: float) -> str:
        return f"{_n(100 * (one - ends[0]) / span)}%"

    label = f"{value:.4f}, {low:.4f} to {high:.4f}"
    parts = [
        tag("title", label),
        _line("0%", 12, "100%", 12, "grid"),
        _line(x(low), 12, x(high), 12, "whisker"),
    ]
    parts += [_line(x(end), 8, x(end), 16, "whisker") for end in (low, high)]
    parts.append(tag("circle", class_="dot", cx=x(value), cy=12, r="4.5"))
    return _svg(24, label, *parts, class_="plot row")


def cut(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def heat_map(table: np.ndarray, classes: Sequence[str]) -> Markup:
    """Confusion counts (C, C) int, row true and column predicted class, shaded by the share of the true class.

    Right ones in one colour, mistakes in another; an empty cell is not drawn.
    """
    count = len(classes)
    cell = max(27, min(58, 620 // count))
    names = [cut(name, 26) for name in classes]
    widest = LETTER * max(len(name) for name in names)
    flat = widest <= cell - 4
    left, top = widest + 24, 20 + (16 if flat else widest)
    side = cell * count
    right = 12 if flat else 0
    totals = np.maximum(table.sum(axis=1), 1)
    parts = [
        _text("predicted", _n(left + side / 2), 12, "middle", "tick"),
        tag("text", "true", class_="tick", text_anchor="middle", transform=f"translate(11,{_n(top + side / 2)}) rotate(-90)"),
        tag("rect", class_="field", x=_n(left), y=_n(top), width=side, height=side),
    ]  # fmt: skip
    for i, name in enumerate(names):
        at = (i + 0.5) * cell
        title = tag("title", classes[i])
        parts.append(
            tag("text", title, name, class_="label", x=_n(left - 7), y=_n(top + at + 4), text_anchor="end")
        )
        turn = (
            {"x": _n(left + at), "y": _n(top - 6), "text_anchor": "middle"}
            if flat
            else {"transform": f"translate({_n(left + at + 4)},{_n(top - 6)}) rotate(-90)"}
        )
        parts.append(tag("text", title, name, class_="label", **turn))
    for i, j in zip(*np.nonzero(table)):
        number, share = int(table[i, j]), float(table[i, j] / totals[i])
        title = tag(
            "title", f"{classes[i]} taken for {classes[j]}: {number:,} ({share:.1%} of {int(totals[i]):,})"
        )
        x, y = left + j * cell, top + i * cell
        parts.append(
            tag(
                "rect", title, class_="hit" if i == j else "miss", x=_n(x + 0.5), y=_n(y + 0.5), width=cell - 1,
                height=cell - 1, fill_opacity=_n(0.08 + 0.92 * share),
            )
        )  # fmt: skip
        text = f"{number}" if number < 10000 else f"{number / 1000:.0f}k"
        style = "count on" if share > 0.5 else "count"
        parts.append(_text(text, _n(x + cell / 2), y + cell / 2 + 4, "middle", style))
    label = f"Confusion matrix of {count} classes: {int(np.trace(table)):,} of {int(table.sum()):,} images are right"
    return _svg(top + side + 4, label, *parts, width=_n(left + side + right))


def reliability(found: Mapping[str, Any]) -> Markup:
    """Share of right answers over confidence, a bar a bin, with what lacks to the mean confidence or is above it as a gap.

    ``found``: what :func:`fastload.train.calibrate.reliability` gives. Below: how many answers each bin has.
    """
    height, below = 190, 34
    parts: list[Markup] = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = height * (1 - tick)
        parts += [_line("0%", y, "100%", y, "grid"), _text(f"{tick:.0%}", "-7", y + 4, "end")]
        parts.append(_text(f"{tick:.0%}", f"{100 * tick:g}%", height + below + 18, "middle"))
    edges, counts, most = found["edges"], found["count"], found["count"].max()
    for i in np.flatnonzero(counts):
        right, sure = float(found["accuracy"][i]), float(found["confidence"][i])
        text = f"confidence {edges[i]:.0%} to {edges[i + 1]:.0%}: {counts[i]:,} answers, sure by {sure:.1%}, right {right:.1%}"
        tall = max(1.0, 26 * counts[i] / most)
        for style, top, size in (
            ("bar", height * (1 - min(right, sure)), height * min(right, sure)),
            ("gap", height * (1 - max(right, sure)), height * abs(right - sure)),
            ("bar faint", height + below - tall, tall),
        ):
            place = {
                "x": f"{_n(100 * edges[i] + 0.3)}%",
                "width": f"{_n(100 * (edges[i + 1] - edges[i]) - 0.6)}%",
            }
            parts.append(
                tag("rect", tag("title", text), class_=style, y=_n(top), height=_n(size), rx=1, **place)
            )
    parts.append(_line("0%", height, "100%", 0, "diagonal"))
    parts.append(_line("0%", height, "100%", height, "axis"))
    label = (
        f"Reliability diagram: share of right answers over confidence, apart by {found['ece']:.1%} on average"
    )
    return _svg(height + below + 26, label, *parts)
