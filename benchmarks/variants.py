"""How the model side is run: memory layout, precision, compilation, CUDA graphs, and where pixels are normalised.

A variant changes how a training step is computed and not what it computes, so its loss on the same batch must be that of
the plain one within the precision it uses. The trade-off: what a variant costs (compilation, memory that a graph holds) is
not in it, but measured where it is run.

>>> Variant(channels_last=False, amp="off")  # what torch does when nothing is asked for
"""

from __future__ import annotations

from dataclasses import dataclass

from fastload.errors import UsageError, unknown

AMP = ("auto", "bf16", "fp16", "off")


@dataclass(frozen=True)
class Variant:
    """One way to run the trainer's step.

    ``channels_last``: weights and images in that memory layout. ``amp``: auto (the trainer's choice on this device), bf16, fp16
    or off. ``compile``: ``torch.compile``. ``cuda_graph``: forward and backward recorded once and replayed (CUDA only; not
    with ``compile``). ``normalise``: images arrive as uint8 and are normalised on the device, as part of the step.
    """

    channels_last: bool = True
    amp: str = "auto"
    compile: bool = False
    cuda_graph: bool = False
    normalise: bool = False

    def __post_init__(self) -> None:
        for name in ("channels_last", "compile", "cuda_graph", "normalise"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.amp not in AMP:
            raise unknown("AMP mode", self.amp, AMP)
        if self.compile and self.cuda_graph:
            raise UsageError(
                "a step is compiled or recorded as a CUDA graph, not both: choose one, got compile and cuda_graph"
            )

    @property
    def name(self) -> str:
        """What differs from torch's plain way, such as ``channels_last + bf16``; ``plain`` where nothing does."""
        parts = ["channels_last"] * self.channels_last
        parts += [] if self.amp == "off" else ["AMP" if self.amp == "auto" else self.amp]
        parts += ["compile"] * self.compile + ["CUDA graph"] * self.cuda_graph
        parts += ["normalise on the device"] * self.normalise
        return " + ".join(parts) or "plain"
