"""TensorBoard and Weights & Biases as callbacks, for those who ask for them: ``Config(track=("tensorboard",))``.

``log.jsonl`` of the run folder is always written and needs none of this. Both trackers count optimizer steps, so that a resumed
run continues its curves: what was written after the checkpoint it goes on from is replaced. The loss of single steps is kept on
the device and read once an epoch, when the device has been waited for anyway; the trade-off: a killed run loses those of its last
epoch.

>>> Trainer(Config(track=("tensorboard", "wandb"))).fit("photos.beton", out="runs/photos")
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastload.errors import require
from fastload.train.callbacks import Callback
from fastload.train.config import Config
from fastload.train.metrics import confusion

if TYPE_CHECKING:
    import torch

    from fastload.train.predictions import Predictions
    from fastload.train.runs import Run
    from fastload.train.trainer import Session

EVERY = 10  # optimizer steps between two losses that are kept
IMAGES, SIDE = 16, 128  # sample pictures and their side in pixels
MOST = 40  # classes of a confusion matrix; of more, nothing could be read
WANDB_ID = "wandb_id.txt"


def make_trackers(cfg: Config) -> list[Callback]:
    """A callback for each of ``cfg.track``. UsageError with the command that installs it where its package is missing."""
    known: dict[str, Callable[[], Callback]] = {"tensorboard": TensorBoard, "wandb": Wandb}
    return [known[name]() for name in cfg.track]


class _Tracker(Callback, ABC):
    """What both have in common: ``scalars`` of every epoch, and of some steps the loss."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, torch.Tensor]] = []

    def on_step(self, session: Session, loss: torch.Tensor) -> None:
        if session.step.updates % EVERY == 0:
            self.losses.append((session.step.updates, loss))

    def on_epoch(self, session: Session, line: dict[str, Any]) -> None:
        import torch

        if self.losses:
            values = torch.stack([loss for _, loss in self.losses]).tolist()  # one wait for all
            for (step, _), value in zip(self.losses, values):
                self.scalars({"step/loss": value}, step)
            self.losses = []
        self.scalars(
            {f"epoch/{name}": value for name, value in line.items() if not isinstance(value, str)},
            session.step.updates,
        )

    @abstractmethod
    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write ``values`` by name at optimizer step ``step``."""


class TensorBoard(_Tracker):
    """Event files in ``tensorboard/`` of the run folder: scalars, sample images, confusion matrix, options with final scores."""

    def __init__(self) -> None:
        super().__init__()
        require("tensorboard", "track")

    def on_start(self, session: Session) -> None:
        from torch.utils.tensorboard import SummaryWriter

        updates = session.step.updates
        # What an earlier attempt wrote after this step is no longer shown; at the start, all of it.
        purge = updates + 1 if updates else 0
        self.writer: Any = SummaryWriter(session.folder / "tensorboard", purge_step=purge)
        if not updates:
            self.writer.add_images("images of the training side", _samples(session), 0, dataformats="NHWC")

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def on_epoch(self, session: Session, line: dict[str, Any]) -> None:
        super().on_epoch(session, line)
        self.writer.flush()  # a killed run keeps its epochs

    def on_end(self, session: Session, run: Run) -> None:
        from torch.utils.tensorboard.summary import hparams

        # One step further than the last epoch: replaced, too, when a finished run is resumed.
        step = session.step.updates + 1
        final = {f"final/{name}": value for name, value in run.oof.summary().items()}
        options = {
            k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in session.cfg.to_dict().items()
        }
        for part in hparams(options, final):
            self.writer.file_writer.add_summary(part, step)
        self.scalars(final, step)
        picture = _confusion(run.oof)
        if picture is not None:
            self.writer.add_image("confusion matrix", picture, step, dataformats="HWC")
        self.writer.close()


class Wandb(_Tracker):
    """A run of Weights & Biases in ``wandb/`` of the run folder; project and mode from WANDB_PROJECT and WANDB_MODE."""

    def __init__(self) -> None:
        super().__init__()
        self.wandb: Any = require("wandb", "track")

    def on_start(self, session: Session) -> None:
        folder, kept = session.folder, session.folder / WANDB_ID
        id = kept.read_text(encoding="utf-8") if kept.is_file() and session.step.updates else None
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastload"), dir=folder, config=session.cfg.to_dict(), id=id,
            resume=None if id is None else "allow", name=folder.name, group=folder.resolve().parent.name,
            reinit="finish_previous",  # the folds of one process are runs of their own
        )  # fmt: skip
        kept.write_text(self.run.id, encoding="utf-8")
        if id is None:
            pictures = [self.wandb.Image(image) for image in _samples(session)]
            self.run.log({"images of the training side": pictures}, step=0)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def on_end(self, session: Session, run: Run) -> None:
        picture = _confusion(run.oof)
        if picture is not None:
            self.run.log({"confusion matrix": self.wandb.Image(picture)}, step=session.step.updates + 1)
        self.run.summary.update({f"final/{name}": value for name, value in run.oof.summary().items()})
        self.run.finish()


def _samples(session: Session) -> np.ndarray:
    """(n, SIDE, SIDE, 3) uint8: images spread over the training side, cut to squares, not augmented."""
    from PIL import Image, ImageOps

    data = session.split.train
    rows = np.unique(np.linspace(0, len(data) - 1, IMAGES).astype(int)).tolist()
    pictures = [Image.fromarray(data[i][data.image_field]) for i in rows]
    return np.stack([np.asarray(ImageOps.fit(picture, (SIDE, SIDE))) for picture in pictures])


def _confusion(held: Predictions) -> np.ndarray | None:
    """A picture (H, W, 3) uint8, shaded by the share of the true class; None for several labels an image, or too many classes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(held.classes)
    if held.multilabel or count > MOST:
        return None
    table = confusion(held.true, held.predicted, count)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    side = 3 + 0.3 * count
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(table > 0):
        colour = "white" if shares[i, j] > 0.5 else "black"
        axes.text(j, i, str(table[i, j]), ha="center", va="center", color=colour, fontsize=7)
    axes.set_xticks(range(count), held.classes, rotation=90)
    axes.set_yticks(range(count), held.classes)
    axes.set(xlabel="predicted", ylabel="true")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
