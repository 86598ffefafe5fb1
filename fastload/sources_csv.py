"""A CSV file with one row per image: a column of paths, label columns, and anything else as fields.

The file is read once into packed columns. Types are found by looking at every value: integers, reals (an empty one is NaN), else text
as UTF-8 bytes. Rows that are broken become samples with an error, so ``--on-error skip`` can leave them out.

>>> CsvSource("train.csv", SourceOptions(labels=("species",))).columns[0].classes
('cat', 'dog')
"""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastload.errors import DataError, UsageError, unknown
from fastload.exported import Spec, make_columns, manifest_for
from fastload.sources_base import (
    Column,
    Names,
    Sample,
    Source,
    SourceOptions,
    Tick,
    categorical,
    check_unique,
    field_names,
    label_column,
    numbers,
    quiet,
    regex_columns,
    require_same_options,
    typed,
)
from fastload.sources_folder import read_bytes

_PATHS = [
    "path",
    "filepath",
    "file_path",
    "filename",
    "file_name",
    "file",
    "image_path",
    "img_path",
    "image_file",
    "imagepath",
    "image",
    "img",
    "image_name",
    "image_id",
    "id",
]
_LABELS = ("label", "class", "target", "category", "class_name", "label_name")
_PROBED = 20  # rows that are looked at to find the column of paths


class CsvSource(Source):
    """A CSV (or TSV) file with a header. Relative paths are relative to ``root``, which is the file's own folder if not given.

    The ``labels.csv`` that ``fastload export`` wrote has a ``dataset.json`` beside it, which says what its columns are.
    """

    def __init__(self, path: str | os.PathLike[str], options: SourceOptions, tick: Tick = quiet) -> None:
        super().__init__(kind="csv")
        self._tick = tick
        require_same_options("CSV file", options, set(options.__dataclass_fields__) - {"shard_ids"})
        self.path = Path(path)
        self.root = Path(options.root) if options.root is not None else self.path.parent
        if options.root is not None and not self.root.is_dir():
            raise UsageError(
                f"root is no folder; give the folder that the paths start from, got {options.root!r}"
            )
        self._cells = self._read()
        self._count = len(next(iter(self._cells.values())))
        if not self._count:
            raise DataError(f"{self.path} has a header but no rows; there is nothing to convert")
        self._paths = self._cells[self._path_column(options.path_column)]
        for i, name in enumerate(self._paths):
            if not name.strip():
                self.errors.setdefault(i, f"line {self._lines[i]} of {self.path.name} names no image")
        self._source: Callable[[int], str] = self._name
        self._boxes: tuple[str, str, str, str] | None = None
        manifest = manifest_for([self.path], options)
        keys = {"id", "source"} | {spec.key for spec in manifest.specs} if manifest is not None else set()
        if manifest is not None and keys <= self._cells.keys():
            self._id: Callable[[int], str] = self._cells["id"].text
            self._source = self._cells["source"].text
            self.columns = make_columns(manifest, self._exported_value, options, self.errors)
            self._by_title = self._typed([title for title in self._cells if title not in keys], [], options)
        else:
            self._id = self._names_of(options)
            self._make_columns(options)
        self._sizes = array("Q", (_size(self._file(i)) for i in range(self._count)))
        check_unique(
            self._id,
            self._count,
            lambda i: f"line {self._lines[i]}",
            "keep one of them, or name a column of unique ids with --id-column",
        )

    def _read(self) -> dict[str, Names]:
        self._lines = array("Q")  # line in the file where each row ends, for messages
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as file:
                head = file.readline()
                file.seek(0)
                delimiter = max(
                    "\t" if self.path.suffix.lower() == ".tsv" else ",", ";", "\t", "|", key=head.count
                )
                rows = csv.reader(file, delimiter=delimiter, strict=True)
                header = [name.strip() for name in next(rows, [])]
                if not any(header):
                    raise DataError(f"{self.path} is empty; its first line must name the columns")
                twice = {name for name in header if header.count(name) > 1}
                if twice:
                    raise DataError(
                        f"{self.path} has two columns called {sorted(twice)[0]!r}; rename one of them"
                    )
                columns = [Names() for _ in header]
                for row in rows:
                    if not row:
                        continue
                    if len(row) != len(header):
                        self.errors[len(self._lines)] = (
                            f"line {rows.line_num} of {self.path.name} has {len(row)} values, but the header has {len(header)}"
                        )
                        row = (row + [""] * len(header))[: len(header)]
                    for column, value in zip(columns, row):
                        column.append(value.encode("utf-8"))
                    self._lines.append(rows.line_num)
                    self._tick()
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror}); check the file") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
        except csv.Error as error:
            raise DataError(
                f"{self.path} is not a CSV file ({error}); check its quotes and delimiter"
            ) from error
        return dict(zip(header, columns))

    def _column(self, name: str, purpose: str) -> str:
        if name not in self._cells:
            raise unknown(
                f"{purpose} column", name, self._cells, f"the columns of {self.path.name} were searched"
            )
        return name

    def _path_column(self, name: str | None) -> str:
        if name is not None:
            return self._column(name, "path")
        lower = {title.lower(): title for title in reversed(self._cells)}
        named = [lower[name] for name in _PATHS if name in lower]
        for title in [
            *named,
            *self._cells,
        ]:  # the first that leads to a file, else the first with a telling name
            texts = self._cells[title]
            if any(texts[i] and _is_file(self._resolve(texts[i])) for i in range(min(self._count, _PROBED))):
                return title
        for title in named:
            if title.lower() not in ("id", "image_id"):
                return title
        raise UsageError(
            f"no column of {self.path} leads to files below {self.root}; name it with --path-column (columns: "
            f"{', '.join(self._cells)}) or give the folder with --root"
        )

    def _resolve(self, raw: bytes) -> Path:
        return self.root / raw.decode().strip()

    def _file(self, i: int) -> Path:
        return self._resolve(self._paths[i])

    def _name(self, i: int) -> str:
        """The path as it is stored: relative to the root, so that no absolute path gets into the file."""
        text = self._paths.text(i).strip() or f"line {self._lines[i]}"
        if os.path.isabs(text):
            text = os.path.relpath(text, self.root.absolute())
        return text.replace(os.sep, "/")

    def _names_of(self, options: SourceOptions) -> Callable[[int], str]:
        if options.id_column is not None:
            return self._cells[self._column(options.id_column, "id")].text
        if options.crop_box is None:
            return self._name
        # Several boxes of one image are several samples.
        boxes = [self._cells[self._column(name, "crop box")] for name in options.crop_box]
        return lambda i: f"{self._name(i)}#{','.join(box.text(i).strip() for box in boxes)}"

    def _make_columns(self, options: SourceOptions) -> None:
        labels = [self._column(name, "label") for name in options.columns()]
        if not labels and options.label_from == "auto":
            lower = {title.lower(): title for title in reversed(self._cells)}
            labels = [lower[name] for name in _LABELS if name in lower][:1]
        if options.label_sep is not None and not labels:
            raise UsageError(
                f"--label-sep needs a label column; name it with --label, got {options.label_sep!r}"
            )
        if labels:
            self.columns.append(
                label_column("label", labels[0], self._cells[labels[0]], options, self.errors)
            )
        elif options.label_from == "parent":
            parents = (os.path.basename(os.path.dirname(self._name(i))) or None for i in range(self._count))
            self.columns.append(categorical("label", "label", parents, options.classes, self.errors))
            for i in range(self._count):
                if not os.path.dirname(self._name(i)):
                    self.errors.setdefault(i, f"has no parent folder to take a label from: {self._name(i)!r}")
        else:
            self.columns.extend(
                regex_columns(lambda: (self._name(i) for i in range(self._count)), options, self.errors)
            )
        used = {labels[0]} if labels else set()
        used.update([options.id_column] if options.id_column else [])
        by_title = self._typed([title for title in self._cells if title not in used], labels, options)
        self._boxes = options.crop_box
        self._by_title = by_title
        if self._boxes is not None:
            for name in self._boxes:
                kind = by_title[self._column(name, "crop box")].field.kind if name in by_title else "text"
                if kind not in ("int", "float"):
                    raise DataError(
                        f"crop box column {name!r} of {self.path} must hold numbers; correct its rows"
                    )

    def _typed(self, titles: list[str], labels: list[str], options: SourceOptions) -> dict[str, Column]:
        """Add a column for each of these but the paths: numbers or text, classes where it is one of ``labels``."""
        rest = [title for title in titles if self._cells[title] is not self._paths]
        by_title: dict[str, Column] = {}
        for title, name in zip(rest, field_names(rest, (c.field.name for c in self.columns))):
            make = label_column if title in labels else typed_of
            by_title[title] = make(name, title, self._cells[title], options, self.errors)
        self.columns.extend(by_title.values())
        return by_title

    def _exported_value(self, i: int, spec: Spec) -> Any:
        return spec.from_cell(self._cells[spec.key].text(i))

    def __len__(self) -> int:
        return self._count

    def sample(self, i: int) -> Sample:
        box = numbers(self._by_title, self._boxes, i) if self._boxes is not None else None
        error = self.errors.get(i)
        if self._boxes is not None and box is None and error is None:
            error = f"line {self._lines[i]} has no complete crop box"
        path = self._file(i)
        values = self.values(i)  # may find out what is wrong
        error = error or self.errors.get(i)
        return Sample(
            self._id(i), self._source(i), values, lambda: read_bytes(path), self._sizes[i], box, error
        )

    def digest(self, into: Any) -> None:
        for texts in self._cells.values():
            texts.digest(into)
        into.update(self._sizes.tobytes())


def typed_of(name: str, title: str, texts: Names, options: SourceOptions, errors: dict[int, str]) -> Column:
    return typed(name, title, texts)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0  # reading it will say what is wrong


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a text too long for a name, or with a NUL byte: a caption, not a path
        return False
