"""Views at test time against numpy and a model fed the turned images, and the properties that averaging over views must have."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastload
from fastload.errors import UsageError
from fastload.loader import Loader
from fastload.train import tta
from fastload.train.config import Config
from fastload.train.data import TrainWarning, eval_pipeline
from fastload.train.infer import infer
from fastload.train.runs import LoadedRun
from fastload.train.tta import infer_views, parse, view_pipeline

SIDE = 32
CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Toy(nn.Module):
    """A linear model of all pixels: it sees every shift and turn."""

    def __init__(self, classes: int = 3, scale: float = 0.05, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 3 * SIDE * SIDE, generator=generator) * scale)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight.T


def loaded(model: nn.Module | None = None, classes=("a", "b", "c"), several=False, **options) -> LoadedRun:
    cfg = Config(size=SIDE, device="cpu", **{"augment": "light", **options})
    return LoadedRun(Path("none/best.pt"), model or Toy(), cfg, list(classes), MEAN, STD, 1, CPU, several)


def pixels(count: int = 5, side: int = SIDE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def write(path: Path, images: np.ndarray) -> fastload.Dataset:
    fastload.convert(
        [{"image": np.ascontiguousarray(image)} for image in images], path, store="raw", progress=False
    )
    return fastload.open(path)


def by_hand(run: LoadedRun, images: np.ndarray) -> np.ndarray:
    """(N, C) softmax of the model's answer to (N, S, S, 3) uint8, in float64."""
    x = ((images / 255.0 - MEAN) / STD).transpose(0, 3, 1, 2).reshape(len(images), -1)
    return softmax(x @ run.model.weight.detach().double().numpy().T)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def shifted(images: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moved, pixel by pixel: where it comes from outside, the nearest pixel of the edge."""
    rows, columns = (np.clip(np.arange(SIDE) - by, 0, SIDE - 1) for by in (down, right))
    return images[:, rows][:, :, columns]


BY_HAND = {
    "hflip": lambda x: [x, x[:, :, ::-1]],
    "vflip": lambda x: [x, x[:, ::-1]],
    "hflip+vflip": lambda x: [x, x[:, :, ::-1], x[:, ::-1]],
    "rot90": lambda x: [np.rot90(x, k, (1, 2)) for k in range(4)],
    "shifts": lambda x: [x, *(shifted(x, *by) for by in ((-2, 0), (2, 0), (0, -2), (0, 2)))],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_each_view_equals_the_model_fed_the_turned_images(name, tmp_path):
    images, run = pixels(), loaded()
    got = infer_views(run, write(tmp_path / "x.beton", images), parse(name), batch_size=2, progress=False)
    want = np.mean([by_hand(run, view) for view in BY_HAND[name](images)], axis=0)
    np.testing.assert_allclose(got, want, atol=2e-4)  # float32 sums of 3,072 products
    assert np.abs(got - by_hand(run, images)).max() > 1e-2  # the views do matter to this model


def test_crops_are_the_corners_of_a_larger_image(tmp_path):
    larger = pixels(4, side=37)  # 32 / 0.875: resized by nothing, so that the corners are exact
    run = loaded(augment="default")
    got = infer_views(run, write(tmp_path / "x.beton", larger), parse("crops"), progress=False)
    corners = [larger[:, :32, :32], larger[:, :32, -32:], larger[:, -32:, :32], larger[:, -32:, -32:]]
    want = np.mean([by_hand(run, x) for x in [larger[:, 2:34, 2:34], *corners]], axis=0)
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_scales_resize_and_never_leave_a_black_border(tmp_path):
    plain = tuple(eval_pipeline(Config(size=224), MEAN, STD))
    assert [view_pipeline(view.pixels, plain)[0].size for view in parse("scales")] == [256, 230, 294]
    whole = tuple(eval_pipeline(Config(size=224, augment="none"), MEAN, STD))
    assert view_pipeline(0.9, whole) == whole and view_pipeline(1.15, whole)[0].size == 258
    run, data = loaded(), write(tmp_path / "x.beton", pixels(side=40))
    wider = view_pipeline(1.15, tuple(eval_pipeline(run.config, MEAN, STD)))
    parts = [
        infer(run.model, Loader(data, 2, transforms=pipeline), CPU, total=5, progress=False)
        for pipeline in (eval_pipeline(run.config, MEAN, STD), wider)
    ]
    got = infer_views(
        run, data, parse("scales"), progress=False
    )  # 0.9 is the plain view here, and no second vote
    np.testing.assert_allclose(got, np.mean(parts, axis=0), atol=1e-6)


@pytest.mark.parametrize("merge", ["mean", "geometric"])
@pytest.mark.parametrize("options", [{}, {"amp": "bf16"}, {"loss": "bce"}, {"channels_last": False}])
def test_the_plain_view_is_plain_prediction_bit_for_bit(tmp_path, merge, options):
    from fastload.train.losses import activation

    run, data = loaded(**options), write(tmp_path / "x.beton", pixels())
    loader = Loader(data, 3, transforms=eval_pipeline(run.config, MEAN, STD))
    layout = torch.channels_last if run.config.channels_last else torch.contiguous_format
    plain = infer(
        run.model,
        loader,
        CPU,
        total=5,
        layout=layout,
        activation=activation(run.config.loss, False),
        progress=False,
    )
    for name in (None, "none"):
        assert np.array_equal(
            infer_views(run, data, parse(name), merge=merge, batch_size=3, progress=False), plain
        )


@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["hflip", "vflip", "rot90"]),
    st.sampled_from(["mean", "geometric"]),
)
def test_an_image_and_its_turned_image_get_the_same_answer(tmp_path_factory, seed, name, merge):
    folder, run, images = tmp_path_factory.mktemp("x"), loaded(), pixels(3, seed=seed)
    turn = {
        "hflip": lambda x: x[:, :, ::-1],
        "vflip": lambda x: x[:, ::-1],
        "rot90": lambda x: np.rot90(x, 1, (1, 2)),
    }[name]
    one, other = write(folder / "a.beton", images), write(folder / "b.beton", turn(images))
    a, b = (infer_views(run, data, parse(name), merge=merge, progress=False) for data in (one, other))
    np.testing.assert_allclose(a, b, atol=1e-6)
    plain = [infer_views(run, data, parse(None), progress=False) for data in (one, other)]
    assert np.abs(plain[0] - plain[1]).max() > 1e-3


@pytest.mark.parametrize("merge", ["mean", "geometric"])
def test_classes_that_a_mirror_changes(tmp_path, merge):
    """The mirror image of a left hand is a right hand: the answer to the mirror image has both columns exchanged."""
    classes, images = ("left", "both", "right"), pixels()
    run = loaded(classes=classes)
    views = parse("hflip", classes, {"left": "right"})
    one, other = write(tmp_path / "a.beton", images), write(tmp_path / "b.beton", images[:, :, ::-1])
    a, b = (infer_views(run, data, views, merge=merge, progress=False) for data in (one, other))
    np.testing.assert_allclose(a, b[:, [2, 1, 0]], atol=1e-6)
    if merge == "mean":
        want = (by_hand(run, images) + by_hand(run, images[:, :, ::-1])[:, [2, 1, 0]]) / 2
        np.testing.assert_allclose(a, want, atol=2e-4)


def test_a_map_of_three_classes_goes_the_right_way(tmp_path):
    """a -> b -> c -> a: what the mirror image is called b was an a."""
    classes, images = ("a", "b", "c"), pixels()
    run = loaded(classes=classes)
    views = parse("hflip", classes, {"a": "b", "b": "c", "c": "a"})
    got = infer_views(run, write(tmp_path / "x.beton", images), views, progress=False)
    mirrored = by_hand(run, images[:, :, ::-1])
    want = (by_hand(run, images) + np.stack([mirrored[:, 1], mirrored[:, 2], mirrored[:, 0]], axis=1)) / 2
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_geometric_is_the_renormalised_geometric_mean(tmp_path):
    run, images = loaded(), pixels()
    got = infer_views(
        run, write(tmp_path / "x.beton", images), parse("hflip"), merge="geometric", progress=False
    )
    root = np.sqrt(by_hand(run, images) * by_hand(run, images[:, :, ::-1]))
    np.testing.assert_allclose(got, root / root.sum(axis=1, keepdims=True), atol=2e-4)


def test_geometric_of_probabilities_that_are_rounded_to_0(tmp_path):
    """Logits in the thousands: a product of float32 probabilities would be 0 / 0."""
    run, images = loaded(Toy(scale=100.0)), pixels()
    got = infer_views(
        run, write(tmp_path / "x.beton", images), parse("hflip+vflip"), merge="geometric", progress=False
    )
    x = [
        ((view / 255.0 - MEAN) / STD).transpose(0, 3, 1, 2).reshape(5, -1)
        for view in BY_HAND["hflip+vflip"](images)
    ]
    logits = np.mean(x, axis=0) @ run.model.weight.detach().double().numpy().T
    assert np.abs(logits).max() > 1000 and np.isfinite(got).all()
    assert got.argmax(axis=1).tolist() == logits.argmax(axis=1).tolist()
    np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-5)


def test_several_labels_an_image(tmp_path):
    run, images = loaded(several=True, loss="bce"), pixels()
    data = write(tmp_path / "x.beton", images)
    logits = [
        ((x / 255.0 - MEAN) / STD).transpose(0, 3, 1, 2).reshape(5, -1)
        @ run.model.weight.detach().double().numpy().T
        for x in (images, images[:, :, ::-1])
    ]
    a, b = (1 / (1 + np.exp(-one)) for one in logits)
    np.testing.assert_allclose(infer_views(run, data, parse("hflip"), progress=False), (a + b) / 2, atol=2e-4)
    odds = np.sqrt(a / (1 - a) * b / (1 - b))
    got = infer_views(run, data, parse("hflip"), merge="geometric", progress=False)
    np.testing.assert_allclose(got, odds / (1 + odds), atol=2e-4)


def test_views_of_the_same_pixels_share_a_pass(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        tta, "Loader", lambda *args, **kw: made.append(kw["transforms"]) or Loader(*args, **kw)
    )
    data = write(tmp_path / "x.beton", pixels(side=40))
    infer_views(loaded(), data, parse("hflip+vflip+rot90+shifts"), progress=False)
    assert len(made) == 1
    infer_views(loaded(augment="default"), data, parse("hflip+crops+scales"), progress=False)
    assert len(made) == 1 + 4  # plain, larger, 0.9, 1.15


def test_eval_mode_whatever_the_caller_left_and_each_module_gets_its_own_back(tmp_path):
    frozen = nn.BatchNorm2d(3).eval()
    model = nn.Sequential(nn.BatchNorm2d(3), frozen, nn.Dropout(0.5), Toy()).train()
    frozen.eval()
    data = write(tmp_path / "x.beton", pixels())
    got = infer_views(loaded(model), data, parse("hflip"), batch_size=2, progress=False)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert model[0].num_batches_tracked == 0
    np.testing.assert_array_equal(
        got, infer_views(loaded(model.eval()), data, parse("hflip"), batch_size=2, progress=False)
    )


def test_a_view_that_is_no_number_stays_so(tmp_path):
    class Fragile(Toy):
        def forward(self, images):
            logits = super().forward(images)
            return torch.where(images[:, :1, 0, 0] < images[:, :1, 0, -1], logits, logits * float("inf"))

    images = pixels()
    rising = images[:, 0, 0, 0] < images[:, 0, -1, 0]
    with pytest.warns(TrainWarning, match="no numbers"):
        got = infer_views(
            loaded(Fragile()), write(tmp_path / "x.beton", images), parse("hflip"), progress=False
        )
    assert (
        rising.any() and not rising.all() and np.isnan(got).all()
    )  # one of the two views fails for every image


def test_texts():
    assert [view.name for view in parse("hflip+rot90")] == ["plain", "hflip", "rot90", "rot180", "rot270"]
    assert [view.name for view in parse(" hflip + hflip ")] == ["plain", "hflip"]
    assert len(parse("crops")) == len(parse("shifts")) == 5 and len(parse("scales")) == 3
    with pytest.raises(UsageError, match="did you mean 'hflip'"):
        parse("hflp")
    with pytest.raises(UsageError, match="unknown view"):
        parse("hflip+")
    with pytest.raises(UsageError, match="unknown class in flip_labels 'lft'"):
        parse("hflip", ["left", "right"], {"lft": "right"})
    with pytest.raises(UsageError, match="mirror class of its own"):
        parse("hflip", ["a", "b", "c"], {"a": "b", "c": "b"})
    with pytest.raises(UsageError, match="not what rot90 does"):
        parse("hflip+rot90", ["a", "b"], {"a": "b"})
    with pytest.raises(UsageError, match="unknown merge"):
        infer_views(loaded(), None, parse(None), merge="harmonic")  # type: ignore[arg-type]
    assert replace(parse("hflip", ["l", "r"], {"r": "l"})[1], turn=None).columns == (1, 0)


def test_no_warning_where_all_is_well(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainWarning)
        infer_views(loaded(), write(tmp_path / "x.beton", pixels()), parse("hflip"), progress=False)
