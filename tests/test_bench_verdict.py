"""The verdict: right side, right words, and never a figure that was not measured."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.benchmarks.verdict import Figures, bottleneck, rate, verdict
from fastload.errors import UsageError

positive = st.floats(0.01, 1e6)
figures = st.builds(
    Figures,
    loader=positive,
    model=positive,
    both=positive,
    stall=st.floats(0, 1),
    noise=st.floats(0, 0.6),
    loader_plain=st.none() | positive,
    shared_cores=st.booleans(),
    device=st.sampled_from(["cpu", "cuda"]),
    threads=st.integers(1, 64),
    cores=st.integers(1, 64),
    stored_side=st.none() | st.integers(32, 4000),
    store=st.sampled_from(["jpeg", "raw"]),
)


@given(figures)
def test_the_slower_side_is_named_and_only_beyond_the_noise(f: Figures) -> None:
    v = verdict(f)
    apart = max(f.loader / f.model, f.model / f.loader)
    assert v.ratio == pytest.approx(apart)
    if v.bottleneck == "balanced":
        assert apart <= 1 + max(0.15, f.noise) + 1e-9
    else:
        assert apart > 1 + max(0.15, f.noise) - 1e-9
        assert v.bottleneck == ("loader" if f.loader < f.model else "model")
        assert f"The {v.bottleneck} is the bottleneck" in v.sentence


@given(figures)
def test_every_number_in_the_sentence_was_measured_or_set(f: Figures) -> None:
    v = verdict(f)
    known = {rate(f.loader), rate(f.model), rate(f.both), f"{f.stall:.0%}".rstrip("%")}
    known |= {str(f.threads), str(f.cores), str(f.size), str(f.stored_side)}
    if f.loader_plain is not None:
        known.add(rate(f.loader_plain))
    known |= {f"{v.ratio:,.0f}", f"{v.ratio:.1f}", f"{v.ratio:.2f}"}
    for number in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?", v.sentence):
        assert number.rstrip(",") in known, (number, v.sentence)


@given(figures)
def test_it_is_one_sentence(f: Figures) -> None:
    sentence = verdict(f).sentence
    assert sentence.endswith(".")
    assert not re.search(r"[.!?] [A-Z]", sentence)
    assert "\n" not in sentence


@given(figures)
def test_swapping_the_sides_swaps_the_verdict(f: Figures) -> None:
    swapped = bottleneck(dataclasses.replace(f, loader=f.model, model=f.loader))
    assert swapped == {"loader": "model", "model": "loader", "balanced": "balanced"}[bottleneck(f)]


def test_a_very_slow_model() -> None:
    v = verdict(Figures(loader=1200, model=3, both=2.9, stall=0.0, shared_cores=True, cores=2, threads=2))
    assert v.bottleneck == "model"
    assert "400x slower" in v.sentence
    assert "a GPU" in v.change
    assert "share these 2 cores" in v.sentence


def test_a_very_slow_loader() -> None:
    v = verdict(Figures(loader=40, model=4000, both=39, stall=0.98, device="cuda", threads=2, cores=16))
    assert v.bottleneck == "loader"
    assert "100x slower" in v.sentence
    assert "98% of the time" in v.sentence
    assert v.change.startswith("--threads: 2 of 16 cores")
    assert "share these" not in v.sentence


def test_nearly_balanced() -> None:
    v = verdict(Figures(loader=1000, model=950, both=900, stall=0.04, device="cuda"))
    assert v.bottleneck == "balanced"
    assert "1.05x apart" in v.sentence
    assert "bottleneck" in v.sentence


def test_noise_widens_what_counts_as_balanced() -> None:
    f = Figures(loader=1400, model=1000, both=900, stall=0.04, device="cuda")
    assert verdict(f).bottleneck == "model"
    noisy = verdict(dataclasses.replace(f, noise=0.45))
    assert noisy.bottleneck == "balanced"
    assert "within the noise" in noisy.sentence


def test_per_image_is_blamed_only_when_it_was_measured_to_cost() -> None:
    f = Figures(
        loader=100, model=4000, both=99, stall=0.97, device="cuda", threads=8, cores=8, loader_plain=900
    )
    assert "PerImage step: without it the loader makes 900 images/s" in verdict(f).change
    assert "PerImage" not in verdict(dataclasses.replace(f, loader_plain=105)).change
    assert "PerImage" not in verdict(dataclasses.replace(f, loader_plain=None)).change


def test_big_stored_images_are_named_when_all_cores_load() -> None:
    f = Figures(
        loader=100, model=900, both=99, stall=0.9, device="cuda", threads=8, cores=8, stored_side=1600
    )
    assert "images of 1600 px are read for 224 px" in verdict(f).change
    assert "raw" in verdict(dataclasses.replace(f, stored_side=300)).change
    assert "cores" in verdict(dataclasses.replace(f, stored_side=300, store="raw")).change


def test_an_unexpected_wait_is_said() -> None:
    f = Figures(loader=4000, model=1000, both=700, stall=0.3, device="cuda")
    assert "more than the two figures alone explain" in verdict(f).sentence
    assert "more than the two" not in verdict(dataclasses.replace(f, stall=0.01)).sentence


@pytest.mark.parametrize(
    "change",
    [{"loader": 0.0}, {"model": -1.0}, {"both": float("inf")}, {"stall": 1.2}, {"loader": float("nan")}],
)
def test_impossible_figures_are_refused(change) -> None:
    with pytest.raises(UsageError, match="got"):
        Figures(**{"loader": 1.0, "model": 1.0, "both": 1.0, "stall": 0.0, **change})
