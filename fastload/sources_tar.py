"""WebDataset tar shards: files that share a name up to the first dot are one sample.

Headers are read once and give the place of every part, 60 bytes per sample; the images are then read with ``pread`` from several
threads, in any order, without unpacking. That needs plain tar files: a compressed one has no places to jump to.

>>> TarSource(expand("shards/train-{000..012}.tar"), SourceOptions()).sample(0).id
'sample000000'
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import tarfile
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastload.beton import Field
from fastload.errors import DataError, UsageError
from fastload.exported import Spec, make_columns, manifest_for
from fastload.sources_base import (
    Column,
    Names,
    Sample,
    Source,
    SourceOptions,
    Tick,
    check_unique,
    field_names,
    label_column,
    quiet,
    readable,
    regex_columns,
    require_same_options,
)

_IMAGES = frozenset(
    [
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "webp",
        "bmp",
        "gif",
        "tif",
        "tiff",
        "ppm",
        "pgm",
        "jp2",
        "avif",
        "img",
    ]
)
_EXTRAS = ("cls", "json", "txt")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
_MAX_SHARDS = 1_000_000
_OPEN_SHARDS = 256  # up to this many stay open; more could exceed the limit of open files


def is_pattern(text: str) -> bool:
    """Whether a name is a brace or glob pattern rather than a path."""
    return bool(_BRACES.search(text) or glob.has_magic(text)) and not os.path.exists(text)


def expand(text: str) -> list[str]:
    """Paths of ``train-{000..012}.tar``, ``{a,b}.tar`` and ``train-*.tar``, in the order written, globs sorted."""
    names = _expand_braces(text)
    paths: list[str] = []
    for name in names:
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not found:
            raise UsageError(
                f"no file matches {name!r}; check the pattern and the folder {os.path.dirname(name) or '.'!r}"
            )
        paths.extend(found)
    return paths


def _expand_braces(text: str) -> list[str]:
    pieces = _BRACES.split(text)  # text, inside, text, inside, ..., text
    choices: list[list[str]] = []
    for k, piece in enumerate(pieces):
        span = _RANGE.fullmatch(piece) if k % 2 else None
        if span is not None:
            first, last = int(span[1]), int(span[2])
            width = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 0
            if last < first or last - first >= _MAX_SHARDS:
                raise UsageError(f"a range counts up to at most {_MAX_SHARDS} shards, got {{{piece}}}")
            choices.append([str(n).zfill(width) for n in range(first, last + 1)])
        else:
            choices.append(piece.split(",") if k % 2 else [piece])
    return ["".join(parts) for parts in itertools.product(*choices)]


class TarSource(Source):
    """Samples of one or more shards, in the order of the shards and of the files in them.

    ``cls`` becomes the int field ``label``; ``json`` is kept as a json field, and ``labels`` names keys of it to be used as labels;
    ``txt`` is kept as bytes. ``shard_ids`` puts the shard's name before each key, for shards that count from zero each. Shards that
    ``fastload export`` wrote have a ``dataset.json`` beside them: then ids, sources, fields and class names are those of the dataset.
    """

    def __init__(self, paths: Sequence[str], options: SourceOptions, tick: Tick = quiet) -> None:
        super().__init__(kind="tar")
        self._tick = tick
        require_same_options(
            "tar file", options, ("label_from", "labels", "label_sep", "classes", "shard_ids")
        )
        self.paths = [Path(path) for path in paths]
        self._keys, self._suffixes = Names(), Names()
        self._suffix_ids: dict[str, int] = {}
        self._shards, self._suffix = array("I"), array("I")
        self._places = {part: (array("Q"), array("Q")) for part in ("image", *_EXTRAS)}
        self._prefix = options.shard_ids
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()
        self._exported = manifest_for(self.paths, options)
        self._last: tuple[int, dict[str, Any]] = (-1, {})
        for n, path in enumerate(self.paths):
            self._scan(n, path)
        if not len(self):
            raise DataError(
                f"{self._shown()} holds no images; WebDataset shards hold files like 000001.jpg and 000001.cls"
            )
        if self._exported is not None:
            self.columns = make_columns(self._exported, self._exported_value, options, self.errors)
        else:
            self._make_columns(options)
        check_unique(
            self._id,
            len(self),
            self._where,
            "remove one, or put the shard's name before each key with --shard-ids",
        )

    def _shown(self) -> str:
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]} ... {self.paths[-1]}"

    def _scan(self, shard: int, path: Path) -> None:
        """List one shard. Members with one key that follow each other are one sample."""
        key: str | None = None
        parts: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep a million of them
                    folder, _, base = member.name.rpartition("/")
                    stem, dot, suffix = base.partition(".")
                    if not member.isreg() or not dot or not stem:
                        self.ignored["no sample"] += member.isreg()
                        continue
                    name = f"{folder}/{stem}" if folder else stem
                    if name != key:
                        self._close_sample(shard, key, parts)
                        key, parts = name, {}
                    parts[suffix] = (member.offset_data, member.size)
                self._close_sample(shard, key, parts)
                self._check_end(path, tar)
        except FileNotFoundError as error:
            raise UsageError(f"{path} does not exist; check the pattern or the name") from error
        except tarfile.ReadError as error:
            with open(path, "rb") as file:
                packed = file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
            cure = (
                "decompress it first (gunzip)"
                if packed
                else f"it is damaged or cut off ({error}): fetch it again"
            )
            raise DataError(f"{path} cannot be read as a plain tar file; {cure}") from error
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); check the file") from error

    def _check_end(self, path: Path, tar: tarfile.TarFile) -> None:
        """tarfile takes a file that is cut between two members for a whole one, or reads past a member that is cut."""
        offsets, sizes = self._places["image"]
        if (
            offsets
            and self._shards[-1] == len(self.paths) - 1
            and offsets[-1] + sizes[-1] > path.stat().st_size
        ):
            raise tarfile.ReadError("unexpected end of data")
        # It also takes a damaged header for the end.
        with open(path, "rb") as file:
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("damaged header")

    def _close_sample(self, shard: int, key: str | None, parts: dict[str, tuple[int, int]]) -> None:
        if key is None:
            return
        lower = {suffix.lower(): suffix for suffix in reversed(parts)}
        image = next((s for s in lower if s in _IMAGES), None) or next(
            (s for s in lower if s.rpartition(".")[2] in _IMAGES), None
        )
        if image is None:
            self.ignored["sample without image"] += 1
            return
        self._keys.append(os.fsencode(key))
        self._tick()
        self._shards.append(shard)
        suffix = lower[image]
        if suffix not in self._suffix_ids:
            self._suffix_ids[suffix] = len(self._suffixes)
            self._suffixes.append(os.fsencode(suffix))
        self._suffix.append(self._suffix_ids[suffix])
        for part, (offsets, sizes) in self._places.items():
            found = image if part == "image" else part
            offset, size = parts[lower[found]] if found in lower else (0, 0)
            offsets.append(offset)
            sizes.append(size)
        for suffix in lower:
            if suffix != image and suffix not in _EXTRAS:
                self.ignored[f".{suffix}"] += 1

    def _make_columns(self, options: SourceOptions) -> None:
        offsets = self._places["cls"][0]
        keys = options.columns()
        if keys:
            for title, name in zip(keys, ["label", *field_names(keys[1:], _EXTRAS)]):
                self.columns.append(
                    label_column(
                        name, title, self._json_texts(title, options.label_sep), options, self.errors
                    )
                )
        elif options.label_from in ("auto", "parent") and any(offsets):
            if options.label_from == "parent":
                raise UsageError(
                    "the labels of a tar file are its .cls files; leave --label-from out, got 'parent'"
                )
            texts = Names()
            for i in range(len(self)):
                texts.append(self._part(i, "cls").strip())
            self.columns.append(label_column("label", "cls", texts, options, self.errors))
        else:
            self.columns.extend(
                regex_columns(lambda: map(self._name, range(len(self))), options, self.errors)
            )
        if any(self._places["json"][0]):
            self.columns.append(Column(Field("json", "json"), "json", self._json))
        if any(self._places["txt"][0]):
            self.columns.append(Column(Field("txt", "bytes"), "txt", lambda i: self._part(i, "txt")))

    def _json_texts(self, name: str, sep: str | None) -> Names:
        texts = Names()
        known: set[str] = set()
        for i in range(len(self)):
            record = self._json(i)
            value = record.get(name) if isinstance(record, dict) else None
            known.update(record if isinstance(record, dict) and len(known) < 1000 else ())
            if isinstance(value, list) and sep is not None:
                value = sep.join(map(str, value))
            texts.append(b"" if value is None else str(value).encode())
        if name not in known:
            shown = ", ".join(sorted(known)) or "none"
            raise UsageError(f"no .json in {self._shown()} has the key {name!r}; the keys are: {shown}")
        return texts

    def _json(self, i: int) -> Any:
        raw = self._part(i, "json")
        if not raw:
            return None
        try:
            return json.loads(raw)
        except ValueError as error:
            self.errors.setdefault(i, f"its .json cannot be read ({error})")
            return None

    def _record(self, i: int) -> dict[str, Any]:
        """The .json of a sample of an exported shard; empty for a broken one. The last one is kept: it has all of the fields."""
        if self._last[0] != i:
            record = self._json(i)
            if not isinstance(record, dict):
                self.errors.setdefault(i, "it has no .json with its fields, as dataset.json says")
                record = {}
            self._last = (i, record)
        return self._last[1]

    def _exported_value(self, i: int, spec: Spec) -> Any:
        record = self._record(i)
        if spec.key not in record:
            raise DataError(f"its .json has no {spec.key!r}, which dataset.json lists")
        return record[spec.key]

    def _part(self, i: int, part: str) -> bytes:
        """The bytes of one part of sample ``i``; empty where the sample has no such part. Safe from several threads."""
        offsets, sizes = self._places[part]
        if not sizes[i]:
            return b""
        shard = self._shards[i]
        keep = len(self.paths) <= _OPEN_SHARDS
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = os.open(self.paths[shard], os.O_RDONLY)
                if keep:
                    self._files[shard] = file
        try:
            data = os.pread(file, sizes[i], offsets[i])
        finally:
            if not keep:
                os.close(file)
        if len(data) != sizes[i]:
            raise DataError(f"{self.paths[shard].name} ends inside it; the shard is cut off")
        return data

    def _image(self, i: int) -> bytes:
        data = self._part(i, "image")
        if not data:
            raise DataError("the file is empty")
        return data

    def _id(self, i: int) -> str:
        key = self._keys.text(i)
        if self._exported is not None:
            key = str(self._record(i).get("id", key))
        return f"{self._shard_name(i)}/{key}" if self._prefix else key

    def _shard_name(self, i: int) -> str:
        return readable(os.fsencode(self.paths[self._shards[i]].stem))

    def _name(self, i: int) -> str:
        return f"{self._keys.text(i)}.{self._suffixes.text(self._suffix[i])}"

    def _where(self, i: int) -> str:
        return f"{self._name(i)} in {self.paths[self._shards[i]].name}"

    def __len__(self) -> int:
        return len(self._keys)

    def sample(self, i: int) -> Sample:
        size = self._places["image"][1][i]
        source = f"{readable(os.fsencode(self.paths[self._shards[i]].name))}/{self._name(i)}"
        if self._exported is not None:
            source = str(self._record(i).get("source", source))
        values = self.values(i)  # reads the .json, which may be found broken here
        return Sample(self._id(i), source, values, lambda: self._image(i), size, error=self.errors.get(i))

    def digest(self, into: Any) -> None:
        self._keys.digest(into)
        for part in (self._shards, self._suffix, *(a for pair in self._places.values() for a in pair)):
            into.update(part.tobytes())

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()
