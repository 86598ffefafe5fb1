"""Peers on the same work: each checked, then measured in rounds that take turns, and nobody's failure is another's.

Every peer has its own process, stopped while another has its turn. A peer that is missing, crashes, takes too long or does other
work than asked is named with one sentence and no figure; the others' figures stay. The trade-off: all peers of a workload are
alive at once, which takes memory, and a peer for which none is left is named too.

>>> records = run("photos.tar", "cpu,ffcv,torch", "train500,eval", out="results.jsonl")
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastload.benchmarks import environments, machine
from fastload.benchmarks.compare_measure import Failed, Measurement, Runner
from fastload.benchmarks.compare_options import CompareOptions, names
from fastload.benchmarks.environments import Environment
from fastload.benchmarks.harness import MIN_ROUNDS, write_jsonl
from fastload.benchmarks.peers import PEERS
from fastload.benchmarks.photos import Photos
from fastload.benchmarks.workloads import WORKLOADS, Workload
from fastload.errors import DataError, FastloadError

__all__ = ["CompareOptions", "compare", "run"]

Say = Callable[[str], object]


def run(
    data: str | os.PathLike[str],
    peers: str = "cpu,ffcv",
    workloads: str = "train500",
    *,
    baseline: str | None = None,
    rounds: int = MIN_ROUNDS,
    images: int = 1000,
    threads: int | None = None,
    batch_size: int = 64,
    install: bool = False,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    done: Callable[[dict[str, Any]], object] | None = None,
) -> list[dict[str, Any]]:
    """Compare ``peers`` on ``workloads`` (comma-separated names, or "all") and return one record a workload.

    Each record is appended to ``out`` and handed to ``done`` as soon as its workload is done. UsageError for a wrong name or option, before anything
    runs; DataError where ``data`` holds no pictures.
    """
    from tqdm.auto import tqdm

    options = CompareOptions(
        os.fspath(data),
        names(peers, PEERS),
        names(workloads, WORKLOADS),
        baseline=baseline,
        rounds=rounds,
        images=images,
        threads=threads,
        batch=batch_size,
        install=install,
    )
    if out is not None:
        write_jsonl(
            os.fspath(out), []
        )  # a file that cannot be written is said now, and not after the first workload
    records = []
    with tqdm(desc="compare", unit="job", disable=not progress, leave=False) as bar:

        def say(text: str) -> None:
            bar.set_postfix_str(text)
            bar.update(1)

        for record in compare(options, say):
            records.append(record)
            if out is not None:
                write_jsonl(os.fspath(out), [record])
            if done is not None:
                bar.clear()
                done(record)
    return records


def compare(options: CompareOptions, progress: Say | None = None) -> Iterator[dict[str, Any]]:
    """The records of the workloads, in the order of ``options``, each when its workload is done."""
    say = progress or (lambda text: None)
    found, absent = _environments(options, say)
    with tempfile.TemporaryDirectory(prefix="fastload-compare-") as scratch:
        photos = Photos(
            options.data,
            Path(scratch),
            images=2 * options.images,
            copies=options.copies,
            small_images=options.small_images,
            subset_images=options.subset_images,
            threads=options.thread_count,
            say=say,
        )
        runner = Runner(options, photos, found, absent, Path(scratch) / "peers", say)
        for name in options.workloads:
            yield _record(options, photos, runner, WORKLOADS[name])


def _environments(options: CompareOptions, say: Say) -> tuple[dict[str, Environment], dict[str, str]]:
    """Where each peer runs, and why some cannot."""
    found: dict[str, Environment] = {}
    absent: dict[str, str] = {}
    for name in options.peers:
        say(f"{name}: look for its library")
        try:
            found[name] = environments.install(name, say) if options.install else environments.locate(name)
        except FastloadError as error:
            absent[name] = str(error)
    return found, absent


def _record(options: CompareOptions, photos: Photos, runner: Runner, workload: Workload) -> dict[str, Any]:
    """One workload from its pictures to its record; where its pictures cannot be made, all peers failed."""
    started = time.perf_counter()
    record: dict[str, Any] = {
        "kind": "compare",
        "workload": workload.name,
        "what": workload.what,
        "unit": workload.unit,
        "better": workload.better,
        "baseline": options.baseline_name,
    }
    settings: dict[str, Any] = {
        "data": os.path.basename(os.path.abspath(options.data)),
        "rounds": options.rounds,
        "images_per_round": options.images,
        "threads": options.thread_count,
        "batch": workload.batch or options.batch,
        "peers": list(options.peers),
    }
    notes = list(photos.notes)
    environment = machine.environment()
    try:
        pictures = photos.get(workload.pictures)
    except DataError as error:
        result = Measurement(failed=[Failed(name, str(error)) for name in options.peers])
    else:
        settings |= pictures.settings()
        cache = pictures.warm()
        result = runner.measure(workload, pictures)
        environment = machine.environment(pictures.beton or None)
        environment["page_cache"] = cache
        notes += pictures.notes
    notes += result.notes
    if options.baseline_name in {failed.peer for failed in result.failed}:
        notes.append(f"the baseline {options.baseline_name} has no figure here, so there are no ratios to it")
    record["rows"] = result.rows
    record["failed"] = [{"peer": failed.peer, "reason": failed.reason} for failed in result.failed]
    record |= {"settings": settings, "environment": environment, "notes": notes}
    record["seconds"] = round(time.perf_counter() - started, 1)
    return record
