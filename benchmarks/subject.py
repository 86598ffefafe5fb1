"""What a bench measures, opened and fitted to the machine: data, pipeline, batch size, the model's side.

``fastload bench`` and ``--tune`` share it. A batch larger than the data, or whose step is too slow for the time, is made smaller, and a
note says so.

>>> with Subject.open("photos.beton", BenchOptions("resnet18"), None) as subject: subject.setting()
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastload.benchmarks import machine
from fastload.benchmarks.options import NO_MODEL, BenchOptions
from fastload.benchmarks.pairing import Pair, Setting
from fastload.benchmarks.side import Labels, ModelSide, make_side
from fastload.errors import DataError, UsageError

if TYPE_CHECKING:
    from fastload.dataset import Dataset


@dataclass
class Subject:
    """What is measured: open data, options that fit them, a pipeline, and the model's side, None where there is none."""

    options: BenchOptions
    dataset: Dataset
    pipeline: tuple[Any, ...]
    target: Any
    side: ModelSide | None
    notes: list[str]
    cut: bool = False
    owned: bool = False

    @staticmethod
    def open(
        data: str | os.PathLike[str] | Dataset,
        options: BenchOptions,
        transforms: Sequence[Any] | None,
        share: float = 1.0,
    ) -> Subject:
        """Open the data and build the model; ``share`` of the budget is for the rounds that a batch must fit into."""
        import fastload
        from fastload import transforms as specs
        from fastload.train import pick_device

        target = pick_device(options.device)
        dataset = fastload.open(data) if isinstance(data, (str, os.PathLike)) else data
        with contextlib.ExitStack() as stack:
            if dataset is not data:
                stack.callback(dataset.close)
            if len(dataset) == 0:
                raise DataError(f"there is nothing to measure: {dataset.path!r} holds no images")
            notes: list[str] = []
            if len(dataset) < options.batch_size:
                notes.append(
                    f"the data hold {len(dataset)} images, so batches have {len(dataset)}, not {options.batch_size}"
                )
                options = replace(options, batch_size=len(dataset))
            pipeline = tuple(specs.train(options.size) if transforms is None else transforms)
            side, fitting = None, options.batch_size
            if options.model != NO_MODEL:
                side, fitting = make_side(
                    replace(options, seconds=share * options.seconds), Labels.of(dataset), target
                )
            if fitting < options.batch_size:
                notes.append(
                    f"a step of {options.batch_size} is too slow here for {options.seconds:g} s, so everything was measured "
                    f"with batches of {fitting}; --seconds {options.seconds * options.batch_size / fitting:.0f} measures full ones"
                )
            cut = fitting < options.batch_size
            stack.pop_all()  # from here on the data are closed with the subject
            return Subject(
                replace(options, batch_size=fitting),
                dataset,
                pipeline,
                target,
                side,
                notes,
                cut,
                dataset is not data,
            )

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.owned:
            self.dataset.close()

    @property
    def device(self) -> str | None:
        """Where the loader puts its batches."""
        return str(self.target) if self.target.type == "cuda" else None

    @property
    def floats(self) -> bool:
        """Whether the loader makes floats on the CPU, four times the bytes."""
        from fastload import transforms as specs

        mixes = any(isinstance(spec, (specs.Mixup, specs.CutMix)) for spec in self.pipeline)
        normalises = any(isinstance(spec, specs.Normalize) for spec in self.pipeline)
        return normalises and (self.device is None or mixes)

    def setting(self) -> Setting:
        """What the options ask for."""
        o = self.options
        threads = machine.usable_cores() if o.threads is None else o.threads
        return Setting(o.batch_size, threads, o.prefetch, self.pipeline, o.engine, o.decode)

    def make_side(self, setting: Setting) -> ModelSide | None:
        """The model's side for another batch size or variant; None where there is no model."""
        if self.side is None:
            return None
        options = replace(self.options, batch_size=setting.batch_size)
        return ModelSide(options, Labels.of(self.dataset), self.target, variant=setting.variant)

    def pair(self, setting: Setting, side: ModelSide | None, pipeline: tuple[Any, ...] | None = None) -> Pair:
        """A loader under ``setting`` beside ``side``; ``pipeline`` in place of the setting's."""
        chosen = setting if pipeline is None else replace(setting, pipeline=pipeline)
        return Pair(self.dataset, chosen, side, seed=self.options.seed, device=self.device)

    def engines(self) -> tuple[tuple[str, ...], dict[str, str]]:
        """Engines that the Loader takes for these data here, and those that it refuses, with its reason."""
        from fastload import loader

        works: list[str] = []
        refused: dict[str, str] = {}
        # Engines that need a GPU are asked about where there is one.
        names = getattr(loader, "ENGINES", ("cpu",) if self.device is None else ("cpu", "cuda", "dali"))
        for name in names:
            try:
                loader.Loader(
                    self.dataset,
                    self.options.batch_size,
                    transforms=self.pipeline,
                    engine=name,
                    device=self.device,
                ).close()
            except UsageError as error:
                refused[name] = str(error)
            else:
                works.append(name)
        return tuple(works), refused
