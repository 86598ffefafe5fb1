"""Folders of images: one folder per class, one flat folder, or any tree with the label in its paths.

Content decides what an image is, not its extension: wrong and upper-case extensions are common. Hidden files, what operating systems
leave behind, and text files beside the images are left out and counted. Order is natural (``img2`` before ``img10``).

>>> FolderSource("photos/", SourceOptions()).classes
{'label': ['cat', 'dog']}
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastload.errors import DataError, UsageError
from fastload.sources_base import (
    Names,
    Sample,
    Source,
    SourceOptions,
    Tick,
    categorical,
    natural_key,
    quiet,
    readable,
    regex_columns,
    require_same_options,
)

_LITTER = frozenset({"__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r", "@eadir"})
_NO_IMAGE = frozenset(
    [
        ".txt",
        ".csv",
        ".tsv",
        ".json",
        ".jsonl",
        ".xml",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
        ".md",
        ".rst",
        ".html",
        ".htm",
        ".pdf",
        ".doc",
        ".docx",
        ".xls",
        ".xlsx",
        ".py",
        ".ipynb",
        ".sh",
        ".m",
        ".mat",
        ".npy",
        ".npz",
        ".pkl",
        ".h5",
        ".pt",
        ".pth",
        ".onnx",
        ".zip",
        ".tar",
        ".gz",
        ".tgz",
        ".bz2",
        ".xz",
        ".7z",
        ".rar",
        ".beton",
        ".partial",
        ".journal",
        ".mp4",
        ".avi",
        ".mov",
        ".mp3",
        ".wav",
        ".log",
        ".db",
        ".url",
        ".lnk",
        ".exe",
        ".dll",
    ]
)
_SPLITS = frozenset(["train", "training", "val", "valid", "validation", "test", "testing", "dev"])


def looks_like_image(head: bytes) -> bool:
    """Whether the first 16 bytes begin a format that Pillow may read."""
    return (
        head.startswith(
            (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")
        )
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or head[4:8] == b"ftyp"
    )


class FolderSource(Source):
    """A folder. ``label_from``: ``auto`` (class folders if there are any), ``parent``, ``none`` or ``regex:...``.

    The class of ``SRC/cat/sub/1.jpg`` is ``cat``: the first folder below SRC. Ids are paths relative to SRC.
    """

    def __init__(self, path: str | os.PathLike[str], options: SourceOptions, tick: Tick = quiet) -> None:
        super().__init__(kind="folder")
        self._tick = tick
        require_same_options("folder", options, ("label_from", "classes"))
        if options.label_from.startswith("column:"):
            raise UsageError(
                f"a folder has no columns; use parent, none or regex:..., got {options.label_from!r}"
            )
        self.root = Path(path)
        self._names, self._sizes = Names(), array("Q")
        folders, files = self._entries(self.root)
        labelled = options.label_from == "parent" or (options.label_from == "auto" and bool(folders))
        if labelled:
            self._check_shape(folders, files, options)
        owners = array("q")
        for name, size in files:
            self._add(name, size)
        for n, folder in enumerate(folders):
            before = len(self._names)
            self._walk(folder)
            owners.extend([n] * (len(self._names) - before))
            if labelled and len(self._names) == before and folder not in (options.classes or ()):
                raise DataError(
                    f"class folder {folder!r} in {self.root} holds no image; remove it, or name the classes with --classes"
                )
        if not len(self._names):
            seen = f" (only {', '.join(f'{n} {k}' for k, n in self.ignored.items())})" if self.ignored else ""
            raise DataError(f"{self.root} holds no image{seen}; give a folder with images")
        if labelled:
            texts = (folders[n] for n in owners)
            column = categorical("label", "label", texts, options.classes or folders, self.errors)
            self.columns = [column]
        else:
            self.columns = regex_columns(self._names.texts, options, self.errors)

    def _check_shape(
        self, folders: list[str], files: Sequence[tuple[str, int]], options: SourceOptions
    ) -> None:
        """The mistakes that would otherwise become wrong labels."""
        if not folders:
            raise DataError(
                f"{self.root} has no class folders, so label_from parent finds no label; use none, a regex or a CSV file"
            )
        if files:
            raise DataError(
                f"{self.root} holds both class folders ({folders[0]!r}, ...) and {len(files)} images beside them ({files[0][0]!r}, "
                "...), which have no class; move them into a class folder, or use --label-from none or regex:..."
            )
        if (
            options.label_from == "auto"
            and options.classes is None
            and {f.lower() for f in folders} <= _SPLITS
        ):
            raise DataError(
                f"{self.root} holds splits ({', '.join(folders)}), not classes; convert each of them alone, or say --label-from parent"
            )

    def _entries(self, folder: Path) -> tuple[list[str], Sequence[tuple[str, int]]]:
        """Sub-folders and image candidates with their sizes, each in natural order."""
        folders, files = [], []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith(".") or name.lower() in _LITTER:
                        self.ignored["hidden"] += 1
                    elif entry.is_dir():
                        folders.append(name)
                    elif entry.is_file() or entry.is_symlink():
                        suffix = os.path.splitext(name)[1].lower()
                        if suffix in _NO_IMAGE and not _image_inside(entry.path):
                            self.ignored[suffix] += 1
                        else:
                            # One string per file, sorted as it is: a million (name, size) pairs with sort keys would take 500 MB.
                            files.append(f"{natural_key(name)}\0{_size(entry)}")
        except OSError as error:
            raise DataError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
        return sorted(folders, key=natural_key), _Pairs(files)

    def _walk(self, start: str) -> None:
        """Add every file below a folder: the files of a folder before those of its sub-folders."""
        stack: list[tuple[str, tuple[tuple[int, int], ...]]] = [(start, (_identity(self.root),))]
        while stack:
            relative, above = stack.pop()
            own = _identity(self.root / relative)
            if own in above:
                continue  # a link to a folder that it is in; one to any other folder stands for that folder's images
            folders, files = self._entries(self.root / relative)
            for name, size in files:
                self._add(f"{relative}/{name}", size)
            stack.extend((f"{relative}/{name}", (*above, own)) for name in reversed(folders))

    def _add(self, name: str, size: int) -> None:
        self._names.append(os.fsencode(name))
        self._sizes.append(size)
        self._tick()

    def __len__(self) -> int:
        return len(self._names)

    def sample(self, i: int) -> Sample:
        raw = self._names[i]
        path = os.path.join(os.fsencode(self.root), raw)
        name = readable(raw)
        return Sample(
            name, name, self.values(i), lambda: read_bytes(path), self._sizes[i], error=self.errors.get(i)
        )

    def digest(self, into: Any) -> None:
        self._names.digest(into)
        into.update(self._sizes.tobytes())


class _Pairs(Sequence[tuple[str, int]]):
    """Sorted ``key NUL name NUL size`` strings, read as (name, size) pairs without making them all at once."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = sorted(lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: Any) -> Any:
        _, name, size = self._lines[i].split("\0")
        return name, int(size)


def read_bytes(path: str | bytes | os.PathLike[str]) -> bytes:
    """A whole file; a missing or unreadable one is a DataError that says which."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # a NUL byte in the name
        raise DataError(f"cannot be read ({error})") from error
    if not data:
        raise DataError("the file is empty")
    return data


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
    return status.st_dev, status.st_ino


def _image_inside(path: str) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            return looks_like_image(file.read(16))
    except OSError:
        return False


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0  # a broken link: reading it will say so
