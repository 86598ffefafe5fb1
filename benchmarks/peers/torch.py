"""PyTorch's DataLoader with torchvision's JPEG decoder and v2 transforms.

The trade-off of worker processes: each image travels as a tensor through shared memory, and each worker has its own copy of
Python and torch. Small decoded images are read a batch at a time without workers instead, which is faster.

>>> make("torch").load(work)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from fastload.benchmarks.peers.base import MEAN, STD, Files, Peer, Pixels, Work


class Torch(Peer):
    """As its "Getting started with transforms v2" page advises: uint8 tensors, ``antialias=True``, bilinear."""

    name = "torch"
    title = "torch DataLoader, torchvision"
    requires = ("torch", "torchvision")
    modules = ("torch", "torchvision")
    crops: ClassVar[dict[str, str]] = {
        "train": "antialiased bilinear",
        "eval": "antialiased bilinear",
        "pad": "none",
    }
    stores = ("jpeg", "raw")
    settings = (
        "torch DataLoader(persistent_workers=True), one worker a thread, torchvision decode_jpeg and v2 transforms on uint8 "
        "tensors with antialias=True; small decoded images: __getitems__ on a memory map, a whole batch at once, without workers"
    )

    def imports(self) -> None:
        import torch.utils.data  # noqa: F401
        import torchvision.io
        import torchvision.transforms.v2  # noqa: F401

    def load(self, work: Work) -> None:
        import torch
        from torch.utils.data import DataLoader

        # Mapped pixels are read-only, and no transform writes into its input.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        options: dict[str, Any]
        if work.crop == "pad":
            # "num_workers=0" is what its documentation advises for data sets that fit in memory: no copies between processes.
            options = {"num_workers": 0, "collate_fn": _as_it_is}
            torch.set_num_threads(work.threads)
        else:
            # A DataLoader sets torch's threads to 1 in its workers by itself.
            options = {"num_workers": work.threads, "persistent_workers": True, "prefetch_factor": 2}
        dataset: Any = PadCrops(work) if work.crop == "pad" else Images(work)
        self.loader: Any = DataLoader(
            dataset,
            batch_size=work.batch,
            shuffle=work.crop != "eval",
            generator=torch.Generator().manual_seed(work.seed),
            **options,
        )

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self.loader:
            yield images.permute(0, 2, 3, 1).numpy(), labels.numpy()


def _as_it_is(batch: Any) -> Any:
    return batch


def transforms(work: Work) -> Any:
    """v2 transforms for one uint8 image (3, H, W)."""
    import torch
    from torchvision.transforms import v2

    if work.crop == "train":
        steps = [v2.RandomResizedCrop(work.size, antialias=True), v2.RandomHorizontalFlip()]
    else:
        steps = [v2.Resize(work.resize, antialias=True), v2.CenterCrop(work.size)]
    if work.normalise:
        mean, std = ([value / 255 for value in levels] for levels in (MEAN, STD))
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    return v2.Compose(steps)


class Images:
    """One transformed image and its label by index, from a file or from mapped pixels."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.source = Files(work.folder) if work.store == "jpeg" else Pixels(work.pixels)
        self.transform = transforms(work)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg, read_file

        if isinstance(self.source, Files):
            image = decode_jpeg(read_file(self.source.paths[index]), mode=ImageReadMode.RGB)
        else:
            image = torch.from_numpy(self.source.image(index)).permute(2, 0, 1)
        return self.transform(image), int(self.source.labels[index])


class PadCrops:
    """A whole batch by a list of indices: images padded by 4, cut at random places, half of them flipped, (B, 3, size, size)."""

    def __init__(self, work: Work) -> None:
        import torch

        if work.store != "raw":
            raise ValueError(f"padded crops are cut from decoded images, got store {work.store!r}")
        self.work = work
        source = Pixels(work.pixels)
        self.pixels, self.labels = torch.from_numpy(source.stacked()), torch.from_numpy(source.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Any, Any]:
        import torch
        from torch.nn.functional import pad

        chosen, size, count = torch.tensor(indices), self.work.size, len(indices)
        images = pad(self.pixels[chosen], (0, 0, 4, 4, 4, 4))
        windows = images.unfold(1, size, 1).unfold(2, size, 1)  # (B, rows, columns, 3, size, size), a view
        rows, columns = (torch.randint(windows.shape[axis], (count,)) for axis in (1, 2))
        cut = windows[torch.arange(count), rows, columns]
        cut = torch.where((torch.rand(count) < 0.5)[:, None, None, None], cut.flip(3), cut)
        if self.work.normalise:
            cut = (cut - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        return cut, self.labels[chosen]
