"""Losses of an image from its logits, for hard labels and for the soft ones of Mixup and CutMix.

All are computed in float32 whatever the precision of the model, never read a value back from the device, and are finite for any
finite logits. Class weights multiply the target's mass, so a mixture of two labels costs the mixture of their weighted losses.

>>> loss = make_loss(Config(loss="focal")); loss(logits, labels).mean().backward()
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from fastload.errors import UsageError
from fastload.train.config import Config

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Activation = Callable[[torch.Tensor], torch.Tensor]


def make_loss(cfg: Config, class_weights: torch.Tensor | None = None, multilabel: bool = False) -> Loss:
    """The loss ``cfg.loss`` as a function of logits (B, C) and targets (B,) int64 or (B, C) float32, which gives (B,) float32.

    ``class_weights``: (C,) float32 on the logits' device. soft_f1 is one number for the batch, repeated for each image.
    """
    smoothing, gamma = cfg.label_smoothing, cfg.focal_gamma
    if multilabel and cfg.loss != "bce":
        raise UsageError(f"images with several labels need the loss bce, got {cfg.loss!r}")
    if cfg.loss == "focal":
        return lambda logits, targets: focal(logits, targets, gamma, smoothing, class_weights)
    if cfg.loss == "bce":
        return lambda logits, targets: binary_cross_entropy(
            logits, targets, smoothing, class_weights, multilabel
        )
    if cfg.loss == "soft_f1":
        return lambda logits, targets: soft_f1(logits, targets, class_weights)
    return lambda logits, targets: cross_entropy(logits, targets, smoothing, class_weights)


def activation(loss: str, multilabel: bool) -> Activation:
    """Probabilities (B, C) from logits (B, C), as a model trained with ``loss`` means them."""
    if multilabel:
        return lambda logits: _wide(logits).sigmoid()
    if loss == "bce":
        # Each class's own probability, divided by their sum; from logarithms, so that all of them may be next to 0.
        return lambda logits: F.logsigmoid(_wide(logits)).softmax(dim=1)
    return lambda logits: _wide(logits).softmax(dim=1)


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """-sum over classes of w * t * log p, as torch's: (B,). t is smoothed to (1 - s) * t + s / C first."""
    if targets.ndim == 2:
        targets = _dense(targets, logits)
    return F.cross_entropy(_wide(logits), targets, weights, reduction="none", label_smoothing=smoothing)


def focal(
    logits: torch.Tensor,
    targets: torch.Tensor,
    gamma: float = 2.0,
    smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """-sum over classes of w * t * (1 - p) ** gamma * log p (Lin et al. 2017, with softmax): (B,)."""
    log_p = _wide(logits).log_softmax(dim=1)
    # 1 - p loses its digits where p is near 1; off 0, where a root (gamma < 1) has no slope.
    miss = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
    mass = _smooth(_dense(targets, logits), smoothing)
    if weights is not None:
        mass = mass * weights
    return -(mass * miss**gamma * log_p).sum(dim=1)


def binary_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
    multilabel: bool = False,
) -> torch.Tensor:
    """Mean over classes of -w * t * log sigmoid(x) - (1 - t) * log sigmoid(-x): (B,).

    One-vs-all targets are smoothed to (1 - s) * t + s / C, those of several labels towards 1/2: (1 - s) * t + s / 2. Both as
    timm's BinaryCrossEntropy does.
    """
    mass = _smooth(_dense(targets, logits), smoothing, 0.5 if multilabel else None)
    loss = F.binary_cross_entropy_with_logits(_wide(logits), mass, pos_weight=weights, reduction="none")
    return loss.mean(dim=1)


def soft_f1(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """1 - macro-F1 of the batch, with probabilities in the place of decisions: (B,), one number repeated.

    F1 of a class is 2 * sum(t * p) / (sum(t) + sum(p)), the sums over the images; with 0 and 1 as probabilities it is the usual
    one. It needs batches in which the classes come several times. Labels are not smoothed, since that would count
    as images of classes that are not there. ``weights`` count an image as that many.
    """
    p, t = _wide(logits).softmax(dim=1), _dense(targets, logits)
    image = 1.0 if weights is None else (t * weights).sum(dim=1, keepdim=True)
    hits, both = (image * t * p).sum(dim=0), (image * (t + p)).sum(dim=0)
    present = both > 0  # others have no F1 and are left out of the mean, as scikit-learn does
    f1 = 2 * hits / torch.where(present, both, 1)
    return (1 - f1.sum() / present.sum()).expand(len(logits))


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """At least float32: in half precision sums over classes overflow and small probabilities vanish."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _dense(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """(B, C) target mass: soft targets as they are, class numbers as one-hot rows."""
    if targets.ndim == 2:
        return targets.to(_wide(logits).dtype)
    return torch.zeros_like(_wide(logits)).scatter(1, targets[:, None], 1.0)


def _smooth(mass: torch.Tensor, smoothing: float, towards: float | None = None) -> torch.Tensor:
    """``mass`` moved towards a value, by default that of equal mass for all classes."""
    return (1 - smoothing) * mass + smoothing * (1 / mass.shape[1] if towards is None else towards)
