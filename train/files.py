"""Files that are there whole or not at all.

A run may be killed at any moment, also while it writes: every file is written beside its place, flushed to the disk and
then renamed over it. A failed write leaves the old file as it was.

>>> write_json("runs/a/config.json", {"epochs": 20})
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from fastload.errors import DataError, UsageError


def write_atomic(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write(file)`` on a temporary binary file in the same folder, then rename it to ``path``.

    The folder is made if needed. Raises UsageError where the place cannot be written, DataError where writing fails
    (a full disk).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise DataError(
                f"writing {path} failed: {why}; what was there before is unchanged, make room and start again"
            ) from error
        raise UsageError(f"cannot write {path}: {why}; choose a place you may write to") from error
    finally:
        with suppress(OSError):  # renamed already, unless something above failed
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A UTF-8 CSV file with ``\\n`` line ends, written row by row."""

    def write(file: IO[bytes]) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
        text.flush()
        text.detach()  # the caller still needs the file underneath

    write_atomic(path, write)
