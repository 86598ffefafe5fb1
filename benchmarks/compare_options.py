"""What ``fastload bench --compare`` takes, checked before anything runs; the same on both command lines.

A wrong name costs a second and not half an hour. The trade-off: each new option is named twice, in the dataclass and for click.

>>> CompareOptions("photos.tar", peers=("cpu", "ffcv"), workloads=("train500",)).baseline_name
'ffcv'
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastload.benchmarks.harness import MIN_ROUNDS
from fastload.benchmarks.peers import PEERS, peer_class
from fastload.benchmarks.workloads import WORKLOADS
from fastload.errors import UsageError, unknown
from fastload.system import usable_cores

DEFAULT_BASELINE = "ffcv"
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class CompareOptions:
    """What to compare.

    ``data`` is a folder of class folders, a tar of one or a ``.beton`` of JPEG images; ``peers`` are names of the registry or
    "module:Class"; ``baseline`` None is "ffcv" where it takes part, else the first peer. ``images`` is the least number of images a round
    (whole epochs are run, of about twice as many images); ``copies`` how often each picture stands in a set (None: as needed).
    ``timeout`` are the seconds that one answer of a peer may take. ``install`` makes an environment for a peer that has none.
    """

    data: str
    peers: tuple[str, ...] = ("cpu", "ffcv")
    workloads: tuple[str, ...] = ("train500",)
    baseline: str | None = None
    rounds: int = MIN_ROUNDS
    images: int = 1000
    threads: int | None = None
    batch: int = 64
    copies: int | None = None
    install: bool = False
    timeout: float = 900.0
    small_images: int = 20_000
    subset_images: int = 200
    epochs: int = 50

    def __post_init__(self) -> None:
        for names, known, kind in ((self.peers, PEERS, "peer"), (self.workloads, WORKLOADS, "workload")):
            if not names:
                raise UsageError(f"name at least one {kind} of {', '.join(known)}; got none")
            if len(set(names)) < len(names):
                raise UsageError(f"name each {kind} once, got {','.join(names)}")
        for name in self.peers:
            peer_class(name)
        for name in self.workloads:
            if name not in WORKLOADS:
                raise unknown("workload", name, WORKLOADS)
        if self.baseline is not None and self.baseline not in self.peers:
            raise unknown("baseline", self.baseline, self.peers, "it must be one of the peers")
        if self.rounds < MIN_ROUNDS:
            raise UsageError(f"a figure needs at least {MIN_ROUNDS} rounds, got {self.rounds}")
        for option in ("images", "threads", "batch", "copies", "small_images", "subset_images", "epochs"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UsageError(f"{option} must be at least 1, got {value}")
        if not self.timeout > 0:
            raise UsageError(f"timeout must be above 0 s, got {self.timeout}")
        if not os.path.exists(self.data):
            raise UsageError(f"there is no folder, tar or .beton file at {self.data!r}; check the path")

    @property
    def baseline_name(self) -> str:
        """The peer that the others are divided by."""
        if self.baseline is not None:
            return self.baseline
        return DEFAULT_BASELINE if DEFAULT_BASELINE in self.peers else self.peers[0]

    @property
    def thread_count(self) -> int:
        """Threads or workers of each peer: as asked, or one for each usable core."""
        return self.threads or usable_cores()


def names(text: str, known: dict[str, Any]) -> tuple[str, ...]:
    """``"a,b"`` as names, ``"all"`` as all that are known."""
    if text.strip() == "all":
        return tuple(known)
    return tuple(name.strip() for name in text.split(",") if name.strip())


def compare_flags(function: _F) -> _F:
    """Add the options of a comparison to a click command, besides DATA and the names of the peers."""
    import click

    for flag in reversed(
        (
            click.option(
                "--workloads",
                default="train500",
                show_default=True,
                help=f"Comma-separated, or all: {', '.join(WORKLOADS)}.",
            ),
            click.option(
                "--baseline",
                default=None,
                help="Peer that ratios refer to; ffcv if it takes part, else the first.",
            ),
            click.option(
                "--install",
                is_flag=True,
                help="Make an environment for each peer whose library is missing here.",
            ),
            click.option(
                "--images", default=1000, show_default=True, help="Images a round at least (whole epochs)."
            ),
        )
    ):
        function = flag(function)
    return function
