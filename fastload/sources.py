"""Where images come from: one function that turns whatever the user names into a numbered list of samples.

>>> len(open_source("photos/", SourceOptions()))
1512
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fastload.errors import DataError, UsageError
from fastload.exported import read_manifest
from fastload.sources_base import Sample, Source, SourceOptions, Tick
from fastload.sources_csv import CsvSource
from fastload.sources_folder import FolderSource
from fastload.sources_python import BetonSource, PythonSource
from fastload.sources_tar import TarSource, expand, is_pattern

__all__ = ["Sample", "Source", "SourceOptions", "open_source"]

_PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")


def open_source(src: Any, options: SourceOptions, *, progress: bool = False) -> Source:
    """The source for ``src``: a folder, CSV, tar shards (``{000..012}`` and globs), ``.beton`` file or Python object.

    A path that does not exist or is of no known kind is a UsageError, which names what is nearest to it.
    """
    if isinstance(src, str | os.PathLike):
        with tqdm(desc="list", unit="img", delay=1, leave=False, disable=not progress) as bar:
            source = _from_path(src, options, bar.update)
    else:
        source = _from_object(src, options)
    if "label" not in (field.name for field in source.fields):
        for flag, value in (("classes", options.classes), ("label-sep", options.label_sep)):
            if value is not None:
                source.close()
                raise UsageError(
                    f"--{flag} needs labels, and none were found; say where with --label-from, got {value!r}"
                )
    return source


def _from_path(src: str | os.PathLike[str], options: SourceOptions, tick: Tick) -> Source:
    text = os.fspath(src)
    if is_pattern(text):
        paths = expand(text)
        other = [path for path in paths if not path.endswith(".tar")]
        if other:
            raise UsageError(
                f"a pattern names .tar shards, but it also matches {other[0]!r}; narrow it, got {text!r}"
            )
        return TarSource(paths, options, tick)
    path = Path(text)
    if not path.exists():
        raise missing(path)
    if path.is_dir():
        shards = _shards(path)
        return TarSource(shards, options, tick) if shards else FolderSource(path, options, tick)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return CsvSource(path, options, tick)
    if suffix == ".tar":
        return TarSource([text], options, tick)
    if suffix == ".beton":
        from fastload.dataset import open as open_dataset

        return BetonSource(open_dataset(path), options, owned=True)
    cure = "unpack it first" if suffix in _PACKED else "give a folder, a .csv, .tar or .beton file"
    raise UsageError(f"cannot convert {text!r}; {cure}")


def _from_object(src: Any, options: SourceOptions) -> Source:
    if not (hasattr(src, "__len__") and hasattr(src, "__getitem__")):
        raise UsageError(f"a source is a path or has __len__ and __getitem__, got {type(src).__name__}")
    if hasattr(src, "encoded") and hasattr(src, "ids") and hasattr(src, "fields"):
        return BetonSource(src, options, owned=False)
    return PythonSource(src, options)


def _shards(folder: Path) -> list[str]:
    """The tar files of a folder that holds nothing else, or that ``fastload export`` wrote."""
    manifest = read_manifest(folder)
    if manifest is not None and manifest.shards:
        return [str(folder / name) for name in manifest.shards]
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
    if names and all(name.endswith(".tar") for name in names):
        return [str(folder / name) for name in names]
    return []


def missing(path: Path) -> UsageError:
    """An error for a path that does not exist, with the nearest names that do."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = os.listdir(parent) if os.access(parent, os.R_OK) else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(str(parent / name) for name in near)}?"
        if near
        else f"check the name in {parent}"
    )
    return UsageError(f"{path} does not exist; {hint}")
