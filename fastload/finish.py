"""From filled pixels to a batch: mixed, copied to the device, made into the dtype asked for, with its labels and columns.

These are the steps that are done once a batch, on the consumer's own thread. Each is a method of its own, so that they can
be measured apart. On a GPU bytes travel, a quarter of the floats, and are normalised there.

>>> images = finisher.convert(finisher.copy(finisher.mix(job))); batch = finisher.batch(job, images)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastload.batch import Buffers, batch_class
from fastload.dataset import Dataset
from fastload.draws import Plan
from fastload.errors import DataError
from fastload.jobs import Job
from fastload.kernels import pixels


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
        self._affine = plan.affine

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
            scale, shift = (torch.from_numpy(v).to(images.device).view(1, 3, 1, 1) for v in self._affine)
            images = images.to(torch.float32).mul_(scale).add_(shift)
        return images if images.dtype == self._dtype else images.to(self._dtype)

    def batch(self, job: Job, images: torch.Tensor) -> Any:
        """The named tuple of a job and its finished images."""
        values: dict[str, Any] = {}
        for name in self._fields:
            if name == self._dataset.image_field:
                values[name] = images
            elif name == "label" and self._plan.mixers:
                values[name] = self._move(self._mixed_labels(job))
            else:
                values[name] = self._column(name, job.bases)
        batch = self._batch_class(*(values[name] for name in self._fields))
        if "index" not in self._fields:
            batch.__dict__["_index"] = torch.from_numpy(job.bases)
        return batch

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._device is None else tensor.to(self._device, non_blocking=True)

    def _column(self, name: str, bases: np.ndarray) -> Any:
        if name == "index":
            return self._move(torch.from_numpy(bases))
        if name in ("id", "source") and name not in self._dataset.fields:
            located = map(self._dataset.locate_base, bases.tolist())
            return [reader.strings(name)[at] for reader, at in located]
        values = self._dataset.gather(name, bases)
        if self._dataset.fields[name].kind in ("bytes", "json"):
            return list(values)
        values = values.astype(np.float32) if self._dataset.fields[name].kind == "float" else values
        return self._move(torch.from_numpy(np.ascontiguousarray(values)))

    def _mixed_labels(self, job: Job) -> torch.Tensor:
        labels = self._dataset.gather("label", job.bases)
        if labels.ndim == 1:
            if labels.min(initial=0) < 0 or labels.max(initial=0) >= self._classes:
                raise DataError(
                    f"mixing needs labels from 0 to {self._classes - 1}, got {labels.min()} to {labels.max()}"
                )
            soft = np.zeros((len(labels), self._classes), np.float32)
            soft[np.arange(len(labels)), labels] = 1.0
        else:
            soft = labels.astype(np.float32)
        assert job.table.mix is not None
        own = job.table.mix[:, None]
        return torch.from_numpy(soft * own + soft[::-1] * (1 - own))
