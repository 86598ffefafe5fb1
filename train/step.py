"""What happens to one batch: forward, loss, backward, and an optimizer step when a window of batches is full.

Gradients are weighted by real images: a window of small batches gives the step that one large batch of the same images
would give, also when the last batch is short or the epoch ends in the middle of a window. Nothing here waits for the
device, except that fp16's loss scaling must look at the gradients once per optimizer step.

>>> step = make_step(Config(model="resnet18"), num_classes=10, device="cuda"); loss = step(images, labels)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm.optim
import torch
from torch import nn
from torch.nn import functional as F

from fastload.errors import UsageError, unknown
from fastload.train.config import Config
from fastload.train.ema import Ema
from fastload.train.model import autocast, create_model, pick_device, resolve_amp
from fastload.train.schedule import factor

_factory: Any = timm.optim  # timm's types do not name its public functions


def make_step(
    cfg: Config,
    num_classes: int,
    device: str | torch.device | None = None,
    *,
    model: nn.Module | None = None,
    steps_per_epoch: int | None = None,
) -> Step:
    """A :class:`Step` as ``cfg`` describes it; the weights start from ``torch``'s current random state.

    ``steps_per_epoch`` optimizer steps make an epoch of the schedule; None keeps the peak learning rate (a benchmark).
    """
    where = pick_device(str(device) if device is not None else cfg.device)
    amp = resolve_amp(cfg.amp, where)
    if where.type == "cuda":
        torch.backends.cudnn.benchmark = True  # one input size: the search for the fastest algorithm pays
        torch.set_float32_matmul_precision("high")
    if model is None:
        model = create_model(cfg.model, num_classes, cfg.pretrained, cfg.size)
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    model = model.to(where).to(memory_format=layout).train()
    schedule: Callable[[int], float] | None = None
    if steps_per_epoch is not None:
        total, warmup = cfg.epochs * steps_per_epoch, round(cfg.warmup * steps_per_epoch)
        schedule = partial(factor, total=total, warmup=warmup)
    return Step(cfg, model, make_optimizer(cfg, model), where, amp, schedule)


def make_optimizer(cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer called ``cfg.optimizer``; biases and all one-dimensional weights (norms) are not decayed."""
    known = _factory.list_optimizers()
    if cfg.optimizer not in known:
        raise unknown("optimizer", cfg.optimizer, known, "see timm.optim.list_optimizers()")
    try:
        optimizer: torch.optim.Optimizer = _factory.create_optimizer_v2(
            model, opt=cfg.optimizer, lr=cfg.peak_lr, weight_decay=cfg.weight_decay, filter_bias_and_bn=True
        )
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:
        raise UsageError(
            f"timm cannot make the optimizer {cfg.optimizer!r} here ({error}); use adamw"
        ) from error
    return optimizer


class Step:
    """Trains ``model`` by one batch per call. ``updates`` counts optimizer steps, ``ema`` is None where it is off."""

    def __init__(
        self,
        cfg: Config,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        amp: str,
        schedule: Callable[[int], float] | None,
    ) -> None:
        self.model, self.optimizer, self.device, self.amp = model, optimizer, device, amp
        self.forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model) if cfg.compile else model
        self.ema = Ema(model, cfg.ema) if cfg.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
        self.smoothing, self.clip, self.accumulate = cfg.label_smoothing, cfg.clip_grad, cfg.accumulate
        self.nominal = cfg.batch_size * cfg.accumulate
        self.schedule, self.peak_lr = schedule, cfg.peak_lr
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.updates = self._batches = self._samples = 0
        self._set_lr()

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Learn from ``images`` (B, 3, H, W) float and ``labels`` (B,) int64, or (B, C) float weights of the classes.

        Returns the mean loss of this batch as a detached 0-d tensor on the device; reading it makes the device wait.
        """
        images = images.to(self.device, non_blocking=True, memory_format=self.layout)
        labels = labels.to(self.device, non_blocking=True)
        with autocast(self.device, self.amp):
            logits = self.forward(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=self.smoothing)
        # Divided by the size of a full window now (sums overflow in fp16) and by the real one in flush().
        self.scaler.scale(loss / self.nominal).backward()
        self._samples += len(images)
        self._batches += 1
        if self._batches == self.accumulate:
            self.flush()
        return loss.detach() / len(images)

    def flush(self) -> None:
        """Make the optimizer step that is due, from the batches since the last one; nothing if there are none."""
        if self._batches == 0:
            return
        self.scaler.unscale_(self.optimizer)
        if self._samples != self.nominal:
            grads = [p.grad for p in self.params if p.grad is not None]
            torch._foreach_mul_(grads, self.nominal / self._samples)
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.params, self.clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._batches = self._samples = 0
        if self.scaler.get_scale() < scale:
            return  # the gradients had overflowed: no step was made, so none is counted
        self.updates += 1
        self._set_lr()
        if self.ema is not None:
            self.ema.update(self.model, self.updates)

    @property
    def best_model(self) -> nn.Module:
        """The model to validate and to keep: the averaged one where there is one."""
        return self.model if self.ema is None else self.ema.model

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as references. Only between windows (after :meth:`flush`)."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a step made with the same options."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.updates = int(state["updates"])
        self._set_lr()

    def _set_lr(self) -> None:
        if self.schedule is None:
            return
        lr = self.peak_lr * self.schedule(self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
