"""The verdict: right side, right words, and never a figure that was not measured."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.benchmarks.verdict import (
    Change,
    Figures,
    Stage,
    bottleneck,
    from_record,
    gained,
    limiting_stage,
    ranked,
    rate,
    times,
    verdict,
)
from fastload.errors import DataError, UsageError

positive = st.floats(0.01, 1e6)
changes = st.builds(
    Change,
    what=st.sampled_from(["more loader threads", "a larger batch", "raw store"]),
    setting=st.sampled_from(["--threads X", "--batch-size X", "fastload convert A B --store raw"]),
    side=st.sampled_from(["loader", "model", "both"]),
    figure=positive,
    ratios=st.lists(st.floats(0.5, 4), min_size=5, max_size=10).map(tuple),
    cost=st.sampled_from(["none", "more memory"]),
)
stages = st.lists(
    st.builds(
        Stage,
        name=st.sampled_from(["read", "crop", "decode", "resize", "copy"]),
        us=st.floats(0, 1e5),
        share=st.floats(0, 1),
    ),
    max_size=5,
    unique_by=lambda stage: stage.name,
).map(tuple)
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
    stages=stages,
    changes=st.none() | st.lists(changes, max_size=4).map(tuple),
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
    known |= {f"{stage.share:.0%}".rstrip("%") for stage in f.stages}
    if f.changes is not None:
        known.add(str(len(f.changes)))
        known |= {
            shown for change in f.changes for shown in (rate(change.figure), times(change.ratio).rstrip("x"))
        }
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


SLOW = Figures(loader=100, model=900, both=99, stall=0.9, device="cuda", threads=8, cores=8)


def test_a_change_gains_only_if_its_median_and_four_of_five_rounds_do() -> None:
    assert gained((1.04, 1.05, 1.06, 1.2, 0.9))
    assert not gained((1.04, 1.05, 1.2, 0.99, 0.98))  # two rounds lost
    assert not gained((1.02, 1.03, 1.03, 1.02, 1.03))  # too little
    assert not gained((0.9, 0.9, 5.0, 0.9, 5.0))
    assert gained((1.1,) * 8 + (0.9,) * 2)  # ten rounds: eight are enough
    assert not gained((1.1,) * 7 + (0.9,) * 3)
    assert not gained(())


def test_the_best_change_that_gained_comes_first_with_its_figure_and_cost() -> None:
    lucky = Change("a lucky one", "--lucky", "loader", 300, (3.0, 3.0, 3.0, 0.9, 0.9))
    small = Change("a smaller stored size", "--max-side", "loader", 240, (2.4,) * 5, "12 MB of disk")
    threads = Change("more loader threads", "--threads", "loader", 130, (1.3,) * 5)
    assert [c.what for c in ranked((threads, lucky, small))] == [small.what, threads.what, lucky.what]
    v = verdict(dataclasses.replace(SLOW, changes=(threads, lucky, small)))
    assert "change first a smaller stored size (--max-side)" in v.sentence
    assert "240 images/s together, 2.4x the unchanged" in v.sentence
    assert v.sentence.endswith("12 MB of disk.")
    assert "lucky" not in v.sentence


def test_if_nothing_gained_it_says_so() -> None:
    none = tuple(Change(f"change {n}", "--x", "loader", 99, (1.0, 0.9, 1.1, 1.01, 0.99)) for n in "ab")
    v = verdict(dataclasses.replace(SLOW, changes=none))
    assert "change nothing: none of the 2 changes that were run gained, which leaves more cores" in v.sentence
    one = verdict(dataclasses.replace(SLOW, loader=9000, changes=none[:1]))
    assert "the one change that was run did not gain" in one.sentence
    assert "a smaller model" in one.change


def test_threads_share_out_all_stages_but_copying() -> None:
    made = (Stage("read", 10, 0.1), Stage("decode", 60, 0.5), Stage("copy", 50, 0.4))
    found = limiting_stage(made, threads=1)
    assert found is not None and found.name == "decode"
    found = limiting_stage(made, threads=4)  # 70 / 4 = 17.5 us against 50 us on the one thread that copies
    assert found is not None and found.name == "copy"
    assert limiting_stage((), 4) is None


def test_the_limiting_stage_is_named_where_the_loader_is_to_blame() -> None:
    made = (Stage("read", 20, 0.2), Stage("decode", 80, 0.8))
    v = verdict(dataclasses.replace(SLOW, stages=made))
    assert v.stage == "decode"
    assert "its stage 'decode' limits it (80% of its time per image)" in v.sentence
    assert "decode" not in verdict(dataclasses.replace(SLOW, loader=9000, stages=made)).sentence


def test_the_loader_alone_is_no_bottleneck_of_a_model() -> None:
    f = dataclasses.replace(SLOW, model=None, both=None, stall=None, stages=(Stage("decode", 80, 0.8),))
    v = verdict(f)
    assert v.bottleneck == "loader"
    assert v.ratio == 1.0
    assert v.sentence.startswith("The loader alone makes 100 images/s, and its stage 'decode' limits it")
    assert "model" not in v.sentence
    with pytest.raises(UsageError, match="together or not at all"):
        dataclasses.replace(SLOW, model=None)


def test_what_is_no_record_of_a_bench_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"no record of fastload bench.*got kind 'tune'"):
        from_record({"kind": "tune"})


@pytest.mark.parametrize(
    "change",
    [{"loader": 0.0}, {"model": -1.0}, {"both": float("inf")}, {"stall": 1.2}, {"loader": float("nan")}],
)
def test_impossible_figures_are_refused(change) -> None:
    with pytest.raises(UsageError, match="got"):
        Figures(**{"loader": 1.0, "model": 1.0, "both": 1.0, "stall": 0.0, **change})
