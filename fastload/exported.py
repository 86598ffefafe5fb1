"""What an exported dataset says about itself, so that ``convert`` reads back the same fields, names and ids.

Tar shards and folders of images have no room for class numbers, kinds of fields or ids of any text. Beside them lies ``dataset.json``;
each value is kept as plain JSON (in a shard) or as text (in ``labels.csv``) that other tools read too: labels by name, bytes as text,
arrays as lists. What fits into neither is base64. Without ``dataset.json`` the files are ordinary ones and are read as such.

>>> read_manifest("shards/").specs[0].classes
('cat', 'dog')
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastload.beton import Field
from fastload.errors import DataError, UsageError
from fastload.sources_base import Column, SourceOptions, unknown_label

MANIFEST, TABLE, CLASSES = "dataset.json", "labels.csv", "classes.txt"
_FORMAT, _VERSION = "fastload export", 1
_BASE64 = "base64:"
_LISTED = 4096  # elements of an array that is written as a list of numbers; a larger one is base64
_SEPARATORS = ("|", ";", ",", "/", "\t")


@dataclass(frozen=True)
class Spec:
    """One field of an exported dataset. ``key`` is its name in the .json or the CSV, ``sep`` joins several labels in a CSV cell.

    ``places`` are the numbers of the class names; ``strict``: other numbers are refused, because the user named the classes.
    """

    field: Field
    key: str
    title: str
    classes: tuple[str, ...] = ()
    sep: str | None = None
    strict: bool = False
    places: dict[str, int] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", {name: n for n, name in enumerate(self.classes)})

    @property
    def multi_hot(self) -> bool:
        """Whether values are vectors with one place for each class."""
        return self.field.kind == "ndarray" and self.field.shape == (len(self.places),)

    def with_classes(self, classes: tuple[str, ...]) -> Spec:
        """The same labels, numbered in the order of ``classes``."""
        if self.field.kind == "int":
            return replace(self, classes=classes, strict=True)
        if self.multi_hot:
            return replace(self, field=replace(self.field, shape=(len(classes),)), classes=classes)
        raise UsageError(f"--classes needs labels with names, got {self.field.kind} values")

    # -- values as JSON

    def plain(self, value: Any) -> Any:
        """A value of the dataset as JSON: a label by its name, NaN as null, infinity and bytes as text, arrays as lists."""
        kind = self.field.kind
        if kind == "int":
            named = 0 <= value < len(self.classes) and self.places[self.classes[value]] == value
            return self.classes[value] if named else value
        if kind == "float":
            return value if math.isfinite(value) else None if math.isnan(value) else str(value)
        if kind == "bytes":
            return _text(value)
        if kind == "ndarray":
            if self.multi_hot and np.isin(value, (0, 1)).all():
                return [self.classes[n] for n in np.flatnonzero(value)]
            if value.size <= _LISTED and value.dtype.kind in "biuf" and np.isfinite(value).all():
                return value.tolist()
            return _BASE64 + base64.b64encode(value.tobytes()).decode()
        return value

    def restore(self, value: Any) -> Any:
        """The value of the dataset again. DataError for what :meth:`plain` does not give."""
        kind = self.field.kind
        try:
            if kind == "int":
                return self._code(value)
            if kind == "float":
                return math.nan if value is None else float(value)
            if kind == "bytes":
                return _bytes(value)
            if kind == "ndarray":
                return self._array(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"its {self.key!r} is no {kind} as {MANIFEST} says, got {str(value)[:80]!r}"
            ) from error
        return value

    def _code(self, value: Any) -> int:
        if isinstance(value, str):
            if value not in self.places:
                raise DataError(unknown_label(value, self.classes))
            return self.places[value]
        if self.strict and not 0 <= value < len(self.classes):
            raise DataError(unknown_label(value, self.classes))
        return int(value)

    def _array(self, value: Any) -> np.ndarray:
        if isinstance(value, str):
            return np.frombuffer(bytearray(_bytes(value)), self.field.dtype).reshape(self.field.shape)
        if self.multi_hot and all(isinstance(name, str) for name in value):
            vector = np.zeros(self.field.shape, self.field.dtype)
            vector[[self._code(name) for name in value]] = 1
            return vector
        array = np.array(value, self.field.dtype)
        if array.shape != self.field.shape:
            raise ValueError(f"its shape is {array.shape}")
        return array

    # -- values as CSV cells

    def cell(self, value: Any) -> str:
        """A value of the dataset as the text of a CSV cell."""
        plain = self.plain(value)
        if self.field.kind == "float":
            return "" if plain is None else str(plain)
        if self.field.kind in ("int", "bytes"):
            if isinstance(plain, int) and str(plain) in self.places:
                raise DataError(
                    f"its {self.key!r} is {plain} and has no name, but another class is called {str(plain)!r}; a CSV file cannot "
                    "tell them apart: export --to webdataset"
                )
            return str(plain)
        if self.sep is not None and isinstance(plain, list) and all(isinstance(name, str) for name in plain):
            return self.sep.join(plain)
        return plain if isinstance(plain, str) and self.field.kind == "ndarray" else json.dumps(plain)

    def from_cell(self, text: str) -> Any:
        """What :meth:`plain` gave, from the text of :meth:`cell`."""
        kind = self.field.kind
        try:
            if kind == "int":
                return text if text in self.places else int(text)
            if kind == "float":
                return text if text.strip() else None
            if kind == "json" or (kind == "ndarray" and text.startswith("[")):
                return json.loads(text)
        except ValueError as error:
            known = unknown_label(text, self.classes) if self.classes else f"no {kind}, got {text[:80]!r}"
            raise DataError(f"its {self.key!r}: {known}") from error
        if kind == "ndarray" and not text.startswith(_BASE64):
            return [name.strip() for name in text.split(self.sep) if name.strip()]
        return text


@dataclass(frozen=True)
class Manifest:
    """``dataset.json``: what is in a folder that ``export`` wrote. ``shards`` are the tar files, in order."""

    to: str
    samples: int
    specs: tuple[Spec, ...]
    shards: tuple[str, ...] = ()
    created_by: str = ""

    def to_json(self) -> str:
        fields = [
            {
                "name": spec.field.name,
                "kind": spec.field.kind,
                "dtype": spec.field.dtype,
                "shape": list(spec.field.shape),
                "key": spec.key,
                "title": spec.title,
                "classes": list(spec.classes),
                "sep": spec.sep,
            }
            for spec in self.specs
        ]
        head = {"format": _FORMAT, "version": _VERSION, "created_by": self.created_by, "to": self.to}
        return json.dumps(
            {**head, "samples": self.samples, "fields": fields, "shards": self.shards}, indent=1
        )


def make_specs(data: Any) -> tuple[tuple[Spec, ...], list[str]]:
    """Specs of a dataset's fields, and the names of image fields beside its image, which only a `.beton` file has room for."""
    titles = data.info.get("field_titles", {})
    titles = titles if isinstance(titles, dict) else {}
    specs: list[Spec] = []
    used = {"id", "source", "path"}
    others = [name for name, f in data.fields.items() if f.kind == "image" and name != data.image_field]
    for name, spec in data.fields.items():
        if spec.kind == "image":
            continue
        key, number = name, 2
        while key in used:
            key, number = f"{name}_{number}", number + 1
        used.add(key)
        classes = tuple(data.class_names(name))
        sep = _separator(classes) if spec.kind == "ndarray" else None
        specs.append(Spec(spec, key, str(titles.get(name, name)), classes, sep))
    return tuple(specs), others


def _separator(classes: Sequence[str]) -> str | None:
    """A text that joins class names in a cell and can be split again; None where no such text is at hand."""
    if not all(name and name == name.strip() and not name.startswith(("[", _BASE64)) for name in classes):
        return None
    return next((sep for sep in _SEPARATORS if not any(sep in name for name in classes)), None)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of an exported folder; None where there is none, or a ``dataset.json`` of another origin."""
    path = Path(folder) / MANIFEST
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        return None
    if found.get("version") != _VERSION:
        raise DataError(
            f"{path} is of version {found.get('version')!r}, and this release reads version {_VERSION}; update fastload"
        )
    try:
        specs = tuple(
            Spec(
                Field(f["name"], f["kind"], f["dtype"], tuple(f["shape"])),
                str(f["key"]),
                str(f["title"]),
                tuple(str(name) for name in f["classes"]),
                f["sep"],
            )
            for f in found["fields"]
        )
        shards = tuple(os.path.basename(str(name)) for name in found["shards"])
        return Manifest(str(found["to"]), int(found["samples"]), specs, shards, str(found.get("created_by")))
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({error!r}); remove it to read the files without it, or export again"
        ) from error


def manifest_for(files: Iterable[Path], options: SourceOptions) -> Manifest | None:
    """The manifest that describes all of these shards, or this ``labels.csv``; None where a user's option asks for something else."""
    asked = replace(options, label_from="auto", classes=None, shard_ids=False) != SourceOptions()
    if asked or options.label_from not in ("auto", "none"):
        return None
    paths = list(files)
    by_folder = {folder: read_manifest(folder) for folder in dict.fromkeys(path.parent for path in paths)}
    first: Manifest | None = None
    for path in paths:
        found = by_folder[path.parent]
        if found is None or path.name not in ((TABLE,) if found.to == "folder" else found.shards):
            return None
        first = first or found
        if found.specs != first.specs:
            raise DataError(
                f"{paths[0].parent / MANIFEST} and {path.parent / MANIFEST} name other fields or classes; "
                "convert the two exports apart"
            )
    return first


def make_columns(
    manifest: Manifest, get: Callable[[int, Spec], Any], options: SourceOptions, errors: dict[int, str]
) -> list[Column]:
    """The columns of an exported dataset. ``get(i, spec)`` is the JSON value of sample ``i``; what is wrong with it goes to ``errors``."""

    def value(spec: Spec, i: int) -> Any:
        try:
            return spec.restore(get(i, spec))
        except DataError as error:
            errors.setdefault(i, str(error))
            return None

    columns = []
    for spec in manifest.specs:
        if spec.field.name == "label":
            if options.label_from == "none":
                continue
            if options.classes is not None:
                spec = spec.with_classes(options.classes)
        columns.append(Column(spec.field, spec.title, functools.partial(value, spec), spec.classes or None))
    return columns


def _text(value: bytes) -> str:
    """Bytes as text, base64 where they are none."""
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text or text.startswith(_BASE64):  # a CSV reader may refuse NUL
        return _BASE64 + base64.b64encode(value).decode()
    return text


def _bytes(text: str) -> bytes:
    if text.startswith(_BASE64):
        return base64.b64decode(text[len(_BASE64) :], validate=True)
    return text.encode("utf-8")
