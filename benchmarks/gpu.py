"""What a machine with a GPU does with the whole path, in one command: tests, decoders, kernel, loaders, models, stall.

``python -m fastload.benchmarks gpu`` needs no data and ends in less than eight minutes; it runs, small, without a GPU too, and says of each
part that needs one that it was not run. The trade-off of one budget: a figure has five short rounds, and its spread says what that is
worth.

>>> record = run(None, GpuOptions(small=True)); print(table(record))
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastload.benchmarks import gpu_loaders, gpu_parts, machine
from fastload.benchmarks.gpu_suite import NOT_RUN, Budget, part_table, run_part
from fastload.benchmarks.harness import Series, noise_notes, write_jsonl
from fastload.errors import UsageError, unknown

if TYPE_CHECKING:
    from fastload.dataset import Dataset

MODELS = (
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_small_patch16_224",
)
SECONDS, SMALL_SECONDS = 400.0, 20.0
# Title, weight of the budget, and what does it.
PARTS: dict[str, tuple[str, float, Callable[..., Any]]] = {
    "tests": ("The GPU tests", 55, gpu_parts.tests),
    "scaling": ("CPU scaling, crops to uint8 from 500 px JPEG", 25, gpu_loaders.scaling),
    "decode": ("Decoding alone", 35, gpu_parts.decode),
    "kernel": ("The kernel, from decoded images", 25, gpu_parts.kernel),
    "loaders": ("Loaders, random crops, normalised fp16", 110, gpu_loaders.loaders),
    "models": ("Training of models on a synthetic batch", 85, gpu_parts.models),
    "stall": ("Time that a model waits for images", 65, gpu_loaders.stall),
}
SMALL_IMAGES = "32 px raw"
BATCHES = 64  # of an epoch: images are repeated
AIMS = {"resident_images_s": 500_000, "resident_of_copy": 0.4, "jpeg_images_s": 20_000, "jpeg_of_dali": 2.0, "stall_percent": 1.0}  # fmt: skip


@dataclass(frozen=True)
class GpuOptions:
    """``seconds``: the budget of all parts; None is 400, or 20 for a small run. ``skip``: names of :data:`PARTS`."""

    seconds: float | None = None
    small: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:
            raise UsageError(f"--seconds must be above 0, got {self.seconds}")
        for name in self.skip:
            if name not in PARTS:
                raise unknown("part", name, PARTS)

    @property
    def budget(self) -> float:
        return self.seconds or (SMALL_SECONDS if self.small else SECONDS)


class Rig:
    """The machine, the files and the sizes that the parts measure; ``red`` and ``best`` are what parts tell later ones."""

    def __init__(self, small: bool, stack: contextlib.ExitStack) -> None:
        import torch

        self.small, self.cuda, self.cores = small, torch.cuda.is_available(), machine.usable_cores()
        self.size = 96 if small and not self.cuda else 224
        self.batch = (8 if not self.cuda else 64) if small else 256
        tiny = small and not self.cuda
        self.models = ("test_resnet",) if tiny else ("resnet18",) if small else MODELS
        self.model_size, self.model_batch = (32, 8) if tiny else (224, 64 if small else 256)
        self.images = 40 if small else 1500
        self.files: dict[str, Dataset] = {}
        self.folders: dict[str, Path] = {}
        self.red: dict[str, str] = {}
        self.best: dict[str, str] | None = None  # None: the loaders were not measured
        self._stack = stack

    def shape(self, name: str) -> gpu_loaders.Shape:
        """What loaders make of a file: small images stay small, and come in larger batches."""
        if name == SMALL_IMAGES:
            return gpu_loaders.Shape(32, 2 * self.batch, self.cores)
        return gpu_loaders.Shape(self.size, self.batch, self.cores)

    def make_files(self, data: str | None, scratch: Path, notes: list[str]) -> None:
        """The four files: JPEG of at most 500 px and of 256 px, pixels of the latter, and of 32 px."""
        import fastload
        from fastload.benchmarks.photos import Photos
        from fastload.benchmarks.sample_photos import write_photos

        if data is None:
            write_photos(scratch / "made", self.images, 0)
            data = str(scratch / "made")
            notes.append("no data were given: the images are crops of scikit-learn's two photographs")
        photos = Photos(data, scratch, images=self.images, copies=1, threads=self.cores)
        whole = photos.get("500")
        notes += [*photos.notes, *whole.notes]
        made = {"500 px JPEG": whole.beton}
        for name, store, side in (
            ("256 px JPEG", "jpeg", 256),
            ("256 px raw", "raw", 256),
            (SMALL_IMAGES, "raw", 32),
        ):
            made[name] = str(scratch / f"{side}-{store}.beton")
            fastload.convert(whole.folder, made[name], store=store, max_side=side, workers=self.cores, progress=False)  # fmt: skip
        for name, path in made.items():
            machine.warm_cache(path)
            self.files[name] = self._stack.enter_context(fastload.open(path))
        self.folders["500 px JPEG"] = Path(whole.folder)

    def warm_up(self) -> None:
        """Compile the CPU engine's kernels, which the first batch of a new version does for a minute."""
        for dtype in ("uint8", "float16"):
            shape = gpu_loaders.Shape(self.size, 4, self.cores, dtype)
            with contextlib.closing(gpu_loaders.open_loader(self.repeated("500 px JPEG"), "cpu", shape, None)) as loader:  # fmt: skip
                gpu_loaders.first_batches(loader, dtype != "uint8")

    def repeated(self, name: str) -> Dataset:
        """A file, its images repeated until an epoch has many batches."""
        data = self.files[name]
        batches = 6 if self.small else BATCHES
        copies = max(1, -(-batches * self.batch // len(data)))
        return data.subset(np.tile(np.arange(len(data)), copies))

    def sync(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back GPU memory that nobody holds."""
        gc.collect()
        if self.cuda:
            import torch

            torch.cuda.empty_cache()


def run(
    data: str | None,
    options: GpuOptions,
    *,
    out: str | None = None,
    say: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Measure and return the record; ``say`` is given each part's table when it is done. A part that fails is recorded."""
    started, say = time.perf_counter(), say or (lambda text: None)
    parts: list[dict[str, Any]] = []
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastload-gpu-")))
        rig = Rig(options.small, stack)
        say("Making the files, and compiling kernels where that was not done yet")
        rig.make_files(data, scratch, notes)
        rig.warm_up()
        prepared = time.perf_counter() - started
        weights = {name: PARTS[name][1] for name in PARTS if name not in options.skip}
        # Compiling a new version's kernels takes its time once; half of the budget is left in any case.
        budget = Budget(max(options.budget - prepared, options.budget / 2), weights)
        for name, (title, _, measure) in PARTS.items():
            if name in options.skip:
                part: dict[str, Any] = {
                    "name": name,
                    "title": title,
                    "status": NOT_RUN,
                    "reason": "left out by --skip",
                }
                part.update(rows=[], notes=[], seconds=0.0, budget_s=0.0)
            else:
                part = run_part(
                    name, title, partial(measure, rig), budget.share(name), rig.red,
                    least=0.0 if options.small else 3.0,
                )  # fmt: skip
            if name == "loaders" and part["status"] != NOT_RUN:
                rig.best = best_loaders(part)
            rig.free()
            parts.append(part)
            say(part_table(part))
        settings = {
            **asdict(options), "seconds": options.budget, "size": rig.size, "batch": rig.batch, "threads": rig.cores,
            "models": list(rig.models), "model_size": rig.model_size, "model_batch": rig.model_batch, "cuda": rig.cuda,
            "data": data or "made of scikit-learn's photographs", "images": {k: len(v) for k, v in rig.files.items()},
        }  # fmt: skip
    for part in parts:
        part["notes"] += noise_notes(
            Series(one["name"], tuple(one["figure"]["rounds"]), one["figure"]["unit"])
            for one in part["rows"]
            if one["figure"] is not None and not one["figure"]["unit"].startswith("%")
        )
    record = {
        "kind": "gpu", "environment": machine.environment(), "settings": settings, "parts": parts,
        "aims": aims(parts), "red": rig.red, "notes": notes, "prepared_s": round(prepared, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    if out is not None:
        write_jsonl(out, [record])
    return record


def best_loaders(part: dict[str, Any]) -> dict[str, str]:
    """The fastest loader of ours that reads each file anew, by file; only those whose figure is shown."""
    found: dict[str, tuple[float, str]] = {}
    for one in part["rows"]:
        if (
            one["figure"] is not None
            and one["arm"] in gpu_loaders.ARMS
            and one["arm"] not in gpu_loaders.CACHED
        ):
            found[one["file"]] = max(found.get(one["file"], (0.0, "")), (one["figure"]["median"], one["arm"]))
    return {file: arm for file, (_, arm) in found.items()}


def aims(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at on one H200 with 16 cores, and what was measured here; None where it was not."""
    rows = {part["name"]: part["rows"] for part in parts}
    shown = [one for one in rows.get("loaders", ()) if one["figure"] is not None]

    def top(*arms: str, file: str = "500 px JPEG") -> float | None:
        return max(
            (r["figure"]["median"] for r in shown if r["file"] == file and r["arm"] in arms), default=None
        )

    ours, dali = top("cpu", "cuda", "segments", "hybrid", "dali"), top("dali own")
    shares = [r["of_copy"] for r in rows.get("kernel", ()) if r["figure"] and r.get("of_copy") and "crop" in r["name"]]  # fmt: skip
    stalls = [r["figure"]["median"] for r in rows.get("stall", ()) if r["figure"] is not None]
    measured = {
        "resident_images_s": max((v for name in ("500 px JPEG", "256 px JPEG") if (v := top("resident", file=name))), default=None),
        "resident_of_copy": max(shares, default=None),
        "jpeg_images_s": ours,
        "jpeg_of_dali": ours / dali if ours and dali else None,
        "stall_percent": max(stalls, default=None),
    }  # fmt: skip
    found = []
    for name, value in measured.items():
        good = (
            None
            if value is None
            else (value < AIMS[name] if name == "stall_percent" else value >= AIMS[name])
        )
        found.append({"name": name, "aim": AIMS[name], "measured": value, "reached": good})
    return found


def ending(record: dict[str, Any]) -> str:
    """What stands below the parts' tables: aims, notes, time."""
    lines = []
    if record["settings"]["cuda"]:
        lines.append("Aims (for one H200 with 16 cores)")
        for one in record["aims"]:
            value = "not measured" if one["measured"] is None else f"{one['measured']:,.4g}"
            lines.append(
                f"  {one['name']:<18} {value:>14}  aim {one['aim']:,g}{'' if one['reached'] in (None, True) else ', missed'}"
            )
    lines += [f"Note: {note}" for note in record["notes"]]
    env = record["environment"]
    lines.append(
        f"{env.get('gpu', 'no GPU')}, {env['cpu']}, {env['cores']} cores, commit {env['commit']}, {record['seconds']:.0f} s in all"
    )
    return "\n".join(lines)
