"""The model's side of a bench: the trainer's step on one synthetic batch, and a batch size that fits the time budget.

A CPU's images per second hardly depend on the batch, so a step too slow for the budget is measured with fewer images, and the
result says so. On a GPU the batch decides the rate, and it is never changed.

>>> side, batch = make_side(BenchOptions("resnet18"), Labels(classes=1000), torch.device("cpu"))
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastload.benchmarks.graphs import record_graph
from fastload.benchmarks.options import BenchOptions
from fastload.benchmarks.variants import Variant
from fastload.errors import UsageError

if TYPE_CHECKING:
    from fastload.dataset import Dataset

# Images of the step that is timed first on a CPU, to see which batch fits.
PROBE = 4
# A bench makes about this many steps at least; half of the budget is for them.
LEAST_STEPS = 12


@dataclass(frozen=True)
class Labels:
    """What a step learns: one of ``classes`` classes, or a weight for each (``soft``).

    ``stored``: the data have labels of their own.
    """

    classes: int
    soft: bool = False
    stored: bool = False

    @staticmethod
    def of(dataset: Dataset) -> Labels:
        """The labels of the data; 1,000 classes where there are none."""
        label = dataset.fields.get("label")
        if label is None or label.kind not in ("int", "ndarray"):
            return Labels(1000)
        if label.kind == "ndarray":
            return Labels(int(np.prod(label.shape)) or 1, soft=True, stored=True)
        classes = len(dataset.classes) if dataset.classes else max(2, int(np.max(dataset.labels)) + 1)
        return Labels(classes, stored=True)


class ModelSide:
    """The trainer's step with one synthetic batch of the right shape already on the device.

    ``variant`` says how the step is computed (default: the trainer's own way). With ``normalise`` the batch is uint8, as batches
    of the loader must be then. Weights and batch depend on the options' seed alone, so two variants begin with the same ones.
    """

    def __init__(
        self, options: BenchOptions, labels: Labels, device: Any, *, variant: Variant | None = None
    ) -> None:
        import torch

        from fastload.train import Config, make_step
        from fastload.transforms import IMAGENET_MEAN, IMAGENET_STD

        self.device, self.model, self.variant = device, options.model, variant or Variant()
        self.has_labels = labels.stored
        config = Config(
            model=options.model,
            size=options.size,
            batch_size=options.batch_size,
            seed=options.seed,
            channels_last=self.variant.channels_last,
            amp=self.variant.amp,
            compile=self.variant.compile,
        )
        # The caller's own random numbers stay as they are.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(options.seed)
            self.step = make_step(config, labels.classes, device)
        self.amp = str(getattr(self.step, "amp", None))
        generator = torch.Generator().manual_seed(options.seed)
        shape = (options.batch_size, 3, options.size, options.size)
        if self.variant.normalise:
            images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        else:
            images = torch.randn(shape, generator=generator)
        # In the layout that the step takes: no variant pays for another one's.
        layout = torch.channels_last if self.variant.channels_last else torch.contiguous_format
        images = images.to(memory_format=layout)
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.scale, self.shift = 1 / (255 * std), -mean / std
        if labels.soft:
            targets = torch.rand((options.batch_size, labels.classes), generator=generator).round()
        else:
            targets = torch.randint(0, labels.classes, (options.batch_size,), generator=generator)
        self.images, self.labels = images.to(device), targets.to(device)
        if self.variant.cuda_graph:
            record_graph(self.step, self._normalised(self.images))

    def sync(self) -> None:
        """Wait until the device has done all that it was given."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def launch(self, images: Any, labels: Any) -> Any:
        """One step as the trainer makes it, which the device may still be working on. Returns the loss, 0-d, on the device."""
        return self.step(self._normalised(images), labels)

    def train(self, images: Any, labels: Any) -> None:
        """One step to its end: the loop waits for the device, so that a stall is never hidden in the device's queue."""
        self.launch(images, labels)
        self.sync()

    def _normalised(self, images: Any) -> Any:
        if not self.variant.normalise:
            return images
        return images.to(self.device, non_blocking=True).float().mul_(self.scale).add_(self.shift)

    def try_once(self, batch: int) -> None:
        """The first step, where a model says what it cannot do; UsageError in place of torch's own words."""
        try:
            self.train(self.images[:batch], self.labels[:batch])
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            raise UsageError(
                f"{self.model!r} cannot learn from batches of {batch} images of {self.images.shape[-1]} px "
                f"({reason(error)}); change --size, --batch-size or --model"
            ) from error


def make_side(options: BenchOptions, labels: Labels, device: Any) -> tuple[ModelSide, int]:
    """The model's side and its batch size: the one asked for, or on a slow CPU the largest doubling of 4 that fits."""
    side = ModelSide(options, labels, device)
    batch = fit_batch(side, options.batch_size, options.seconds / 2 / LEAST_STEPS)
    if batch == options.batch_size:
        return side, batch
    return ModelSide(replace(options, batch_size=batch), labels, device), batch


def fit_batch(side: ModelSide, wanted: int, limit: float) -> int:
    """``wanted``, or on a CPU the largest doubling of 4 whose step takes at most ``limit`` seconds. Trains the side a little."""
    batch = min(PROBE, wanted) if side.device.type == "cpu" else wanted
    side.try_once(batch)
    while batch < wanted and 2 * _step_seconds(side, batch) <= limit:
        batch = min(2 * batch, wanted)
    return batch


def _step_seconds(side: ModelSide, batch: int) -> float:
    clock = time.perf_counter()
    side.train(side.images[:batch], side.labels[:batch])
    return time.perf_counter() - clock


def reason(error: BaseException) -> str:
    """What another library says went wrong, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
