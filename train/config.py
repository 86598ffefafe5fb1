"""All that can be chosen about a training, in one frozen dataclass that is checked when it is made.

A :class:`Config` goes to ``config.yaml`` of the run folder as it was resolved, and that file alone repeats the run:
``fastload train --config runs/a/config.yaml -o runs/b``. Unknown names are errors with the nearest known one, never ignored: a
typo must not train the wrong model for a night.

>>> Config(model="resnet18", epochs=20, batch_size=128, lr=2e-3); Config.load("mine.yaml").with_values({"lr": "1e-3"})
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from fastload.errors import DataError, UsageError, unknown

AMP = ("auto", "bf16", "fp16", "off")
AUGMENT = ("default", "light", "none")
LOSSES = ("cross_entropy", "focal", "bce", "soft_f1")
SCHEDULES = (
    "cosine", "constant", "step", "multi_step", "cosine_restarts", "one_cycle", "polynomial", "plateau",
)  # fmt: skip
CLASS_WEIGHTS = ("none", "balanced", "effective")
SAMPLING = ("none", "balanced", "sqrt", "bootstrap")
AVERAGES = ("none", "swa", "soup")
TRACKERS = ("tensorboard", "wandb")
ENGINES = ("cpu", "dali", "cuda", "auto")
GPU_DECODE = ("auto", "gpu", "segments", "cpu")
CACHES = ("none", "device", "host")
SGD_LIKE = ("sgd", "momentum", "nesterov", "plain_sgd", "sgdw", "nesterovw", "sgdp")
# What does not change the weights that come out (on one machine), so it may differ when a run is resumed.
FREE_ON_RESUME = ("threads", "device", "save_minutes", "track", "allow_leak", "data", "valid", "split")

Rule = tuple[Callable[[Any], bool], str]


def _at_least(low: float) -> Rule:
    return (lambda v: v >= low), f"at least {low:g}"


def _above(low: float) -> Rule:
    return (lambda v: v > low), f"above {low:g}"


def _below(high: float) -> Rule:
    return (lambda v: 0 <= v < high), f"from 0 to below {high:g}"


def _one_of(known: Sequence[str]) -> Rule:
    return (lambda v: v in known), "one of " + ", ".join(known)


def _option(
    default: Any, section: str, text: str, rule: Rule | None = None, choices: Sequence[str] = ()
) -> Any:
    """A field with what the command line's help and the checks need to know of it."""
    return dataclasses.field(
        default=default, metadata={"section": section, "help": text, "rule": rule, "choices": tuple(choices)}
    )


@dataclass(frozen=True)
class Config:
    """Options of a training. ``from_dict`` and ``to_dict`` are inverse, ``load`` and ``save`` too; bad values raise UsageError."""

    # fmt: off
    data: str | None = _option(None, "Data and split", "The .beton file to learn from.")
    valid: str | None = _option(None, "Data and split", "Validation data (.beton). Without it a part of the data is held out.")
    split: str | None = _option(None, "Data and split", "A saved split (id, fold, group, label) to use instead of making one.")
    fold: int = _option(0, "Data and split", "The fold of the split that is held out.", _at_least(0))
    valid_fraction: float = _option(
        0.2, "Data and split", "Share held out where there is no validation data.", ((lambda v: 0 < v < 1), "between 0 and 1"))
    groups: str = _option(
        "auto", "Data and split", "What must never stand on two sides of a split: a field (a person, a patient), 'parent' for the "
        "folder an image came from, 'duplicates' for look-alikes, several joined by '+'; 'auto': the field 'group' if there is "
        "one; 'none': images are independent.", (bool, "a field name, 'parent', 'duplicates', 'auto' or 'none'"))
    allow_leak: bool = _option(False, "Data and split", "Train although the split looks as if it leaks.")

    model: str = _option("resnet18", "Model", "Name of a timm model.", (bool, "the name of a timm model"))
    pretrained: bool = _option(False, "Model", "Start from timm's published weights (needs the network once).")
    weights: str | None = _option(None, "Model", "Start from the weights in this file (.pt, .pth, .safetensors, or a run folder).")
    drop: float = _option(0.0, "Model", "Dropout before the head.", _below(1))
    drop_path: float = _option(0.0, "Model", "Stochastic depth.", _below(1))
    channels_last: bool = _option(True, "Model", "NHWC memory for the model.")
    compile: bool = _option(False, "Model", "torch.compile the model.")
    grad_checkpointing: bool = _option(False, "Model", "Less memory for activations, about a third more time.")

    epochs: int = _option(20, "Training", "Times every image is seen.", _at_least(1))
    size: int = _option(224, "Training", "Side of the square the model sees, in pixels.", _at_least(1))
    start_size: int | None = _option(
        None, "Training", "Side at the first epoch; it grows to the full size over the first 70% of the epochs.", _at_least(1))
    batch_size: int = _option(64, "Training", "Images per forward pass (and process).", _at_least(1))
    accumulate: int = _option(1, "Training", "Forward passes per optimizer step.", _at_least(1))
    drop_last: bool = _option(False, "Training", "Leave out the last, smaller batch of an epoch.")
    freeze_epochs: int = _option(0, "Training", "Epochs at the start in which only the head learns.", _at_least(0))
    early_stop: int = _option(0, "Training", "Stop after so many epochs without a better score; 0: never.", _at_least(0))
    amp: str = _option("auto", "Training", "Mixed precision; auto: bf16 where it is native, else fp16, on a CPU off.", choices=AMP)
    oom: str = _option(
        "error", "Training", "When memory runs out: say what would fit, or go on with micro-batches.", choices=("error", "micro"))
    seed: int = _option(
        0, "Training", "Of order, augmentation, split and weights.", ((lambda v: 0 <= v < 2**63), "from 0 to 2**63 - 1"))
    deterministic: bool = _option(False, "Training", "Only algorithms that give the same bits each time (slower on a GPU).")
    save_minutes: float = _option(5.0, "Training", "Minutes between two checkpoints within an epoch.", _at_least(0))
    device: str | None = _option(None, "Training", "cuda, cuda:1, mps, cpu; None: the best there is.")

    threads: int | None = _option(None, "Loading", "Loader threads; None: one for each core.", _at_least(1))
    engine: str = _option("cpu", "Loading", "What makes the batches; auto measures which is fastest.", choices=ENGINES)
    gpu_decode: str = _option("auto", "Loading", "Who decodes JPEG for the engine cuda; auto measures.", choices=GPU_DECODE)
    cache: str = _option("none", "Loading", "Where the engine cuda keeps the training images.", choices=CACHES)
    cache_gb: float | None = _option(
        None, "Loading", "GB that the cache may take; None: 40% of the free GPU memory (the model wants the rest), 80% of the host's.", _above(0))

    optimizer: str = _option("adamw", "Optimizer", "Any name that timm's optimizer factory knows, and plain_sgd (without momentum).", (bool, "the name of an optimizer"))
    lr: float | None = _option(
        None, "Optimizer", "Peak learning rate; None: 1e-3, with pretrained weights 2e-4, for SGD 50 times as much.", _above(0))
    weight_decay: float = _option(0.05, "Optimizer", "Not applied to biases and normalisation layers.", _at_least(0))
    layer_decay: float = _option(
        1.0, "Optimizer", "Factor of the learning rate from each layer to the one below it.", ((lambda v: 0 < v <= 1), "above 0 and at most 1"))
    clip_grad: float = _option(1.0, "Optimizer", "Largest norm of the gradient of a step; 0: not clipped.", _at_least(0))

    schedule: str = _option("cosine", "Schedule", "Course of the learning rate, step by step.", choices=SCHEDULES)
    warmup_epochs: float | None = _option(
        None, "Schedule", "Epochs of linear warm-up; None: a tenth of the epochs, at most 5.", _at_least(0))
    min_lr: float = _option(0.0, "Schedule", "Share of the peak at which the course ends (or is held).", _below(1))
    gamma: float = _option(0.1, "Schedule", "Factor of step, multi_step and plateau.", ((lambda v: 0 < v < 1), "between 0 and 1"))
    step_epochs: float = _option(10.0, "Schedule", "Epochs between two drops of step.", _above(0))
    milestones: tuple[float, ...] = _option((), "Schedule", "Epochs at which multi_step drops.", _at_least(0))
    cycles: int = _option(3, "Schedule", "Cycles of cosine_restarts.", _at_least(1))
    power: float = _option(0.9, "Schedule", "Exponent of polynomial.", _above(0))
    plateau_epochs: int = _option(3, "Schedule", "Epochs without a better score before plateau drops.", _at_least(1))

    loss: str = _option("cross_entropy", "Loss", "bce: each class for itself, the only one for several labels an image.", choices=LOSSES)
    label_smoothing: float = _option(0.1, "Loss", "Weight spread over all classes.", _below(1))
    focal_gamma: float = _option(2.0, "Loss", "How much focal looks away from easy images.", _at_least(0))
    class_weights: str = _option("none", "Loss", "Weight of a class in the loss, from its count in training.", choices=CLASS_WEIGHTS)
    effective_beta: float = _option(0.999, "Loss", "Beta of effective class weights.", _below(1))
    sampling: str = _option(
        "none", "Loss", "Draw training images with replacement: balanced: classes equally often; sqrt: half way "
        "there; bootstrap: a bagging sample keyed by the seed.", choices=SAMPLING)

    augment: str = _option("default", "Augmentation", "default: random resized crops; light: padded crops for small images; none: centre.", choices=AUGMENT)
    flip: bool = _option(True, "Augmentation", "Mirror half of the images (never for digits or text).")
    jitter: float = _option(0.0, "Augmentation", "Strength of random brightness, contrast and saturation.", _below(1))
    erasing: float = _option(0.0, "Augmentation", "Probability of random erasing.", ((lambda v: 0 <= v <= 1), "from 0 to 1"))
    mixup: float = _option(0.0, "Augmentation", "Alpha of Mixup; 0: off.", _at_least(0))
    cutmix: float = _option(0.0, "Augmentation", "Alpha of CutMix; 0: off.", _at_least(0))

    ema: float = _option(0.999, "Averaging", "Decay of averaged weights, which are then validated and kept; 0: off.", _below(1))
    average: str = _option("none", "Averaging", "swa: mean of the last epochs; soup: greedy soup of the best ones. Kept if better.", choices=AVERAGES)
    swa_start: float = _option(0.75, "Averaging", "Share of the epochs after which swa begins.", _below(1))
    soup_size: int = _option(5, "Averaging", "Best epochs that soup chooses from.", _at_least(2))

    metric: str = _option("accuracy", "Score", "What the best epoch is best in (fastload.train.metrics).", (bool, "the name of a metric"))
    track: tuple[str, ...] = _option((), "Score", "Trackers: tensorboard, wandb.", _one_of(TRACKERS))
    # fmt: on

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            wanted, rule, choices = str(spec.type), spec.metadata["rule"], spec.metadata["choices"]
            if wanted.startswith("tuple") and isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, spec.name, value)
            if not _has_type(value, wanted):
                raise UsageError(f"{_spell(spec.name)} must be {_TYPES[wanted]}, got {value!r}")
            if choices and value not in choices:
                raise unknown(spec.name, value, choices, f"got {value!r}")
            parts = value if isinstance(value, tuple) else (value,)
            if rule is not None and value is not None and not all(rule[0](part) for part in parts):
                raise UsageError(f"{_spell(spec.name)} must be {rule[1]}, got {value!r}")
        self._check_together()

    def _check_together(self) -> None:
        from fastload.train.metrics import check_metric

        check_metric(self.metric)
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise UsageError(
                f"warm-up must end before the last epoch ({self.epochs} epochs); lower warmup_epochs, got {self.warmup_epochs!r}"
            )
        if self.schedule == "multi_step" and not self.milestones:
            raise UsageError("schedule multi_step needs milestones, for example --milestones 10,15, got ()")
        if self.start_size is not None and self.start_size > self.size:
            raise UsageError(f"start_size must be at most size ({self.size}), got {self.start_size!r}")
        if self.pretrained and self.weights is not None:
            raise UsageError(
                f"pretrained weights and weights of a file exclude each other; give one of them, got {self.weights!r}"
            )
        if self.cache != "none" and self.engine not in ("cuda", "auto"):
            raise UsageError(
                f"a cache is kept by the engine cuda; add --engine cuda (or auto) or leave --cache out, got {self.cache!r}"
            )
        if self.valid is not None and self.split is not None:
            raise UsageError(
                f"validation data and a saved split exclude each other; give one, got {self.valid!r}"
            )

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up: ``lr``, or its default for this optimizer."""
        if self.lr is not None:
            return self.lr
        base = 2e-4 if self.pretrained or self.weights is not None else 1e-3
        return 50 * base if self.optimizer in SGD_LIKE else base

    @property
    def warmup(self) -> float:
        """Epochs of warm-up, resolved."""
        return min(5.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs

    def size_at(self, epoch: int) -> int:
        """Side of the training images in ``epoch`` (from 0), in pixels: a multiple of 32 on the way from ``start_size``."""
        if self.start_size is None or self.start_size == self.size:
            return self.size
        share = min(1.0, epoch / max(1.0, 0.7 * (self.epochs - 1)))
        side = self.start_size + share * (self.size - self.start_size)
        step = 32 if self.size % 32 == 0 and self.size >= 64 else 8
        return self.size if share == 1 else min(self.size, max(self.start_size, round(side / step) * step))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and YAML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The inverse of :meth:`to_dict`; a name that is no option raises UsageError with the nearest that is."""
        known = {spec.name for spec in fields(cls)}
        for name in values:
            if name not in known:
                raise unknown("training option", name, known)
        return cls(**values)

    def with_values(self, values: Mapping[str, Any]) -> Config:
        """A copy with some options changed. Texts are read as the option's kind: ``{"lr": "1e-3", "flip": "false"}``."""
        known = {spec.name: str(spec.type) for spec in fields(self)}
        for name in values:
            if name not in known:
                raise unknown("training option", name, known)
        read = {k: _read(k, v, known[k]) if isinstance(v, str) else v for k, v in values.items()}
        return Config.from_dict({**self.to_dict(), **read})

    def save(self, path: str | Path) -> None:
        """Write a YAML file that :meth:`load` reads."""
        from fastload.train.files import write_text

        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read a YAML (or JSON) file of options. UsageError: no such file, unknown or bad options; DataError: no YAML."""
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not a text file"
            raise UsageError(f"cannot read the options in {path}: {why}; give a YAML file") from error
        except yaml.YAMLError as error:
            raise DataError(f"{path} is not YAML ({' '.join(str(error).split())[:160]})") from error
        if not isinstance(content, dict):
            raise DataError(f"{path} must hold one 'option: value' a line, got {type(content).__name__}")
        known = {spec.name: str(spec.type) for spec in fields(cls)}
        # YAML 1.1 reads 1e-3 as text.
        values = {
            str(k): _read(str(k), v, known[k]) if k in known and isinstance(v, (str, list)) else v
            for k, v in content.items()
        }
        return cls.from_dict(values)


def parse_sets(pairs: Sequence[str]) -> dict[str, str]:
    """``["lr=1e-3", "flip=false"]`` as a dict; UsageError for what is no ``key=value``."""
    values = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.strip():
            raise UsageError(f"--set takes key=value, for example --set lr=1e-3, got {pair!r}")
        values[name.strip()] = value.strip()
    return values


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
    "tuple[float, ...]": "a list of numbers",
    "tuple[str, ...]": "a list of names",
}


def _has_type(value: Any, wanted: str) -> bool:
    """Whether ``value`` fits an annotation of Config; True is no number and NaN is none either."""
    if wanted.startswith("tuple"):
        inner = wanted[len("tuple[") :].partition(",")[0]
        return isinstance(value, tuple) and all(_has_type(part, inner) for part in value)
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


def _read(name: str, text: Any, wanted: str) -> Any:
    """The value that ``text`` means for an option of kind ``wanted``; what does not fit is left for the checks to refuse."""
    if wanted.startswith("tuple"):
        inner = wanted[len("tuple[") :].partition(",")[0]
        parts = text if isinstance(text, list) else text.strip("[]()").split(",")
        return tuple(_read(name, p.strip(), inner) if isinstance(p, str) else p for p in parts if p != "")
    if not isinstance(text, str):
        return text
    kind, _, optional = wanted.partition(" | ")
    word = text.strip().lower()
    if optional and word in ("none", "null", "~", ""):
        return None
    if kind == "bool" and word in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        return word in ("true", "yes", "on", "1")
    if kind in ("int", "float"):
        try:
            return int(text) if kind == "int" else float(text)
        except ValueError:
            return text
    return text


def _spell(name: str) -> str:
    """The option as it is spelt in Python and on the command line."""
    return f"{name} (--{name.replace('_', '-')})"
