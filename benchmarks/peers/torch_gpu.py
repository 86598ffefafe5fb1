"""PyTorch with torchvision's JPEG decoder on the GPU: workers read the files, batches are decoded and cropped there.

The trade-off: whole images are decoded, one library call a batch, and a crop of each image is a few kernels of its own.

>>> make("torch-gpu").load(work)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from fastload.benchmarks.peers.base import Files, Peer, Work
from fastload.benchmarks.peers.torch import transforms


class TorchGpu(Peer):
    """``decode_jpeg(list, device="cuda")``, as its documentation advises: a list of bytes at a time."""

    name = "torch-gpu"
    title = "torch, torchvision on the GPU"
    requires = ("torch", "torchvision")
    modules = ("torch", "torchvision")
    crops: ClassVar[dict[str, str]] = {"train": "antialiased bilinear", "eval": "antialiased bilinear"}
    settings = (
        'torch DataLoader workers read files, torchvision decode_jpeg(list, device="cuda") and v2 transforms with '
        "antialias=True on the GPU; batches stay there"
    )
    needs_cuda = True

    def imports(self) -> None:
        import torch.utils.data  # noqa: F401
        import torchvision.io
        import torchvision.transforms.v2  # noqa: F401

    def load(self, work: Work) -> None:
        import torch
        from torch.utils.data import DataLoader

        self.transform = transforms(work)
        # The hardware decoder ignores the caller's stream: a stream of its own, drained before each call, keeps pixels whole
        # (pytorch/vision#9606).
        self.stream = torch.cuda.Stream()
        self.loader: Any = DataLoader(
            Encoded(work.folder),  # type: ignore[arg-type]
            batch_size=work.batch,
            shuffle=work.crop != "eval",
            generator=torch.Generator().manual_seed(work.seed),
            num_workers=work.threads,
            persistent_workers=True,
            collate_fn=_lists,
        )

    def epoch(self) -> Iterator[tuple[Any, np.ndarray]]:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        for encoded, labels in self.loader:
            with torch.cuda.stream(self.stream):
                self.stream.synchronize()
                decoded = decode_jpeg(encoded, mode=ImageReadMode.RGB, device="cuda")
                batch = torch.stack([self.transform(image) for image in decoded])
            current = torch.cuda.current_stream()
            current.wait_stream(self.stream)
            batch.record_stream(current)
            yield batch.permute(0, 2, 3, 1), labels.numpy()


class Encoded:
    """The bytes of a file as a tensor, and its label."""

    def __init__(self, folder: str) -> None:
        self.files = Files(folder)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from torchvision.io import read_file

        return read_file(self.files.paths[index]), int(self.files.labels[index])


def _lists(samples: list[tuple[Any, int]]) -> tuple[list[Any], Any]:
    import torch

    return [data for data, _ in samples], torch.tensor([label for _, label in samples])
