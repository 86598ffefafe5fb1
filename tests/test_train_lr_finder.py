"""The learning-rate finder: its curve on losses that are known, and whether its suggestion is of use."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fastload
from fastload import transforms as T
from fastload.cli import main
from fastload.errors import DataError, UsageError
from fastload.train import Config, lr_finder, make_step
from fastload.train.data import make_split
from fastload.train.lr_finder import LrCurve, find_lr, smooth

CFG = Config(model="linear", size=8, batch_size=16, augment="none", optimizer="plain_sgd", clip_grad=0.0, device="cpu", threads=1)  # fmt: skip


class Linear(nn.Module):
    """A convex loss over few weights; the first layer makes batch statistics play no part."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    rng = np.random.default_rng(0)
    colours = np.array([(60, 60, 180), (60, 180, 60), (180, 60, 60)])
    items = []
    for i in range(80):
        image = np.clip(colours[i % 3] + rng.integers(-60, 60, (8, 8, 3)), 0, 255).astype(np.uint8)
        items.append({"image": image, "label": i % 3})
    path = tmp_path_factory.mktemp("data") / "photos.beton"
    fastload.convert(items, path, classes=["a", "b", "c"], store="raw", progress=False)
    return path


@pytest.fixture(scope="module")
def curve(photos):
    return find_lr(photos, CFG, model=Linear, high=1e3, progress=False)


def batches_of(data, size: int, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Normalised images, not cropped, and labels, in the loader's shuffled order."""
    normal = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    loader = fastload.Loader(
        data, size, transforms=[T.Resize((8, 8)), normal], shuffle=True, threads=1, **options
    )
    found = [(images.clone(), labels.clone()) for images, labels in loader]
    loader.close()
    return found


def loss_after(photos, lr: float) -> float:
    """Mean loss of all images after 12 epochs of torch's own SGD with this learning rate."""
    torch.manual_seed(0)
    batches = batches_of(fastload.open(photos), 16)
    model = Linear(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for images, labels in batches * 12:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
        optimizer.step()
    images, labels = (torch.cat(part) for part in zip(*batches))
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1))


def test_the_suggestion_trains_better_than_a_hundredth_or_a_hundred_times_of_it(curve, photos):
    losses = {factor: loss_after(photos, factor * curve.suggestion) for factor in (0.01, 1, 100)}
    assert losses[1] < losses[0.01] - 0.05
    assert not losses[100] < losses[1] + 0.05, losses
    assert 1e-3 < curve.suggestion < 10


def test_the_curve_rises_evenly_and_ends_where_the_loss_explodes(curve):
    ratios = curve.lrs[1:] / curve.lrs[:-1]
    np.testing.assert_allclose(ratios, (1e3 / 1e-6) ** (1 / 99), rtol=1e-9)
    assert curve.lrs[0] == 1e-6 and len(curve.lrs) == len(curve.losses) < 100
    assert curve.exploded and np.isfinite(curve.losses).all()
    means = curve.smoothed
    assert means[-1] > 4 * means.min() and (means[:-1] <= 4 * np.minimum.accumulate(means)[:-1]).all()


def test_a_range_that_breaks_nothing_is_walked_to_its_end(photos):
    calm = find_lr(photos, CFG, model=Linear, high=0.1, steps=23, progress=False)
    assert not calm.exploded and len(calm.lrs) == 23 and calm.lrs[-1] == pytest.approx(0.1)


def test_the_same_seed_gives_the_same_curve_and_leaves_the_random_state_alone(curve, photos):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = find_lr(photos, CFG, model=Linear, high=1e3, progress=False)
    np.testing.assert_array_equal(again.losses, curve.losses)
    assert torch.equal(torch.get_rng_state(), before)
    other = find_lr(photos, replace(CFG, seed=1), model=Linear, high=1e3, steps=20, progress=False)
    assert other.losses[0] != curve.losses[0]


def test_a_model_that_is_given_keeps_its_weights(photos):
    mine = Linear(3)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    find_lr(photos, CFG, model=mine, steps=20, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


def test_the_first_losses_are_those_of_torchs_sgd(photos):
    """In a window of two batches too, and only with images of the training side."""
    cfg = replace(CFG, label_smoothing=0.0, weight_decay=0.0, accumulate=2, batch_size=8)
    curve = find_lr(photos, cfg, model=Linear, low=0.5, high=2.0, steps=20, progress=False)
    torch.manual_seed(cfg.seed)
    model = Linear(3)
    optimizer = torch.optim.SGD(model.parameters())
    batches = batches_of(make_split(photos, None, cfg, checked=True).train, 16, drop_last=True)
    losses = []
    for lr, (images, labels) in zip(curve.lrs, batches):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) >= 3
    np.testing.assert_allclose(curve.losses[: len(losses)], losses, rtol=1e-4)


def test_layers_that_learn_slower_do_so_here_too(photos, monkeypatch):
    seen = []

    def spied(*args, **options):
        step = make_step(*args, **options)
        flush = step.flush

        def look_and_flush():
            seen.append([(group["lr"], group.get("lr_scale", 1.0)) for group in step.optimizer.param_groups])
            flush()

        step.flush = look_and_flush
        return step

    monkeypatch.setattr(lr_finder, "make_step", spied)
    cfg = replace(CFG, model="test_vit", size=32, layer_decay=0.5, optimizer="adamw")
    curve = find_lr(photos, cfg, steps=20, progress=False)
    assert len(seen) == len(curve.lrs) == 20
    assert len({scale for _, scale in seen[0]}) > 2
    for lr, groups in zip(curve.lrs, seen):
        assert all(got == pytest.approx(lr * scale) for got, scale in groups)


# --- the rule, on losses that are known


def made_curve(losses, exploded=False) -> LrCurve:
    losses = np.asarray(losses, np.float64)
    return LrCurve(np.geomspace(1e-5, 1, len(losses)), losses, exploded, 1e-3)


def test_smoothing_is_a_weighted_mean_of_what_came_before():
    losses = np.random.default_rng(0).normal(size=30)
    for n in (1, 2, 7, 30):
        weights = 0.9 ** np.arange(n)[::-1]
        assert smooth(losses)[n - 1] == pytest.approx(np.average(losses[:n], weights=weights))


def test_the_suggestion_lies_on_the_steepest_descent():
    """Of a loss that falls as a logistic curve over the exponent the mean falls fastest a little after the middle."""
    x = np.linspace(-5, 0, 200)
    curve = made_curve(2 - 1.5 / (1 + np.exp(-(x + 2.5) * 6)) + 3 * np.maximum(0, x + 0.5) ** 2)
    assert -2.5 <= np.log10(curve.suggestion) <= -2.0


def test_no_suggestion_where_nothing_falls():
    curve = made_curve(np.linspace(1, 2, 50))
    assert curve.suggestion is None and "no learning rate" in curve.summary()
    assert json.loads(json.dumps(curve.to_json()))["suggestion"] is None
    assert made_curve(np.ones(50)).suggestion is None
    assert "<img" in curve._repr_html_()


def test_the_beginning_and_what_comes_after_the_lowest_point_do_not_count():
    losses = np.concatenate([[9.0, 2.0], np.linspace(2, 1, 60), np.linspace(5, 4, 5), [3.0, 1.5]])
    curve = made_curve(losses)
    lowest = curve.lrs[curve.smoothed.argmin()]
    assert curve.lrs[4] <= curve.suggestion <= lowest


# --- what is said and written


def test_the_first_loss_must_be_a_number(photos):
    class Broken(Linear):
        def forward(self, images):
            return super().forward(images) * (float("nan") if self.training else 1.0)

    with pytest.raises(DataError, match=r"first step is no number.*got nan"):
        find_lr(photos, CFG, model=Broken, progress=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"low": 1.0, "high": 0.1}, "0 < low < high, got low 1.0 and high 0.1"),
        ({"low": 0.0}, "0 < low < high"),
        ({"steps": 5}, "at least 20 steps, got 5"),
        ({"train": None}, "nothing to train on"),
    ],
)
def test_wrong_calls(options, words, photos):
    with pytest.raises(UsageError, match=words):
        find_lr(**{"train": photos, "cfg": CFG, "model": Linear, **options})


def test_the_command(photos, tmp_path, capsys):
    line = [
        "find-lr", str(photos), "--model", "test_resnet", "--size", "32", "--batch-size", "8", "--device", "cpu", "--threads", "1",
        "--steps", "25", "--plot", str(tmp_path / "lr.png"), "--json",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as done:
        main(line)
    lines = capsys.readouterr().out.splitlines()
    assert done.value.code == 0
    content = json.loads(lines[-1])
    assert len(content["lrs"]) == len(content["losses"]) == len(content["smoothed"]) <= 25
    assert content["default"] == 1e-3
    assert "learning rate" in lines[0] and lines[1] == f"plot: {tmp_path / 'lr.png'}"
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    import matplotlib

    assert "matplotlib.pyplot" not in vars(matplotlib) or not matplotlib.pyplot.get_fignums()
