"""A dataset is one or more `.beton` files seen through an index: views and joins cost nothing and copy nothing.

>>> ds = fastload.open("photos.beton"); ds[0]["image"].shape, ds.classes[ds[0]["label"]]
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from fastload import beton, codecs
from fastload.beton import EncodedImage, Field
from fastload.errors import CorruptError, DataError, FastloadError, UsageError, unknown
from fastload.system import usable_cores


def open(path: str | os.PathLike[str]) -> Dataset:
    """Open a `.beton` file, made by fastload or FFCV. UsageError for a wrong path, DataError for a damaged file."""
    return Dataset([beton.Reader(path)])


def concat(datasets: Sequence[Dataset]) -> Dataset:
    """Several datasets as one, in the given order. Fields and class names must be the same in all of them."""
    if not datasets:
        raise UsageError("concat needs at least one dataset, got none")
    first = datasets[0]
    for other in datasets[1:]:
        if other.fields != first.fields:
            raise DataError(
                f"{other.path} has the fields {sorted(other.fields)} and {first.path} {sorted(first.fields)}; "
                "files can be joined only if names, kinds and shapes are the same"
            )
        for name in first.fields:
            if other.class_names(name) != first.class_names(name):
                raise DataError(
                    f"{other.path} names the classes of {name!r} otherwise than {first.path}; "
                    "convert both with the same --classes"
                )
    readers = [reader for ds in datasets for reader in ds._readers]
    starts, at = [], 0
    for ds in datasets:
        starts.append(at)
        at += sum(len(reader) for reader in ds._readers)
    if all(ds._view is None for ds in datasets):
        return Dataset(readers)
    return Dataset(readers, np.concatenate([ds.indices + start for ds, start in zip(datasets, starts)]))


class Dataset(Sequence[dict[str, Any]]):
    """Samples of one or more `.beton` files; ``ds[i]`` decodes one: its image is (H, W, 3) uint8.

    Index ``i`` counts in this view. A sample's base index (``indices[i]``) counts in the files, does not change in
    subsets, and is what augmentation is keyed by: a sample looks the same in every fold.
    """

    def __init__(self, readers: Sequence[beton.Reader], view: np.ndarray | None = None) -> None:
        self._readers = list(readers)
        self._starts = np.cumsum([0] + [len(reader) for reader in self._readers])
        self._view = view
        self.fields: dict[str, Field] = dict(self._readers[0].fields)
        self.info: dict[str, Any] = self._readers[0].info

    @property
    def path(self) -> str:
        """Path of the (first) file."""
        return self._readers[0].path

    @property
    def paths(self) -> list[str]:
        """Paths of all files."""
        return [reader.path for reader in self._readers]

    @property
    def file_bytes(self) -> int:
        """Bytes of all files together, as they were when they were opened."""
        return sum(reader.size for reader in self._readers)

    @property
    def is_view(self) -> bool:
        """Whether this shows some samples of its files, or all of them in another order."""
        return self._view is not None

    @property
    def format_version(self) -> int:
        """Version of fastload's index in the (first) file; 0 for a file that FFCV wrote."""
        return self._readers[0].format_version

    @property
    def indices(self) -> np.ndarray:
        """Base index of each sample of this view, (N,) int64."""
        return np.arange(self._starts[-1]) if self._view is None else self._view

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._view is None else len(self._view)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{name}: {field.kind}" for name, field in self.fields.items())
        return f"Dataset({len(self):,} samples, {{{kinds}}}, {len(self.classes)} classes, {', '.join(self.paths)})"

    def __enter__(self) -> Dataset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; views and joins made from this dataset end with it."""
        for reader in self._readers:
            reader.close()

    def base(self, index: int) -> int:
        """Base index of sample ``index`` of this view."""
        return index if self._view is None else int(self._view[index])

    def locate(self, index: int) -> tuple[beton.Reader, int]:
        """The file that holds sample ``index`` of this view, and its place there."""
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"sample {index} of a dataset of {size}")
        return self.locate_base(int(self.indices[index]) if self._view is not None else index % size)

    def locate_base(self, base: int) -> tuple[beton.Reader, int]:
        """The same for a base index."""
        file = int(np.searchsorted(self._starts, base, side="right")) - 1 if len(self._readers) > 1 else 0
        reader, at = self._readers[file], base - int(self._starts[file])
        if at >= reader.num_samples:
            raise self._closed(reader)
        return reader, at

    @staticmethod
    def _closed(reader: beton.Reader) -> UsageError:
        return UsageError(f"{reader.path} is closed; open it again, or read it before its `with` block ends")

    def _check_open(self) -> None:
        for reader, size in zip(self._readers, np.diff(self._starts)):
            if len(reader) != size:
                raise self._closed(reader)

    def encoded(self, index: int) -> EncodedImage:
        """The encoded image of a sample, its bytes a view into the file."""
        reader, at = self.locate(index)
        try:
            return reader.image(at, self.image_field)
        except CorruptError as error:
            raise self.blame(error, index) from None

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.subset(np.arange(len(self))[index])
        index = int(index)
        reader, at = self.locate(index)
        try:
            return {
                name: decode(reader.image(at, name)) if field.kind == "image" else reader.value(at, name)
                for name, field in self.fields.items()
            }
        except CorruptError as error:
            raise self.blame(error, index) from None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def blame(self, error: CorruptError, index: int) -> CorruptError:
        """Name the sample in an error of its bytes."""
        reader, at = self.locate(index)
        return error.at(index, reader.name(at), reader.name(at, "source"))

    def subset(self, indices: Any) -> Dataset:
        """A view of the samples at ``indices`` (integers of this view, in any order, or a boolean mask)."""
        chosen = np.asarray(indices)
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise UsageError(
                    f"a mask needs one entry for each of {len(self)} samples, got shape {chosen.shape}"
                )
            chosen = np.flatnonzero(chosen)
        if (chosen.size and chosen.dtype.kind not in "iu") or chosen.ndim != 1:
            raise UsageError(
                f"indices must be a list of integers, got {chosen.dtype} of shape {chosen.shape}"
            )
        chosen = chosen.astype(np.int64)
        size = len(self)
        if chosen.size and not (-size <= chosen.min() and chosen.max() < size):
            wrong = chosen[(chosen < -size) | (chosen >= size)][0]
            raise UsageError(f"index {wrong} is outside of a dataset of {size} samples")
        return Dataset(self._readers, self.indices[chosen])

    @property
    def image_field(self) -> str:
        """Name of the image field: "image", or the only one of that kind."""
        names = [name for name, field in self.fields.items() if field.kind == "image"]
        if "image" in names or len(names) == 1:
            return "image" if "image" in names else names[0]
        raise DataError(
            f"{self.path} has {len(names)} image fields ({', '.join(names)}) and none is called 'image'"
        )

    def gather(self, name: str, bases: np.ndarray) -> np.ndarray:
        """Values of an int, float or ndarray field at base indices (B,); for an image field, its rows."""
        field = self.fields[name]
        self._check_open()
        if field.kind in ("bytes", "json", "ndarray"):
            values = [reader.value(at, name) for reader, at in map(self.locate_base, bases.tolist())]
            return np.stack(values) if field.kind == "ndarray" else np.array([*values, None], object)[:-1]
        if len(self._readers) == 1:
            return np.asarray(self._readers[0].column(name)[bases])
        parts = [reader.column(name)[at] for reader, at in map(self.locate_base, bases.tolist())]
        return np.array(parts, self._readers[0].column(name).dtype)

    def spans(self, bases: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, beton.Spans]]:
        """Where the encoded images of ``bases`` (B,) lie: for each file that has some of them its bytes (n,) uint8, their places
        (k,) int64 in ``bases``, and Spans of B entries, which hold at these places.
        """
        self._check_open()
        bases, name = np.asarray(bases, np.int64), self.image_field
        if len(self._readers) == 1:
            reader = self._readers[0]
            return [(reader.data, np.arange(len(bases)), reader.spans(bases, name))]
        files = np.searchsorted(self._starts, bases, side="right") - 1
        found = []
        for file in np.unique(files).tolist():
            places = np.flatnonzero(files == file)
            reader = self._readers[file]
            parts = reader.spans(bases[places] - self._starts[file], name)
            whole = [np.zeros((len(bases), *part.shape[1:]), part.dtype) for part in parts]
            for array, part in zip(whole, parts):
                array[places] = part
            found.append((reader.data, places, beton.Spans(*whole)))
        return found

    def _gather(self, parts: list[np.ndarray]) -> np.ndarray:
        for reader, part, size in zip(self._readers, parts, np.diff(self._starts)):
            if len(part) != size:
                raise self._closed(reader)
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole if self._view is None else whole[self._view]

    def column(self, name: str) -> np.ndarray:
        """All values of an int (N,) int64, float (N,) float64 or ndarray (N, ...) field."""
        if name not in self.fields:
            raise unknown("field", name, self.fields)
        kind = self.fields[name].kind
        if kind in ("int", "float"):
            return self._gather([np.asarray(reader.column(name)) for reader in self._readers])
        if kind != "ndarray":
            raise UsageError(f"field {name!r} is of kind {kind}; columns are of kind int, float or ndarray")
        field = self.fields[name]
        values = np.empty((len(self), *field.shape), field.dtype)
        for i in range(len(self)):
            reader, at = self.locate(i)
            values[i] = reader.value(at, name)
        return values

    @property
    def labels(self) -> np.ndarray:
        """The "label" column: (N,) int64, or (N, C) float32 for a multi-label file. DataError if there is none."""
        if "label" not in self.fields:
            raise DataError(
                f"{self.path} has no labels (fields: {', '.join(self.fields)}); convert it again with --label-from"
            )
        return self.column("label")

    def class_names(self, field: str) -> list[str]:
        """Names of the values 0, 1, ... of a field; empty if it has none."""
        classes = self.info.get("classes", {})
        names = classes.get(field) if isinstance(classes, dict) else None
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def classes(self) -> list[str]:
        """Class names of "label"."""
        return self.class_names("label")

    def label_counts(self, field: str = "label") -> dict[str, int]:
        """Samples of each class, by class name (or number); classes without samples count 0."""
        values = self.column(field) if field != "label" else self.labels
        names = self.class_names(field)
        if values.ndim == 2:
            counts = (values > 0.5).sum(axis=0)
            return {names[i] if i < len(names) else str(i): int(n) for i, n in enumerate(counts)}
        numbers, counts = np.unique(values, return_counts=True)
        found = dict(zip(numbers.tolist(), counts.tolist()))
        if not names:
            return {str(n): c for n, c in found.items()}
        outside = [n for n in found if not 0 <= n < len(names)]
        if outside:
            raise DataError(f"{self.path} has label {outside[0]} and names only {len(names)} classes")
        return {name: found.get(i, 0) for i, name in enumerate(names)}

    def _images(self, member: str) -> np.ndarray:
        name = self.image_field
        return self._gather([np.asarray(r.column(name)[member]) for r in self._readers])

    @property
    def heights(self) -> np.ndarray:
        """Height of each stored image in pixels, (N,) int64."""
        return self._images("height").astype(np.int64)

    @property
    def widths(self) -> np.ndarray:
        """Width of each stored image in pixels, (N,) int64."""
        return self._images("width").astype(np.int64)

    @property
    def modes(self) -> np.ndarray:
        """Storage of each image, (N,): 0 jpeg, 1 raw."""
        return self._images("mode")

    @property
    def ids(self) -> Sequence[str]:
        """Id of each sample, read when asked for."""
        return _Names(self, "id")

    @property
    def sources(self) -> Sequence[str]:
        """Where each sample came from (a path relative to the converted folder), read when asked for."""
        return _Names(self, "source")


class _Names(Sequence[str]):
    """Names through the view of a dataset."""

    def __init__(self, dataset: Dataset, what: str) -> None:
        self._dataset, self._what = dataset, what

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        reader, at = self._dataset.locate(int(index))
        return reader.strings(self._what)[at]


def decode(image: EncodedImage) -> np.ndarray:
    """The pixels of an encoded image, (H, W, 3) uint8, a copy."""
    if image.mode == "raw":
        return np.frombuffer(bytes(image.data), np.uint8).reshape(image.height, image.width, 3).copy()
    pixels = codecs.decode_jpeg(codecs.as_bytes(image.data))
    if pixels.shape != (image.height, image.width, 3):
        raise CorruptError(
            f"its JPEG has {pixels.shape[0]} x {pixels.shape[1]} pixels and the file says {image.height} x {image.width}"
        )
    return pixels


@dataclass(frozen=True)
class Verification:
    """Outcome of :func:`verify`: samples looked at, whether the file has checksums, and what is wrong with which.

    An entry of ``bad`` has index, id, source and reason; index and id are None where the file's index itself is damaged.
    """

    samples: int
    has_checksums: bool
    bad: list[dict[str, Any]]

    @property
    def ok(self) -> bool:
        """No sample is wrong."""
        return not self.bad


def verify(dataset: Dataset | str | os.PathLike[str], progress: bool = False) -> Verification:
    """Compare each checksum and decode each image. Never raises for a bad sample: it is listed."""
    from concurrent.futures import ThreadPoolExecutor

    from tqdm.auto import tqdm

    ds = dataset if isinstance(dataset, Dataset) else open(dataset)

    def check(index: int) -> tuple[str | None, bool]:
        reader, at = ds.locate(index)
        has_checksums = False
        try:
            matches = reader.checksum_matches(at)
            has_checksums = matches is not None
            ds[index]
            return None if matches in (True, None) else "its checksum does not match", has_checksums
        except FastloadError as error:
            return getattr(error, "reason", str(error)), has_checksums

    bad: list[dict[str, Any]] = [
        {"index": None, "id": None, "source": reader.path, "reason": f"its index is damaged: {section}"}
        for reader in ds._readers
        for section in reader.damaged_sections()
    ]
    has = False
    with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
        chunk = 4096  # keeps the queue of futures short on files of millions
        with tqdm(total=len(ds), desc="verify", unit="img", disable=not progress) as bar:
            for start in range(0, len(ds), chunk):
                span = range(start, min(start + chunk, len(ds)))
                for index, (reason, has_checksums) in zip(span, pool.map(check, span)):
                    has |= has_checksums
                    if reason is not None:
                        reader, at = ds.locate(index)
                        where = {"index": index, "id": reader.name(at), "source": reader.name(at, "source")}
                        bad.append({**where, "reason": reason})
                    bar.update()
    return Verification(len(ds), has, bad)
