"""What a search may try: a mapping of options to values or ranges, a YAML file of it, or a function of Optuna's trial.

Names and values are checked before the first trial, so that no night is lost to a typo. The trade-off: the options that make trials
comparable (data, split, metric) are not for searching.

>>> suggestions({"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "optimizer": ["adamw", "sgd"]}, cfg)(trial)
{'lr': 0.0031, 'optimizer': 'sgd'}
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastload.errors import DataError, UsageError, require, unknown
from fastload.train.config import Config

if TYPE_CHECKING:
    from optuna.trial import Trial

# Of the whole search: trials that differ in these could not be compared.
NOT_SEARCHED = ("data", "valid", "split", "fold", "valid_fraction", "groups", "allow_leak", "metric")

Suggest = Callable[["Trial"], dict[str, Any]]
Space = Mapping[str, Any] | Suggest


def read_space(space: Space | str | Path) -> Space:
    """What may be tried: a mapping, a function ``space(trial) -> dict``, a YAML file, or ``file.py:function``.

    An option of the mapping is ``{low, high, log, step}``, a list of values to choose from, or one value that is fixed.
    UsageError: no such file or function; DataError: no mapping in it.
    """
    if not isinstance(space, (str, Path)):
        return space
    file, sign, name = str(space).rpartition(":")
    if sign and file.endswith(".py"):
        return _imported(Path(file), name)
    try:
        content = yaml.safe_load(Path(space).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the space ({error}); give a YAML file or file.py:function, got {str(space)!r}"
        ) from error
    except yaml.YAMLError as error:
        raise DataError(f"{space} is not YAML ({' '.join(str(error).split())[:160]})") from error
    if not isinstance(content, dict):
        raise DataError(f"{space} must hold 'option: what to try' on each line, got {type(content).__name__}")
    return {str(name): value for name, value in content.items()}


def _imported(file: Path, name: str) -> Suggest:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise UsageError(
            f"no such Python file; give file.py:function with a function space(trial), got {str(file)!r}"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Suggest | None = getattr(module, name, None)
    if found is None:
        raise unknown("function", name, [k for k, v in vars(module).items() if callable(v)], f"in {file}")
    return found


def suggestions(space: Space, cfg: Config) -> Suggest:
    """The function of a trial that gives its options, after everything in ``space`` has been checked against ``cfg``.

    UsageError: an unknown option (with the nearest known), one that a search cannot change, values that it cannot have.
    """
    if callable(space):
        optuna = require("optuna", "tune")
        with quiet():
            # A trial of a study that is forgotten: names and values as they will come.
            cfg.with_values(_named(space(optuna.create_study().ask())))
        given: Suggest = space
        return lambda trial: _named(given(trial))
    options = {name: _option(name, value) for name, value in _named(dict(space)).items()}
    if all(len(ends) == 1 for ends, _ in options.values()):
        raise UsageError(
            f"the space has nothing to choose from, so all trials would be alike; give a list or a range, got {dict(space)!r}"
        )
    # Some values fit only beside others (warmup_epochs and epochs): it is enough if they fit the first or the last ones.
    first, last = ({name: ends[i] for name, (ends, _) in options.items()} for i in (0, -1))
    for name, (ends, _) in options.items():
        for value in ends:
            try:
                cfg.with_values({**first, name: value})
            except UsageError:
                cfg.with_values({**last, name: value})
    return lambda trial: {name: draw(trial) for name, (_, draw) in options.items()}


def _named(values: Any) -> dict[str, Any]:
    """``values``, if their names are options that a search may change."""
    if not isinstance(values, dict):
        raise UsageError(f"a space is a mapping of options or a function that returns one, got {values!r}")
    known = [spec.name for spec in fields(Config) if spec.name not in NOT_SEARCHED]
    for name, value in values.items():
        if name in NOT_SEARCHED:
            raise UsageError(
                f"trials that differ in {name!r} could not be compared; set it outside of the space, got {value!r}"
            )
        if name not in known:
            raise unknown("training option in the space", name, known)
    return values


def _option(name: str, value: Any) -> tuple[list[Any], Callable[[Trial], Any]]:
    """What may be tried for one option: all values, or the ends of a range; and how a trial draws one."""
    kind = next(str(spec.type) for spec in fields(Config) if spec.name == name)
    if isinstance(value, dict):
        return _range(name, value, kind.partition(" | ")[0])
    listed = isinstance(value, list)
    if listed and kind.startswith("tuple"):  # an option that is a list itself needs a list of lists
        listed = any(isinstance(one, list) for one in value)
    if not listed:
        return [value], lambda trial: value
    if not value:
        raise UsageError(f"{name} needs values to choose from, got []")
    # Optuna keeps plain values only; Config reads such a text as the list.
    texts = [",".join(map(str, one)) if isinstance(one, list) else one for one in value]
    return texts, lambda trial: trial.suggest_categorical(name, texts)


def _range(name: str, value: dict[str, Any], kind: str) -> tuple[list[Any], Callable[[Trial], Any]]:
    words = ("low", "high", "log", "step")
    for word in value:
        if word not in words:
            raise unknown(f"word in the range of {name}", word, words)
    if kind not in ("int", "float"):
        raise UsageError(f"{name} has no range; give a list of values to choose from, got {value!r}")
    number, log = int if kind == "int" else float, value.get("log", False)
    try:  # as text, because YAML 1.1 reads 1e-4 as one, and because 0.5 must not pass as a whole number
        low, high = number(str(value["low"])), number(str(value["high"]))
        step = None if value.get("step") is None else number(str(value["step"]))
    except (KeyError, ValueError) as error:
        what = "whole numbers" if kind == "int" else "numbers"
        raise UsageError(
            f"the range of {name} needs low and high, which are {what}, got {value!r}"
        ) from error
    if not low < high or (step is not None and step <= 0):
        raise UsageError(f"the range of {name} must have low below high and a step above 0, got {value!r}")
    if not isinstance(log, bool) or (log and (low <= 0 or step is not None)):
        raise UsageError(
            f"log is true or false, and true only above 0 and without a step; change {name}, got {value!r}"
        )
    more: dict[str, Any] = {"step": step, "log": log} if step is not None else {"log": log}
    if kind == "int":
        return [low, high], lambda trial: trial.suggest_int(name, int(low), int(high), **more)
    return [low, high], lambda trial: trial.suggest_float(name, low, high, **more)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's lines about what it does; its warnings stay."""
    optuna = require("optuna", "tune")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
