"""Records of result files as types: what a report may rely on.

Every figure is a Series with its rounds, made by :mod:`fastload.benchmarks.report.read`. The trade-off: only what is shown is
named here; the whole line stays in ``Record.raw``.

>>> record.kind, record.body.rows[0].figure.median
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastload.benchmarks.harness import Series


@dataclass(frozen=True)
class Row:
    """One peer of a comparison.

    ``ratio`` says how many times as good as the baseline it was, round by round; None where there is none. ``extra`` holds the
    numbers that only some workloads know.
    """

    peer: str
    title: str
    filter: str
    figure: Series
    ratio: Series | None
    cpu_s_per_1000: Series | None
    peak_mib: float | None
    settings: str
    versions: dict[str, str]
    python: str
    threads: int | None
    mib_by_epoch: tuple[float, ...]
    extra: dict[str, float]

    @property
    def ours(self) -> bool:
        return self.peer in ("cpu", "cpu-exact", "cuda") or self.title.lower().startswith("fastload")


@dataclass(frozen=True)
class Failed:
    """What was asked for and gave no figure, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Compare:
    workload: str
    what: str
    unit: str
    baseline: str
    rows: tuple[Row, ...]
    failed: tuple[Failed, ...]
    less_is_better: bool


@dataclass(frozen=True)
class Stage:
    """Microseconds an image on one thread, and the bytes an image that the stage reads or writes."""

    name: str
    us: float
    bytes: float | None


@dataclass(frozen=True)
class Change:
    what: str
    setting: str
    side: str
    figure: Series
    ratio: Series | None
    cost: str
    gain: bool


@dataclass(frozen=True)
class Step:
    """One training step: when it began, how long it waited for images and how long the model took, all in seconds."""

    t: float
    wait_s: float
    step_s: float


@dataclass(frozen=True)
class Bench:
    """``model``, ``both`` and ``stall`` are None where the loader alone was measured."""

    loader: Series
    plain: Series | None
    model: Series | None
    both: Series | None
    stall: Series | None
    first_batch_s: float | None
    stages: tuple[Stage, ...]
    resources: dict[str, float]
    limits: dict[str, float]
    shares: dict[str, float]
    ceilings: tuple[Series, ...]
    """The limits with their rounds, where the file has them."""
    changes: tuple[Change, ...]
    not_run: tuple[Failed, ...]
    timeline: tuple[Step, ...]
    bottleneck: str
    sentence: str
    doubt: str
    """What is to be said where the file holds another sentence than its figures give; else empty."""


@dataclass(frozen=True)
class Tried:
    threads: int | None
    prefetch: int | None
    batch_size: int | None
    images_s: float


@dataclass(frozen=True)
class Tune:
    tried: tuple[Tried, ...]
    default: Tried | None
    best: Tried | None
    figure: Series | None
    default_figure: Series | None
    ratio: Series | None
    sentence: str
    doubt: str
    paste: str


@dataclass(frozen=True)
class Variant:
    name: str
    figure: Series
    ratio: Series | None
    cost: str


@dataclass(frozen=True)
class ModelRow:
    model: str
    size: int | None
    batch_size: int | None
    variants: tuple[Variant, ...]
    best: str
    loader_needs: float | None
    failed: tuple[Failed, ...]
    sentence: str
    doubt: str
    """As in :class:`Bench`."""


@dataclass(frozen=True)
class Model:
    rows: tuple[ModelRow, ...]


Body = Bench | Compare | Model | Tune


@dataclass(frozen=True)
class Record:
    """One line of a result file. ``body`` holds the figures of its kind; ``raw`` is the line as it was."""

    kind: str
    body: Body
    settings: dict[str, Any]
    environment: dict[str, Any]
    notes: tuple[str, ...]
    file: str
    line: int
    raw: dict[str, Any] = field(repr=False)

    @property
    def date(self) -> str:
        return str(self.environment.get("date") or "")
