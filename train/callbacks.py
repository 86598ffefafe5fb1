"""What may listen to a training: a few plain methods, called in the order of the list.

>>> class Stop(Callback):
...     def on_epoch(self, session, line):
...         session.stop = line["accuracy"] > 0.99
>>> Trainer(cfg).fit("photos.beton", callbacks=[Stop()])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fastload.train.runs import Run
    from fastload.train.trainer import Session


class Callback:
    """Override what is needed. Exceptions end the training; with several processes only the first one calls these.

    A session has ``cfg``, ``folder``, ``split`` (with ``classes``), ``step`` (with ``model``, ``optimizer``, ``updates``), ``epoch``
    (finished ones), ``history``, ``best``, ``valid`` (:class:`Predictions` of the held-out side after the last finished epoch, or
    None), and ``stop``: set to True it ends the training after this epoch.
    """

    def on_start(self, session: Session) -> None:
        """Before the first batch, also of a run that is resumed."""

    def on_step(self, session: Session, loss: torch.Tensor) -> None:
        """After each optimizer step. ``loss``: of the last batch, 0-d on the device; reading it makes the device wait."""

    def on_epoch(self, session: Session, line: dict[str, Any]) -> None:
        """After each epoch, when it is written; ``line`` is its line of ``log.jsonl``."""

    def on_end(self, session: Session, run: Run) -> None:
        """When the run is complete. Not called for one that failed."""
