"""What a loader hands out, and the memory it lies in."""

from __future__ import annotations

import weakref
from collections import namedtuple
from functools import lru_cache
from typing import Any

import numpy as np
import torch


class Batch:
    """A named tuple of the loader's fields: ``images, labels = batch``, ``batch.image``, ``batch["image"]``.

    ``batch.index`` (B,) int64, the base indices of its samples, is there even where it is not one of the fields.
    """

    _fields: tuple[str, ...]
    _names: tuple[str, ...]

    @property
    def index(self) -> torch.Tensor:
        """Base indices of the samples, (B,) int64; in host memory if it is not one of the fields."""
        if "_index" not in self.__dict__:
            raise AttributeError(
                "this batch was rebuilt by another library without its index; ask for it: Loader(fields=(..., 'index'))"
            )
        index: torch.Tensor = self.__dict__["_index"]
        if index.device.type != "cpu":  # made on the device, which is waited for when somebody asks, and once
            index = self.__dict__["_index"] = index.cpu()
        return index

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if key in self._names:
                return super().__getitem__(self._names.index(key))  # type: ignore[misc]
            if key == "index":
                return self.index
            raise KeyError(f"{key!r}; this batch has {', '.join(self._names)} and index")
        return super().__getitem__(key)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        values: Any = self  # a tuple, by the class that batch_class makes
        return _rebuild, (self._names, tuple(values), self.__dict__)

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        """The same batch with its tensors on ``device``."""
        values = (v.to(device, non_blocking=non_blocking) if isinstance(v, torch.Tensor) else v for v in self)  # type: ignore[attr-defined]
        moved = type(self)(*values)
        moved.__dict__.update(self.__dict__)
        return moved


@lru_cache(maxsize=64)
def batch_class(fields: tuple[str, ...]) -> Any:
    """The batch type of these fields; names that are no identifiers are reached as ``batch["name"]`` only."""
    # Lightning and Accelerate rebuild a batch as type(batch)(*values) if it is a named tuple.
    base = namedtuple("Batch", fields, rename=True)  # type: ignore[misc]
    members: dict[str, Any] = {"_names": fields}
    if "index" in fields:
        members["index"] = getattr(base, "index")  # noqa: B009
    return type("Batch", (Batch, base), members)


def _rebuild(fields: tuple[str, ...], values: tuple[Any, ...], state: dict[str, Any]) -> Any:
    """A batch from its pickle: its class is made for its fields, so it is not found by name."""
    batch = batch_class(fields)(*values)
    batch.__dict__.update(state)
    return batch


class Buffers:
    """Host memory for batches, used again when the tensors over it are gone.

    A buffer is handed out as a fresh view, which the tensor made of it keeps alive: as long as anything that looks into
    the buffer lives, so does the view, and a weak reference to it tells.
    """

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._pool: dict[tuple[tuple[int, ...], str], list[list[Any]]] = {}
        self._uploading: list[tuple[Any, np.ndarray]] = []
        self._stream: Any = None

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An uninitialised array that nobody else looks into."""
        self._uploading = [(event, array) for event, array in self._uploading if not event.query()]
        entries = self._pool.setdefault((shape, np.dtype(dtype).str), [])
        for entry in entries:
            if entry[1]() is None:
                break
        else:
            entry = [self._allocate(shape, dtype), None]
            entries.append(entry)
        view: np.ndarray = entry[0].view()
        entry[1] = weakref.ref(view)
        return view

    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if self._pinned:
            kind = torch.uint8 if np.dtype(dtype) == np.uint8 else torch.float32
            pinned: np.ndarray = torch.empty(shape, dtype=kind, pin_memory=True, device="cpu").numpy()
            return pinned
        return np.empty(shape, dtype)

    def upload(self, tensor: torch.Tensor, array: np.ndarray, device: torch.device) -> torch.Tensor:
        """Copy a pinned tensor over ``array`` to the GPU on a stream of its own; the consumer's stream waits for it."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        consumer = torch.cuda.current_stream(device)
        with torch.cuda.stream(self._stream):
            moved = tensor.to(device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        consumer.wait_event(event)
        moved.record_stream(
            consumer
        )  # or the allocator could give its memory away while the consumer reads it
        self._uploading.append((event, array))  # the source must stay as it is until the copy is done
        return moved

    def clear(self) -> None:
        """Forget all buffers; those in use live on with their tensors."""
        for event, _ in self._uploading:
            event.synchronize()
        self._uploading = []
        self._pool = {}
