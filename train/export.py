"""A trained run as one file that needs no fastload: ONNX, and ``torch.export`` (.pt2).

The graph takes pixels and gives probabilities: normalisation, activation and the mean over the folds' models are in it, so that
none of them can be forgotten where it is deployed. Only the resize is left to the caller, who decodes the images; how to do it is
in ``model.json`` beside the file, and in the metadata of the ONNX file. Each file is read back and compared with the PyTorch
model before it is kept. The trade-off: fp32, one input size, dynamic batch.

>>> export("runs/photos", "deploy/model.onnx").differences
"""

from __future__ import annotations

import copy
import io
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fastload.errors import DataError, FastloadError, UsageError, require, unknown
from fastload.loader import Loader
from fastload.train.data import eval_pipeline, open_data
from fastload.train.files import write_atomic, write_json
from fastload.train.losses import activation
from fastload.train.predicting import members_of
from fastload.train.predictions import VALID, Predictions
from fastload.train.runs import LoadedRun, load_run

if TYPE_CHECKING:
    from fastload.train.cv import CvRun
    from fastload.train.model import Given
    from fastload.train.runs import Run

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-4  # largest difference of a probability from the PyTorch model's
_CHECKED = 8  # images
# The exporter that works on traced graphs is torch's default since 2.9; before, it fits few versions of onnxscript.
NEW_EXPORTER = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)


@dataclass(frozen=True)
class Exported:
    """``files`` that were written, the JSON last; ``differences``: the largest one of each format from the PyTorch model."""

    files: list[Path]
    differences: dict[str, float]
    checked_on: str


class Deployed(nn.Module):
    """(B, S, S, 3) uint8 RGB pixels -> (B, C) float32 probabilities, the mean over ``runs``."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, runs: Sequence[LoadedRun]) -> None:
        super().__init__()
        self.models = nn.ModuleList(
            copy.deepcopy(run.model).to(memory_format=torch.contiguous_format) for run in runs
        )
        self.activations = [activation(run.config.loss, run.multilabel) for run in runs]
        for name in ("mean", "std"):
            values = torch.tensor([getattr(run, name) for run in runs], dtype=torch.float32)
            self.register_buffer(name, values[:, None, :, None, None])  # of each model, for NCHW

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.permute(0, 3, 1, 2).to(torch.float32) / 255
        answers = [
            activate(model((pixels - mean) / std))
            for model, activate, mean, std in zip(self.models, self.activations, self.mean, self.std)
        ]
        return sum(answers[1:], answers[0]) / len(answers)


def export(
    run: Run | CvRun | LoadedRun | str | Path,
    out: str | Path,
    formats: Sequence[str] = ("onnx", "torch"),
    *,
    which: str = "best",
    model: Given | None = None,
) -> Exported:
    """Write ``run`` to ``out``: a ``.onnx`` or ``.pt2`` file, or a folder for a ``model`` file of each of the ``formats``.

    A cross-validation becomes one graph with the mean of its folds' models. ``model``: the module, where the training was given
    one. UsageError: no such run or format, a missing package; DataError: a result that differs from the PyTorch model.
    """
    targets = _targets(Path(out), formats)
    if "onnx" in targets:
        for package in ("onnx", "onnxruntime", *(["onnxscript"] if NEW_EXPORTER else [])):
            require(package, "export")
    members = members_of(run)
    loaded = [m if isinstance(m, LoadedRun) else load_run(m, which, "cpu", model=model) for m in members]
    if any(one.device.type != "cpu" for one in loaded):
        raise UsageError(
            f"export works on the CPU; load the run with device='cpu', got {loaded[0].device.type!r}"
        )
    first = loaded[0]
    deployed = Deployed(loaded).eval()
    about = _about(loaded)
    images, checked_on = _check_images(first)
    with torch.no_grad():
        wanted = deployed(images).numpy()
    program = _trace(deployed, first.config.model, images[:2])
    differences = {}
    for name, path in targets.items():
        content, answer = _WRITERS[name](deployed, program, images[:2], about)
        # A batch of one and of more: the first is what a graph is most easily frozen to.
        got = np.concatenate([answer(images[:1].numpy()), answer(images[1:].numpy())])
        differences[name] = float(np.abs(got - wanted).max())
        if not differences[name] <= TOLERANCE:  # NaN too
            raise DataError(
                f"the {name} model differs from the PyTorch model by {differences[name]:.3g} (allowed: {TOLERANCE:g}), so it was not "
                f"written; try another version of torch or onnxruntime, or another model, got {first.config.model!r}"
            )
        write_atomic(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
    described = next(iter(targets.values())).with_suffix(".json")
    write_json(described, {**about, "largest_difference": differences, "checked_on": checked_on})
    return Exported([*targets.values(), described], differences, checked_on)


def _targets(out: Path, formats: Sequence[str]) -> dict[str, Path]:
    """The file to write for each format."""
    for name, suffix in FORMATS.items():
        if out.suffix.lower() == suffix and not out.is_dir():
            return {name: out}
    if re.fullmatch(r"\.[A-Za-z]\w*", out.suffix) and not out.is_dir():
        raise UsageError(f"a model is written as .onnx or .pt2, or both into a folder, got {str(out)!r}")
    if not formats:
        raise UsageError(f"formats must name one of {', '.join(FORMATS)} at least, got {formats!r}")
    for name in formats:
        if name not in FORMATS:
            raise unknown("export format", name, FORMATS)
    return {name: out / f"model{FORMATS[name]}" for name in formats}


def _about(loaded: Sequence[LoadedRun]) -> dict[str, Any]:
    """What whoever deploys the file has to know."""
    first = loaded[0]
    cfg = first.config
    resize, crop, _ = eval_pipeline(cfg, first.mean, first.std)
    return {
        "input": f"images: uint8 (batch, {cfg.size}, {cfg.size}, 3), RGB", "output": f"probabilities: float32 (batch, {len(first.classes)})",
        "classes": first.classes, "multilabel": first.multilabel, "size": cfg.size, "mean": list(first.mean), "std": list(first.std),
        "resize": f"shorter side to {resize.size} (bilinear, antialiased), then the centre {crop.size[0]} x {crop.size[1]}; normalised inside",
        "model": cfg.model, "runs": [str(one.path) for one in loaded], "epochs": [one.epoch for one in loaded],
        "torch": torch.__version__,
    }  # fmt: skip


def _check_images(loaded: LoadedRun) -> tuple[torch.Tensor, str]:
    """(8, S, S, 3) uint8: held-out images of the run, or noise where its data are no longer there."""
    size = loaded.config.size
    with suppress(FastloadError):
        source = loaded.config.valid or loaded.config.data or ""
        data, held = open_data(source), set(Predictions.load(loaded.path.parent / VALID).ids[:_CHECKED])
        places = [i for i, id in enumerate(data.ids) if str(id) in held]
        resize, crop, _ = eval_pipeline(loaded.config, loaded.mean, loaded.std)
        (batch,) = Loader(
            data.subset(places), len(places), transforms=(resize, crop), fields=[data.image_field]
        )
        if len(places) > 1:
            return batch[0].permute(0, 2, 3, 1).contiguous(), f"{len(places)} held-out images"
    noise = torch.randint(
        256, (_CHECKED, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return noise, f"{_CHECKED} images of noise"


def _trace(deployed: Deployed, name: str, images: torch.Tensor) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(
                deployed,
                (images,),
                dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=2**20)}},
                strict=False,
            )
    except Exception as error:  # what a model does that cannot be traced is told by errors of any kind
        raise UsageError(
            f"torch.export cannot trace this model ({' '.join(str(error).split())[:200]}); use another one, got {name!r}"
        ) from error


Answer = Callable[[np.ndarray], np.ndarray]


def _torch_file(
    deployed: Deployed, program: torch.export.ExportedProgram, images: torch.Tensor, about: Mapping[str, Any]
) -> tuple[bytes, Answer]:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"fastload.json": json.dumps(about)})
    read = torch.export.load(io.BytesIO(file.getvalue())).module()

    def answer(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(read(torch.from_numpy(images)).numpy())

    return file.getvalue(), answer


def _onnx_file(
    deployed: Deployed, program: torch.export.ExportedProgram, images: torch.Tensor, about: Mapping[str, Any]
) -> tuple[bytes, Answer]:
    import onnx

    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["probabilities"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts, at each call
        if NEW_EXPORTER:
            converted = torch.onnx.export(
                program, dynamo=True, verbose=False, dynamic_shapes={"images": {0: "batch"}}, **names
            )
            assert converted is not None
            proto = converted.model_proto
        else:
            file = io.BytesIO()
            axes = {"images": {0: "batch"}, "probabilities": {0: "batch"}}
            torch.onnx.export(deployed, (images,), file, dynamic_axes=axes, **names)  # type: ignore[arg-type]
            proto = onnx.load_from_string(file.getvalue())
    onnx.helper.set_model_props(
        proto, {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    )
    content = proto.SerializeToString()
    session = require("onnxruntime", "export").InferenceSession(content, providers=["CPUExecutionProvider"])

    def answer(images: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(["probabilities"], {"images": images})[0])

    return content, answer


_WRITERS = {"onnx": _onnx_file, "torch": _torch_file}
