"""What happens to one batch: forward, loss, backward, and an optimizer step when a window of batches is full.

Gradients are weighted by real images: a window of small batches gives the step that one large batch of the same images
would give, also when the last batch is short, the epoch ends in the middle of a window, or several processes share it. Nothing
here waits for the device, except that fp16's loss scaling must look at the gradients once per optimizer step.

>>> step = make_step(Config(model="resnet18"), num_classes=10, device="cuda"); loss = step(images, labels)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastload.errors import UsageError
from fastload.train.average import Ema
from fastload.train.config import Config
from fastload.train.distributed import Ranks
from fastload.train.losses import make_loss
from fastload.train.model import autocast, build_model, head_of, pick_device, resolve_amp
from fastload.train.optim import make_optimizer
from fastload.train.schedule import make_schedule

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_step(
    cfg: Config,
    num_classes: int,
    device: str | torch.device | None = None,
    *,
    model: nn.Module | None = None,
    steps_per_epoch: int | None = None,
    loss: Loss | None = None,
    ranks: Ranks | None = None,
) -> Step:
    """A :class:`Step` as ``cfg`` describes it; the weights start from ``torch``'s current random state.

    ``steps_per_epoch`` optimizer steps make an epoch of the schedule; None keeps the peak learning rate (a benchmark). ``loss``
    takes logits (B, C) float32 and targets and gives the (B,) losses; None is the one of ``cfg`` with all classes equal.
    """
    where = pick_device(str(device) if device is not None else cfg.device)
    amp = resolve_amp(cfg.amp, where)
    if where.type == "cuda":
        torch.backends.cudnn.benchmark = (
            not cfg.deterministic
        )  # one input size: the search for the fastest pays
        torch.set_float32_matmul_precision("high")
    if model is None:
        model = build_model(cfg, num_classes)
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    model = model.to(where).to(memory_format=layout).train()
    schedule = None if steps_per_epoch is None else make_schedule(cfg, steps_per_epoch)
    return Step(
        cfg, model, make_optimizer(cfg, model), where, amp, schedule, loss or make_loss(cfg), ranks or Ranks()
    )


class Step:
    """Trains ``model`` by one batch per call. ``updates`` counts optimizer steps, ``ema`` is None where it is off.

    ``scores`` are those of the finished epochs, higher is better: the schedule ``plateau`` looks at them. ``micro`` is the number
    of images that go through the model at once; it falls when memory runs out and ``cfg.oom`` allows that.
    """

    def __init__(
        self,
        cfg: Config,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        amp: str,
        schedule: Callable[[int, list[float]], float] | None,
        loss: Loss,
        ranks: Ranks,
    ) -> None:
        self.model, self.optimizer, self.device, self.amp, self.ranks = model, optimizer, device, amp, ranks
        self.compile, self.loss = cfg.compile, loss
        self.ema = Ema(model, cfg.ema) if cfg.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
        self.clip, self.accumulate = cfg.clip_grad, cfg.accumulate
        self.nominal = cfg.batch_size * cfg.accumulate
        self.micro, self.may_shrink = cfg.batch_size, cfg.oom == "micro"
        self.schedule, self.peak_lr = schedule, cfg.peak_lr
        self.scores: list[float] = []
        self.params = list(model.parameters())
        self.updates = self._batches = self._samples = 0
        self._window: list[tuple[torch.Tensor, torch.Tensor]] = []  # what a smaller micro-batch has to repeat
        self.frozen = False
        self._wrap()
        self._set_lr()

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, total: int | None = None, final: bool = False
    ) -> torch.Tensor:
        """Learn from ``images`` (B, 3, H, W) float and ``labels`` (B,) int64, or (B, C) float weights of the classes.

        ``total``: images of this batch in all processes together, None where there is one process; ``final``: no batch follows in
        this epoch, so a window ends here. Returns the mean loss of this batch as a detached 0-d tensor on the device; reading it
        makes the device wait.
        """
        images = images.to(self.device, non_blocking=True, memory_format=self.layout)
        labels = labels.to(self.device, non_blocking=True)
        last = final or self._batches + 1 == self.accumulate
        if self.may_shrink:
            self._window.append((images, labels))
        try:
            loss = self._backward(images, labels, last)
        except torch.OutOfMemoryError:
            if not self.may_shrink or self.micro == 1:
                raise
            loss = self._repeat_smaller(last)
        self._samples += len(images) if total is None else total
        self._batches += 1
        if last:
            self.flush()
        return loss / max(1, len(images))

    def idle(self, like: torch.Tensor, total: int, final: bool) -> torch.Tensor:
        """Take part in a batch for which only other processes have images, ``total`` of them; the loss is 0.

        ``like``: images (B, 3, H, W) to send through the model, which gives gradients of 0.
        """
        images = like.to(self.device, memory_format=self.layout)
        last = final or self._batches + 1 == self.accumulate
        with self._sync(last), autocast(self.device, self.amp):
            nothing = self.forward(images).float().sum() * 0
        self.scaler.scale(nothing).backward()
        self._samples += total
        self._batches += 1
        if last:
            self.flush()
        return nothing.detach()

    def _backward(self, images: torch.Tensor, labels: torch.Tensor, last: bool) -> torch.Tensor:
        """Gradients of a batch, ``micro`` images at a time; the sum of the losses, detached."""
        whole = torch.zeros((), device=self.device)
        parts = list(zip(images.split(self.micro), labels.split(self.micro)))
        for number, (some, theirs) in enumerate(parts):
            with self._sync(last and number + 1 == len(parts)):
                with autocast(self.device, self.amp):
                    logits = self.forward(some)
                loss = self.loss(logits.float(), theirs).sum()
                # Divided by the size of a full window now (sums overflow in fp16) and by the real one in flush().
                self.scaler.scale(loss / self.nominal).backward()
            whole += loss.detach()
        return whole

    def _repeat_smaller(self, last: bool) -> torch.Tensor:
        """The window's batches again with smaller micro-batches, until they fit: a failed backward leaves half-added gradients.

        Batch norm counts the repeated images twice, and dropout draws anew.
        """
        while True:
            self.micro = max(1, min(self.micro, max(len(x) for x, _ in self._window)) // 2)
            self._forget()
            try:
                for number, (images, labels) in enumerate(self._window, start=1):
                    loss = self._backward(images, labels, last and number == len(self._window))
                return loss
            except torch.OutOfMemoryError:
                if self.micro == 1:
                    raise

    def _forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def fitting(self, images: torch.Tensor, labels: torch.Tensor) -> int:
        """After memory ran out: how many of ``images`` go through forward and backward at once, by halving; 0: none."""
        count = len(images) // 2
        while count:
            self._forget()
            try:
                self.micro = count
                self._backward(images[:count].to(self.device), labels[:count].to(self.device), True)
                self._forget()
                return count
            except torch.OutOfMemoryError:
                count //= 2
        return 0

    def flush(self) -> None:
        """Make the optimizer step that is due, from the batches since the last one; nothing if there are none."""
        if self._batches == 0:
            return
        self.scaler.unscale_(self.optimizer)
        # DistributedDataParallel has taken the mean over the processes.
        if self._samples != self.nominal * self.ranks.size:
            grads = [p.grad for p in self.params if p.grad is not None]
            torch._foreach_mul_(grads, self.nominal * self.ranks.size / self._samples)
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.params, self.clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._batches = self._samples = 0
        self._window.clear()
        if self.scaler.get_scale() < scale:
            return  # the gradients had overflowed: no step was made, so none is counted
        self.updates += 1
        self._set_lr()
        if self.ema is not None:
            self.ema.update(self.model, self.updates)

    @property
    def between(self) -> bool:
        """Whether no batch waits for its optimizer step, so that the state can be saved."""
        return self._batches == 0

    def train_mode(self, frozen: bool) -> None:
        """Train mode; ``frozen`` lets only the head learn, and keeps the statistics of the body as they are."""
        self.model.train()
        if frozen != self.frozen:
            head = {id(p) for p in head_of(self.model).parameters()} if frozen else set()
            for p in self.params:
                p.requires_grad_(not frozen or id(p) in head)
            self.frozen = frozen
            self._wrap()  # the wrappers have looked at what needs gradients
        if frozen:
            self.model.eval()
            head_of(self.model).train()

    def _wrap(self) -> None:
        forward: nn.Module = self.model
        if self.ranks.size > 1:
            gpus = [self.device.index] if self.device.type == "cuda" else None
            forward = DistributedDataParallel(self.model, device_ids=gpus)
        self.wrapped = forward
        self.forward: Callable[[torch.Tensor], torch.Tensor] = (
            torch.compile(forward) if self.compile else forward
        )

    def _sync(self, needed: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients cross the processes once in a window only."""
        if needed or not isinstance(self.wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.wrapped.no_sync()

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
            "micro": self.micro,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a step made with the same options."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.updates, self.micro = int(state["updates"]), int(state["micro"])
        self._set_lr()

    def _set_lr(self) -> None:
        if self.schedule is None:
            return
        lr = self.peak_lr * self.schedule(self.updates, self.scores)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def rescore(self, score: float) -> None:
        """Take in the score of a finished epoch."""
        self.scores.append(score)
        self._set_lr()


def no_memory(cfg: Config, device: torch.device, fits: int) -> UsageError:
    """What to do when ``cfg.batch_size`` images are too many for ``device`` and ``fits`` are not."""
    if not fits:
        return UsageError(
            f"{device} has no memory for even one image of {cfg.size} px at a time; use a smaller --size or --model, or "
            f"--grad-checkpointing, got --batch-size {cfg.batch_size}"
        )
    times = -(-cfg.batch_size * cfg.accumulate // fits)
    return UsageError(
        f"{device} has no memory for batches of {cfg.batch_size} images of {cfg.size} px; {fits} were tried and fit. The same "
        f"optimizer steps in less memory: --batch-size {fits} --accumulate {times}, or --oom micro does it by itself"
    )
