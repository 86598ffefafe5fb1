"""All that can be chosen about a training, checked when it is made.

A :class:`Config` is frozen and goes to ``config.json`` and into every checkpoint as it is, so a run can be repeated from
its folder alone. Unknown names are errors, never ignored: a typo must not train the wrong model for a night.

>>> Config(model="resnet18", epochs=20, batch_size=128, lr=2e-3)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastload.errors import UsageError, unknown

AMP = ("auto", "bf16", "fp16", "off")
AUGMENT = ("default", "light", "none")
METRICS = ("accuracy", "macro_f1", "loss")
# What does not change the weights that come out (on one machine), so it may differ when a run is resumed.
FREE_ON_RESUME = ("threads", "device")


@dataclass(frozen=True)
class Config:
    """Options of a training. ``Config.from_dict`` and ``to_dict`` are inverse; bad values raise :class:`UsageError`."""

    model: str = "resnet18"
    """Name of a timm model."""
    pretrained: bool = False
    """Start from timm's published weights (needs the network once)."""
    epochs: int = 20
    size: int = 224
    """Side of the square the model sees, in pixels."""
    batch_size: int = 64
    """Images per forward pass. One optimizer step uses ``batch_size * accumulate`` images."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    drop_last: bool = False
    """Leave out the last, smaller batch of an epoch."""
    optimizer: str = "adamw"
    """Any name that timm's optimizer factory knows."""
    lr: float | None = None
    """Peak learning rate; None: 1e-3, with pretrained weights 2e-4, for SGD 50 times as much."""
    weight_decay: float = 0.05
    """Not applied to biases and normalisation layers."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up before the cosine; None: a tenth of the epochs, at most 5."""
    clip_grad: float = 1.0
    """Largest norm of the gradient of one optimizer step; 0: not clipped."""
    label_smoothing: float = 0.1
    mixup: float = 0.0
    """Alpha of Mixup; 0: off."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0: off."""
    augment: str = "default"
    """``default``: random resized crop; ``light``: random crop with padding (small images); ``none``: centre crop."""
    flip: bool = True
    """Mirror half of the images (never for digits or text)."""
    ema: float = 0.999
    """Decay of the averaged weights, which are then the ones validated and saved; 0: off."""
    amp: str = "auto"
    """``bf16``, ``fp16`` (with loss scaling), ``off``; ``auto``: bf16 where it is native, else fp16, on a CPU off."""
    channels_last: bool = True
    compile: bool = False
    """``torch.compile`` the model."""
    metric: str = "accuracy"
    """What the best checkpoint is best in: ``accuracy``, ``macro_f1`` or ``loss`` on the validation side."""
    valid_fraction: float = 0.2
    """Share of the images held out where no validation data are given."""
    groups: str = "auto"
    """Field whose equal values never stand on two sides of the split (a person, a patient). ``auto``: the field
    ``group`` where there is one; ``none``: images are independent."""
    seed: int = 0
    threads: int | None = None
    """Loader threads; None: the loader's own choice."""
    device: str | None = None
    """``cuda``, ``cuda:1``, ``mps``, ``cpu``; None: the best there is."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            wanted = str(spec.type)
            if not _has_type(value, wanted):
                raise UsageError(f"{_spell(spec.name)} must be {_TYPES[wanted]}, got {value!r}")
            if spec.name in _RANGES and value is not None:
                holds, rule = _RANGES[spec.name]
                if not holds(value):
                    raise UsageError(f"{_spell(spec.name)} must be {rule}, got {value!r}")
        for name, known in (("amp", AMP), ("augment", AUGMENT), ("metric", METRICS)):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise UsageError(
                f"warm-up must end before the last epoch ({self.epochs} epochs); lower warmup_epochs, got {self.warmup_epochs!r}"
            )

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up: ``lr``, or its default for this optimizer."""
        if self.lr is not None:
            return self.lr
        base = 2e-4 if self.pretrained else 1e-3
        return 50 * base if self.optimizer in ("sgd", "momentum", "nesterov") else base

    @property
    def warmup(self) -> float:
        """Epochs of warm-up, resolved."""
        return min(5.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The inverse of :meth:`to_dict`; a name that is no option raises UsageError with the nearest that is."""
        known = {spec.name for spec in fields(cls)}
        for name in values:
            if name not in known:
                raise unknown("training option", name, known)
        return cls(**values)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Options that make ``new`` another training than ``old``: name -> (old value, new value)."""
    before, after = old.to_dict(), new.to_dict()
    return {
        name: (before[name], after[name])
        for name in before
        if name not in FREE_ON_RESUME and before[name] != after[name]
    }


_TYPES = {
    "str": "text",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "float | None": "a number or None",
    "int | None": "a whole number or None",
    "str | None": "text or None",
}


def _has_type(value: Any, wanted: str) -> bool:
    """Whether ``value`` fits an annotation of Config; True is no number and NaN is none either."""
    kind, _, optional = wanted.partition(" | ")
    if value is None:
        return bool(optional)
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (kind == "float" and isinstance(value, float) and math.isfinite(value))


def _at_least(low: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda v: v >= low), f"at least {low:g}"


def _below(high: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda v: 0 <= v < high), f"from 0 to below {high:g}"


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda v: bool(v), "the name of a timm model"),
    "epochs": _at_least(1),
    "size": _at_least(1),
    "batch_size": _at_least(1),
    "accumulate": _at_least(1),
    "threads": _at_least(1),
    "lr": ((lambda v: v > 0), "above 0"),
    "weight_decay": _at_least(0),
    "warmup_epochs": _at_least(0),
    "clip_grad": _at_least(0),
    "label_smoothing": _below(1),
    "mixup": _at_least(0),
    "cutmix": _at_least(0),
    "ema": _below(1),
    "valid_fraction": ((lambda v: 0 < v < 1), "between 0 and 1"),
    "groups": (lambda v: bool(v), "a field name, 'auto' or 'none'"),
    "seed": ((lambda v: 0 <= v < 2**63), "from 0 to 2**63 - 1"),
}


def _spell(name: str) -> str:
    return f"{name} (--{name.replace('_', '-')})"
