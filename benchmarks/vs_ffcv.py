"""fastload beside FFCV 1.0.2 on the same file: loading, start to first batch, conversion.

One run measures the three claims of the README. Each peer has its own process, kept alive and stopped while the other has its
turn; both read the same file from a warm page cache with the same number of threads, and the work is checked before any speed is
shown. The trade-off: FFCV resizes with OpenCV's INTER_AREA and fastload with an antialiased triangle filter, so pixels agree on
average and not one by one.

>>> python -m fastload.benchmarks vs-ffcv --data ../shared/data/imagenet_photos.tar
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastload.benchmarks import machine
from fastload.benchmarks.harness import MIN_ROUNDS, Series, interleave, noise_notes, ratio
from fastload.benchmarks.peers import SUFFIXES
from fastload.benchmarks.process import PeerProcess
from fastload.errors import DataError, UsageError, require

PAIR = ("fastload", "ffcv")
LOADERS = (*PAIR, "fastload-exact")
# Levels (0-255) by which the mean pictures may differ in one cell and on average, and contrast as a share. Over 8,000 random
# crops two runs of FFCV differed by 2.3 levels in the worst cell; swapped channels or a wrong crop differ by far more. FFCV
# decodes with libjpeg-turbo's fast inverse DCT, which darkens red and blue by 1.1 to 1.3 levels on these photographs (Pillow and
# fastload use the accurate one): most of the mean's tolerance is for that.
CELL_TOLERANCE = 5.0
MEAN_TOLERANCE = 2.5
CONTRAST_TOLERANCE = 0.08
# Random crops scatter: the check averages over four times the images of a round.
CHECK_ROUNDS = 4
CLAIMS = {"train": 2.0, "convert": 1.5, "first_batch_s": 2.0}


@dataclass(frozen=True)
class VsOptions:
    """``copies``: how often each photograph stands in the file that is loaded, so that an epoch is long enough to time."""

    data: str
    rounds: int = 7
    images: int = 2000
    copies: int = 4
    threads: int = 2
    batch: int = 64
    size: int = 224

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise UsageError(f"a figure needs at least {MIN_ROUNDS} rounds, got {self.rounds}")
        for name in ("images", "copies", "threads", "batch", "size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not os.path.exists(self.data):
            raise UsageError(f"there is no folder or tar file at {self.data!r}; check the path")


def compare(options: VsOptions, progress: Callable[[str], object] | None = None) -> dict[str, Any]:
    """Run the three comparisons and return one JSON-able record with every round; raises DataError if the work differs."""
    require("ffcv", "ffcv")
    say = progress or (lambda text: None)
    with tempfile.TemporaryDirectory(prefix="fastload-vs-") as scratch:
        folder = unpack(options.data, Path(scratch))
        with contextlib.ExitStack() as stack:
            peers = {name: stack.enter_context(PeerProcess(name)) for name in PAIR}
            for name in PAIR:
                say(f"{name}: import")
                peers[name].ask(do="import")
            record: dict[str, Any] = {"kind": "vs-ffcv"}
            record["convert"] = convert_rounds(options, peers, folder, Path(scratch), say)
        path = shared_file(options, folder, Path(scratch), say)
        machine.warm_cache(path)
        record["environment"] = machine.environment(path)
        record["environment"]["versions"]["ffcv"] = machine.version("ffcv")
        record["settings"] = {
            "photos": len(photo_files(folder)),
            "copies": options.copies,
            "images_per_round": options.images,
            "threads": options.threads,
            "batch": options.batch,
            "size": options.size,
            "rounds": options.rounds,
            "store": "max side 500 px, JPEG quality 90",
            "work": "RandomResizedCrop + horizontal flip to uint8, random order",
            "filters": {"fastload": "antialiased bilinear", "ffcv": "INTER_AREA"},
        }
        record["train"], record["check"] = train_rounds(options, path, say)
        record["first_batch"] = first_batch_rounds(options, path, say)
    record["claims"] = claims(record)
    return record


def unpack(data: str, scratch: Path) -> Path:
    """The folder of class folders: the given one, or a tar file's content in ``scratch``."""
    root = Path(data)
    if root.is_file():
        target = scratch / "photos"
        try:
            with tarfile.open(root) as archive:
                archive.extractall(target, filter="data")
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"cannot unpack {data!r} ({error}); give a tar file or a folder") from error
        root = target
    while len(inside := list(root.iterdir())) == 1 and inside[0].is_dir():
        root = inside[0]  # archives often wrap everything in one folder
    if not photo_files(root):
        raise DataError(f"found no images in class folders under {data!r}; give a folder of class folders")
    return root


def photo_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.suffix.lower() in SUFFIXES)


def shared_file(options: VsOptions, folder: Path, scratch: Path, say: Callable[[str], object]) -> Path:
    """The one file that both peers read; each photograph is in it ``copies`` times under another name."""
    import fastload

    many = scratch / "many"
    for file in photo_files(folder):
        for copy in range(options.copies):
            target = many / file.parent.name / f"{copy}-{file.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:  # another file system, or links not allowed
                shutil.copyfile(file, target)
    say("convert the file that both read")
    path = scratch / "shared.beton"
    fastload.convert(
        many,
        path,
        max_side=500,
        quality=90,
        store="jpeg",
        reencode="always",
        workers=options.threads,
        progress=False,
    )
    return path


def train_rounds(
    options: VsOptions, path: Path, say: Callable[[str], object]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Alternating rounds of whole epochs; the check of the work comes first and stops everything if it fails."""
    arguments = [str(path), options.threads, options.batch, options.size]
    cpu: dict[str, list[float]] = {name: [] for name in LOADERS}
    peak: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        peers = {name: stack.enter_context(PeerProcess(name)) for name in LOADERS}
        found = {}
        for name in LOADERS:
            say(f"{name}: check of the work")
            peers[name].ask(do="load", arguments=arguments)
            found[name] = peers[name].ask(do="check", images=CHECK_ROUNDS * options.images)
        check = compare_work(found["fastload"], found["ffcv"], options.size)
        compare_work(found["fastload-exact"], found["ffcv"], options.size)

        def job(name: str) -> Callable[[], float]:
            def run() -> float:
                answer = peers[name].ask(do="run", images=options.images)
                cpu[name].append(1000 * answer["cpu_s"] / answer["images"])
                peak[name] = answer["peak_bytes"] / 2**20
                return float(answer["images"] / answer["seconds"])

            return run

        series = interleave(
            {name: job(name) for name in LOADERS},
            rounds=options.rounds,
            progress=lambda name: say(f"{name}: load"),
        )
    result: dict[str, Any] = {name: series[name].to_json() for name in LOADERS}
    for name in LOADERS:
        kept = Series(name, tuple(cpu[name][-options.rounds :]), "CPU s per 1,000 images")
        result[name]["cpu_s_per_1000"] = kept.to_json()
        result[name]["peak_mib"] = round(peak[name], 1)
    result["ratio"] = ratio(series["fastload"], series["ffcv"]).to_json()
    result["ratio_exact"] = ratio(series["fastload-exact"], series["ffcv"]).to_json()
    result["notes"] = noise_notes(series.values())
    return result, check


def compare_work(ours: dict[str, Any], theirs: dict[str, Any], size: int) -> dict[str, Any]:
    """DataError unless both gave the same shape, dtype, labels, and on average the same picture."""
    import numpy as np

    for answer, name in ((ours, "fastload"), (theirs, "ffcv")):
        if answer["shapes"] != [[size, size, 3]] or answer["dtypes"] not in (["uint8"], ["torch.uint8"]):
            raise DataError(
                f"{name} gave {answer['shapes']} {answer['dtypes']} instead of ({size}, {size}, 3) uint8"
            )
    if ours["labels"] != theirs["labels"]:
        raise DataError(
            "the two loaders did not give the same labels in an epoch, so their speed is not compared"
        )
    a, b = np.array(ours["mean_picture"]), np.array(theirs["mean_picture"])
    worst, mean = float(np.abs(a - b).max()), float(np.abs(a.mean((0, 1)) - b.mean((0, 1))).max())
    contrast = abs(ours["contrast"] / theirs["contrast"] - 1)
    if worst > CELL_TOLERANCE or mean > MEAN_TOLERANCE or contrast > CONTRAST_TOLERANCE:
        raise DataError(
            f"the mean pictures differ (worst cell {worst:.1f} levels, mean {mean:.1f}, contrast {contrast:.0%}), "
            "so the loaders do not do the same work and no speed is shown"
        )
    return {
        "passed": True,
        "worst_cell_levels": round(worst, 2),
        "mean_levels": round(mean, 2),
        "contrast_difference": round(contrast, 4),
        "images": ours["images"],
    }


def first_batch_rounds(options: VsOptions, path: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Fresh process each time, kernels cached; the clock runs from making the loader to its first batch."""
    arguments = [str(path), options.threads, options.batch, options.size]

    def job(name: str) -> Callable[[], float]:
        def run() -> float:
            with PeerProcess(name) as peer:
                peer.ask(do="import")
                return float(peer.ask(do="first_batch", arguments=arguments)["seconds"])

        return run

    series = interleave(
        {name: job(name) for name in PAIR},
        rounds=MIN_ROUNDS,
        unit="s",
        progress=lambda name: say(f"{name}: start to first batch"),
    )
    result: dict[str, Any] = {name: series[name].to_json() for name in PAIR}
    result["ratio"] = ratio(series["ffcv"], series["fastload"]).to_json()  # how many times sooner we are
    return result


def convert_rounds(
    options: VsOptions,
    peers: dict[str, PeerProcess],
    folder: Path,
    scratch: Path,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """The folder into a .beton, alternating, both with the same number of workers and the same options."""
    cpu: dict[str, list[float]] = {name: [] for name in PAIR}
    size: dict[str, int] = {}
    expected = len(photo_files(folder))

    def job(name: str) -> Callable[[], float]:
        def run() -> float:
            target = scratch / f"{name}.beton"
            answer = peers[name].ask(
                do="convert", source=str(folder), target=str(target), threads=options.threads
            )
            if answer["images"] != expected:
                raise DataError(
                    f"{name} wrote {answer['images']} of {expected} images, so its speed is not shown"
                )
            cpu[name].append(1000 * answer["cpu_s"] / answer["images"])
            size[name] = answer["bytes"]
            target.unlink()
            return float(answer["images"] / answer["seconds"])

        return run

    series = interleave(
        {name: job(name) for name in PAIR},
        rounds=options.rounds,
        progress=lambda name: say(f"{name}: convert"),
    )
    result: dict[str, Any] = {name: series[name].to_json() for name in PAIR}
    for name in PAIR:
        kept = Series(name, tuple(cpu[name][-options.rounds :]), "CPU s per 1,000 images")
        result[name]["cpu_s_per_1000"] = kept.to_json()
        result[name]["bytes"] = size[name]
    result["ratio"] = ratio(series["fastload"], series["ffcv"]).to_json()
    result["notes"] = noise_notes(series.values())
    return result


def claims(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The three claims beside what was measured; ratios are medians of the ratios within a round."""
    measured = {
        "train": record["train"]["ratio"]["median"],
        "convert": record["convert"]["ratio"]["median"],
        "first_batch_s": record["first_batch"]["fastload"]["median"],
    }
    return {
        name: {
            "claim": CLAIMS[name],
            "measured": value,
            "holds": value <= CLAIMS[name] if name.endswith("_s") else value >= CLAIMS[name],
        }
        for name, value in measured.items()
    }


def table(record: dict[str, Any]) -> str:
    """The record as a table for people."""
    return "\n".join(_lines(record))


def _lines(record: dict[str, Any]) -> Iterator[str]:
    settings, env = record["settings"], record["environment"]
    yield f"{env['cpu']}, {env['cores']} cores, {settings['threads']} threads each, page cache {env.get('page_cache')}"
    yield f"check of the work: passed (worst cell {record['check']['worst_cell_levels']} levels of 255)"
    yield f"{'':<22}{'fastload':>26}{'FFCV':>26}{'ratio, per round':>26}"
    for key, title, unit in (
        ("train", "load, images/s", ""),
        ("convert", "convert, images/s", ""),
        ("first_batch", "first batch, s", ""),
    ):
        row = record[key]
        cells = "".join(f"{_cell(row[name]) + unit:>26}" for name in PAIR)
        yield f"{title:<22}{cells}{_cell(row['ratio']):>26}"
    for key, title in (("train", "load, CPU s/1,000"), ("convert", "convert, CPU s/1,000")):
        cells = "".join(f"{_cell(record[key][name]['cpu_s_per_1000']):>26}" for name in PAIR)
        yield f"{title:<22}{cells}"
    exact = record["train"]["fastload-exact"]
    yield f"{'load exact, images/s':<22}{_cell(exact):>26}{'':>26}{_cell(record['train']['ratio_exact']):>26}"
    yield f"{'load exact, CPU s/1,000':<22}{_cell(exact['cpu_s_per_1000']):>25}"
    yield f"{'load, peak MiB':<22}" + "".join(f"{record['train'][name]['peak_mib']:>26,.0f}" for name in PAIR)
    yield f"{'converted, MiB':<22}" + "".join(
        f"{record['convert'][name]['bytes'] / 2**20:>26,.1f}" for name in PAIR
    )
    for name, claim in record["claims"].items():
        verb = "holds" if claim["holds"] else "DOES NOT HOLD"
        bound = "at most" if name.endswith("_s") else "at least"
        yield f"claim {name}: {bound} {claim['claim']}, measured {claim['measured']:.2f}: {verb}"
    for note in record["train"]["notes"] + record["convert"]["notes"]:
        yield f"note: {note}"


def _cell(row: dict[str, Any]) -> str:
    digits = 0 if row["median"] >= 100 else 2
    return f"{row['median']:,.{digits}f} [{row['min']:,.{digits}f}-{row['max']:,.{digits}f}]"


def markdown(record: dict[str, Any]) -> str:
    """The record as the README's table; a test holds the two together."""
    train, convert, first = record["train"], record["convert"], record["first_batch"]
    rows = [
        ("train crops, images/s", train["fastload"], train["ffcv"], train["ratio"]),
        ('the same with `decode="exact"`', train["fastload-exact"], train["ffcv"], train["ratio_exact"]),
        ("`convert`, images/s", convert["fastload"], convert["ffcv"], convert["ratio"]),
        ("loader made to first batch, s", first["fastload"], first["ffcv"], first["ratio"]),
    ]
    lines = ["| | fastload | FFCV 1.0.2 | ratio, round by round |", "|---|---|---|---|"]
    lines += [f"| {name} | {_cell(a)} | {_cell(b)} | **{_cell(r)}** |" for name, a, b, r in rows]
    cpu = [_cell(train[name]["cpu_s_per_1000"]) for name in PAIR]
    lines.append(f"| CPU seconds per 1,000 train crops | {cpu[0]} | {cpu[1]} | |")
    lines.append(
        f"| peak memory, MiB (file pages included) | {train['fastload']['peak_mib']:,.0f} | {train['ffcv']['peak_mib']:,.0f} | |"
    )
    return "\n".join(lines)
