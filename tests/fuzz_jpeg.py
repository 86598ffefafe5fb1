"""Fuzz the JPEG crop kernels: damaged files by the hundred thousand, each decoded twice over different poison.

A case is a number: with the seed it says which file is damaged, how, and which windows are asked for. Checked is that both runs
agree to the byte (nothing shows memory that is not the picture's), that all guard bytes stand, that the time is bounded, and that
a status of OK comes with libjpeg-turbo's picture. Cases run in child processes, which write the number down first, so that a
crash or a hang names its case. The price of such structure: mutations that nobody thought of are only the random bytes.

>>> python tests/fuzz_jpeg.py --cases 200000 --seed 0 --minutes 10
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from jpeg_damage import mutate, pick, seeds
from PIL import Image

from fastload.kernels import batch as batch_kernel
from fastload.kernels import crops, decode, jpeg, oracle
from fastload.kernels.jit import kernel

CORPUS = Path(__file__).with_name("corpus") / "jpeg.zip"
GUARD = 256
LEVELS = 3  # largest difference from libjpeg-turbo: rounding of the chroma's upsampling, and of the colours
WINDOW_LEVELS = 1  # a window at the edge may get by with fewer taps, and so round otherwise
WILD = 2048  # dequantised coefficients beyond this overflow the 16 bits of libjpeg-turbo's vector code
MOST_PIXELS = 1 << 18  # larger pictures are only looked at through windows
MOST_SCRATCH = 1 << 22
STALL = 180  # seconds without a new case that count as a hang; compiling has to fit in
SLOW = 1.0  # seconds of CPU for one call


@kernel
def crop_to(data, height, width, box, clip, flips, out, work, scratch, need):
    """Into the inner part of ``out`` (h + 2, w + 2, 3); sliced here, where a single row does not change its type."""
    clock = np.zeros((2, 0), np.int64)
    return crops.crop_to(data, height, width, box, clip, flips, out[1:-1, 1:-1], work, scratch, need, clock)


# ---- what each case must fulfil


class Outcome(NamedTuple):
    """What came of a case: statuses of its calls, OK against libjpeg-turbo, the longest call, and what is wrong."""

    statuses: tuple[int, int, int]
    compared: str
    seconds: float
    wrong: str


class Memory:
    """A thread's memory with guards before and behind each piece, and poison in what it need not keep."""

    def __init__(self) -> None:
        work = decode.new_work()
        self._coefficients = np.zeros((len(work.coefficients) + 8, 64), np.int16)
        self.work = work._replace(coefficients=self._coefficients[4:-4])
        self._mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)  # glibc has it
        self._scratch = np.empty(0, np.uint8)

    def poison(self, sentinel: int, size: int) -> np.ndarray:
        """Poison all but the Huffman tables, and what the C library hands out; returns ``size`` bytes of scratch."""
        self._mallopt(-6, sentinel)  # M_PERTURB
        self._coefficients.view(np.uint8)[:] = sentinel
        self.work.jobs[:] = -sentinel
        for array in self.work.header:
            array.view(np.uint8)[:] = sentinel
        if len(self._scratch) < size + 2 * GUARD:
            self._scratch = np.empty(size + 2 * GUARD, np.uint8)
        self._used = self._scratch[: size + 2 * GUARD]
        self._used[:] = sentinel
        return self._used[GUARD:-GUARD]

    def intact(self, sentinel: int) -> bool:
        """Whether no guard was written to; the C library's memory is left in peace again."""
        self._mallopt(-6, 0)
        pieces = (
            self._used[:GUARD],
            self._used[-GUARD:],
            *(self._coefficients.view(np.uint8)[s] for s in (slice(4), slice(-4, None))),
        )
        return all((piece == sentinel).all() for piece in pieces)


class Wrong(Exception):
    """A case that breaks a promise of the kernel."""


class Checker:
    """Runs crops over poison; ``seconds`` is the longest call."""

    def __init__(self) -> None:
        self.memory, self.seconds = Memory(), 0.0
        for batch in (False, True):  # compiling takes its time here, not in a case
            self.crop(seeds()[0], (8, 8), (0, 0, 8, 8), (0, 0, 8, 8), (8, 8), batch=batch)
        self.seconds = 0.0

    def crop(self, data, shape, box, clip, size, flips=0, batch=False):
        """(status, pixels) of a crop, by ``crop_to`` or as the middle row of a batch by ``fill``."""
        room, results = 1 << 16, []
        while True:
            results = [
                self._once(data, shape, box, clip, size, flips, sentinel, room, batch)
                for sentinel in (0x55, 0xAA)
            ]
            if results[0][0] != results[1][0] or results[0][2] != results[1][2]:
                raise Wrong(f"status {results[0][0]} over one poison, {results[1][0]} over the other")
            if results[0][0] != crops.MORE_SCRATCH or results[0][2] > MOST_SCRATCH:
                break
            if results[0][2] <= room:
                raise Wrong(f"asks for {results[0][2]} bytes of scratch, has {room}")
            room = results[0][2]
        status = results[0][0]
        if status not in (crops.OK, *crops.REASONS):
            raise Wrong(f"an unknown status, {status}")
        if status == crops.OK and not np.array_equal(results[0][1], results[1][1]):
            raise Wrong("shows memory that is not the picture's")
        if status != crops.OK and not all((r[1] == s).all() for r, s in zip(results, (0x55, 0xAA))):
            raise Wrong(f"wrote pixels with status {status}")
        return status, results[0][1]

    def _once(self, data, shape, box, clip, size, flips, sentinel, room, batch):
        scratch, need = self.memory.poison(sentinel, room), np.zeros(1, np.int64)
        file = np.full(len(data) + 2 * GUARD, sentinel, np.uint8)
        file[GUARD : GUARD + len(data)] = np.frombuffer(data, np.uint8)
        file.setflags(write=False)  # as a mapped file is
        out = np.full((3, size[0] + 2, size[1] + 2, 3), sentinel, np.uint8)
        window = out[1, 1:-1, 1:-1]
        box, clip = np.array(box, np.float64), np.array(clip, np.int64)
        start = time.thread_time()
        if batch:
            rows = [np.array([v] * 3) for v in (GUARD, len(data), shape, (1, 1, *size), box, clip, flips)]
            statuses, colour = np.full(3, -1), np.full(3, sentinel, np.uint8)
            starts, sizes, shapes, place, box, clip, flips = rows
            background = batch_kernel.Paint(
                colour, np.zeros((0, 3), np.uint8), np.ones(3, np.float32), np.zeros(3, np.float32)
            )
            table = batch_kernel.Rows(
                place,
                box,
                clip,
                flips,
                np.zeros((0, 3, 7), np.float32),
                np.zeros(3, bool),
                np.zeros((3, 0, 4), np.int64),
            )
            batch_kernel.fill(
                file,
                np.array([1]),
                batch_kernel.Sources(starts, sizes, np.zeros(3, bool), shapes),
                table,
                background,
                out,
                np.zeros((0, *out.shape[1:]), np.float32),
                batch_kernel.Thread(self.memory.work, scratch, need),
                statuses,
                np.zeros((2, 0), np.int64),
            )
            if statuses[0] != -1 or statuses[2] != -1:
                raise Wrong("wrote the status of another row")
            status = int(statuses[1])
        else:
            status = int(
                crop_to(
                    file[GUARD : GUARD + len(data)],
                    *shape,
                    box,
                    clip,
                    flips,
                    out[1],
                    self.memory.work,
                    scratch,
                    need,
                )
            )
        self.seconds = max(self.seconds, time.thread_time() - start)
        pixels = window.copy()
        window[:] = sentinel
        if not (out == sentinel).all():
            raise Wrong("wrote outside of the output")
        if not self.memory.intact(sentinel):
            raise Wrong("wrote outside of scratch")
        return status, pixels, int(need[0]) if status == crops.MORE_SCRATCH else 0


def reference(data: bytes) -> tuple[np.ndarray | None, str]:
    """libjpeg-turbo's picture, (H, W, 3) uint8, None if it refuses, and the complaint that it came with.

    TurboJPEG's interface refuses more than the library: an unknown JFIF revision, an odd selector of a quantisation table.
    Pillow asks the library itself.
    """
    for strict in (True, False):
        try:
            picture = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=strict)
            return picture, "" if strict else ", with a complaint"
        except ValueError:
            pass
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB")), ", by Pillow"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None, ""


def unlike(ours: np.ndarray, theirs: np.ndarray, data: bytes) -> str:
    """Empty if two whole pictures are alike, ``"wild"`` if they differ only near blocks that overflow, else what differs."""
    difference = np.abs(ours.astype(int) - theirs).max(axis=2)
    if difference.max() <= LEVELS:
        return ""
    height, width = difference.shape
    near = np.zeros((height + 64, width + 64), bool)
    try:
        planes = oracle.jpeg_coefficients(data[: data.index(b"\xff\xd9", data.index(b"\xff\xda")) + 2])
    except (ValueError, LookupError, ArithmeticError) as error:
        return f"up to {difference.max()} levels, and the oracle cannot say why ({error!r})"
    most = [max(p.shape[axis] for p in planes) for axis in (0, 1)]
    for plane in planes:
        step_y, step_x = 8 * most[0] // plane.shape[0], 8 * most[1] // plane.shape[1]
        for y, x in zip(*np.nonzero(np.abs(plane).max(axis=(2, 3)) > WILD)):
            # With the neighbours' pixels, into which chroma is interpolated.
            near[
                max(0, y * step_y - 2) : (y + 1) * step_y + 2, max(0, x * step_x - 2) : (x + 1) * step_x + 2
            ] = True
    if (difference > LEVELS)[~near[:height, :width]].any():
        return (
            f"up to {difference[~near[:height, :width]].max()} levels in {(difference > LEVELS).sum()} pixels"
        )
    return "wild"


def check(data: bytes, rng, checker: Checker) -> Outcome:
    """All that is asked of one file; never raises."""
    checker.seconds = 0.0
    statuses, compared = [-1, -1, -1], "not OK"
    info, parsed = jpeg.parse(np.frombuffer(data, np.uint8))
    shape = (int(info[jpeg.HEIGHT]), int(info[jpeg.WIDTH])) if parsed == jpeg.OK else (24, 40)
    whole = (0, 0, *shape)
    try:
        # The whole picture at its size: chroma is then interpolated as libjpeg-turbo's "fancy upsampling" does.
        full = None
        if shape[0] * shape[1] <= MOST_PIXELS:
            statuses[0], full = checker.crop(data, shape, whole, whole, shape)
        # A window of it, at its size.
        y0, x0 = (int(rng.integers(0, n)) for n in shape)
        y1, x1 = (min(n, a + int(rng.integers(1, 64))) for n, a in zip(shape, (y0, x0)))
        flips = int(rng.integers(0, 4))
        statuses[1], window = checker.crop(data, shape, (y0, x0, y1, x1), whole, (y1 - y0, x1 - x0), flips)
        # Any box at any size, in a batch; one time in eight for a picture of another size than the file says.
        ys, xs = (np.sort(rng.uniform(0, n, 2)) for n in shape)
        box = (ys[0], xs[0], max(ys[1], ys[0] + 0.25), max(xs[1], xs[0] + 0.25))
        claimed = shape if rng.integers(0, 8) else (shape[0] + 1, shape[1])
        size = tuple(int(v) for v in rng.integers(1, 40, 2))
        statuses[2], _ = checker.crop(data, claimed, box, whole, size, int(rng.integers(0, 4)), batch=True)
        if claimed != shape and statuses[2] == crops.OK:
            raise Wrong("a picture of another size is OK")
        if statuses[0] == crops.OK and full is not None:
            compared = _compare(full, data)
            if statuses[1] not in (crops.OK, crops.MORE_SCRATCH):
                raise Wrong(f"the picture is OK, a window of it is not: {statuses[1]}")
            if statuses[1] == crops.OK:
                turned = window[:: -1 if flips & 2 else 1, :: -1 if flips & 1 else 1]
                if np.abs(turned.astype(int) - full[y0:y1, x0:x1]).max() > WINDOW_LEVELS:
                    raise Wrong("a window differs from the picture")
        if checker.seconds > SLOW:
            raise Wrong(f"took {checker.seconds:.1f} s")
    except Wrong as error:
        return Outcome(tuple(statuses), compared, checker.seconds, str(error))
    return Outcome(
        tuple(statuses), compared, checker.seconds, compared if compared.startswith("other") else ""
    )


def _compare(full: np.ndarray, data: bytes) -> str:
    theirs, how = reference(data)
    if theirs is None:
        return "other: libjpeg-turbo refuses it"
    if theirs.shape != full.shape:
        return f"other: its size is {theirs.shape}"
    difference = unlike(full, theirs, data)
    if difference == "wild":
        return "equal but for overflows" + how
    return f"other: {difference}{how}" if difference else "equal" + how


# ---- cases in child processes


def case(seed: int, number: int, pool: list[bytes]):
    """(generator, file) of a case."""
    rng = np.random.default_rng((seed, number))
    return rng, mutate(pick(rng, pool), rng, pool)


def work_through(seed: int, begin: int, end: int, until: float, folder: Path) -> None:
    """A child's part: one line of JSON for each outcome that is new or wrong, and a summary last."""
    pool, checker = seeds(), Checker()
    now = (folder / "now").open("r+")
    seen: Counter = Counter()
    slowest = (0.0, -1)
    number = begin
    for number in range(begin, end):
        now.seek(0)
        now.write(f"{number:>12}")
        now.flush()
        rng, data = case(seed, number, pool)
        outcome = check(data, rng, checker)
        slowest = max(slowest, (outcome.seconds, number))
        key = json.dumps([outcome.statuses, outcome.compared])
        if outcome.wrong or key not in seen:
            print(json.dumps({"case": number, "key": key, "wrong": outcome.wrong}), flush=True)
        seen[key] += 1
        if time.time() > until:
            break
    print(json.dumps({"begin": begin, "end": number + 1, "seen": seen, "slowest": slowest}), flush=True)


def run(cases: int, seed: int, minutes: float, batch: int = 5000) -> dict:
    """All cases; a summary, with the cases that are wrong and the first of each new outcome."""
    until = time.time() + 60 * minutes
    total: dict = {"cases": 0, "seen": Counter(), "slowest": (0.0, -1), "wrong": [], "first": {}}
    with tempfile.TemporaryDirectory() as folder:
        # A cache of its own: numba's beside the sources does not know when a function that was compiled in has changed.
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        now, begin = Path(folder) / "now", 0
        while begin < cases and time.time() < until:
            end = min(begin + batch, cases)
            now.write_text(str(begin))
            arguments = ["--child", str(seed), str(begin), str(end), str(until), folder]
            child = subprocess.Popen(
                [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, env=environment
            )
            output, stopped = _follow(child, now)
            for line in output.splitlines():
                record = json.loads(line)
                if "seen" in record:
                    total["cases"] += record["end"] - record["begin"]
                    total["seen"].update(record["seen"])
                    total["slowest"] = max(total["slowest"], tuple(record["slowest"]))
                    stopped = ""
                else:
                    total["first"].setdefault(record["key"], record["case"])
                    if record["wrong"]:
                        total["wrong"].append((record["case"], record["wrong"]))
                        print(f"case {record['case']}: {record['wrong']}", flush=True)
            if stopped:
                end = int(now.read_text()) + 1
                total["wrong"].append((end - 1, stopped))
                print(f"case {end - 1}: {stopped}", flush=True)
            begin = end
            print(f"{begin:,} cases, {len(total['wrong'])} wrong", file=sys.stderr, flush=True)
    return total


def _follow(child, now: Path) -> tuple[str, str]:
    """A child's output, and how it ended if not by itself: a crash or a hang."""
    last, since = None, time.time()
    while True:
        try:
            output, _ = child.communicate(timeout=5)
            return output, f"crashed with exit code {child.returncode}"
        except subprocess.TimeoutExpired:
            text = now.read_text()
            if text != last:
                last, since = text, time.time()
            elif time.time() - since > STALL:
                child.kill()
                return child.communicate()[0], f"hangs for more than {STALL} s"


def write_corpus(path: Path, seed: int, numbers: list[int], limit: int = 150_000) -> None:
    """The files of some cases as a zip, those of fewest bytes first, up to ``limit`` bytes; names are seed and case."""
    pool = seeds()
    files = sorted(((case(seed, n, pool)[1], n) for n in numbers), key=lambda f: len(f[0]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for data, number in files:
            if archive.fp.tell() + len(data) > limit:
                break
            archive.writestr(zipfile.ZipInfo(f"{seed}-{number}.jpg"), data, zipfile.ZIP_DEFLATED)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--corpus", type=Path, help="write the first case of each outcome to this zip file")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        seed, begin, end, until, folder = options.child
        work_through(int(seed), int(begin), int(end), float(until), Path(folder))
        return 0
    start = time.time()
    total = run(options.cases, options.seed, options.minutes)
    if options.corpus:
        numbers = {*total["first"].values(), *(n for n, _ in total["wrong"])}
        write_corpus(options.corpus, options.seed, sorted(numbers))
    names = {crops.OK: "OK", -1: "not asked", crops.UNSUPPORTED: "not supported", **crops.REASONS}
    statuses, compared = Counter(), Counter()
    for key, count in total["seen"].items():
        kinds, how = json.loads(key)
        statuses[names[kinds[0]]] += count
        compared[how.split(":")[0]] += count
    summary = {
        "cases": total["cases"],
        "seed": options.seed,
        "seconds": round(time.time() - start),
        "whole_picture": dict(statuses.most_common()),
        "against_libjpeg_turbo": dict(compared.most_common()),
        "slowest_call_cpu_s": round(total["slowest"][0], 4),
        "slowest_case": total["slowest"][1],
        "wrong": total["wrong"],
    }
    print(json.dumps(summary, indent=2))
    return 1 if total["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
