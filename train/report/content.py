"""What the page says: figures, plots and pictures of each run, and the table that compares several.

All of it is made from the files of the run folders; how it looks is decided in ``template.html.j2``. The trade-off: scores are
computed anew from the saved probabilities, which costs seconds for 100,000 images and shows what any other tool would find.

>>> section(read("runs/photos"), ["photos.beton"], "r1")["scores"]
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastload.train import calibrate, metrics, runs
from fastload.train.config import Config
from fastload.train.predictions import Predictions
from fastload.train.report import pictures, plots
from fastload.train.report.label_errors import suspects
from fastload.train.report.read import Result, Training

MATRIX = 30  # classes; of more, the most confused pairs are listed
PAIRS = 25
CARDS = 24  # pictures of a gallery
NAMES = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1", "micro_f1": "micro-F1",
    "weighted_f1": "weighted F1", "top5": "top-5 accuracy", "log_loss": "log loss", "loss": "log loss", "auroc": "AUROC",
    "average_precision": "average precision", "kappa": "kappa", "quadratic_kappa": "quadratic kappa",
}  # fmt: skip


def section(result: Result, sources: Sequence[Any], anchor: str) -> dict[str, Any]:
    """Everything about one run, for the template. ``sources``: where its pictures are, see :func:`pictures.find`."""
    best = result.best
    found: dict[str, Any] = {
        "id": anchor, "name": result.name, "folder": str(result.folder), "kind": result.kind, "notes": result.notes,
        "metric": NAMES.get(result.metric, result.metric), "facts": facts(result), "curves": curves(result),
        "speed": speed(result), "options": options(result), "environment": environment(result), "headline": None,
        "trainings": [training(one, result.metric) for one in result.trainings], "multilabel": False,
    }  # fmt: skip
    if best is None or not len(best):
        return found
    table = None if best.multilabel else metrics.confusion(best.true, best.predicted, len(best.classes))
    small = len(best.classes) <= MATRIX
    wrong, doubtful = mistakes(best), label_errors(best)
    cards = wrong["cards"] + doubtful["cards"]
    shown, problem = pictures.find([card["id"] for card in cards], sources)
    for card in cards:
        card["picture"] = shown.get(card["id"])
    return found | {
        "multilabel": best.multilabel, "headline": headline(result, "best"), "last": headline(result, "last"),
        "scores": scores(result), "per_class": per_class(best),
        "matrix": plots.heat_map(table, best.classes) if table is not None and small else None,
        "pairs": pairs(table, best.classes) if table is not None and not small else None,
        "mistakes": wrong, "label_errors": doubtful, "pictures": bool(shown), "problem": problem,
        "calibration": calibration(best),
    }  # fmt: skip


def per_class(held: Predictions) -> list[dict[str, Any]]:
    """Figures of each class, weakest F1 first; for several labels an image also how many were missed, and given falsely."""
    rows = metrics.per_class(held.true, held.probs, held.classes, held.decided)
    if held.multilabel:
        true, given = held.true > 0.5, held.predicted > 0.5
        for row, missed, false in zip(rows, (true & ~given).sum(axis=0), (given & ~true).sum(axis=0)):
            row |= {"missed": int(missed), "false": int(false)}
    return sorted(rows, key=lambda row: (math.isnan(row["f1"]), row["f1"]))


def number(value: float | None) -> str:
    """A score with four decimals, a dash where there is none."""
    return "\N{EN DASH}" if value is None or math.isnan(value) else f"{value:.4f}"


def short(id: str) -> str:
    """An id of at most 44 letters; of a longer one the beginning and the end, which most often tells images apart."""
    return id if len(id) <= 44 else f"{id[:14]}…{id[-29:]}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def facts(result: Result) -> list[tuple[str, str]]:
    """One line of what was trained, on what, how long."""
    resolved, data = result.info.get("resolved", {}), result.info.get("data", {})
    options, lines = result.options, [line for one in result.trainings for line in one.history]
    folds = ""
    if result.kind == "cv":
        there, wanted = len(result.trainings), result.info.get("folds", "?")
        repeats = result.info.get("repeats", 1)
        folds = f"{wanted}" + (f" \N{MULTIPLICATION SIGN} {repeats}" if repeats != 1 else "")
        folds += "" if there == wanted * repeats else f", {there} there"
    images = [f"{data[key]:,} {word}" for key, word in (("train_images", "to learn from"), ("valid_images", "held out"))
              if isinstance(data.get(key), int)]  # fmt: skip
    if result.best is not None and result.kind == "cv":
        images = [f"{len(result.best):,} held out in turn"]
    classes = result.best.classes if result.best is not None else data.get("classes") or []
    found = [
        ("Model", f"{options['model']} at {options['size']} px"), ("Folds", folds), ("Split", result.info.get("scheme", "")),
        ("Groups", resolved.get("groups") or ""), ("Images", ", ".join(images)), ("Classes", len(classes) or ""),
        ("Epochs", _epochs(result)), ("Device", resolved.get("device", "")), ("Precision", resolved.get("amp", "")),
        ("Time", duration(sum(line.get("seconds", 0.0) for line in lines)) if lines else ""),
    ]  # fmt: skip
    return [(name, str(value)) for name, value in found if value]


def _epochs(result: Result) -> str:
    counts = sorted({len(one.history) for one in result.trainings if one.history})
    if not counts:
        return ""
    found = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return found if counts == [result.options["epochs"]] else f"{found} of {result.options['epochs']}"


def headline(result: Result, which: str, metric: str | None = None) -> dict[str, Any] | None:
    """The selection metric with its bootstrap interval, of the pooled predictions ``which``: best or last."""
    held: Predictions | None = getattr(result, which)
    if held is None or not len(held):
        return None
    metric = metric or result.metric
    saved = result.scores.get(which, {}).get("interval") if metric == result.metric else None
    low, high = saved or metrics.bootstrap(metric, held.true, held.probs, held.groups, held.decided)
    found = {"value": held.score(metric), "low": low, "high": high}
    return found | {"images": len(held), "by_group": held.groups is not None}


def scores(result: Result) -> list[tuple[str, float | None, float | None]]:
    """Every scalar metric: name, at the best epochs, at the last ones."""

    def every(held: Predictions | None) -> dict[str, float]:
        name = metrics.ALIASES.get(result.metric, result.metric)  # which a summary need not have
        return {} if held is None else {**held.summary(), name: held.score(name)}

    last = every(result.last)
    return [(NAMES.get(name, name), value, last.get(name)) for name, value in every(result.best).items()]


def training(one: Training, metric: str) -> dict[str, Any]:
    """A row of the table of folds; figures are None where they are not known."""

    def score(held: Predictions | None, name: str) -> float | None:
        return held.score(name) if held is not None and len(held) else None

    kept, epochs = one.kept, len(one.history)
    return {
        "name": one.name, "images": None if one.best is None else len(one.best),
        "kept": None if kept is None else kept.get("average", f"{kept['epoch']} of {epochs}"),
        "score": score(one.best, metric), "last": score(one.last, metric), "log_loss": score(one.best, "log_loss"),
    }  # fmt: skip


def _lines(result: Result, key: str, name: str, style: str = "ours") -> list[plots.Line]:
    """A thin line for each fold and the mean of all, or the one line of a run."""
    found = []
    for one in result.trainings:
        at = [(line["epoch"], line[key]) for line in one.history if isinstance(line.get(key), (int, float))]
        if at:
            xs, ys = zip(*at)
            found.append(plots.Line(f"{one.name}, {name}", xs, ys, "thin"))
    if len(found) < 2:
        return [dataclasses.replace(line, name=name, style=style) for line in found]
    common = min((line.xs for line in found), key=len)
    mean = np.mean([line.ys[: len(common)] for line in found], axis=0).tolist()
    thin = [dataclasses.replace(line, style=f"thin {style}") for line in found]
    return [*thin, plots.Line(f"mean of {name}", common, mean, style)]


def curves(result: Result) -> list[dict[str, Any]]:
    """Loss, metric and learning rate over epochs."""
    key = runs.column(result.metric)
    kept = [
        ("Loss", [*_lines(result, "train_loss", "training", "other"), *_lines(result, "valid_loss", "held out")]),
        *((NAMES.get(name, name), _lines(result, name, "held out")) for name in dict.fromkeys([key, "macro_f1"])
          if name != "valid_loss"),
        ("Learning rate", _lines(result, "lr", "learning rate")),
    ]  # fmt: skip
    return [{"name": name, "plot": plots.chart(lines)} for name, lines in kept if lines]


def speed(result: Result) -> dict[str, Any] | None:
    """Share of the time that training waited for data, and images per second, over epochs."""
    lines = [
        line for one in result.trainings for line in one.history if {"stall", "images_per_s"} <= set(line)
    ]
    if not lines:
        return None
    waits, images = _lines(result, "stall", "waiting for data"), _lines(result, "images_per_s", "images/s")
    charts = [
        ("Share of the time spent waiting for data", plots.chart(waits, percent=True, zero=True)),
        ("Training images per second", plots.chart(images, zero=True)),
    ]
    middle = {name: float(np.median([line[name] for line in lines])) for name in ("stall", "images_per_s")}
    return middle | {"plots": [{"name": name, "plot": plot} for name, plot in charts]}


def pairs(table: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The most confused pairs of classes, by count."""
    off = table.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:PAIRS]
    places = [divmod(int(place), len(classes)) for place in order]
    return [
        {
            "true": classes[i],
            "predicted": classes[j],
            "count": int(off[i, j]),
            "share": off[i, j] / table[i].sum(),
        }
        for i, j in places
        if off[i, j]
    ]


def _names(row: np.ndarray, classes: Sequence[str]) -> str:
    return ", ".join(classes[i] for i in np.flatnonzero(row).tolist()) or "none"


def mistakes(held: Predictions) -> dict[str, Any]:
    """The held-out images of which the model was surest and wrong: the least probability of the truth first."""
    rows, probs, labels = np.arange(len(held)), held.probs, held.true
    if held.multilabel:
        truth = labels > 0.5
        wrong = truth != held.predicted
        off = np.where(wrong, np.abs(truth - probs), -1.0)
        worst = off.argmax(axis=1)
        own = 1 - off[rows, worst]
        bad = np.flatnonzero(wrong.any(axis=1))
    else:
        own, bad = probs[rows, labels], np.flatnonzero(held.predicted != labels)
    order = bad[np.argsort(own[bad], kind="stable")][:CARDS]
    cards = []
    for i in order.tolist():
        card: dict[str, Any] = {"id": held.ids[i]}
        if held.multilabel:
            name, there = held.classes[worst[i]], bool(truth[i, worst[i]])
            card["lines"] = [("true", _names(truth[i], held.classes), None),
                             ("predicted", _names(held.predicted[i], held.classes), None),
                             ("missed" if there else "not there", name, float(probs[i, worst[i]]))]  # fmt: skip
        else:
            guess = int(held.predicted[i])
            card["lines"] = [("true", held.classes[labels[i]], float(own[i])),
                             ("predicted", held.classes[guess], float(probs[i, guess]))]  # fmt: skip
        cards.append(card)
    return {"count": len(bad), "images": len(held), "cards": cards}


def label_errors(held: Predictions) -> dict[str, Any]:
    """Probable label errors, most probable first."""
    found = suspects(held.true, held.probs)
    cards, lines = [], list[tuple[str, str, float | None]]()
    for one in found[:CARDS]:
        if one.label is None:
            lines = [(word, held.classes[c], float(held.probs[one.row, c]))
                     for word, c in (("labelled", one.given), ("probably", one.suggested))]  # fmt: skip
        else:
            name, p = held.classes[one.label], float(held.probs[one.row, one.label])
            lines = [("labelled", name if one.given else f"without {name}", None),
                     ("probably", name if one.suggested else f"without {name}", p if one.suggested else 1 - p)]  # fmt: skip
        cards.append({"id": held.ids[one.row], "lines": lines})
    return {"count": len(found), "images": len({one.row for one in found}), "of": len(held), "cards": cards}


def calibration(held: Predictions) -> dict[str, Any]:
    """Reliability of the probabilities as they are, before any temperature."""
    found = calibrate.reliability(held.true, held.probs)
    return {"ece": float(found["ece"]), "plot": plots.reliability(found)}


def options(result: Result) -> dict[str, Any]:
    """All options by section: (name, value, default, whether it was changed), and the changed ones alone."""
    fields = {spec.name: spec for spec in dataclasses.fields(Config)}
    defaults, by_section = Config().to_dict(), dict[str, list[dict[str, Any]]]()
    for name, value in result.options.items():
        where = fields[name].metadata["section"] if name in fields else "Unknown to this version"
        changed = name not in defaults or value != defaults[name]
        row = {"name": name, "value": text(value), "default": text(defaults.get(name)), "changed": changed}
        by_section.setdefault(where, []).append(row)
    changed = [row for rows in by_section.values() for row in rows if row["changed"]]
    return {"sections": by_section, "changed": changed}


def text(value: Any) -> str:
    """An option or a version on one line."""
    if isinstance(value, list):
        return ", ".join(map(text, value)) or "none"
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def environment(result: Result) -> list[tuple[str, list[tuple[str, str]]]]:
    """What run.json says of resolved values, data, versions and the machine."""
    return [
        (name.capitalize(), [(key, text(value)) for key, value in values.items()])
        for name in ("resolved", "data", "versions", "machine")
        if isinstance(values := result.info.get(name), dict)
    ]


def comparison(results: Sequence[Result], sections: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The runs side by side by the selection metric of the first one, and the options in which they differ."""
    if len(results) < 2:
        return None
    metric = results[0].metric
    shown = NAMES.get(metric, metric)
    rows = []
    for result, found in zip(results, sections):
        head = found["headline"] if result.metric == metric else headline(result, "best", metric)
        summary = {} if result.best is None else result.best.summary()
        rows.append({"id": found["id"], "name": result.name, "head": head, "summary": summary, "speed": found["speed"],
                     "seconds": sum(line.get("seconds", 0.0) for one in result.trainings for line in one.history)})  # fmt: skip
    heads = [row["head"] for row in rows if row["head"]]
    sure = [head for head in heads if math.isfinite(head["low"])]  # of one group there is no interval
    ends = (
        min((head["low"] for head in sure), default=0.0),
        max((head["high"] for head in sure), default=1.0),
    )
    for row in rows:
        head = row["head"]
        row["plot"] = plots.interval(head["value"], head["low"], head["high"], ends) if head in sure else ""
    values = [head["value"] for head in heads if math.isfinite(head["value"])]
    best = (max if metrics.higher_is_better(metric) else min)(values, default=None)
    names = dict.fromkeys(name for result in results for name in result.options)
    table = [(name, [text(result.options.get(name)) for result in results]) for name in names]
    images = {frozenset(result.best.ids) for result in results if result.best is not None}
    notes = []
    if len(images) > 1:
        notes.append("The runs were scored on different images, which may be part of a difference.")
    if len({result.metric for result in results}) > 1:
        notes.append(f"The runs chose their best epochs by different metrics; all are compared by {shown}.")
    return {
        "metric": shown, "rows": rows, "best": best, "notes": notes, "ends": ends,
        "beside": [(key, NAMES[key]) for key in ("accuracy", "macro_f1", "log_loss") if NAMES[key] != shown],
        "differences": [(name, values) for name, values in table if len(set(values)) > 1],
    }  # fmt: skip
