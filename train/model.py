"""Models from timm, and the device and precision they run in.

>>> model = build_model(Config(model="resnet18"), num_classes=10); device = pick_device(None); resolve_amp("auto", device)
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from fastload.errors import UsageError, unknown
from fastload.train import checkpoint
from fastload.train.config import Config

Given = (
    nn.Module | Callable[[int], nn.Module]
)  # a model of the user's own, or a function of the number of classes


def build_model(cfg: Config, num_classes: int, given: Given | None = None) -> nn.Module:
    """The model of ``cfg`` with its starting weights: timm's, or ``given`` (copied, so that each fold starts alike).

    ``cfg.model`` may also be ``package.module:function``, where ``function(num_classes)`` makes the model.
    """
    if given is None and ":" in cfg.model:
        given = _imported(cfg.model)
    if given is not None:
        model = copy.deepcopy(given) if isinstance(given, nn.Module) else given(num_classes)
    elif cfg.model.startswith("<"):
        raise UsageError(
            f"the run was trained with a module of its own, which cannot be made from its name; give it as model=, got {cfg.model!r}"
        )
    else:
        drops = {"drop_rate": cfg.drop, "drop_path_rate": cfg.drop_path}
        used = {name: value for name, value in drops.items() if value}
        model = create_model(cfg.model, num_classes, cfg.pretrained, cfg.size, **used)
    if cfg.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UsageError(f"gradient checkpointing needs a timm model, got {cfg.model!r}")
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if cfg.weights is not None:
        load_weights(model, cfg.weights)
    return model


def model_name(given: Given) -> str:
    """What ``cfg.model`` says of a module or function that was given."""
    return f"<{type(given).__name__ if isinstance(given, nn.Module) else getattr(given, '__qualname__', 'function')}>"


def _imported(name: str) -> Callable[[int], nn.Module]:
    module, _, function = name.partition(":")
    try:
        found: Callable[[int], nn.Module] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"a model of your own is 'package.module:function', importable here ({error}); got {name!r}"
        ) from error
    return found


def head_of(model: nn.Module) -> nn.Module:
    """The classifier of a timm model, or the last module of another that has weights."""
    if hasattr(model, "get_classifier"):
        head = model.get_classifier()  # type: ignore[operator]
        if isinstance(head, nn.Module):
            return head
    heads = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    if not heads:
        raise UsageError(f"a model without weights has no head to train, got {type(model).__name__}")
    return heads[-1]


def load_weights(model: nn.Module, path: str) -> None:
    """Start ``model`` from a file: .safetensors, .pt or .pth (a state dict), or a run folder of fastload.

    Weights of the head are left out where they are for other classes. UsageError: no such file, or weights of another model.
    """
    file = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UsageError(
            f"no weights at {file}; give a .pt, .pth or .safetensors file or a run folder, got {path!r}"
        )
    found = checkpoint.read_weights(file)
    found = {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in found.items()}
    own = model.state_dict()
    fitting = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape}
    head = {id(p) for p in head_of(model).parameters()}
    open_names = {name for name, p in model.named_parameters() if name not in fitting and id(p) not in head}
    if open_names:
        raise UsageError(
            f"the weights in {path} belong to another model: {len(open_names)} of {len(own)} tensors have no match "
            f"(for example {min(open_names)!r}); give weights of the model that is trained, got {path!r}"
        )
    model.load_state_dict(fitting, strict=False)


def create_model(
    name: str, num_classes: int, pretrained: bool = False, size: int | None = None, **options: Any
) -> nn.Module:
    """A timm classifier for 3-channel images with ``num_classes`` outputs; other ``options`` go to timm.

    ``size`` (pixels) is passed on to models that are built for one input size, such as vision transformers. UsageError:
    unknown name (with the nearest ones), no weights to be had, or a size the model cannot be built for.
    """
    if not timm.is_model(name):
        raise unknown("model", name, timm.list_models(), "see timm.list_models()")
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
            "~/.cache/huggingface here, give a file with --weights, or leave --pretrained out to learn from scratch"
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


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Only deterministic algorithms while training, if they are wanted."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
