"""How one workload is measured: which peers can do it, the check of their work, the rounds, and a row for each that came through.

Every kind of measurement goes the same way: start the peers, check each, measure in turns. A peer that fails on the way gets one
sentence and leaves. The trade-off of checking first: a minute or so that shows no figure.

>>> runner.measure(WORKLOADS["train500"], photos.get("500")).rows[0]["figure"]["median"]
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fastload.benchmarks import machine, reference
from fastload.benchmarks.compare_options import CompareOptions
from fastload.benchmarks.environments import Environment
from fastload.benchmarks.harness import Series, interleave, noise_notes, ratio
from fastload.benchmarks.peers import peer_class
from fastload.benchmarks.peers.base import Conversion, Work
from fastload.benchmarks.photos import QUALITY, SIDE, ImageSet, Photos
from fastload.benchmarks.process import PeerProcess
from fastload.benchmarks.workloads import Workload, make_work, thread_counts
from fastload.errors import DataError, FastloadError
from fastload.system import usable_cores

# A peer is not started where less than this is left: the system would end some process, and perhaps a peer that was measured.
LEAST_FREE = 3 << 29
LONGEST_REASON = 400
GIB = 1 << 30


@dataclass(frozen=True)
class Failed:
    """A peer without a figure, and why."""

    peer: str
    reason: str


@dataclass
class Measurement:
    """Rows of a record, best first; peers that failed; what else should be known."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fail(self, peer: str, error: FastloadError | str) -> None:
        self.failed.append(Failed(peer, " ".join(str(error).split())[:LONGEST_REASON]))


@dataclass
class Entry:
    """What is known of one peer while it is measured; cost lists have one value a round, warm-up included."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)
    cpu: list[float] = field(default_factory=list)
    peak: float = 0.0
    mapped: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def cost(self, answer: dict[str, Any]) -> None:
        self.cpu.append(1000 * answer["cpu_s"] / answer["images"])
        self.peak = max(self.peak, answer.get("peak_bytes", 0) / 2**20)
        self.mapped = max(self.mapped, answer.get("mapped_bytes", 0) / 2**20)


class Runner:
    """Measures workloads with the peers that have an environment; ``absent`` says why the others have none."""

    def __init__(
        self,
        options: CompareOptions,
        photos: Photos,
        found: dict[str, Environment],
        absent: dict[str, str],
        scratch: Path,
        say: Callable[[str], object],
    ) -> None:
        self.o, self.photos, self.found, self.absent = options, photos, found, absent
        self.scratch, self.say = scratch, say
        self._expected: dict[tuple[Any, ...], reference.Expected] = {}

    def measure(self, workload: Workload, pictures: ImageSet) -> Measurement:
        """One workload; whatever a peer does, the others' figures stay."""
        result = Measurement()
        able = list(self._able(workload, result))
        if workload.kind == "threads":
            for count in thread_counts(usable_cores()):
                self._rate(workload, pictures, able, count, result)
            result.failed = list(dict.fromkeys(result.failed))
            result.notes.append(
                "thread counts were measured one after another, the peers of one count in turns"
            )
        elif workload.kind == "rate":
            self._rate(workload, pictures, able, self.o.thread_count, result)
        else:
            {"start": self._start, "convert": self._convert, "memory": self._memory}[workload.kind](
                workload, pictures, able, result
            )
        return result

    def _able(self, workload: Workload, result: Measurement) -> Iterator[str]:
        for name in self.o.peers:
            peer = peer_class(name)
            if name in self.absent:
                result.fail(name, self.absent[name])
            elif workload.kind == "convert":
                if peer.converts:
                    yield name
                else:
                    result.fail(name, f"{peer.title} has no conversion to compare")
            elif workload.store not in peer.stores:
                result.fail(
                    name,
                    f"{peer.title} does not read {'decoded pixels' if workload.store == 'raw' else 'JPEG'}",
                )
            elif workload.crop not in peer.crops:
                result.fail(name, f"{peer.title} does not make this crop ({workload.crop!r})")
            else:
                yield name

    # ---- steps that all kinds share ----

    def _process(self, name: str) -> PeerProcess:
        return PeerProcess(name, python=self.found[name].python, timeout=self.o.timeout)

    def _work(self, workload: Workload, pictures: ImageSet, name: str, threads: int) -> Work:
        folder = self.scratch / name.replace(":", "-") / pictures.name
        return make_work(workload, pictures, folder, threads=threads, batch=self.o.batch)

    def _ready(self, entry: Entry, process: PeerProcess, work: Work, pictures: ImageSet) -> None:
        """Import, prepare, load, and the check of the work; DataError if anything of it is wrong."""
        self.say(f"{entry.name}: prepare")
        entry.facts = process.ask(do="import")
        process.ask(do="prepare", work=work.to_json())
        process.ask(do="load", work=work.to_json())
        self.say(f"{entry.name}: check of the work")
        want = self._expect(work, pictures, peer_class(entry.name).crops[work.crop])
        images = 1 if work.crop == "eval" else max(reference.CHECK_IMAGES, len(want.labels))  # whole epochs
        entry.check = reference.check_work(want, process.ask(do="check", images=images))

    def _expect(self, work: Work, pictures: ImageSet, filter: str) -> reference.Expected:
        key = (pictures.name, work.crop, work.size, "not antialiased" in filter)
        if key not in self._expected:
            self.say("the expected pictures, by Pillow")
            self._expected[key] = reference.expected(
                pictures.sources, pictures.labels, work, filter, threads=usable_cores()
            )
        return self._expected[key]

    @contextmanager
    def _alive(
        self, workload: Workload, pictures: ImageSet, able: list[str], threads: int, result: Measurement
    ) -> Iterator[dict[str, tuple[Entry, PeerProcess]]]:
        """All peers that passed the check, each in its stopped process."""
        alive: dict[str, tuple[Entry, PeerProcess]] = {}
        with ExitStack() as stack:
            before = machine.available_bytes()
            for name in able:
                free = machine.available_bytes()
                if free is not None and free < LEAST_FREE:
                    result.fail(
                        name,
                        f"only {free / GIB:.1f} GiB of memory were free at its turn; compare fewer peers at once",
                    )
                    continue
                entry = Entry(name)
                try:
                    process = stack.enter_context(self._process(name))
                except FastloadError as error:
                    result.fail(name, error)
                    continue
                try:
                    self._ready(entry, process, self._work(workload, pictures, name, threads), pictures)
                except FastloadError as error:
                    result.fail(name, error)
                    process.close()
                else:
                    alive[name] = (entry, process)
            after = machine.available_bytes()
            if len(alive) > 1 and before is not None and after is not None:
                result.notes.append(
                    f"{len(alive)} peers were alive at once and held about {max(0, before - after) / GIB:.1f} GiB; "
                    f"{after / GIB:.1f} GiB were free"
                )
            yield alive

    def _turns(
        self,
        workload: Workload,
        jobs: dict[str, Callable[[], float]],
        result: Measurement,
        leave: Callable[[str], object] = lambda name: None,
        warmup: int = 1,
    ) -> dict[str, Series]:
        """Rounds of all jobs; one that fails is named, left with ``leave``, and the others go on."""
        if not jobs:
            return {}

        def drop(name: str, error: FastloadError) -> None:
            result.fail(name, error)
            leave(name)

        return interleave(
            jobs,
            rounds=self.o.rounds,
            warmup=warmup,
            unit=workload.unit,
            progress=lambda name: self.say(f"{name}: {workload.name}"),
            on_error=drop,
        )

    def _add_rows(
        self,
        workload: Workload,
        entries: dict[str, Entry],
        series: dict[str, Series],
        threads: int,
        result: Measurement,
    ) -> None:
        """A row for each series, best first; ratios say how many times as good as the baseline in the same round."""
        base = series.get(self.o.baseline_name)
        lower = workload.better == "lower"
        rows = []
        for name, figure in series.items():
            peer, entry = peer_class(name), entries[name]
            beside = None
            if base is not None and base.n == figure.n and workload.kind != "memory":
                beside = ratio(base, figure) if lower else ratio(figure, base)
            cpu = (
                Series(name, tuple(entry.cpu[-self.o.rounds :]), "CPU s per 1,000 images")
                if entry.cpu
                else None
            )
            rows.append(
                {
                    "peer": name,
                    "title": peer.title,
                    "filter": "none" if workload.kind == "convert" else peer.crops[workload.crop],
                    "figure": figure.to_json(),
                    "ratio": beside.to_json() if beside else None,
                    "cpu_s_per_1000": cpu.to_json() if cpu else None,
                    "peak_mib": round(entry.peak, 1) if entry.peak else None,
                    "settings": peer.settings,
                    "versions": entry.facts.get("versions", {}),
                    "python": entry.facts.get("python", ""),
                    "threads": threads,
                    "check": entry.check,
                    "extra": {
                        **entry.extra,
                        **({"mapped_mib": round(entry.mapped, 1)} if entry.mapped else {}),
                    },
                }
            )
        rows.sort(key=lambda row: row["figure"]["median"], reverse=not lower)
        result.rows += rows
        if workload.kind != "memory":  # its figures are one run's epochs, not rounds of the same
            result.notes += noise_notes(
                Series(peer_class(name).title, figure.rounds, figure.unit) for name, figure in series.items()
            )

    # ---- the kinds ----

    def _rate(
        self, workload: Workload, pictures: ImageSet, able: list[str], threads: int, result: Measurement
    ) -> None:
        with self._alive(workload, pictures, able, threads, result) as alive:

            def job(entry: Entry, process: PeerProcess) -> Callable[[], float]:
                def run() -> float:
                    answer = process.ask(do="run", images=max(1, round(workload.share * self.o.images)))
                    entry.cost(answer)
                    return float(answer["images"] / answer["seconds"])

                return run

            jobs = {name: job(*pair) for name, pair in alive.items()}
            series = self._turns(workload, jobs, result, lambda name: alive[name][1].close())
            entries = {name: entry for name, (entry, _) in alive.items()}
        self._add_rows(workload, entries, series, threads, result)

    def _start(self, workload: Workload, pictures: ImageSet, able: list[str], result: Measurement) -> None:
        entries, threads = {}, self.o.thread_count
        for name in able:
            entry = Entry(name, seconds={"process": [], "import": [], "loader": []})
            try:
                with self._process(name) as process:  # writes its own format and warms the caches
                    self._ready(entry, process, self._work(workload, pictures, name, threads), pictures)
            except FastloadError as error:
                result.fail(name, error)
            else:
                entries[name] = entry

        def job(entry: Entry) -> Callable[[], float]:
            work = self._work(workload, pictures, entry.name, threads).to_json()

            def run() -> float:
                clock = time.perf_counter()
                with self._process(entry.name) as process:
                    imported = process.ask(do="import")["seconds"]
                    first = process.ask(do="first_batch", work=work)["seconds"]
                    whole = time.perf_counter() - clock
                for part, seconds in (
                    ("process", whole - imported - first),
                    ("import", imported),
                    ("loader", first),
                ):
                    entry.seconds[part].append(seconds)
                return whole

            return run

        series = self._turns(workload, {name: job(entry) for name, entry in entries.items()}, result)
        for name in series:
            for part, seconds in entries[name].seconds.items():
                entries[name].extra[f"{part}_s"] = round(median(seconds[-self.o.rounds :]), 3)
        self._add_rows(workload, entries, series, threads, result)

    def _convert(self, workload: Workload, pictures: ImageSet, able: list[str], result: Measurement) -> None:
        threads = self.o.thread_count
        with ExitStack() as stack:
            alive: dict[str, tuple[Entry, PeerProcess]] = {}
            jobs = {}
            for name in able:
                self.say(f"{name}: check of the conversion")
                entry = Entry(name)
                try:
                    process = stack.enter_context(self._process(name))
                    entry.facts = process.ask(do="import")
                    jobs[name] = job = self._conversion(entry, process, pictures, threads)
                    job()  # the check; it warms up too
                except FastloadError as error:
                    result.fail(name, error)
                    jobs.pop(name, None)
                else:
                    alive[name] = (entry, process)
            series = self._turns(workload, jobs, result, lambda name: alive[name][1].close(), warmup=0)
        self._add_rows(workload, {name: entry for name, (entry, _) in alive.items()}, series, threads, result)

    def _conversion(
        self, entry: Entry, process: PeerProcess, pictures: ImageSet, threads: int
    ) -> Callable[[], float]:
        folder = self.scratch / entry.name.replace(":", "-") / "converted"
        target = folder / "images.beton"
        job = Conversion(pictures.folder, str(target), threads, SIDE, QUALITY)

        def run() -> float:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            answer = process.ask(do="convert", job=asdict(job))
            if answer["images"] != len(pictures.labels):
                raise DataError(f"it wrote {answer['images']:,} of {len(pictures.labels):,} images")
            if not entry.check:  # the first time, before any speed
                right = reference.Sources([item.path for item in self.photos.encoded])
                entry.check = reference.check_file(target, right, pictures.labels, SIDE)
            shutil.rmtree(folder, ignore_errors=True)
            entry.cost(answer)
            entry.extra["bytes"] = answer["bytes"]
            return float(answer["images"] / answer["seconds"])

        return run

    def _memory(self, workload: Workload, pictures: ImageSet, able: list[str], result: Measurement) -> None:
        entries, series, threads = {}, {}, self.o.thread_count
        for name in able:
            entry = Entry(name)
            try:
                with self._process(name) as process:
                    self._ready(entry, process, self._work(workload, pictures, name, threads), pictures)
                    self.say(f"{name}: {self.o.epochs} epochs")
                    answer = process.ask(do="epochs", count=self.o.epochs)
            except FastloadError as error:
                result.fail(name, error)
                continue
            entry.cost(answer)
            held = answer["mib_by_epoch"]
            tenth = max(1, len(held) // 10)
            entry.extra = {
                "mib_by_epoch": held,
                # From the second tenth on, when every buffer has been made, to the last.
                "growth_mib": round(median(held[-tenth:]) - median(held[tenth : 2 * tenth] or held[:1]), 1),
            }
            entries[name], series[name] = entry, Series(name, tuple(held), workload.unit)
        self._add_rows(workload, entries, series, threads, result)
