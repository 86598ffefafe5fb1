"""A lean trainer for timm models: one split, one run folder, figures that are true.

``Trainer(Config(model="resnet18", epochs=20)).fit("photos.beton", out="runs/photos")`` learns and keeps the best and the
last checkpoint; ``predict("runs/photos", "test.beton", out="out.csv")`` writes class probabilities. The trade-off: one
device and one label per image; whoever needs more has :class:`fastload.Loader` and a loop of their own (``examples/``).

Reading order: ``config`` (what can be chosen), ``step`` (one batch), ``trainer`` (the loop); the rest are pure functions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Loaded on first use, so that `fastload train --help` need not wait for torch.
_LAZY = {
    "Config": "config",
    "Predictions": "predict",
    "Run": "runs",
    "Step": "step",
    "Trainer": "trainer",
    "create_model": "model",
    "eval_pipeline": "data",
    "load_run": "runs",
    "make_step": "step",
    "pick_device": "model",
    "predict": "predict",
    "train_pipeline": "data",
}

__all__ = [*_LAZY]  # pyright: ignore

if TYPE_CHECKING:
    from fastload.train.config import Config as Config
    from fastload.train.data import eval_pipeline as eval_pipeline
    from fastload.train.data import train_pipeline as train_pipeline
    from fastload.train.model import create_model as create_model
    from fastload.train.model import pick_device as pick_device
    from fastload.train.predict import Predictions as Predictions
    from fastload.train.predict import predict as predict
    from fastload.train.runs import Run as Run
    from fastload.train.runs import load_run as load_run
    from fastload.train.step import Step as Step
    from fastload.train.step import make_step as make_step
    from fastload.train.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module = importlib.import_module(f"fastload.train.{_LAZY[name]}")
        value = getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastload.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
