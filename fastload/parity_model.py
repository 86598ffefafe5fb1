"""What a model makes of the difference between our pixels and Pillow's: logits, decisions, accuracy.

A mean error of half a level says little to whoever trains a model; this says what it does to the answers. The model runs once for
each way of decoding, in float32 and in eval mode. Weights are published ones, a checkpoint, or random ones where that is asked for:
an untrained model answers the question about logits only roughly, and that about accuracy not at all.

>>> judge = load("resnet18", None, False, None, None); judge.add(indices, pictures); judge.result(dataset, "Pillow")
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastload import train
from fastload.dataset import Dataset
from fastload.errors import DataError, FastloadError, UsageError

PUBLISHED, RANDOM = "published weights", "random weights"
_FALLBACK_CLASSES = 1000


@dataclass(frozen=True)
class JudgedRow:
    """Answers on the pixels of ``ours`` against those of ``reference``: mean and largest absolute difference of a logit, the share
    of images in [0, 1] whose most probable class is the same, and accuracy in [0, 1] of either side, None without fitting labels.
    """

    ours: str
    reference: str
    mean: float
    largest: float
    same: float
    accuracy: float | None
    reference_accuracy: float | None


@dataclass(frozen=True)
class Judged:
    """The table for one model. ``spread``: standard deviation of the reference's logits, which the differences are small against."""

    model: str
    weights: str
    images: int
    spread: float
    rows: list[JudgedRow]
    note: str

    def lines(self) -> list[str]:
        """The table for people."""
        lines = [
            f"  logits of {self.model} ({self.weights}) on the eval crop of {self.images:,} images",
            f"  {'':<24}{'mean':>9}{'most':>9}{'same top-1':>12}{'accuracy':>10}{'reference':>11}",
        ]
        for r in self.rows:
            scores = ["-" if a is None else f"{a:.2%}" for a in (r.accuracy, r.reference_accuracy)]
            lines.append(
                f"    {f'{r.ours} - {r.reference}':<22}{r.mean:>9.4f}{r.largest:>9.4f}{r.same:>12.2%}{scores[0]:>10}{scores[1]:>11}"
            )
        lines.append(f"  the logits themselves spread by {self.spread:.3f} (standard deviation)")
        if self.weights == RANDOM:
            lines.append(
                "  random weights: the model has learned nothing, so its answers and accuracy mean nothing"
            )
        if self.note:
            lines.append(f"  {self.note}")
        return lines


@dataclass
class Judge:
    """A model in eval mode, and the logits (N, C) float32 that it gave so far, by way of decoding.

    ``mean`` and ``std`` (3,) in [0, 1] are those it expects; ``classes``: names of its outputs, empty where unknown.
    """

    model: Any
    name: str
    weights: str
    device: Any
    size: int
    crop_ratio: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str]
    _logits: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _indices: list[int] = field(default_factory=list)

    def add(self, indices: list[int], pictures: dict[str, np.ndarray]) -> None:
        """Run the model on the same images by each way: (B, H, W, 3) uint8; ``indices`` are their places in the dataset."""
        import torch

        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        self._indices += indices
        for way, pixels in pictures.items():
            with torch.inference_mode():
                images = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device).permute(0, 3, 1, 2)
                try:
                    logits = self.model((images.float() / 255 - mean) / std)
                except (RuntimeError, AssertionError, ValueError) as error:
                    raise UsageError(
                        f"model {self.name!r} cannot take images of {self.size} px ({_first_line(error)}); use another --size"
                    ) from error
            self._logits.setdefault(way, []).append(logits.float().cpu().numpy())

    def result(self, dataset: Dataset, reference: str) -> Judged:
        """Every other way against ``reference``, with accuracy where the labels of ``dataset`` fit the model's outputs."""
        logits = {way: np.concatenate(parts).astype(np.float64) for way, parts in self._logits.items()}
        truth = logits.pop(reference)
        for way, values in (*logits.items(), (reference, truth)):
            if not np.isfinite(values).all():
                raise DataError(
                    f"model {self.name!r} gives logits that are no numbers on the pixels of {way}"
                )
        labels, note = self._labels(dataset, truth.shape[1])
        rows = []
        for way, values in logits.items():
            gap = np.abs(values - truth)
            same = float((values.argmax(1) == truth.argmax(1)).mean())
            rows.append(
                JudgedRow(
                    way,
                    reference,
                    float(gap.mean()),
                    float(gap.max()),
                    same,
                    _accuracy(values, labels),
                    _accuracy(truth, labels),
                )
            )
        return Judged(self.name, self.weights, len(truth), float(truth.std()), rows, note)

    def _labels(self, dataset: Dataset, outputs: int) -> tuple[np.ndarray | None, str]:
        """Labels (N,) of the images as numbers of outputs, by name where both sides have names; or None and why."""
        if "label" not in dataset.fields or dataset.fields["label"].kind != "int":
            return None, "no accuracy: the file has no labels of one class an image"
        labels = np.asarray(dataset.labels)[self._indices]
        names = dataset.classes
        if names and self.classes:
            strange = sorted({names[n] for n in labels.tolist()} - set(self.classes))
            if strange:
                return None, f"no accuracy: the model does not know the class {strange[0]!r}"
            return np.array([self.classes.index(names[n]) for n in labels.tolist()]), ""
        count = len(names) or int(np.max(dataset.labels)) + 1
        if count != outputs:
            return None, f"no accuracy: the file has {count} classes and the model {outputs} outputs"
        return labels, ""


def _accuracy(logits: np.ndarray, labels: np.ndarray | None) -> float | None:
    return None if labels is None else float((logits.argmax(1) == labels).mean())


def load(
    model: str | None,
    checkpoint: str | os.PathLike[str] | None,
    random_weights: bool,
    size: int | None,
    device: str | None,
) -> Judge:
    """The model of a training run, or a timm model with weights of its own; ``size`` None is the run's, else 224.

    UsageError says what is missing and how to get it; DataError: a checkpoint that is damaged or belongs to another model.
    """
    if checkpoint is not None and (Path(checkpoint).is_dir() or _is_run(Path(checkpoint))):
        return _from_run(model, checkpoint, device)
    if model is None:
        raise UsageError(
            f"{os.fspath(checkpoint or '')!r} is no training run of fastload: name its timm model too, --model NAME"
        )
    return _from_timm(model, checkpoint, random_weights, size or 224, device)


def _is_run(path: Path) -> bool:
    """Whether the file is a checkpoint of ``fastload train``."""
    import torch

    if not path.is_file():
        raise UsageError(f"there is no checkpoint {str(path)!r}; give a file or the folder of a training run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # no file of torch's, or a damaged one: timm's reader says which
        return False
    return isinstance(state, dict) and "fastload_checkpoint" in state


def _from_run(model: str | None, path: str | os.PathLike[str], device: str | None) -> Judge:
    run = train.load_run(os.fspath(path), device=device)
    if model is not None and model != run.config.model:
        raise UsageError(
            f"the run in {os.fspath(path)} trained {run.config.model!r}; leave --model out, got {model!r}"
        )
    pipeline = train.eval_pipeline(run.config, run.mean, run.std)
    return Judge(
        run.model, run.config.model, f"trained, {run.path}", run.device, run.config.size,
        run.config.size / pipeline[0].size, run.mean, run.std, list(run.classes),
    )  # fmt: skip


def _from_timm(
    name: str, checkpoint: str | os.PathLike[str] | None, random_weights: bool, size: int, device: str | None
) -> Judge:
    import timm
    import torch

    where = train.pick_device(device)
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    outputs = known.num_classes if known is not None and known.num_classes else _FALLBACK_CLASSES
    state: dict[str, Any] = {}
    if checkpoint is not None:
        state, outputs = _weights(Path(checkpoint), known, outputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random weights are the same in every run
        built = train.create_model(name, outputs, size=size)
    if checkpoint is not None:
        try:
            built.load_state_dict(state)
        except RuntimeError as error:
            raise DataError(
                f"the weights in {os.fspath(checkpoint)} do not fit {name!r} ({_first_line(error)}); name the model they belong to"
            ) from error
    elif not random_weights:
        try:
            built = train.create_model(name, outputs, pretrained=True, size=size)
        except FastloadError as error:
            raise UsageError(
                f"the published weights of {name!r} cannot be had ({_first_line(error.__cause__ or error)}); connect to the network, give "
                "weights with --checkpoint FILE, or compare with an untrained model by --random-weights"
            ) from error
    config = getattr(built, "pretrained_cfg", None) or {}
    mean = tuple(float(v) for v in config.get("mean") or (0.485, 0.456, 0.406))
    std = tuple(float(v) for v in config.get("std") or (0.229, 0.224, 0.225))
    weights = (
        RANDOM
        if random_weights
        else PUBLISHED
        if checkpoint is None
        else f"weights of {os.fspath(checkpoint)}"
    )
    return Judge(built.to(where).eval(), name, weights, where, size, 0.875, mean, std, [])


def _weights(path: Path, known: Any, outputs: int) -> tuple[dict[str, Any], int]:
    """A state dict, and how many outputs its classifier has."""
    from timm.models import load_state_dict

    try:
        state = load_state_dict(str(path), weights_only=True)
    except (
        Exception
    ) as error:  # torch, pickle and safetensors each have errors of their own for a damaged file
        raise DataError(
            f"{path} cannot be read as weights ({_first_line(error)}); it must be a state dict of the model, .pt or .safetensors"
        ) from error
    classifier = getattr(known, "classifier", None)
    head = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
    return state, int(head.shape[0]) if head is not None else outputs


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
