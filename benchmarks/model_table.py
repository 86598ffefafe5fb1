"""Records of ``fastload bench model`` for people: which switch pays, the best variant, the loader speed that a model needs.

Pure functions of the record, so that a file says what the run said. The trade-off is the rule for the best one: a switch more
must bring 3%, because it costs compilation, memory or precision that no figure shows.

>>> print(table(record)); print(sentence(record["rows"][0]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastload.benchmarks.harness import Series
from fastload.benchmarks.verdict import GAIN, gained, rate, times

PLAIN = "plain"
SWITCHES = ("channels_last", "amp", "compile", "cuda_graph")


def switches(variant: Mapping[str, Any]) -> list[str]:
    """What a variant of a record turns on."""
    return [name for name in SWITCHES if variant.get(name) not in (None, False, "off")]


def best(variants: Sequence[Mapping[str, Any]]) -> str:
    """Name of the best variant: the fastest of those that beat plain, or one with fewer switches that is within 3% of it.

    Plain where none beats it; without a figure of plain the fastest; "" where there is none at all.
    """
    winners = [v for v in variants if v.get("ratio") and gained(v["ratio"]["rounds"])]
    if winners:
        top = max(v["ratio"]["median"] for v in winners)
        near = [v for v in winners if v["ratio"]["median"] * GAIN >= top]
        return str(min(near, key=lambda v: (len(switches(v)), -v["ratio"]["median"]))["name"])
    if any(v["name"] == PLAIN for v in variants):
        return PLAIN
    return str(max(variants, key=lambda v: v["figure"]["median"])["name"]) if variants else ""


def needs(variants: Sequence[Mapping[str, Any]]) -> float | None:
    """Images/s that a loader must make so that the best variant never waits; None where there is no figure."""
    name = best(variants)
    return next((float(v["figure"]["median"]) for v in variants if v["name"] == name), None)


def sentence(row: Mapping[str, Any]) -> str:
    """What one model's figures say, in one sentence."""
    variants, model = row["variants"], row["model"]
    need = needs(variants)
    if need is None:
        return f"{model}: no variant gave a figure."
    parts = [_pays(v) for v in variants if len(switches(v)) == 1 and v.get("ratio")]
    parts += [
        f"{failed['name']} does not pay ({failed['slower']:.1f} times as slow)"
        for failed in row["failed"]
        if failed.get("slower") is not None and " + " not in failed["name"]
    ]
    name = best(variants)
    chosen = next(v for v in variants if v["name"] == name)
    against = f", {times(chosen['ratio']['median'])} plain" if name != PLAIN and chosen.get("ratio") else ""
    head = f"{', '.join(parts)}; " if parts else ""
    return (
        f"{model}: {head}best is {name} with {rate(need)} images/s{against}, so a loader must make {rate(need)} images/s "
        "for it never to wait."
    )


def _pays(variant: Mapping[str, Any]) -> str:
    by = variant["ratio"]
    if gained(by["rounds"]):
        word = "pays"
    else:  # a median above 1 that too few rounds bear out
        word = "is within the noise" if by["median"] > GAIN else "does not pay"
    return f"{variant['name']} {word} ({times(by['median'])})"


def table(record: Mapping[str, Any]) -> str:
    """Every model's variants with figure, spread, ratio and cost, and those without a figure with the reason."""
    return "\n\n".join(_model(row) for row in record["rows"])


def _model(row: Mapping[str, Any]) -> str:
    lines = [f"{row['model']} at {row['size']} px, batches of {row['batch_size']}"]
    width = max((len(v["name"]) for v in row["variants"]), default=0)
    for variant in row["variants"]:
        figure = str(Series(variant["name"], tuple(variant["figure"]["rounds"]), variant["figure"]["unit"]))
        by = variant.get("ratio")
        ratio = f"{times(by['median']):>6} [{by['min']:.2f}-{by['max']:.2f}]" if by else ""
        cost = "" if variant["cost"] == "none" else f"  cost: {variant['cost']}"
        lines.append(f"  {variant['name']:<{width}}  {ratio}  {figure}{cost}")
    if row["failed"]:
        lines.append("  Without a figure:")
        lines += [f"    {failed['name']}: {failed['reason']}" for failed in row["failed"]]
    return "\n".join(lines)
