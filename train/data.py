"""From files to what the loop needs: two sides with one numbering of the classes, and the pipelines they go through.

Everything that can be wrong with the labels is said here, before the first batch: no label, one class only, a class
that training has never seen, images of one group on both sides.

>>> split = make_split("train.beton", None, cfg); split.train, split.valid, split.classes
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fastload
from fastload import transforms as T
from fastload.dataset import Dataset
from fastload.errors import DataError, UsageError, unknown
from fastload.train.config import Config
from fastload.train.split import holdout

_MOST_CLASSES = 1_000_000  # beyond it a label is an identifier, and a model for it would not fit anywhere


class TrainWarning(UserWarning):
    """Something about the data that a person should know, though training goes on."""


@dataclass(frozen=True)
class Split:
    """Two sides of one training. Labels are (N,) int64 numbers of ``classes``, on both sides alike."""

    train: Dataset
    valid: Dataset
    train_labels: np.ndarray
    valid_labels: np.ndarray
    classes: list[str]
    group_field: str | None
    train_groups: np.ndarray | None
    valid_groups: np.ndarray | None

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """(id, fold, group, label) of every image, the training side first."""
        for fold, data, labels, groups in (
            ("train", self.train, self.train_labels, self.train_groups),
            ("valid", self.valid, self.valid_labels, self.valid_groups),
        ):
            for i, (id, label) in enumerate(zip(data.ids, labels)):
                yield str(id), fold, "" if groups is None else str(groups[i]), self.classes[label]

    def digest(self) -> str:
        """Changes when an image, its side or its label changes."""
        sha = hashlib.sha256()
        for row in self.rows():
            sha.update("\x1f".join(row).encode() + b"\n")
        return sha.hexdigest()


def make_split(train: Dataset | str | Path, valid: Dataset | str | Path | None, cfg: Config) -> Split:
    """The two sides: ``valid`` as given, or held out of ``train`` as ``cfg`` says. DataError for labels of no use."""
    data = open_data(train)
    labels = numeric_labels(data)
    classes = class_names(data, labels)
    field = group_field(data, cfg.groups)
    groups = None if field is None else field_values(data, field)
    if valid is not None:
        other = open_data(valid)
        _check_apart(data, other)
        other_labels = match_labels(other, classes)
        other_groups = None
        if groups is not None and field in other.fields:
            other_groups = field_values(other, str(field))
            _check_groups(groups, other_groups, str(field))
        split = Split(data, other, labels, other_labels, classes, field, groups, other_groups)
    else:
        _check_classes(labels, classes)
        inside, held = holdout(labels, cfg.valid_fraction, cfg.seed, groups)
        split = Split(
            data.subset(inside), data.subset(held), labels[inside], labels[held], classes, field,
            None if groups is None else groups[inside], None if groups is None else groups[held],
        )  # fmt: skip
    _check_classes(split.train_labels, classes)
    _warn_missing(split)
    return split


def open_data(data: Dataset | str | Path) -> Dataset:
    """A dataset, opened if it is a path. DataError if it is empty."""
    opened = fastload.open(data) if isinstance(data, (str, Path)) else data
    if len(opened) == 0:
        raise DataError(f"{opened.path} has no images; convert a folder that has some")
    return opened


def numeric_labels(data: Dataset) -> np.ndarray:
    """(N,) int64 labels. DataError: there are none, or they are not one class per image."""
    if "label" not in data.fields:
        raise DataError(
            f"{data.path} has no field 'label' (fields: {', '.join(data.fields)}); "
            "convert it again with --label-from or a label column"
        )
    if data.fields["label"].kind != "int":
        raise DataError(
            f"the labels of {data.path} are not one class per image; for several labels per image write a loop with "
            f"fastload.Loader (examples/plain_loop.py), got a field of kind {data.fields['label'].kind!r}"
        )
    labels = np.asarray(data.labels, dtype=np.int64)
    if labels.min() < 0:
        raise DataError(
            f"{data.path} has a negative label; number the classes from 0, got {int(labels.min())}"
        )
    return labels


def class_names(data: Dataset, labels: np.ndarray) -> list[str]:
    """Names of the classes, by number; the numbers themselves where the file has no names."""
    highest = int(labels.max())
    if not data.classes and highest >= _MOST_CLASSES:
        raise DataError(
            f"{data.path} has no class names and labels too large to be class numbers; number the classes from 0, "
            f"got {highest}"
        )
    names = [str(name) for name in data.classes] or [str(number) for number in range(highest + 1)]
    if highest >= len(names):
        raise DataError(f"{data.path} names {len(names)} classes and has a label beyond them, got {highest}")
    return names


def match_labels(data: Dataset, classes: Sequence[str]) -> np.ndarray:
    """(N,) int64 labels of ``data`` as numbers of ``classes``, matched by name. DataError for a class not in them."""
    labels = numeric_labels(data)
    names = class_names(data, labels)
    number = {name: i for i, name in enumerate(classes)}
    table = np.array([number.get(name, -1) for name in names], dtype=np.int64)
    matched = table[labels]
    if (matched < 0).any():
        strange = sorted({names[label] for label in np.unique(labels[matched < 0])})
        raise DataError(
            f"{data.path} has classes that the training data lack; leave them out or train with them, "
            f"got {', '.join(repr(name) for name in strange[:5])}{' and more' if len(strange) > 5 else ''}"
        )
    return matched


def group_field(data: Dataset, choice: str) -> str | None:
    """The field named by ``choice``; ``auto`` is ``group`` where there is one, ``none`` is None."""
    if choice == "none" or (choice == "auto" and "group" not in data.fields):
        return None
    name = "group" if choice == "auto" else choice
    if name not in data.fields:
        raise unknown("group field", name, data.fields, f"it is not in {data.path}")
    if data.fields[name].kind == "image" or name == "label":
        raise UsageError(f"groups need a field that says which images belong together, got {name!r}")
    return name


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


def _warn_missing(split: Split) -> None:
    count = len(split.classes)
    train, valid = (np.bincount(side, minlength=count) for side in (split.train_labels, split.valid_labels))
    for fold, counts in (("training", train), ("validation", valid)):
        names = [repr(split.classes[i]) for i in np.flatnonzero(counts == 0)]
        if names:
            shown = ", ".join(names[:5]) + (" and more" if len(names) > 5 else "")
            warnings.warn(
                f"{len(names)} of {count} classes have no {fold} image: {shown}", TrainWarning, stacklevel=3
            )


def train_pipeline(cfg: Config, mean: Sequence[float], std: Sequence[float]) -> tuple[Any, ...]:
    """Transforms of the training side: crop as ``cfg.augment`` says, flip, normalise with (3,) mean and std, mixing."""
    crop: dict[str, tuple[Any, ...]] = {
        "default": (T.RandomResizedCrop(cfg.size),),
        "light": (T.Resize(cfg.size), T.RandomCrop(cfg.size, padding=max(1, cfg.size // 8))),
        "none": (T.Resize(cfg.size), T.CenterCrop(cfg.size)),
    }
    flip = (T.HorizontalFlip(),) if cfg.flip and cfg.augment != "none" else ()
    mixup = (T.Mixup(cfg.mixup),) if cfg.mixup else ()
    cutmix = (T.CutMix(cfg.cutmix),) if cfg.cutmix else ()
    return (*crop[cfg.augment], *flip, T.Normalize(_triple(mean), _triple(std)), *mixup, *cutmix)


def eval_pipeline(cfg: Config, mean: Sequence[float], std: Sequence[float]) -> tuple[Any, ...]:
    """Transforms of the validation side and of prediction.

    After random resized crops the centre is taken at 7/8, as is usual; otherwise the image is seen whole, as in training.
    """
    ratio = 0.875 if cfg.augment == "default" else 1.0
    return tuple(T.eval(cfg.size, crop_ratio=ratio, mean=mean, std=std))


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
