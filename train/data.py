"""From files to what the loop needs: two sides with one numbering of the classes, and the pipelines they go through.

Everything that can be wrong with the labels is said here, before the first batch: no label, one class only, a class
that training has never seen, images of one group on both sides, look-alikes on both sides.

>>> split = make_split("train.beton", None, cfg); split.train, split.valid, split.classes
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

import fastload
from fastload import transforms as T
from fastload.check import duplicate_groups, guard
from fastload.dataset import Dataset
from fastload.errors import DataError, UsageError, unknown
from fastload.train.config import Config
from fastload.train.folds import Folds, make_folds

_MOST_CLASSES = 1_000_000  # beyond it a label is an identifier, and a model for it would not fit anywhere


class TrainWarning(UserWarning):
    """Something about the data that a person should know, though training goes on."""


@dataclass(frozen=True)
class Labelled:
    """A dataset with what a split needs to know of it.

    ``labels``: (N,) int64 numbers of ``classes``, or (N, C) float32 of 0 and 1 if ``multilabel``. ``groups``: (N,) text or None.
    """

    data: Dataset
    labels: np.ndarray
    classes: list[str]
    group_field: str | None
    groups: np.ndarray | None

    @property
    def multilabel(self) -> bool:
        return self.labels.ndim == 2


@dataclass(frozen=True)
class Split:
    """Two sides of one training. Labels are numbers of ``classes``, on both sides alike: see :class:`Labelled`."""

    train: Dataset
    valid: Dataset
    train_labels: np.ndarray
    valid_labels: np.ndarray
    classes: list[str]
    group_field: str | None
    train_groups: np.ndarray | None
    valid_groups: np.ndarray | None

    @property
    def multilabel(self) -> bool:
        return self.train_labels.ndim == 2

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """(id, fold, group, label) of every image, the training side first."""
        for fold, data, labels, groups in (
            ("train", self.train, self.train_labels, self.train_groups),
            ("valid", self.valid, self.valid_labels, self.valid_groups),
        ):
            names = label_names(labels, self.classes)
            for i, (id, label) in enumerate(zip(data.ids, names)):
                yield str(id), fold, "" if groups is None else str(groups[i]), label

    def digest(self) -> str:
        """Changes when an image, its side or its label changes."""
        sha = hashlib.sha256()
        for row in self.rows():
            sha.update("\x1f".join(row).encode() + b"\n")
        return sha.hexdigest()


def label_names(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """The label of each image as text; several are joined by a blank."""
    if labels.ndim == 2:
        return [" ".join(classes[i] for i in np.flatnonzero(row > 0.5).tolist()) for row in labels]
    return [classes[label] for label in labels.tolist()]


def read_labelled(data: Dataset | str | Path, groups: str = "auto") -> Labelled:
    """Open ``data`` and read labels, class names and groups. DataError for labels of no use."""
    opened = open_data(data)
    labels = read_labels(opened)
    classes = class_names(opened, labels)
    name, values = group_values(opened, groups)
    return Labelled(opened, labels, classes, name, values)


def make_split(
    train: Dataset | str | Path, valid: Dataset | str | Path | None, cfg: Config, *, checked: bool = False
) -> Split:
    """The two sides: ``valid`` as given, from the saved split of ``cfg``, or held out as ``cfg`` says.

    DataError for labels of no use, and for a split that probably leaks unless ``cfg.allow_leak``; ``checked`` says that the
    caller has looked for leaks already.
    """
    saved = valid is None and cfg.split is not None  # such a split knows its groups
    whole = read_labelled(train, "none" if saved else cfg.groups)
    if not whole.multilabel:
        _check_classes(whole.labels, whole.classes)
    if valid is not None:
        split = _given_sides(whole, open_data(valid))
    elif saved:
        split = _saved_sides(whole, cfg)
    else:
        if cfg.fold:
            raise UsageError(
                f"a fold needs a saved split; give it with --split, or leave --fold out, got {cfg.fold}"
            )
        split = take_sides(whole, *folds_of(whole, "holdout", cfg).sides(0))
    if not split.multilabel:
        _check_classes(split.train_labels, split.classes)
    _warn_missing(split)
    if not checked and not cfg.allow_leak:
        sides = [split.train, split.valid]
        refuse_leaks(
            sides, [np.full(len(side), i - 1) for i, side in enumerate(sides)], [split.train_labels, split.valid_labels],
            split.group_field, cfg.threads,
        )  # fmt: skip
    return split


def folds_of(whole: Labelled, scheme: str, cfg: Config, **options: Any) -> Folds:
    """A new split of the data: see :func:`fastload.train.folds.make_folds`."""
    return make_folds(
        [str(id) for id in whole.data.ids], whole.labels, whole.classes, scheme=scheme, fraction=cfg.valid_fraction,
        groups=whole.groups, seed=cfg.seed, **options,
    )  # fmt: skip


def take_sides(whole: Labelled, inside: np.ndarray, held: np.ndarray) -> Split:
    """The split of ``whole`` at sorted positions."""
    groups = whole.groups
    return Split(
        whole.data.subset(inside), whole.data.subset(held), whole.labels[inside], whole.labels[held], whole.classes,
        whole.group_field, None if groups is None else groups[inside], None if groups is None else groups[held],
    )  # fmt: skip


def refuse_leaks(
    datas: Sequence[Dataset], folds: Sequence[np.ndarray], labels: Sequence[np.ndarray], group_field: str | None,
    threads: int | None,
) -> None:  # fmt: skip
    """DataError if images of different folds look as if they belong together; a warning where groups were respected."""
    found = guard(datas, folds, labels=labels, threads=threads, paths=group_field is None)
    if not found:
        return
    text = "; ".join(found)
    if group_field is not None:
        if "duplicates" not in group_field:  # the groups that there are must not be given up for it
            text = text.replace("--groups duplicates", f"--groups {group_field}+duplicates")
        warnings.warn(
            f"groups by {group_field!r} are kept apart, and still {text}", TrainWarning, stacklevel=3
        )
        return
    raise DataError(
        f"this split probably leaks, so its score would be too good: {text}. Say what belongs together with --groups (a field, "
        "parent, duplicates), or train all the same with --allow-leak; 'fastload check' shows the images"
    )


def _saved_sides(whole: Labelled, cfg: Config) -> Split:
    """The sides of fold ``cfg.fold`` of the saved split."""
    folds = Folds.load(str(cfg.split)).match([str(id) for id in whole.data.ids])
    if cfg.fold >= folds.count:
        raise UsageError(f"{cfg.split} has {folds.count} folds, numbered from 0, got --fold {cfg.fold}")
    groups = None if folds.groups is None else np.array(folds.groups)
    known = replace(whole, groups=groups, group_field=None if groups is None else cfg.groups)
    return take_sides(known, *folds.sides(cfg.fold))


def _given_sides(whole: Labelled, other: Dataset) -> Split:
    data, classes, field = whole.data, whole.classes, whole.group_field
    _check_apart(data, other)
    other_labels = match_labels(other, classes)
    if other_labels.ndim != whole.labels.ndim:
        raise DataError(
            f"{other.path} and {data.path} must both have one label an image or both several; convert them alike"
        )
    other_groups = None
    if whole.groups is not None and (
        field in other.fields or field == "parent"
    ):  # values that mean the same in both
        other_groups = _one_grouping(other, str(field))
        _check_groups(whole.groups, other_groups, str(field))
    return Split(data, other, whole.labels, other_labels, classes, field, whole.groups, other_groups)


def open_data(data: Dataset | str | Path) -> Dataset:
    """A dataset, opened if it is a path. DataError if it is empty."""
    opened = fastload.open(data) if isinstance(data, (str, Path)) else data
    if len(opened) == 0:
        raise DataError(f"{opened.path} has no images; convert a folder that has some")
    return opened


def read_labels(data: Dataset) -> np.ndarray:
    """(N,) int64 labels, or (N, C) float32 of 0 and 1 where an image may have several. DataError: no label field, or of no use."""
    if "label" not in data.fields:
        raise DataError(
            f"{data.path} has no field 'label' (fields: {', '.join(data.fields)}); "
            "convert it again with --label-from or a label column"
        )
    field = data.fields["label"]
    if field.kind == "ndarray" and len(field.shape) == 1:
        several = np.asarray(data.labels, dtype=np.float32)
        if not np.isin(several, (0, 1)).all():
            raise DataError(
                f"{data.path} has labels other than 0 and 1 for several classes an image; convert it again"
            )
        return several
    if field.kind != "int":
        raise DataError(
            f"the labels of {data.path} are neither a class nor a vector of 0 and 1 for each image; convert it again with "
            f"--label-from, got a field of kind {field.kind!r}"
        )
    labels = np.asarray(data.labels, dtype=np.int64)
    if labels.min() < 0:
        raise DataError(
            f"{data.path} has a negative label; number the classes from 0, got {int(labels.min())}"
        )
    return labels


def class_names(data: Dataset, labels: np.ndarray) -> list[str]:
    """Names of the classes, by number; the numbers themselves where the file has no names."""
    highest = labels.shape[1] - 1 if labels.ndim == 2 else int(labels.max())
    if not data.classes and highest >= _MOST_CLASSES:
        raise DataError(
            f"{data.path} has no class names and labels too large to be class numbers; number the classes from 0, "
            f"got {highest}"
        )
    names = [str(name) for name in data.classes] or [str(number) for number in range(highest + 1)]
    if highest >= len(names) or (labels.ndim == 2 and highest + 1 != len(names)):
        raise DataError(f"{data.path} names {len(names)} classes and has a label beyond them, got {highest}")
    return names


def match_labels(data: Dataset, classes: Sequence[str]) -> np.ndarray:
    """Labels of ``data`` as numbers (or columns) of ``classes``, matched by name. DataError for a class not in them."""
    labels = read_labels(data)
    names = class_names(data, labels)
    number = {name: i for i, name in enumerate(classes)}
    table = np.array([number.get(name, -1) for name in names], dtype=np.int64)
    used = labels.any(axis=0) if labels.ndim == 2 else np.isin(np.arange(len(names)), labels)
    strange = sorted(names[i] for i in np.flatnonzero(used & (table < 0)))
    if strange:
        raise DataError(
            f"{data.path} has classes that the training data lack; leave them out or train with them, "
            f"got {', '.join(repr(name) for name in strange[:5])}{' and more' if len(strange) > 5 else ''}"
        )
    if labels.ndim == 1:
        return table[labels]
    matched = np.zeros((len(labels), len(classes)), np.float32)
    matched[:, table[used]] = labels[:, used]
    return matched


def group_values(data: Dataset, choice: str) -> tuple[str | None, np.ndarray | None]:
    """What belongs together as (name, (N,) text), or (None, None); ``choice`` as :class:`Config` has ``groups``."""
    if choice == "none" or (choice == "auto" and "group" not in data.fields):
        return None, None
    if choice == "auto":
        return "group", field_values(data, "group")
    values = [_one_grouping(data, name) for name in choice.split("+")]
    return choice, values[0] if len(values) == 1 else merge_groups(values)


def _one_grouping(data: Dataset, name: str) -> np.ndarray:
    if name in data.fields:
        if data.fields[name].kind == "image" or name == "label":
            raise UsageError(f"groups need a field that says which images belong together, got {name!r}")
        return field_values(data, name)
    if name == "parent":
        parents = [str(PurePosixPath(str(source).replace("\\", "/")).parent) for source in data.sources]
        if len(set(parents)) < 2:
            raise UsageError(
                f"all images of {data.path} come from one folder, so 'parent' makes no groups, got {name!r}"
            )
        return np.array(parents)
    if name == "duplicates":
        return np.array([str(number) for number in duplicate_groups(data).tolist()])
    raise unknown("group field", name, [*data.fields, "parent", "duplicates"], f"it is not in {data.path}")


def merge_groups(groupings: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) text: images belong together if any of the (N,) groupings says so, also through others."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(groupings[0])
    numbers, at = [], count
    for values in groupings:
        number = np.unique(values, return_inverse=True)[1].reshape(-1)
        numbers.append(number + at)
        at += int(number.max()) + 1
    rows, columns = np.tile(np.arange(count), len(groupings)), np.concatenate(numbers)
    graph = coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(at, at))
    return connected_components(graph, directed=False)[1][:count].astype(str)


def field_values(data: Dataset, name: str) -> np.ndarray:
    """(N,) values of a field as text, one per image: class names where the field has them."""
    if data.fields[name].kind in ("bytes", "json"):
        places = (data.locate(i) for i in range(len(data)))
        return np.array([_text(reader.value(at, name)) for reader, at in places])
    names = data.class_names(name)
    column = np.asarray(data.column(name))
    if column.ndim != 1:
        raise UsageError(f"groups need one value per image, got field {name!r} of shape {column.shape}")
    return np.array([names[value] if names else str(value) for value in column.tolist()])


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _check_apart(train: Dataset, valid: Dataset) -> None:
    """Refuse images that are in both: found where both are views of the same files, alone or joined with others."""
    shared = {Path(path).resolve() for path in train.paths} & {Path(path).resolve() for path in valid.paths}
    both = _places(train, shared) & _places(valid, shared) if shared else set()
    if len(both):
        raise DataError(
            f"{len(both)} of {len(valid)} validation images are training images too, so the score would mean "
            f"nothing; leave --valid out to hold some apart, got {valid.path!r} twice"
        )


def _places(data: Dataset, files: set[Path]) -> set[tuple[Path, int]]:
    """File and place in it of each image that lies in one of ``files``."""
    resolved = {path: Path(path).resolve() for path in data.paths}
    located = (data.locate(i) for i in range(len(data)))
    return {(resolved[reader.path], at) for reader, at in located if resolved[reader.path] in files}


def _check_groups(train: np.ndarray, valid: np.ndarray, field: str) -> None:
    both = np.intersect1d(train, valid)
    if len(both):
        raise DataError(
            f"{len(both)} values of {field!r} are in the training and in the validation data, so the score would be too "
            f"good; split by {field!r}, or say --groups none, got for example {str(both[0])!r}"
        )


def _check_classes(labels: np.ndarray, classes: Sequence[str]) -> None:
    present = np.unique(labels)
    if len(present) < 2:
        raise DataError(
            f"there is nothing to learn: all {len(labels)} training images are of one class, got {classes[present[0]]!r}"
        )


def class_counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """(C,) int64: images of each class."""
    if labels.ndim == 2:
        return (labels > 0.5).sum(axis=0)
    return np.bincount(labels, minlength=classes)


def _warn_missing(split: Split) -> None:
    count = len(split.classes)
    for fold, labels in (("training", split.train_labels), ("validation", split.valid_labels)):
        names = [repr(split.classes[i]) for i in np.flatnonzero(class_counts(labels, count) == 0)]
        if names:
            shown = ", ".join(names[:5]) + (" and more" if len(names) > 5 else "")
            warnings.warn(
                f"{len(names)} of {count} classes have no {fold} image: {shown}", TrainWarning, stacklevel=3
            )


def train_pipeline(
    cfg: Config, mean: Sequence[float], std: Sequence[float], size: int | None = None
) -> tuple[Any, ...]:
    """Transforms of the training side: crop as ``cfg.augment`` says, flip, colour, normalise with (3,) mean and std, mixing.

    ``size`` None is ``cfg.size``.
    """
    side = cfg.size if size is None else size
    crop: dict[str, tuple[Any, ...]] = {
        "default": (T.RandomResizedCrop(side),),
        "light": (T.Resize(side), T.RandomCrop(side, padding=max(1, side // 8))),
        "none": (T.Resize(side), T.CenterCrop(side)),
    }
    steps = list(crop[cfg.augment])
    if cfg.flip and cfg.augment != "none":
        steps.append(T.HorizontalFlip())
    if cfg.jitter:
        steps.append(T.ColorJitter(cfg.jitter, cfg.jitter, cfg.jitter))
    if cfg.erasing:
        steps.append(T.RandomErasing(cfg.erasing))
    steps.append(T.Normalize(_triple(mean), _triple(std)))
    if cfg.mixup:
        steps.append(T.Mixup(cfg.mixup))
    if cfg.cutmix:
        steps.append(T.CutMix(cfg.cutmix))
    return tuple(steps)


def eval_pipeline(cfg: Config, mean: Sequence[float], std: Sequence[float]) -> tuple[Any, ...]:
    """Transforms of the validation side and of prediction.

    After random resized crops the centre is taken at 7/8, as is usual; otherwise the image is seen whole, as in training.
    """
    ratio = 0.875 if cfg.augment == "default" else 1.0
    return tuple(T.eval(cfg.size, crop_ratio=ratio, mean=mean, std=std))


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
