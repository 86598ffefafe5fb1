"""The model's side of a bench: the trainer's step on one synthetic batch, and a batch size that fits the time budget.

A CPU's images per second hardly depend on the batch, so a step too slow for the budget is measured with fewer images, and the
result says so. On a GPU the batch decides the rate, and it is never changed.

>>> side, batch = make_side(BenchOptions("resnet18"), dataset, torch.device("cpu"))
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastload.benchmarks.options import BenchOptions
from fastload.benchmarks.variants import Variant
from fastload.errors import UsageError

if TYPE_CHECKING:
    from fastload.dataset import Dataset

# Images of the step that is timed first on a CPU, to see which batch fits.
PROBE = 4
# A bench makes about this many steps at least; half of the budget is for them.
LEAST_STEPS = 12


class ModelSide:
    """The trainer's step with one synthetic batch of the right shape already on the device.

    ``variant`` says how the step is computed (default: the trainer's own way). With ``normalise`` the batch is uint8, as batches of
    the loader must be then.
    """

    def __init__(
        self, options: BenchOptions, dataset: Dataset, device: Any, *, variant: Variant | None = None
    ) -> None:
        import torch

        from fastload.train import Config, make_step
        from fastload.transforms import IMAGENET_MEAN, IMAGENET_STD

        self.device, self.model, self.variant = device, options.model, variant or Variant()
        self.has_labels = "label" in dataset.fields and dataset.fields["label"].kind in ("int", "ndarray")
        self.soft = self.has_labels and dataset.fields["label"].kind == "ndarray"
        classes = num_classes(dataset)
        config = Config(
            model=options.model,
            size=options.size,
            batch_size=options.batch_size,
            seed=options.seed,
            channels_last=self.variant.channels_last,
            amp=self.variant.amp,
            compile=self.variant.compile,
        )
        self.step = make_step(config, classes, device)
        self.amp = str(getattr(self.step, "amp", None))
        generator = torch.Generator().manual_seed(options.seed)
        shape = (options.batch_size, 3, options.size, options.size)
        if self.variant.normalise:
            images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        else:
            images = torch.randn(shape, generator=generator)
        images = images.to(memory_format=torch.channels_last)
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.scale, self.shift = 1 / (255 * std), -mean / std
        if self.soft:
            labels = torch.rand((options.batch_size, classes), generator=generator).round()
        else:
            labels = torch.randint(0, classes, (options.batch_size,), generator=generator)
        self.images, self.labels = images.to(device), labels.to(device)

    def sync(self) -> None:
        """Wait until the device has done all that it was given."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def train(self, images: Any, labels: Any) -> None:
        """One step to its end: the loop waits for the device, so that a stall is never hidden in the device's queue."""
        if self.variant.normalise:
            images = images.to(self.device, non_blocking=True).float().mul_(self.scale).add_(self.shift)
        self.step(images, labels)
        self.sync()

    def try_once(self, batch: int) -> None:
        """The first step, where a model says what it cannot do; UsageError in place of torch's own words."""
        try:
            self.train(self.images[:batch], self.labels[:batch])
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"{self.model!r} cannot learn from batches of {batch} images of {self.images.shape[-1]} px "
                f"({reason}); change --size, --batch-size or --model"
            ) from error


def num_classes(dataset: Dataset) -> int:
    if "label" not in dataset.fields or dataset.fields["label"].kind not in ("int", "ndarray"):
        return 1000
    label = dataset.fields["label"]
    if label.kind == "ndarray":
        return int(np.prod(label.shape)) or 1
    if dataset.classes:
        return len(dataset.classes)
    return max(2, int(np.max(dataset.labels)) + 1)


def make_side(options: BenchOptions, dataset: Dataset, device: Any) -> tuple[ModelSide, int]:
    """The model's side and its batch size: the one asked for, or on a slow CPU the largest doubling of 4 that fits."""
    side = ModelSide(options, dataset, device)
    batch = min(PROBE, options.batch_size) if device.type == "cpu" else options.batch_size
    side.try_once(batch)
    limit = options.seconds / 2 / LEAST_STEPS
    while batch < options.batch_size and 2 * _step_seconds(side, batch) <= limit:
        batch = min(2 * batch, options.batch_size)
    if batch == options.batch_size:
        return side, batch
    return ModelSide(replace(options, batch_size=batch), dataset, device), batch


def _step_seconds(side: ModelSide, batch: int) -> float:
    clock = time.perf_counter()
    side.train(side.images[:batch], side.labels[:batch])
    return time.perf_counter() - clock
