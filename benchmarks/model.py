"""Which of channels_last, AMP, compilation and CUDA graphs pays for which model on this machine, and the loader speed it needs.

Every variant is the trainer's own step on one synthetic batch. All variants of a model take turns in the same rounds, and a
variant shows a speed only if it learns what the plain one learns: from the same weights on the same batch, its loss must be the
same within its precision before the first optimizer step and fall in the same way over the next ones. The trade-off: losses say
that the work was done, not that a long training ends equally well.

>>> record = measure(ModelOptions(("resnet18", "convnext_tiny"), seconds=60)); print(table(record))
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastload.benchmarks import machine
from fastload.benchmarks.harness import MIN_ROUNDS, Series, interleave, noise_notes, ratio
from fastload.benchmarks.model_table import PLAIN, best, needs, sentence
from fastload.benchmarks.options import BenchOptions
from fastload.benchmarks.pairing import clamp
from fastload.benchmarks.side import Labels, ModelSide, fit_batch, reason
from fastload.benchmarks.variants import Variant
from fastload.errors import FastloadError, UsageError

# Optimizer steps after which the losses of a variant and of the plain one are compared.
CHECKED = 3
# fp16's loss scaling leaves out steps until it has found its scale: so many calls it may take.
MOST_CALLS = 24
# Share by which the first loss may differ. Measured on a CPU with resnet18, mobilenetv3_small_100, vit_tiny_patch16_224 and
# convnext_atto: below 0.00001 in float32, 0.0003 in bfloat16. A GPU may round float32 products to TF32's 10 bits, as many as fp16
# has.
TOLERANCE = {"off": 0.002, "fp16": 0.005, "bf16": 0.01}
# Of what the plain loss falls, a variant's may fall this share more or less: rounding errors grow from step to step. Measured as
# above: below 0.001 in float32, 0.006 in bfloat16.
FALL = 0.25
# A variant whose steps take this many times as long as the plain ones is not worth five rounds.
TOO_SLOW = 5.0


@dataclass(frozen=True)
class ModelOptions:
    """What to measure. ``seconds`` is the budget for each model, a target and no limit; compiling comes on top.

    ``compile`` None compiles on CUDA only, where it is worth its minutes. The batch is random numbers of ``classes`` classes.
    """

    models: tuple[str, ...]
    size: int = 224
    batch_size: int = 64
    device: str | None = None
    classes: int = 1000
    seconds: float = 60.0
    rounds: int = MIN_ROUNDS
    compile: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.models or len(set(self.models)) < len(self.models):
            raise UsageError(
                f"models must be one timm model or several different ones, got {','.join(self.models)!r}"
            )
        for name, least in (("size", 1), ("batch_size", 1), ("classes", 2), ("rounds", MIN_ROUNDS)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise UsageError(f"seconds must be above 0, got {self.seconds}")

    def for_side(self, model: str, batch_size: int) -> BenchOptions:
        """The same as the model's side of a bench takes it."""
        return BenchOptions(
            model,
            self.size,
            batch_size,
            self.device,
            seconds=self.seconds,
            rounds=self.rounds,
            seed=self.seed,
        )


def variants(amp: str) -> list[Variant]:
    """Plain, each switch alone, the two that only change formats together, and those with compilation or a graph on top."""
    formats = {"channels_last": True, "amp": amp}
    chosen: list[dict[str, Any]] = [
        {},
        {"channels_last": True},
        {"amp": amp},
        {"compile": True},
        {"cuda_graph": True},
        formats,
        {**formats, "compile": True},
        {**formats, "cuda_graph": True},
    ]
    return [Variant(**{"channels_last": False, "amp": "off", **switches}) for switches in chosen]


def not_run(variant: Variant, device: str, compile: bool | None) -> str | None:
    """Why a variant is not worth trying on this kind of device; None where it is."""
    if variant.compile and compile is False:
        return "left out by --no-compile"
    if variant.compile and compile is None and device != "cuda":
        return "compiling takes minutes and is worth it on CUDA first: --compile runs it here"
    if variant.cuda_graph and device != "cuda":
        return f"CUDA graphs need a CUDA device, and this one is {device!r}"
    return None


def disagreement(plain: Sequence[float], other: Sequence[float], amp: str) -> str | None:
    """What shows that a variant does other work than the plain one; None where nothing does.

    ``plain`` and ``other`` are the losses before the first optimizer step and after each of the next ones.
    """
    if not all(math.isfinite(loss) for loss in other):
        return f"its loss is not finite: {_losses(other)}"
    if len(other) < len(plain):
        return f"it made {len(other) - 1} optimizer steps in {MOST_CALLS} batches, and plain made {len(plain) - 1}"
    allowed = TOLERANCE[amp] * abs(plain[0])
    if abs(other[0] - plain[0]) > allowed:
        return (
            f"its loss on the same weights and images is {other[0]:.4f} and plain's is {plain[0]:.4f}, "
            f"further apart than {TOLERANCE[amp]:.1%}"
        )
    if abs(other[-1] - plain[-1]) > allowed + FALL * abs(plain[0] - plain[-1]):
        return f"its loss went {_losses(other)} over the same steps, and plain's {_losses(plain)}"
    return None


def _losses(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


@dataclass
class _Arm:
    """A variant that works: its side, what its check saw, and seconds of a step."""

    variant: Variant
    side: ModelSide
    losses: list[float]
    step_s: float
    first_s: float
    steps: int = 1

    def round(self) -> float:
        """Images/s over its steps. The device is waited for at the end only, as in a training."""
        side = self.side
        side.sync()
        clock = time.perf_counter()
        try:
            for _ in range(self.steps):
                side.launch(side.images, side.labels)
            side.sync()
        except Exception as error:  # any library may be in a step; which variant failed is what a user needs
            raise UsageError(f"it failed in a round: {reason(error)}") from error
        return self.steps * len(side.images) / (time.perf_counter() - clock)

    @property
    def cost(self) -> str:
        extra = max(0.0, self.first_s - self.step_s)
        if self.variant.compile:
            return f"{extra:.0f} s to compile"
        if self.variant.cuda_graph:
            return "one size of batch; the memory of a pass is kept"
        return "none" if self.variant.amp == "off" else f"precision of {self.variant.amp}"


def measure(options: ModelOptions, progress: Callable[[str], object] | None = None) -> dict[str, Any]:
    """The record of all models. A model or a variant that fails is in it with its reason and leaves the others intact.

    Raises UsageError for an unknown device, or where no model gave a figure.
    """
    from fastload.train import pick_device

    started = time.perf_counter()
    device = pick_device(options.device)
    notes: list[str] = []
    rows = [
        _Model(name, options, device, progress or (lambda text: None), notes).row() for name in options.models
    ]
    if not any(row["variants"] for row in rows):
        raise UsageError(next(failed["reason"] for row in rows for failed in row["failed"]))
    return {
        "kind": "model",
        "rows": rows,
        "settings": {**asdict(options), "models": list(options.models), "device": str(device)},
        "environment": machine.environment(),
        "notes": notes,
        "seconds": round(time.perf_counter() - started, 1),
    }


class _Model:
    """One model: its variants made, checked and measured."""

    def __init__(
        self, name: str, options: ModelOptions, device: Any, say: Callable[[str], object], notes: list[str]
    ) -> None:
        self.name, self.o, self.device, self.say, self.notes = name, options, device, say, notes
        self.failed: list[dict[str, Any]] = []
        self.batch_size = options.batch_size

    def row(self) -> dict[str, Any]:
        """The model's part of the record."""
        try:
            found = self._measure()
        except FastloadError as error:  # the model itself: an unknown name, a size that it cannot take
            self.failed.append({"name": "all variants", "reason": str(error)})
            found = []
        finally:
            _forget(self.device)
        row = {
            "model": self.name,
            "size": self.o.size,
            "batch_size": self.batch_size,
            "variants": found,
            "best": best(found),
            "loader_needs_images_s": needs(found),
            "failed": self.failed,
        }
        return {**row, "sentence": sentence(row)}

    def _measure(self) -> list[dict[str, Any]]:
        until = time.perf_counter() + self.o.seconds
        whys = {v: not_run(v, self.device.type, self.o.compile) for v in variants(_amp(self.device))}
        chosen = [variant for variant, why in whys.items() if why is None]
        self._fit(len(chosen))
        for variant, why in whys.items():
            if why is not None:
                self._fail(variant.name, why)
        arms: dict[str, _Arm] = {}
        for variant in chosen:
            arm = self._arm(variant, arms.get(PLAIN))
            if arm is not None:
                arms[variant.name] = arm
                until += max(0.0, arm.first_s - arm.step_s) if variant.compile else 0.0
            elif variant.name == PLAIN:
                return []  # nothing to hold the others against
            else:
                _free(self.device)  # what it took must not make the next one fail
        return self._rounds(arms, max(until - time.perf_counter(), self.o.seconds / 2))

    def _fit(self, count: int) -> None:
        """Make the batch smaller where a step is too slow for the time. The model's own errors come from here."""
        self.say(f"{self.name}: first step")
        side = ModelSide(
            self.o.for_side(self.name, self.batch_size), self._labels, self.device, variant=_PLAIN
        )
        steps = count * (self.o.rounds + 1 + CHECKED + 1)
        self.batch_size = fit_batch(side, self.o.batch_size, self.o.seconds / steps)
        if self.batch_size < self.o.batch_size:
            full = self.o.seconds * self.o.batch_size / self.batch_size
            self.notes.append(
                f"{self.name}: a step of {self.o.batch_size} is too slow here for {self.o.seconds:g} s, so it was measured with "
                f"batches of {self.batch_size}; --seconds {full:.0f} measures full ones"
            )

    @property
    def _labels(self) -> Labels:
        return Labels(self.o.classes)

    def _arm(self, variant: Variant, plain: _Arm | None) -> _Arm | None:
        """The variant made and checked; None where it has failed, which is then noted."""
        self.say(f"{self.name}: preparing {variant.name}")
        options = self.o.for_side(self.name, self.batch_size)
        try:
            side = ModelSide(options, self._labels, self.device, variant=variant)
            losses, seconds = _learn(side)
        except (
            Exception
        ) as error:  # compilers, drivers and models fail in their own ways; the other variants go on
            self._fail(variant.name, f"it failed here: {reason(error)}")
            return None
        arm = _Arm(variant, side, losses, min(seconds), seconds[0])
        wrong = disagreement(plain.losses if plain else losses, losses, variant.amp)
        if wrong is not None:
            self._fail(variant.name, f"no speed is shown, because {wrong}")
            return None
        if plain is not None and arm.step_s > TOO_SLOW * plain.step_s:
            slower = arm.step_s / plain.step_s
            self._fail(
                variant.name, f"its steps took {slower:.1f} times as long as the plain ones", slower=slower
            )
            return None
        return arm

    def _rounds(self, arms: dict[str, _Arm], seconds: float) -> list[dict[str, Any]]:
        share = seconds / (self.o.rounds + 1) / len(arms)
        for arm in arms.values():
            arm.steps = clamp(share / arm.step_s, 1, 2000)
        series = interleave(
            {name: arm.round for name, arm in arms.items()},
            rounds=self.o.rounds,
            progress=lambda name: self.say(f"{self.name}: {name}"),
            on_error=lambda name, error: self._fail(name, str(error)),
        )
        plain = series.get(PLAIN)
        self.notes += noise_notes(
            Series(f"{self.name}, {name}", one.rounds, one.unit) for name, one in series.items()
        )
        return [self._entry(arms[name], one, plain) for name, one in series.items()]

    def _entry(self, arm: _Arm, figure: Series, plain: Series | None) -> dict[str, Any]:
        v = arm.variant
        return {
            "name": v.name,
            "channels_last": v.channels_last,
            "amp": v.amp,
            "compile": v.compile,
            "cuda_graph": v.cuda_graph,
            "figure": figure.to_json(),
            "ratio": ratio(figure, plain).to_json() if plain is not None else None,
            "cost": arm.cost,
            "losses": [round(loss, 5) for loss in arm.losses],
            "steps_per_round": arm.steps,
        }

    def _fail(self, name: str, why: str, slower: float | None = None) -> None:
        """``slower``: how many times as long as the plain ones its first steps took, where that is the reason."""
        more = {} if slower is None else {"slower": round(slower, 1)}
        self.failed.append({"name": name, "reason": why, **more})


_PLAIN = Variant(channels_last=False, amp="off")


def _amp(device: Any) -> str:
    """The precision that mixed precision means on this device."""
    from fastload.train.model import resolve_amp

    found = resolve_amp("auto", device)
    return found if found != "off" else "bf16"


def _learn(side: ModelSide) -> tuple[list[float], list[float]]:
    """Losses before the first optimizer step and after each of the next :data:`CHECKED`, and seconds of every call."""
    losses: dict[int, float] = {}
    seconds: list[float] = []
    for _ in range(MOST_CALLS):
        made = side.step.updates
        clock = time.perf_counter()
        loss = side.launch(side.images, side.labels)
        side.sync()
        seconds.append(time.perf_counter() - clock)
        losses[made] = float(loss)
        if len(losses) > CHECKED:
            break
    return [losses[made] for made in sorted(losses)], seconds


def _free(device: Any) -> None:
    """Give back the memory of sides that nobody holds any more."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _forget(device: Any) -> None:
    """Free what the variants of a model held, and what was compiled for them: the compiler keeps a limited number."""
    import torch

    _free(device)
    if "torch._dynamo" in sys.modules:  # importing it only to forget nothing takes seconds
        torch.compiler.reset()
