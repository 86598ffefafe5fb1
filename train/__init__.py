"""A lean trainer for timm models: honest splits, one run folder, figures that are true.

``Trainer(Config(model="resnet18", epochs=20)).fit("photos.beton", out="runs/photos")`` learns and keeps the best and the
last checkpoint; ``cross_validate`` does so for each fold; ``Ensemble([cv1, cv2]).search("macro_f1").predict("test.beton")`` puts
several together. The trade-off: image classification only; whoever needs more has :class:`fastload.Loader` and a loop of their
own (``examples/``).

Reading order: ``config`` (what can be chosen), ``step`` (one batch), ``trainer`` (the loop), ``cv`` (folds), ``predictions`` (what
all later steps work on); the rest are pure functions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Loaded on first use, so that `fastload train --help` need not wait for torch.
_LAZY = {
    "Callback": "callbacks",
    "Competition": "competition",
    "Config": "config",
    "CvRun": "cv",
    "Ensemble": "ensemble",
    "Folds": "folds",
    "Predictions": "predictions",
    "Run": "runs",
    "Step": "step",
    "Trainer": "trainer",
    "compete": "competition",
    "create_model": "model",
    "cross_validate": "cv",
    "find_lr": "lr_finder",
    "eval_pipeline": "data",
    "load_run": "runs",
    "make_folds": "folds",
    "make_step": "step",
    "pick_device": "model",
    "predict": "predicting",
    "read_run": "cv",
    "train_pipeline": "data",
    "tune": "tuning",
}

__all__ = [*_LAZY]  # pyright: ignore

if TYPE_CHECKING:
    from fastload.train.callbacks import Callback as Callback
    from fastload.train.competition import Competition as Competition
    from fastload.train.competition import compete as compete
    from fastload.train.config import Config as Config
    from fastload.train.cv import CvRun as CvRun
    from fastload.train.cv import cross_validate as cross_validate
    from fastload.train.cv import read_run as read_run
    from fastload.train.data import eval_pipeline as eval_pipeline
    from fastload.train.data import train_pipeline as train_pipeline
    from fastload.train.ensemble import Ensemble as Ensemble
    from fastload.train.folds import Folds as Folds
    from fastload.train.folds import make_folds as make_folds
    from fastload.train.lr_finder import find_lr as find_lr
    from fastload.train.model import create_model as create_model
    from fastload.train.model import pick_device as pick_device
    from fastload.train.predicting import predict as predict
    from fastload.train.predictions import Predictions as Predictions
    from fastload.train.runs import Run as Run
    from fastload.train.runs import load_run as load_run
    from fastload.train.step import Step as Step
    from fastload.train.step import make_step as make_step
    from fastload.train.trainer import Trainer as Trainer
    from fastload.train.tuning import tune as tune


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module = importlib.import_module(f"fastload.train.{_LAZY[name]}")
        value = getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastload.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
