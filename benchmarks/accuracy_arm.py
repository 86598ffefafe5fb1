"""One arm of the accuracy comparison, run inside of a peer's process: train on that loader's batches, score on its crops.

All but the pixels is the same for each arm: files, split, model, first weights, schedule, number of steps. The arm's own are the
order, the random boxes, and how pixels are decoded and resized. The trade-off: the peer's defaults are what is trained on, not a
pipeline tuned for accuracy.

>>> train(Cpu(), Training("train.beton", "valid.beton", classes=2, images=1200))["accuracy"]
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fastload.benchmarks.peers.base import MEAN, STD, Peer, Work


@dataclass(frozen=True)
class Training:
    """What each arm is asked. ``train`` and ``valid`` are ``.beton`` files of JPEG images with a field ``label`` from 0 on;
    ``images`` is the number of those to train on.

    Boxes of training images are RandomResizedCrop(``size``) with a flip of half of them; validation images are resized to
    ``resize`` pixels on the shorter side and cut to the centre.
    """

    train: str
    valid: str
    classes: int
    images: int
    model: str = "test_resnet"
    size: int = 64
    resize: int = 73
    epochs: int = 14
    batch: int = 32
    lr: float = 2e-3
    threads: int = 2
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def work(self) -> Work:
        """The training side as the peers know it."""
        return Work(
            name="accuracy",
            crop="train",
            store="jpeg",
            folder="",
            beton=self.train,
            pixels="",
            scratch="",
            size=self.size,
            resize=self.resize,
            batch=self.batch,
            threads=self.threads,
            seed=self.seed,
        )


def train(peer: Peer, job: Training) -> dict[str, Any]:
    """``accuracy`` on the validation images from 0 to 1, their number, the mean loss of the last epoch, seconds."""
    import torch

    from fastload.train import Config, make_step

    start = time.perf_counter()
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    work = job.work()
    feed, held = peer, type(peer)()
    feed.load(work)
    held.load(replace(work, crop="eval", beton=job.valid))
    cfg = Config(
        model=job.model,
        size=job.size,
        epochs=job.epochs,
        batch_size=job.batch,
        lr=job.lr,
        ema=0.0,  # it lags behind in so few steps
        device="cpu",
    )
    step = make_step(cfg, job.classes, steps_per_epoch=-(-job.images // job.batch))
    losses: list[float] = []
    for _ in range(job.epochs):
        losses = []
        for images, labels in feed.epoch():
            if len(labels) > 1:  # a single image has no variance to normalise by
                target = torch.from_numpy(np.asarray(labels).reshape(-1).astype(np.int64))
                losses.append(float(step(_images(images), target)))
    if not losses:
        raise RuntimeError("an epoch gave no batch")
    model = step.model.eval()
    right = count = 0
    with torch.inference_mode():
        for images, labels in held.epoch():
            found = model(_images(images)).argmax(dim=1).numpy()
            right += int((found == np.asarray(labels).reshape(-1)).sum())
            count += len(found)
    return {
        "accuracy": right / count,
        "images": count,
        "loss": sum(losses) / len(losses),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _images(batch: np.ndarray) -> Any:
    """(B, H, W, 3) uint8 as (B, 3, H, W) float32, normalised: a copy, since some loaders use their buffers again."""
    import torch

    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    levels = (np.asarray(batch).astype(np.float32) - mean) / std
    return torch.from_numpy(levels).permute(0, 3, 1, 2)
