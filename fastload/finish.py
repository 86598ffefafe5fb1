"""From filled pixels to a batch: mixed, copied to the device, made into the dtype asked for, with its labels and columns.

These are the steps that are done once a batch, on the consumer's own thread. Each is a method of its own, so that they can
be measured apart. On a GPU bytes travel, a quarter of the floats, and are normalised there.

>>> images = finisher.convert(finisher.copy(finisher.mix(job))); batch = finisher.batch(job, images)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat
import numpy as np
import torch

from fastload.batch import Buffers, batch_class
from fastload.dataset import Dataset
from fastload.draws import Plan
from fastload.errors import DataError
from fastload.jobs import Job
from fastload.kernels import pixels

_LISTS = ("bytes", "json")  # kinds of fields that no tensor can hold
_SMALL = 1024  # bytes of a sample, see Finisher.small_fields


class Finisher:
    """Makes batches of ``fields`` from jobs whose pixels are filled. ``classes`` is the length of soft labels (with mixing)."""

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        fields: tuple[str, ...],
        dtype: torch.dtype,
        device: torch.device | None,
        buffers: Buffers,
        classes: int,
    ) -> None:
        self._dataset, self._plan, self._fields = dataset, plan, fields
        self._dtype, self._device, self._buffers, self._classes = dtype, device, buffers, classes
        self._batch_class = batch_class(fields)
        self._late = device is not None and device.type == "cuda" and not plan.mixers
        self._affine: tuple[torch.Tensor, ...] = ()  # on the device, once they were wanted there

    @property
    def wants_floats(self) -> bool:
        """Whether a job needs normalised floats in host memory."""
        return self._dtype != torch.uint8 and not self._late

    def mix(self, job: Job) -> np.ndarray:
        """The images of a filled job, (B, H, W, 3) uint8 or float32, mixed in place where the table says so."""
        array = job.images if job.floats is None else job.floats
        if job.table.mix is not None and job.table.mix_box is not None:
            rounding = np.float32(0.5 if array.dtype == np.uint8 else 0.0)
            pixels.mix(array, job.table.mix, job.table.mix_box, rounding)
        return array

    def copy(self, array: np.ndarray) -> torch.Tensor:
        """The images as a tensor (B, 3, H, W), channels_last, on the device."""
        images = torch.from_numpy(array).permute(0, 3, 1, 2)
        if self._device is not None and self._device.type == "cuda":
            return self._buffers.upload(images, array, self._device)
        return self._move(images)

    def convert(self, images: torch.Tensor) -> torch.Tensor:
        """The images in the loader's dtype, normalised if they are not yet."""
        if self._late and self._dtype != torch.uint8:
            if not self._affine:  # the host waits for a copy such as this
                self._affine = tuple(
                    torch.from_numpy(v).to(images.device).view(1, 3, 1, 1) for v in self._plan.affine
                )
            scale, shift = self._affine
            images = images.to(torch.float32).mul_(scale).add_(shift)
        return images if images.dtype == self._dtype else images.to(self._dtype)

    def batch(self, job: Job, images: torch.Tensor) -> Any:
        """The named tuple of a job and its finished images."""
        values: dict[str, Any] = {self.image_field: images}
        if self._plan.mixers:
            labels = self._dataset.gather("label", job.bases)
            self.check_labels(labels)
            values["label"] = self._move(torch.from_numpy(self.soften(labels, job.table.mix)))
        return self.wrap(values, torch.from_numpy(job.bases), lambda: job.bases)

    def wrap(self, values: dict[str, Any], index: torch.Tensor, bases: Callable[[], np.ndarray]) -> Any:
        """The named tuple of ``values`` by field; fields that are not there are looked up for the samples ``bases()`` (B,)."""
        batch = self._batch_class(*(self._value(name, values, index, bases) for name in self._fields))
        if "index" not in self._fields:
            batch.__dict__["_index"] = index
        return batch

    def _value(
        self, name: str, values: dict[str, Any], index: torch.Tensor, bases: Callable[[], np.ndarray]
    ) -> Any:
        if name in values:
            return values[name]
        return self._move(index) if name == "index" else self.column(name, bases())

    @property
    def image_field(self) -> str:
        """The name of the images."""
        return self._dataset.image_field

    @property
    def small_fields(self) -> list[str]:
        """The fields besides images and index that a device can keep: numbers, of at most 1 KiB a sample, and labels that are mixed."""
        known = [f for f in self._fields if f in self._dataset.fields and f != self.image_field]
        found = []
        for name in known:
            if self._dataset.fields[name].kind in _LISTS:
                continue
            one = self._dataset.gather(name, self._dataset.indices[:1])
            # torch has hardly an operation for unsigned numbers of more than a byte.
            small = one.nbytes <= _SMALL and one.dtype not in (np.uint16, np.uint32, np.uint64)
            if small or (name == "label" and self._plan.mixers):
                found.append(name)
        return found

    @property
    def classes(self) -> int:
        """The length of soft labels, 0 without mixing."""
        return self._classes

    def column(self, name: str, bases: np.ndarray) -> Any:
        """A field of the samples ``bases`` (B,): a tensor on the device, or a list."""
        if name in ("id", "source") and name not in self._dataset.fields:
            located = map(self._dataset.locate_base, bases.tolist())
            return [reader.strings(name)[at] for reader, at in located]
        values = self._dataset.gather(name, bases)
        if self._dataset.fields[name].kind in _LISTS:
            return list(values)
        values = values.astype(np.float32) if self._dataset.fields[name].kind == "float" else values
        return self._move(torch.from_numpy(np.ascontiguousarray(values)))

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device is None:
            return tensor
        if self._device.type == "cuda" and not tensor.is_cuda:
            tensor = tensor.pin_memory()  # else the host would wait for the copy
        return tensor.to(self._device, non_blocking=True)

    def check_labels(self, labels: np.ndarray) -> None:
        """DataError for labels (B,) that cannot be made into soft ones."""
        if labels.ndim == 1 and (labels.min(initial=0) < 0 or labels.max(initial=0) >= self._classes):
            raise DataError(
                f"mixing needs labels from 0 to {self._classes - 1}, got {labels.min()} to {labels.max()}"
            )

    def soften(self, labels: Any, mix: Any) -> Any:
        """Labels (B,) or (B, C) of a batch, mixed as its images are: own share ``mix`` (B,) float32; (B, C) float32.

        Arrays, or tensors on one device.
        """
        xp, device = array_api_compat.array_namespace(mix), array_api_compat.device(mix)
        # Compared, and not written to its places, for which a GPU would make the host wait.
        own_class = labels[:, None] == xp.arange(self._classes, device=device) if labels.ndim == 1 else labels
        soft = xp.astype(own_class, xp.float32)
        own = mix[:, None]
        return soft * own + xp.flip(soft, axis=0) * (1 - own)
