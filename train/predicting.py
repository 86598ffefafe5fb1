"""Class probabilities of a trained run for new images, as arrays and as a CSV file.

``predict("runs/photos", "test.beton", out="out.csv")``. The images need no labels; if they have labels whose names the
run knows, they come with the result, matched by the name of the class and never by its number. A cross-validation predicts with
the mean of its folds' models. Views at test time (``tta="hflip"``) cost a forward pass each and do not always help, so they are
tried on the held-out images first, and used only if the run's own metric gets better.
"""

from __future__ import annotations

import csv
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastload.dataset import Dataset
from fastload.errors import DataError, FastloadError, UsageError
from fastload.train import metrics
from fastload.train.data import match_labels, open_data
from fastload.train.predictions import OOF, VALID, Predictions
from fastload.train.runs import ABOUT, SPLIT, LoadedRun, Run, load_run, read_about
from fastload.train.tta import View, check_merge, infer_views, parse

if TYPE_CHECKING:
    from fastload.train.cv import CvRun
    from fastload.train.model import Given

Member = LoadedRun | Path  # one model: loaded, or where it lies
Load = Callable[[Member], LoadedRun]
Answer = Callable[[LoadedRun, Dataset, Sequence[View], str], np.ndarray]


def predict(
    run: Run | CvRun | LoadedRun | str | Path,
    data: Dataset | str | Path,
    batch_size: int = 64,
    device: str | None = None,
    out: str | Path | None = None,
    *,
    which: str = "best",
    tta: str | None = None,
    merge: str = "mean",
    always_tta: bool = False,
    flip_labels: Mapping[str, str] | None = None,
    threads: int | None = None,
    progress: bool = True,
    model: Given | None = None,
) -> Predictions:
    """Run the model of ``run`` (averaged weights where there are) over all images of ``data``, in their order.

    ``run``: a training, a cross-validation (the mean of its folds' models), or the path of either or of a checkpoint.
    ``which`` checkpoint: ``best`` or ``last``. ``tta``, ``merge``, ``flip_labels``: views at test time (:mod:`fastload.train.tta`),
    used if they improve the run's metric on its held-out images, or untested if ``always_tta``. ``out``: also write a CSV file.
    ``model``: the module, where the training was given one. What a reader should know is in ``note`` of the result.

    UsageError: no such run, a batch size below 1, views that cannot be tested; DataError: empty data, a damaged checkpoint, or a
    model that gives something other than numbers.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size (--batch-size) must be at least 1, got {batch_size!r}")
    check_merge(merge)
    members = members_of(run)

    def load(member: Member) -> LoadedRun:
        return member if isinstance(member, LoadedRun) else load_run(member, which, device, model=model)

    def answer(
        loaded: LoadedRun, images: Dataset, views: Sequence[View], label: str = "predict"
    ) -> np.ndarray:
        probs = infer_views(
            loaded,
            images,
            views,
            merge=merge,
            batch_size=batch_size,
            threads=threads,
            progress=progress,
            label=label,
        )
        if not np.isfinite(probs).all():
            raise DataError(
                f"the model in {loaded.path} gives values that are no numbers; train again with a lower --lr"
            )
        return probs

    images = open_data(data)
    loaded = load(members[0])
    classes, several = loaded.classes, loaded.multilabel
    views, notes = parse(tta, classes, flip_labels), []
    if len(views) > 1 and not always_tta:
        name = f"{tta}_{merge}" + (
            f"_{zlib.crc32(repr(sorted(flip_labels.items())).encode()):08x}" if flip_labels else ""
        )
        helps, text = _try_tta(members, load, answer, views, name)
        notes.append(text)
        views = views if helps else views[:1]
    start = time.perf_counter()
    total, trained = np.zeros((len(images), len(classes)), np.float32), set()
    for i, member in enumerate(members):
        loaded = loaded if i == 0 else load(member)
        if loaded.classes != classes:
            raise DataError(
                f"the folds of one cross-validation must have the same classes, got others in {loaded.path}"
            )
        trained |= _trained_on(loaded, images)
        total += answer(
            loaded, images, views, "predict" if len(members) == 1 else f"predict {i + 1}/{len(members)}"
        )
    labels, why = _comparable(images, classes, several)
    ids = [str(id) for id in images.ids]
    notes += [why, _seen(ids, trained)]
    result = Predictions(
        ids, total / np.float32(len(members)), classes, labels, multilabel=several,
        note="; ".join(note for note in notes if note), seconds=time.perf_counter() - start,
    )  # fmt: skip
    if out is not None:
        result.write_csv(out)
    return result


def average(parts: Sequence[Predictions]) -> Predictions:
    """The mean of the probabilities of several models for the same images, columns matched by class name."""
    first = parts[0]
    if len({part.multilabel for part in parts}) > 1:
        raise DataError(
            "predictions of one class an image and of several cannot be averaged; give runs of one kind"
        )
    stack = np.stack([part.aligned(first.ids, first.classes).probs for part in parts])
    probs = stack.mean(axis=0, dtype=np.float64).astype(np.float32)
    notes = dict.fromkeys(part.note for part in parts if part.note)
    return replace(
        first, probs=probs, decided=None, note="; ".join(notes), seconds=sum(part.seconds for part in parts)
    )


def members_of(run: Run | CvRun | LoadedRun | str | Path) -> list[Member]:
    """The models that ``run`` consists of: one, or one for each fold of a cross-validation."""
    if isinstance(run, LoadedRun):
        return [run]
    if isinstance(run, (str, Path)):
        place = Path(run)
        if not (place / ABOUT).is_file() or read_about(place)["kind"] != "cv":
            return [place]
        from fastload.train.cv import read_cv

        run = read_cv(place)
    return [run.folder] if isinstance(run, Run) else [one.folder for one in run.runs]


def _comparable(data: Dataset, classes: list[str], several: bool) -> tuple[np.ndarray | None, str]:
    """Labels of ``data`` as numbers (or columns) of ``classes``, or None and why there are none."""
    if "label" not in data.fields:
        return None, "the data have no labels, so there is no score"
    try:
        labels = match_labels(data, classes)
    except DataError as error:
        return None, f"no score: {error}"
    if (labels.ndim == 2) != several:
        return (
            None,
            f"no score: {data.path} has {'one label' if several else 'several labels'} an image, the run has not",
        )
    return labels, ""


def _trained_on(loaded: LoadedRun, data: Dataset) -> set[str]:
    """Ids of the images that the model was trained on, if ``data`` is (partly) their file: ids of other files mean nothing."""
    source, split = loaded.config.data, loaded.path.parent / SPLIT
    if (
        source is None
        or Path(source).resolve() not in {Path(path).resolve() for path in data.paths}
        or not split.is_file()
    ):
        return set()
    with open(split, newline="", encoding="utf-8") as file:
        return {row["id"] for row in csv.DictReader(file) if row["fold"] == "train"}


def _seen(ids: Sequence[str], trained: set[str]) -> str:
    count = sum(id in trained for id in ids)
    if not count:
        return ""
    return (
        f"{count:,} of these {len(ids):,} images ({count / len(ids):.0%}) were trained on, so a score on them means nothing; "
        f"the held-out probabilities are in {VALID} of a run and {OOF} of a cross-validation"
    )


# -- whether views help --------------------------------------------------------------------------------------------


def _try_tta(
    members: Sequence[Member], load: Load, answer: Answer, views: Sequence[View], name: str
) -> tuple[bool, str]:
    """Whether ``views`` are better than the plain image on what was held out from each model, and a sentence with both figures.

    The probabilities are kept beside the run as ``tta_<name>_<checkpoint>.npz``, so this is done once.
    """
    plain, turned = [], []
    for i, member in enumerate(members):
        loaded = load(member)
        label = "try tta" if len(members) == 1 else f"try tta {i + 1}/{len(members)}"
        try:
            held = Predictions.load(loaded.path.parent / VALID)
            plain.append(_held_out(loaded, held, answer, views[:1], "none", label))
            turned.append(_held_out(loaded, held, answer, views, name, label))
        except UsageError as error:  # no such file
            raise UsageError(
                f"whether tta helps cannot be tried on the images that were held out ({error}); put them back, or use it untried "
                f"with always_tta=True (--tta-always), got tta={name.split('_')[0]!r}"
            ) from error
    metric = loaded.config.metric
    before, after = (
        metrics.score(
            metric, np.concatenate([p.true for p in parts]), np.concatenate([p.probs for p in parts])
        )
        for parts in (plain, turned)
    )
    helps = metrics.better(metric, after, before)
    count = sum(len(part) for part in plain)
    said = (
        "used, since it helps"
        if helps
        else "not used, since it does not help (always_tta, --tta-always, uses it all the same)"
    )
    return helps, (
        f"tta {name.split('_')[0]} is {said}: {metric} {before:.4f} without, {after:.4f} with it on {count:,} held-out images"
    )


def _held_out(
    loaded: LoadedRun, held: Predictions, answer: Answer, views: Sequence[View], name: str, label: str
) -> Predictions:
    """``held`` with the answers of ``loaded`` to ``views``, from the file that keeps them if the model is no newer.

    UsageError: the images are no longer where they were.
    """
    kept = loaded.path.parent / f"tta_{name}_{loaded.path.stem}.npz"
    if kept.is_file() and kept.stat().st_mtime >= loaded.path.stat().st_mtime:
        with suppress(FastloadError):  # damaged: made anew
            return Predictions.load(kept).aligned(held.ids, held.classes)
    source = loaded.config.valid or loaded.config.data
    if source is None:
        raise UsageError("the run does not say what it was trained on")
    data = open_data(source)
    place = {str(id): i for i, id in enumerate(data.ids)}
    missing = [id for id in held.ids if id not in place]
    if missing:
        raise UsageError(f"{source} lacks {len(missing)} of them, such as {missing[0]!r}")
    found = replace(held, probs=answer(loaded, data.subset([place[id] for id in held.ids]), views, label))
    with suppress(UsageError):  # a folder that cannot be written to
        found.save(kept)
    return found
