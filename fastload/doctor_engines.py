"""What ``Loader(engine="auto")`` takes on this machine and what it measured: the part of ``fastload doctor`` that runs the engines.

They make training batches of the caller's file or, where none is given, of a few pictures made here. The trade-off: some ten seconds, and
made pictures are noise with the spectrum of photographs: a decoder works on them as long as on photographs, and they look like nothing.

>>> measured(run_tasks, "photos.beton", {"works": True})["engine"]
'cpu'
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

from fastload.errors import DataError, FastloadError, UsageError

SECONDS = 300.0  # kernels may have to be compiled, and two more engines to be started
CROP = 224
BATCH = 64
PHOTOS = 64
FALL = 1.4  # of amplitude with frequency: 2.7 bits a pixel at quality 90, as our 500 photographs of ImageNet take
SHAPES = ((333, 500), (500, 333), (375, 500))  # height and width of the made pictures, in turns
LEAST = 64 * BATCH  # images that an epoch must have, so that its start does not count
CURE = "fastload doctor --no-measure leaves it out; Loader(engine='cpu') does not measure"

Run = Callable[
    ..., dict[str, dict[str, Any]]
]  # doctor.run_tasks, which knows this module and not the other way round


def check_file(run: Run, file: str) -> None:
    """UsageError or DataError, naming ``file``, if it is no ``.beton`` file. Where nothing can be opened, nothing is said of it."""
    wrong = _ask(run, f"open:{file}").get("value")
    if wrong is not None:
        raise (UsageError if wrong["exit_code"] == UsageError.exit_code else DataError)(wrong["text"])


def _ask(run: Run, task: str) -> dict[str, Any]:
    return run([task], seconds=SECONDS)[task]


def measured(run: Run, file: str | None, cpu: dict[str, Any]) -> dict[str, Any]:
    """The report's entry: engine, images/s, why others have none, and of what; ``engine`` None with why and cure if it failed.

    ``cpu`` is the report's entry of the CPU engine, which the others need. Never raises: "bad_file" says that the file is to blame.
    """
    entry: dict[str, Any] = {"engine": None, "file": file, "crop": CROP, "batch_size": BATCH}
    if not cpu["works"]:
        return {**entry, "why": f"the CPU engine does not work: {cpu['why']}", "cure": cpu["cure"]}
    try:
        if file is not None:
            answer = _ask(run, f"measure:{file}")
        else:
            # Made and removed on this side, because a child that is killed removes nothing.
            with tempfile.TemporaryDirectory(prefix="fastload-doctor-", ignore_cleanup_errors=True) as folder:
                answer = _ask(run, f"sample:{folder}")
    except OSError as error:
        cure = f"set TMPDIR to a folder that you can write to, or give a .beton file; {CURE}"
        return {**entry, "why": f"no folder for a sample of pictures ({error.strerror})", "cure": cure}
    if not answer["ok"]:
        return {**entry, "why": answer["error"], "cure": CURE}
    value = answer["value"]
    if "bad_file" in value:
        why = f"{file or 'the sample of pictures'} cannot be loaded: {value['bad_file']}"
        cure = CURE if file is None else f"fastload verify {file} shows all that is wrong with it"
        return {**entry, "why": why, "cure": cure, "bad_file": True}
    often = " over and over" if value["images"] < LEAST else ""
    what = (
        f"{value['images']:,} generated photographs"
        if file is None
        else f"the {value['images']:,} images of {file}"
    )
    return {**entry, **value, "data": f"{what}{often}, crops of {CROP}, batches of {BATCH}"}


def lines(entry: dict[str, Any]) -> list[str]:
    """The entry for people."""
    if entry["engine"] is None:
        return [f"  not measured: {entry['why']}", f"  cure: {entry['cure']}"]
    rates = sorted(entry["images_per_s"].items(), key=lambda item: -item[1])
    text = ", ".join(f"{name} {rate:,.0f} images/s" for name, rate in rates)
    out = "".join(f"; {name} not measured: {why}" for name, why in entry["left_out"].items())
    told = [f"  takes {entry['engine']!r} here: {text}{out}"]
    if entry["engine"] == "cuda":  # it has chosen more than itself: who decodes, what is kept where
        told.append(f"  chosen    {entry['chosen']}")
    return [*told, f"  measured  {entry['data']}, on {entry['device']}"]


# ---- the child's side ----


def open_file(path: str) -> dict[str, Any] | None:
    """Text and exit code of what is wrong with a file, None if it can be opened."""
    from fastload.beton import Reader

    try:
        Reader(path).close()
    except FastloadError as error:
        return {"text": str(error), "exit_code": error.exit_code}
    except OSError as error:
        text = f"{path} cannot be read ({error.strerror}); give a .beton file that you may read"
        return {"text": text, "exit_code": DataError.exit_code}
    return None


def measure(path: str) -> dict[str, Any]:
    """What ``Loader(engine="auto")`` chooses for training on this file, or ``{"bad_file": why}``."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see fastload.cli.main; torch is not imported yet
    import numpy as np
    import torch

    from fastload import transforms
    from fastload.choose import SECONDS, rate
    from fastload.dataset import open as open_dataset
    from fastload.loader import ENGINES, Loader

    device = "cuda" if torch.cuda.is_available() else None
    try:
        with open_dataset(path) as dataset:
            count = len(dataset)
            # A small file several times over: in its one or two batches there is no speed to see.
            often = np.tile(np.arange(count), -(-LEAST // count)) if 0 < count < LEAST else None
            loader = Loader(
                dataset, BATCH, transforms=transforms.train(CROP), shuffle=True, indices=often,
                fields=("index", dataset.image_field), device=device, engine="auto",
            )  # fmt: skip
            try:
                choice = loader.choice
                if choice is None:
                    raise RuntimeError("Loader(engine='auto') did not choose")
                rates, out = dict(choice.rates), dict(choice.left_out)
                if (
                    len(rates) == 1
                ):  # the only engine needs no comparison, but whoever asks wants to know its speed
                    rates[choice.name] = rate(loader, SECONDS)
                for name in ENGINES:
                    if name != "auto" and name not in rates and name not in out:
                        out[name] = "torch sees no NVIDIA GPU here"
                return {
                    "engine": choice.name,
                    "images_per_s": {name: round(found, 1) for name, found in rates.items()},
                    "left_out": out,
                    "chosen": loader.chosen,
                    "device": device or "cpu",
                    "images": count,
                }
            finally:
                loader.close()
    except DataError as error:
        return {"bad_file": str(error)}


def sample(folder: str) -> dict[str, Any]:
    """The same for pictures made in a folder, whose owner removes it."""
    return measure(make_sample(folder))


def make_sample(folder: str) -> str:
    """A ``.beton`` file of ``PHOTOS`` pictures, as ``fastload convert`` makes it; returns its path.

    They are cut from one large one whose amplitudes fall with the frequency as those of photographs do.
    """
    import numpy as np

    from fastload.converter import convert

    draw, side = np.random.default_rng(0), 1024
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf  # no mean
    noise = draw.standard_normal((3, *frequency.shape, 2)).view(np.complex128)[..., 0]
    planes = np.fft.irfft2(
        noise / frequency**FALL, (side, side)
    )  # (3, side, side): brightness and two of colour
    planes /= planes.std(axis=(1, 2), keepdims=True)
    light, red, blue = planes * np.reshape((56, 14, 14), (3, 1, 1))
    scene = np.clip(np.stack((light + red, light - (red + blue) / 2, light + blue), 2) + 118, 0, 255).astype(
        np.uint8
    )
    pictures = []
    for number in range(PHOTOS):
        height, width = SHAPES[number % len(SHAPES)]
        top, left = draw.integers(0, (side - height, side - width))
        pictures.append(np.ascontiguousarray(scene[top : top + height, left : left + width]))
    path = os.path.join(folder, "sample.beton")
    convert(pictures, path, progress=False)
    return path


TASKS: dict[str, Callable[[str], Any]] = {"open": open_file, "measure": measure, "sample": sample}
