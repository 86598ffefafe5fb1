"""Does it matter for a model which loader decoded its images? ``python -m fastload.benchmarks accuracy DATA``.

The same small model is trained from the same first weights on FFCV's crops and on fastload's, each arm in a process of its own,
several seeds each, and scored on the validation images as the same loader cuts them. The split keeps groups apart. The trade-off:
three seeds of a small model see a difference of about two points, not of a tenth.

>>> python -m fastload.benchmarks accuracy face_masks.beton --out accuracy.jsonl
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastload.benchmarks import environments, machine
from fastload.benchmarks.accuracy_arm import Training
from fastload.benchmarks.harness import write_jsonl
from fastload.benchmarks.peers import make
from fastload.benchmarks.process import PeerProcess
from fastload.errors import UsageError

ARMS = ("ffcv", "cpu")
SEEDS = (0, 1, 2)
ERRORS = 2.0  # standard errors that a difference may have and still count as noise
_TIMEOUT = 1800.0
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}  # else torch's threads spin while the loader's work


def noise(values: Sequence[float], images: int) -> float:
    """Variance of one accuracy: that of the seeds, but not less than that of drawing ``images`` validation images.

    Three seeds may agree by chance; a share of ``images`` cannot be known better than the binomial's p (1 - p) / n.
    """
    mean = statistics.fmean(values)
    seeds = statistics.variance(values) if len(values) > 1 else 0.0
    return max(seeds, mean * (1 - mean) / images)


def judge(accuracies: dict[str, Sequence[float]], images: int) -> dict[str, Any]:
    """Mean and spread of two arms, the second's mean less the first's, its standard error, and whether it is noise.

    ``accuracies`` are shares from 0 to 1, seed by seed; all results are shares too. UsageError unless there are two arms
    with as many seeds each.
    """
    if len(accuracies) != 2 or len({len(v) for v in accuracies.values()}) != 1 or images < 1:
        raise UsageError(f"two arms with the same seeds are compared on at least one image, got {accuracies}")
    (first, a), (second, b) = accuracies.items()
    if not a:
        raise UsageError("an arm without a seed has no accuracy; give at least one seed")
    difference = statistics.fmean(b) - statistics.fmean(a)
    error = math.sqrt((noise(a, images) + noise(b, images)) / len(a))
    return {
        "arms": {
            name: {
                "accuracy": list(values),
                "mean": statistics.fmean(values),
                "spread": max(values) - min(values),
            }
            for name, values in accuracies.items()
        },
        "compared": f"{second} - {first}",
        "difference": difference,
        "standard_error": error,
        "within_noise": abs(difference) <= ERRORS * error,
    }


def split(data: str, folder: Path, fraction: float = 0.2) -> dict[str, Any]:
    """Write the two sides of ``data``, a ``.beton``, into ``folder`` as JPEG; the facts of the split.

    Both arms read these files. Images of one group (the field ``group``, where there is one) stay on one side.
    """
    import fastload
    from fastload.train import Config
    from fastload.train.data import make_split

    sides = make_split(data, None, Config(seed=0, valid_fraction=fraction))
    facts: dict[str, Any] = {"classes": len(sides.classes), "group_field": sides.group_field}
    for name, side in (("train", sides.train), ("valid", sides.valid)):
        target = folder / f"{name}.beton"
        fastload.convert(data, target, indices=[int(i) for i in side.indices], store="jpeg", progress=False)
        facts[name] = str(target)
        facts[f"{name}_images"] = len(side)
    return facts


def run(
    data: str,
    *,
    arms: Sequence[str] = ARMS,
    seeds: Sequence[int] = SEEDS,
    out: str | None = None,
    say: Callable[[str], object] = lambda text: None,
    **options: Any,
) -> dict[str, Any]:
    """Train each arm once a seed, taking turns, and judge; the record is appended to ``out``.

    ``arms`` are two peers that read a ``.beton``; ``options`` are fields of :class:`Training`. DataError if an arm fails.
    """
    if len(arms) != 2 or not seeds:
        raise UsageError(f"two arms and at least one seed are needed, got {arms!r} and {seeds!r}")
    names = list(arms) if arms[0] != arms[1] else [f"{arms[0]} ({i})" for i in (1, 2)]
    pythons = [environments.locate(arm).python for arm in arms]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="fastload-accuracy-") as folder:
        facts = split(data, Path(folder))
        job = Training(
            facts.pop("train"), facts.pop("valid"), facts["classes"], facts["train_images"], **options
        )
        for seed in seeds:
            for name, arm, python in zip(names, arms, pythons):
                with PeerProcess(arm, python, env=_ENVIRONMENT, timeout=_TIMEOUT) as peer:
                    result = peer.ask(do="train", job=replace(job, seed=seed).to_json())
                found[name].append(result)
                say(f"{name}, seed {seed}: {result['accuracy']:.2%} in {result['seconds']:.0f} s")
    images = found[names[0]][0]["images"]
    record = {
        "kind": "accuracy",
        "data": Path(data).name,
        **facts,
        "training": {k: v for k, v in job.to_json().items() if k not in ("train", "valid", "seed")},
        "seeds": list(seeds),
        **judge({name: [r["accuracy"] for r in results] for name, results in found.items()}, images),
        "runs": found,
        "peer_versions": {arm: make(arm).versions() for arm in arms},
        "environment": machine.environment(),
    }
    if out is not None:
        write_jsonl(out, [record])
    return record


def text(record: dict[str, Any]) -> str:
    """A record in a few lines for people."""
    lines = [
        f"{name}: {arm['mean']:.2%} (" + ", ".join(f"{a:.2%}" for a in arm["accuracy"]) + ")"
        for name, arm in record["arms"].items()
    ]
    verdict = "within noise" if record["within_noise"] else "more than noise"
    lines.append(
        f"{record['compared']}: {100 * record['difference']:+.2f} points, standard error "
        f"{100 * record['standard_error']:.2f}: {verdict} ({ERRORS:g} standard errors)"
    )
    return "\n".join(lines)
