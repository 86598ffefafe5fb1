"""What ``fastload bench`` measures: options, checked when they are made.

>>> BenchOptions(model="resnet18", size=224, seconds=60)
"""

from __future__ import annotations

from dataclasses import dataclass

from fastload.benchmarks.harness import MIN_ROUNDS
from fastload.errors import UsageError

# The name that stands for no model at all: only the loader is measured.
NO_MODEL = "none"


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. ``seconds`` is the budget for everything, a target and no limit.

    ``model`` "none" measures the loader alone. ``changes`` says whether changes are run, ``compile`` whether ``torch.compile`` is
    one of them on a CPU too. The other options are the Loader's.
    """

    model: str = "resnet18"
    size: int = 224
    batch_size: int = 64
    device: str | None = None
    threads: int | None = None
    seconds: float = 60.0
    rounds: int = MIN_ROUNDS
    seed: int = 0
    prefetch: int = 2
    engine: str = "cpu"
    decode: str = "fast"
    compile: bool = False
    changes: bool = True

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("batch_size", 1), ("rounds", MIN_ROUNDS), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, got {self.threads}")
        if not self.seconds > 0:
            raise UsageError(f"seconds must be above 0, got {self.seconds}")
