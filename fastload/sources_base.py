"""What a source of images is: a numbered list of samples that can be asked for one by one.

Every source (folder, CSV, tar, ``.beton``, Python object) is listed once, into packed arrays of a few bytes per sample, so a million
files cost some 100 MB and not a gigabyte. After that any sample can be made at any time: resuming needs no replay, and a plan can
take every hundredth. The trade-off is one pass over the names before the first image is read.

>>> source = open_source("photos/", SourceOptions())
>>> source.sample(0).load()[:3]
b'\\xff\\xd8\\xff'
"""

from __future__ import annotations

import hashlib
import keyword
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastload.beton import EncodedImage, Field
from fastload.errors import DataError, UsageError

Tick = Callable[[], object]  # called once an item is listed
Payload = bytes | np.ndarray | EncodedImage
Box = tuple[float, float, float, float]

_DIGITS = re.compile(r"[0-9]+")
_INT = re.compile(r"[+-]?(0|[1-9][0-9]{0,17})")
_LONG = re.compile(r"[+-]?[0-9]{19,}")
_FLOAT = re.compile(
    r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|nan)", re.IGNORECASE
)
_MAX_NAME = 16  # bytes that a field name may have in the container
_RESERVED = ("image", "label", "index", "count")  # "index" and "count" are attributes of every batch


@dataclass(frozen=True)
class SourceOptions:
    """How samples, labels and ids are found in a source. What does not apply to the kind of source is a UsageError there.

    ``label_from`` is ``auto``, ``parent``, ``none``, ``column:NAME`` or ``regex:PATTERN``; ``labels`` are CSV columns (or JSON keys
    in tar shards), the first of which becomes the field ``label``. ``classes`` fixes class names and their order.
    """

    label_from: str = "auto"
    labels: tuple[str, ...] = ()
    label_sep: str | None = None
    classes: tuple[str, ...] | None = None
    path_column: str | None = None
    id_column: str | None = None
    root: str | None = None
    crop_box: tuple[str, str, str, str] | None = None
    shard_ids: bool = False

    def __post_init__(self) -> None:
        kind, _, rest = self.label_from.partition(":")
        if kind not in ("auto", "parent", "none", "column", "regex") or (kind in ("column", "regex")) != bool(
            rest
        ):
            raise UsageError(
                f"label_from must be parent, none, column:NAME or regex:PATTERN, got {self.label_from!r}"
            )
        if kind != "auto" and self.labels and self.label_from != f"column:{self.labels[0]}":
            raise UsageError(
                f"give either label columns or label_from, got {self.labels!r} and {self.label_from!r}"
            )
        if kind == "regex":
            self.pattern()
        if self.classes is not None:
            twice = [name for name, n in Counter(self.classes).items() if n > 1]
            if twice or not self.classes:
                raise UsageError(
                    f"classes must be names that differ, got {twice[0] if twice else self.classes!r}"
                )
        if self.label_sep == "":
            raise UsageError("label_sep must be at least one character, got ''")
        if self.crop_box is not None and len(self.crop_box) != 4:
            raise UsageError(f"crop_box names four columns, got {','.join(self.crop_box)!r}")

    def pattern(self) -> re.Pattern[str] | None:
        """The compiled regular expression of ``regex:...``, which must have a named group; None for another label_from."""
        if not self.label_from.startswith("regex:"):
            return None
        text = self.label_from[len("regex:") :]
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise UsageError(f"label_from is no valid regular expression ({error}): got {text!r}") from error
        if not pattern.groupindex:
            raise UsageError(f"label_from needs a named group such as (?P<label>...), got {text!r}")
        return pattern

    def columns(self) -> tuple[str, ...]:
        """The label columns, however they were given."""
        return (self.label_from[len("column:") :],) if self.label_from.startswith("column:") else self.labels


def quiet() -> None:
    """A tick that nobody hears."""


class Names:
    """A list of byte strings in two flat buffers: 8 bytes and the text per entry, no objects."""

    def __init__(self) -> None:
        self._blob = bytearray()
        self._ends = array("Q")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> bytes:
        return bytes(self._blob[self._ends[i - 1] if i else 0 : self._ends[i]])

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))

    def append(self, name: bytes) -> None:
        self._blob += name
        self._ends.append(len(self._blob))

    def text(self, i: int) -> str:
        return readable(self[i])

    def texts(self) -> Iterator[str]:
        return (self.text(i) for i in range(len(self)))

    def digest(self, into: Any) -> None:
        into.update(self._ends.tobytes())
        into.update(self._blob)


@dataclass(frozen=True)
class Column:
    """One field of every sample. ``get(i)`` is its value, ``classes`` are the names of its codes, if it has names."""

    field: Field
    title: str
    get: Callable[[int], Any]
    classes: tuple[str, ...] | None = None


@dataclass(slots=True)
class Sample:
    """One item, made in order on the caller's thread; ``load`` runs on a worker thread.

    ``load()`` gives the file's bytes, an (H, W, 3) uint8 array, or an image that is encoded already. ``error`` is set where it is
    known already that this sample cannot be written.
    """

    id: str
    source: str
    values: dict[str, Any]
    load: Callable[[], Payload]
    size: int = 0
    box: Box | None = None
    error: str | None = None


@dataclass
class Source:
    """A numbered list of samples. Subclasses fill the lists when they are made and implement the three methods at the end."""

    kind: str = ""
    columns: list[Column] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)

    @property
    def fields(self) -> list[Field]:
        """The container's fields without the image."""
        return [column.field for column in self.columns]

    @property
    def classes(self) -> dict[str, list[str]]:
        return {c.field.name: list(c.classes) for c in self.columns if c.classes is not None}

    @property
    def titles(self) -> dict[str, str]:
        """Names that the source has for its fields, where the container's name differs."""
        return {c.field.name: c.title for c in self.columns if c.title != c.field.name}

    def values(self, i: int) -> dict[str, Any]:
        return {column.field.name: column.get(i) for column in self.columns}

    def fingerprint(self) -> str:
        """Changes when a name, a size, a label or the order changes."""
        hasher = hashlib.blake2b(digest_size=16)
        hasher.update(
            repr((self.kind, len(self), self.fields, self.classes)).encode("utf-8", "backslashreplace")
        )
        self.digest(hasher)
        return hasher.hexdigest()

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} does not say how long it is")

    def sample(self, i: int) -> Sample:
        """Sample ``i``, cheap; never raises for bad data, but says so in ``Sample.error`` or when loaded."""
        raise TypeError(f"{type(self).__name__} has no samples")

    def digest(self, into: Any) -> None:
        """Feed everything that identifies the listing to a hash."""

    def close(self) -> None:
        """Give files back."""


def readable(name: bytes) -> str:
    """A file name as text; bytes that are not UTF-8 become backslash escapes, so that every name can be stored."""
    return name.decode("utf-8", "backslashreplace")


def natural_key(text: str) -> str:
    """A string that sorts ``img2`` before ``img10``; ends with the text itself, so that no two names are equal."""
    return _DIGITS.sub(lambda m: m.group().zfill(20), text.lower()) + "\0" + text


def require_same_options(kind: str, options: SourceOptions, allowed: Iterable[str]) -> None:
    """Refuse options that would be silently ignored for this kind of source."""
    plain = SourceOptions()
    for name in plain.__dataclass_fields__:
        if name not in allowed and getattr(options, name) != getattr(plain, name):
            flag = {"labels": "label"}.get(name, name).replace("_", "-")
            raise UsageError(
                f"--{flag} does not apply to a {kind}; leave it out, got {getattr(options, name)!r}"
            )


def field_names(titles: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """Names of at most 16 ASCII bytes, unique, usable as attributes: ``"Age of the person"`` becomes ``"Age_of_the_perso"``."""
    used = {*_RESERVED, *taken}
    names = []
    for title in titles:
        name = re.sub(r"[^A-Za-z0-9_]+", "_", title).strip("_")
        if not name or not name.isidentifier() or keyword.iskeyword(name):
            name = f"f_{name}"
        name, stem, number = name[:_MAX_NAME], name, 2
        while name in used:
            tail = f"_{number}"
            name, number = stem[: _MAX_NAME - len(tail)] + tail, number + 1
        used.add(name)
        names.append(name)
    return names


def categorical(
    name: str,
    title: str,
    texts: Iterable[str | None],
    classes: Sequence[str] | None,
    errors: dict[int, str],
    *,
    numbers: bool = False,
) -> Column:
    """Text labels as int codes with class names; None leaves the sample to an error that its source has noted.

    Without ``classes`` the names found are put in natural order. ``numbers``: labels that are all integers stay what they are, and
    with ``classes`` are positions in that list. A label outside the classes is noted in ``errors``.
    """
    found: dict[str, int] = {}
    codes = array("q")
    for text in texts:
        codes.append(-1 if text is None else found.setdefault(text, len(found)))
    keys = list(found)
    names: tuple[str, ...] | None = tuple(sorted(keys, key=natural_key) if classes is None else classes)
    if (
        numbers
        and keys
        and all(_INT.fullmatch(key) for key in keys)
        and not (classes and found.keys() <= set(classes))
    ):
        places = {key: int(key) for key in keys}
        if classes is None:
            names = None
        else:
            places = {key: n for key, n in places.items() if 0 <= n < len(classes)}
    else:
        places = {key: n for n, key in enumerate(names or ())}
    missing = -(2**63)
    table = np.array(
        [places.get(key, missing) for key in keys] + [missing], np.int64
    )  # the last is for code -1
    values = table[np.frombuffer(codes, np.int64)] if codes else np.zeros(0, np.int64)
    for i in np.flatnonzero(values == missing):
        if codes[i] >= 0:
            errors.setdefault(int(i), unknown_label(keys[codes[i]], classes or ()))
    return Column(Field(name, "int"), title, lambda i: int(values[i]), names)


def unknown_label(label: object, classes: Sequence[str]) -> str:
    shown = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
    return f"unknown label {str(label)!r}; the classes are {shown}: add it to --classes or correct it"


def multi_hot(
    name: str, title: str, texts: Names, sep: str, classes: Sequence[str] | None, errors: dict[int, str]
) -> Column:
    """Several labels per sample, separated by ``sep``, as a float32 vector of zeros and ones; no label at all is a vector of zeros."""

    def parts(i: int) -> list[str]:
        return [part.strip() for part in texts.text(i).split(sep) if part.strip()]

    if classes is None:
        classes = sorted({part for i in range(len(texts)) for part in parts(i)}, key=natural_key)
        if not classes:
            raise DataError(f"column {title!r} holds no label at all; name another one with --label")
    places = {label: n for n, label in enumerate(classes)}
    for i in range(len(texts)):
        for part in parts(i):
            if part not in places:
                errors.setdefault(i, unknown_label(part, classes))

    def vector(i: int) -> np.ndarray:
        row = np.zeros(len(places), np.float32)
        row[[places[part] for part in parts(i) if part in places]] = 1
        return row

    return Column(Field(name, "ndarray", "float32", (len(places),)), title, vector, tuple(classes))


def typed(name: str, title: str, texts: Names) -> Column:
    """A column of numbers or text: int where all are integers, float where all are numbers or empty (NaN), else UTF-8 bytes."""
    ints = floats = True
    filled = False
    for raw in texts:
        text = raw.decode("ascii", "replace").strip()
        filled = filled or bool(text)
        ints = ints and _INT.fullmatch(text) is not None
        floats = floats and (not text or _FLOAT.fullmatch(text) is not None)
        if not floats:
            break
    if ints and filled:
        numbers = np.fromiter((int(t) for t in texts), np.int64, len(texts))
        return Column(Field(name, "int"), title, lambda i: int(numbers[i]))
    # Digits too many for 64 bits are no measurement, but an identifier: as a float it would lose some of them.
    if floats and filled and not any(_LONG.fullmatch(t.strip()) for t in texts.texts()):
        reals = np.fromiter((float(t) if t.strip() else np.nan for t in texts), np.float64, len(texts))
        return Column(Field(name, "float"), title, lambda i: float(reals[i]))
    return Column(Field(name, "bytes"), title, texts.__getitem__)


def label_column(
    name: str, title: str, texts: Names, options: SourceOptions, errors: dict[int, str]
) -> Column:
    """A label: integers and reals stay numbers, text becomes a class; an empty one is noted in ``errors``."""
    if options.label_sep is not None and name == "label":
        return multi_hot(name, title, texts, options.label_sep, options.classes, errors)
    classes = options.classes if name == "label" else None
    for i, raw in enumerate(texts):
        if not raw.strip():
            errors.setdefault(i, f"has no label: its {title!r} is empty")
    filled = [text for text in texts.texts() if text.strip()] if classes is None else []
    if filled and not all(_INT.fullmatch(text.strip()) for text in filled):
        column = typed(name, title, texts)
        if column.field.kind == "float":
            return column
    found = (text.strip() or None for text in texts.texts())
    return categorical(name, title, found, classes, errors, numbers=True)


def regex_columns(
    paths: Callable[[], Iterable[str]], options: SourceOptions, errors: dict[int, str]
) -> list[Column]:
    """One categorical column for each named group of ``label_from``, searched in every sample's path."""
    pattern = options.pattern()
    if pattern is None:
        return []
    columns = []
    groups = list(pattern.groupindex)
    for i, path in enumerate(paths()):
        if pattern.search(path) is None:
            errors.setdefault(i, f"label_from does not match its path {path!r}: correct the expression")

    def texts(group: str) -> Iterator[str | None]:
        for i, path in enumerate(paths()):
            match = pattern.search(path)
            if match is not None and match[group] is None:
                errors.setdefault(i, f"label_from finds no {group!r} in its path {path!r}")
            yield None if match is None else match[group]

    plain = [group for group in groups if group != "label"]
    names = {"label": "label", **dict(zip(plain, field_names(plain)))}
    for group in groups:
        classes = options.classes if group == "label" else None
        columns.append(categorical(names[group], group, texts(group), classes, errors))
    return columns


def check_unique(ids: Callable[[int], str], count: int, where: Callable[[int], str], cure: str) -> None:
    """Two samples under one id are a DataError that names both. Costs 8 bytes per sample: hashes first, texts only where they agree."""
    hashes = np.fromiter((hash(ids(i)) for i in range(count)), np.int64, count)
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    seen: dict[str, int] = {}
    for k in np.flatnonzero(ranked[1:] == ranked[:-1]):
        first, second = int(order[k]), int(order[k + 1])
        if not k or ranked[k - 1] != ranked[k]:
            seen = {ids(first): first}
        if ids(second) in seen:
            raise DataError(
                f"duplicate id {ids(second)!r}: {where(seen[ids(second)])} and {where(second)}; {cure}"
            )
        seen[ids(second)] = second


def numbers(row: Mapping[str, Column], names: Sequence[str], i: int) -> Box | None:
    """Four columns of row ``i`` as a box; None where one of them is no finite number."""
    values = [row[name].get(i) for name in names]
    if not all(isinstance(v, int | float) and np.isfinite(v) for v in values):
        return None
    return (float(values[0]), float(values[1]), float(values[2]), float(values[3]))
