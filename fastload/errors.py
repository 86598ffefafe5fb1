"""Errors that say what happened, why, and how to cure it.

Every failure that a user can cause or cure is a :class:`FastloadError`; the command line prints its text in one line and
exits with ``exit_code``. Anything else that escapes is a bug of ours and keeps its traceback.

>>> raise unknown("engine", "gpu", ["cpu", "cuda", "dali"])
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class FastloadError(Exception):
    """Base of all errors that fastload raises on purpose."""

    exit_code = 1


class UsageError(FastloadError, ValueError):
    """The call is wrong: a path, an option, a name. Exit code 2."""

    exit_code = 2


class DataError(FastloadError):
    """The data are wrong: a damaged file, an unknown label, a full disk. Exit code 1."""


class CorruptError(DataError):
    """Bytes that are not what they claim to be.

    ``reason`` says what is wrong with them; ``index``, ``id`` and ``source`` name the sample where it is known.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.index: int | None = None
        self.id: str | None = None
        self.source: str | None = None

    def at(self, index: int | None = None, id: str | None = None, source: str | None = None) -> CorruptError:
        """Say which sample it was; returns the error itself, so that it can be raised in one line."""
        self.index, self.id, self.source = index, id, source
        where = ", ".join(
            f"{name} {value!r}" if name != "sample" else f"sample {value}"
            for name, value in (("sample", index), ("id", id), ("source", source))
            if value is not None
        )
        self.args = (f"{where}: {self.reason}" if where else self.reason,)
        return self


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say with which command it is installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module!r} is needed for this and cannot be imported ({error}); "
            f"install it with: pip install 'fastload[{extra}]'"
        ) from error


def unknown(kind: str, got: object, known: Iterable[str], cure: str = "") -> UsageError:
    """An error for a name that does not exist, with the nearest names that do."""
    names = sorted(known)
    near = difflib.get_close_matches(str(got), names, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(repr(n) for n in near)}?"
    elif len(names) <= 20:
        hint = f"known: {', '.join(names)}"
    else:
        hint = ""
    text = f"unknown {kind} {str(got)!r}"
    return UsageError("; ".join(part for part in (text, hint, cure) if part).replace("?; ", "? "))
