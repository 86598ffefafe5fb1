"""Models from timm, and the device and precision they run in.

>>> model = create_model("resnet18", num_classes=10); device = pick_device(None); resolve_amp("auto", device)
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

import timm
import torch
from torch import nn

from fastload.errors import UsageError, unknown


def create_model(name: str, num_classes: int, pretrained: bool = False, size: int | None = None) -> nn.Module:
    """A timm classifier for 3-channel images with ``num_classes`` outputs.

    ``size`` (pixels) is passed on to models that are built for one input size, such as vision transformers. UsageError:
    unknown name (with the nearest ones), no weights to be had, or a size the model cannot be built for.
    """
    if not timm.is_model(name):
        raise unknown("model", name, timm.list_models(), "see timm.list_models()")
    options: dict[str, Any] = {}
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the model is there, the tag behind the dot is not
        raise unknown("model", name, timm.list_pretrained(f"{name.split('.')[0]}.*")) from error
    if size is not None and known is not None and known.fixed_input_size and known.input_size[-1] != size:
        options["img_size"] = size
    try:
        model = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=3, **options)
    except (
        Exception
    ) as error:  # a model may refuse its arguments with any error; which model is what the user needs to know
        raise UsageError(
            f"timm cannot build {name!r} for images of {size} px ({_first_line(error)}); "
            "use a multiple of the model's patch size, or another model"
        ) from error
    if not pretrained:
        return model
    try:
        return timm.create_model(name, pretrained=True, num_classes=num_classes, in_chans=3, **options)
    except (
        Exception
    ) as error:  # no network, no such file, no weights published: each library has its own error
        raise UsageError(
            f"no pretrained weights for {name!r} could be had ({_first_line(error)}). Without a network: run "
            f"python -c \"import timm; timm.create_model('{name}', pretrained=True)\" where there is one and copy "
            "~/.cache/huggingface here, or leave --pretrained out to learn from scratch"
        ) from error


def normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, each (3,) in [0, 1], that the model's published weights expect."""
    known = getattr(model, "pretrained_cfg", None) or {}
    mean = known.get("mean") or (0.485, 0.456, 0.406)
    std = known.get("std") or (0.229, 0.224, 0.225)
    return tuple(float(v) for v in mean), tuple(float(v) for v in std)


def check_forward(model: nn.Module, name: str, size: int) -> None:
    """Run two black images through the model on the CPU; UsageError where it cannot take that size."""
    mode = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, 3, size, size))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise UsageError(
            f"model {name!r} cannot take images of {size} px ({_first_line(error)}); use another --size"
        ) from error
    finally:
        model.train(mode)


def pick_device(name: str | None = None) -> torch.device:
    """The device called ``name``, or the best there is (CUDA, then Apple's MPS, then the CPU) for None and ``auto``."""
    if name in (None, "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(str(name))
    except RuntimeError as error:
        raise unknown("device", name, ["cpu", "cuda", "cuda:0", "mps"]) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise unknown("device", name, ["cpu", "cuda", "cuda:0", "mps"])
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(
                f"there are {count} CUDA devices here ('fastload doctor' says why), got {name!r}"
            )
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"MPS is not available on this machine; use --device cpu, got {name!r}")
    return device


def resolve_amp(amp: str, device: torch.device) -> str:
    """``bf16``, ``fp16`` or ``off`` for this device.

    ``auto`` takes bf16 only where the GPU computes in it natively (before Ampere it is emulated and slow), else fp16; on
    other devices mixed precision rarely pays, so it is off unless asked for.
    """
    if amp == "auto":
        if device.type != "cuda":
            return "off"
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if amp == "fp16" and device.type != "cuda":
        raise UsageError(
            f"fp16 needs loss scaling, which works on CUDA only; use --amp off or bf16 on {device.type!r}"
        )
    return amp


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass in precision ``amp`` (as :func:`resolve_amp` gives it)."""
    if amp == "off":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if amp == "bf16" else torch.float16)


def _first_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
