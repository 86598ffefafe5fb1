"""A training step recorded as CUDA graphs: one launch for the forward pass and one for the backward pass.

A model of many small kernels keeps a GPU waiting for Python, and a replayed graph needs no Python. Only the model is recorded;
the loss, clipping and the optimizer stay as the trainer has them. The trade-off: a graph holds the memory of its pass for ever
and knows one shape, so every batch must have that of the recorded one.

>>> step = make_step(Config(model="resnet18"), 10, "cuda"); record_graph(step, images); step(images, labels)
"""

from __future__ import annotations

from typing import Any

from fastload.errors import UsageError


def record_graph(step: Any, images: Any) -> None:
    """Let ``step`` (of :func:`fastload.train.make_step`) replay its forward and backward pass from now on.

    ``images`` (B, 3, H, W) float on the device have the shape and layout of all batches to come. Recording runs the model a
    few times: weights stay as they are, running statistics of normalisation layers move. UsageError without a CUDA device, or
    where gradients are summed over several batches.
    """
    import torch

    if step.device.type != "cuda":
        raise UsageError(
            f"CUDA graphs need a CUDA device, and this step is on another; use --device cuda, got {step.device.type!r}"
        )
    if step.accumulate != 1:
        # A replay writes the gradients of a batch over those of the last one, where they could not be added any more.
        raise UsageError(
            f"a step recorded as CUDA graphs cannot sum gradients; use accumulate=1, got {step.accumulate}"
        )
    # Its own memory: a replay copies each batch into it.
    sample = images.detach().clone(memory_format=torch.preserve_format).to(memory_format=step.layout)
    enabled = step.amp != "off"
    dtype = torch.bfloat16 if step.amp == "bf16" else torch.float16
    # Casts of the weights must be recorded too: a cached one would stay what it was before the optimizer moved them.
    with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
        step.forward = torch.cuda.make_graphed_callables(step.model, (sample,))
