"""Checkpoints: tensors and plain Python values only, written atomically, read with ``weights_only=True``.

A checkpoint from a stranger can therefore hold wrong numbers but no code. ``best.pt`` has what is needed to predict,
``last.pt`` what is needed to go on: weights, averaged weights, optimizer, loss scale, random state, history.

>>> save("runs/a/last.pt", {"model": model.state_dict(), "epoch": 3}); load("runs/a/last.pt")["epoch"]
3
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import torch
from torch import nn

from fastload.errors import DataError, UsageError
from fastload.train.files import write_atomic

VERSION = 1


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path``; ``plain`` checks it first, so that what is saved can be loaded."""
    content = plain({"fastload_checkpoint": VERSION, **state})

    def write(file: IO[bytes]) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides a full disk behind an error of its own
            raise _disk_error(error) from error

    write_atomic(path, write)


def _disk_error(error: BaseException) -> BaseException:
    """The OSError that ``error`` was raised after, or ``error`` itself."""
    before: BaseException | None = error
    while before is not None:
        if isinstance(before, OSError):
            return before
        before = before.__cause__ or before.__context__
    return error


def load(path: str | Path) -> dict[str, Any]:
    """The state saved at ``path``, all tensors on the CPU. UsageError: no such file; DataError: not one of ours."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no checkpoint {path}; give the folder that 'fastload train' wrote")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, BadZipFile, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} is damaged or is no fastload checkpoint ({reason[:120]}); train again or use another one"
        ) from error
    version = state.get("fastload_checkpoint") if isinstance(state, dict) else None
    if version != VERSION:
        raise DataError(
            f"{path} is a checkpoint of another format, this fastload reads format {VERSION}; "
            f"use the fastload that wrote it, got {version!r}"
        )
    return dict(state)


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """A model's state dict from one of our checkpoints, a file of torch's (weights only, no code) or ``.safetensors``."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has errors of its own
        raise DataError(
            f"{path} holds no weights that can be read ({str(error)[:120]}); use another file"
        ) from error
    if isinstance(state, dict) and "fastload_checkpoint" in state:
        return kept_weights(state)
    for name in ("state_dict_ema", "state_dict", "model", "weights"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
            break
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise DataError(f"{path} is no state dict of tensors; save model.state_dict() with torch.save")
    return state


def kept_weights(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights to predict with: ``best.pt`` has only those, ``last.pt`` has all that the next step needs."""
    if "weights" in state:
        return dict(state["weights"])
    return dict(state["step"]["ema"] or state["step"]["model"])


def plain(value: Any) -> Any:
    """``value`` as dicts, lists, tuples, strings, numbers and detached CPU tensors; TypeError for anything else."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values only, got {type(value).__name__}")


def restore_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], where: str | Path) -> None:
    """Put ``weights`` into ``model``; DataError where they belong to another model."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise DataError(
            f"the weights in {where} do not fit this model ({first}); "
            "the installed timm may define it differently from the one used in training"
        ) from error


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of torch's generators on the CPU and on ``device``."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set torch's generators to :func:`random_state`; a GPU's is left where there was none."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
