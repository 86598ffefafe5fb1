"""Optimizers by timm's names, with weight decay only where it belongs and smaller steps for lower layers.

timm's "sgd" and "nesterov" are SGD with Nesterov momentum 0.9, "momentum" is SGD with classical momentum 0.9. Plain SGD has
no name there; here it is "plain_sgd". adagrad, adadelta, rmsprop (with momentum 0.9), adam and adamw are torch's.

>>> optimizer = make_optimizer(Config(optimizer="adamw", layer_decay=0.75), model)
"""

from __future__ import annotations

from typing import Any

import timm.optim
import torch
from torch import nn

from fastload.errors import UsageError, unknown
from fastload.train.config import Config

PLAIN = "plain_sgd"
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_timm: Any = timm.optim  # timm's types do not name its public functions


def make_optimizer(cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer called ``cfg.optimizer``, at its peak learning rate, for those parameters that need a gradient.

    Not decayed: biases, norms, all other one-dimensional parameters (layer scale), and what ``model.no_weight_decay()`` names
    (position embeddings). With ``layer_decay`` each group of parameters has an ``lr_scale``: its factor of the learning
    rate, which falls from the head to the first layer (as in BEiT: Bao et al. 2022).
    """
    known = [PLAIN, *_timm.list_optimizers()]
    if cfg.optimizer not in known:
        raise unknown("optimizer", cfg.optimizer, known, "see timm.optim.list_optimizers()")
    plain = cfg.optimizer == PLAIN
    name = "momentum" if plain else cfg.optimizer
    if _timm.get_optimizer_info(name).second_order:
        raise UsageError(f"second derivatives are not computed in training; use adamw, got {name!r}")
    try:
        optimizer: torch.optim.Optimizer = _timm.create_optimizer_v2(
            model,
            opt=name,
            lr=cfg.peak_lr,
            momentum=0.0 if plain else 0.9,
            param_group_fn=lambda m: _groups(cfg, m),
        )
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:
        raise UsageError(f"timm cannot make the optimizer {name!r} here ({error}); use adamw") from error
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_scale", 1.0)
    return optimizer


def _groups(cfg: Config, model: nn.Module) -> list[dict[str, Any]]:
    """Parameters in groups with their ``weight_decay`` and, where layers differ, their ``lr_scale``."""
    # timm leaves out what has one dimension; the shape, not the name, also tells norms of more dimensions and (C, 1, 1) scales.
    spared = {*getattr(model, "no_weight_decay", set)(), *_undecayed(model)}
    options: dict[str, Any] = {"weight_decay": cfg.weight_decay, "no_weight_decay_list": spared}
    if cfg.layer_decay == 1:
        groups: list[dict[str, Any]] = _timm.param_groups_weight_decay(model, **options)
        return groups
    groups = _timm.param_groups_layer_decay(model, layer_decay=cfg.layer_decay, **options)
    if all(group["lr_scale"] == 1 for group in groups):
        raise UsageError(
            "this model does not say in which order its layers are, as timm's do (group_matcher); "
            f"leave layer_decay at 1, got {cfg.layer_decay}"
        )
    return groups


def _undecayed(model: nn.Module) -> set[str]:
    """Names of the biases, of all parameters of norms, and of vectors in disguise, such as a layer scale of (C, 1, 1)."""
    # Not those called weight by their shape: the one of Linear(d, 1) is a matrix all the same.
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, param in module.named_parameters(recurse=False)
        if isinstance(module, NORMS) or name == "bias" or (name != "weight" and param.squeeze().ndim <= 1)
    }
