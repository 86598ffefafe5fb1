"""Draws: boxes like torchvision's, parameters that depend on their key only, pipelines that are checked at the door."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from fastload import transforms as T
from fastload.draws import Plan
from fastload.errors import UsageError


def draw(pipeline, count=1000, height=300, width=400, **key):
    samples = np.arange(count)
    return Plan(pipeline).draw(
        key.get("seed", 0), key.get("epoch", 0), samples, np.full(count, height), np.full(count, width)
    )


@pytest.mark.parametrize(("height", "width"), [(300, 400), (500, 90), (30, 700), (1, 1), (7, 3)])
def test_resized_crops_are_distributed_like_torchvisions(height, width):
    ours = draw([T.RandomResizedCrop(224)], 3000, height, width).box
    assert (ours[:, :2] >= 0).all() and (ours[:, 2] <= height).all() and (ours[:, 3] <= width).all()
    assert (ours[:, 2:] > ours[:, :2]).all()
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    params = [v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(224), [image]) for _ in range(3000)]
    theirs = np.array([[p["top"], p["left"], p["top"] + p["height"], p["left"] + p["width"]] for p in params])
    for a, b in (
        (ours[:, 2] - ours[:, 0], theirs[:, 2] - theirs[:, 0]),
        (ours[:, 3] - ours[:, 1], theirs[:, 3] - theirs[:, 1]),
        (ours[:, 0], theirs[:, 0]),
        (ours[:, 1], theirs[:, 1]),
    ):
        assert stats.ks_2samp(a, b).pvalue > 1e-4


@pytest.mark.parametrize(("height", "width"), [(300, 400), (401, 333), (100, 90), (50, 600)])
@pytest.mark.parametrize("size", [224, (128, 256)])
def test_resize_and_centre_crop_are_torchvisions_geometry(height, width, size):
    """A picture whose pixels are their own coordinates shows where a crop lies."""
    table = draw([T.Resize(256), T.CenterCrop(size)], 1, height, width)
    y, x, h, w = table.place[0]
    scale = 256 / min(height, width)
    new_h = 256 if height <= width else int(256 * height / width)
    new_w = 256 if width <= height else int(256 * width / height)
    grid = torch.stack(
        torch.meshgrid(torch.arange(1.0, new_h + 1), torch.arange(1.0, new_w + 1), indexing="ij")
    )
    theirs = v2.CenterCrop(size)(grid)
    top, left = table.box[0, 0] * new_h / height, table.box[0, 1] * new_w / width
    assert theirs[0, y, x] == pytest.approx(top + 1, abs=1e-6) and theirs[1, y, x] == pytest.approx(
        left + 1, abs=1e-6
    )
    assert (theirs[0] > 0).sum() == h * w
    assert scale > 0 and (table.clip[0] == (0, 0, height, width)).all()


def test_random_crop_with_padding_covers_all_offsets_equally():
    table = draw([T.RandomCrop(32, padding=4)], 20000, 32, 32)
    top = table.box[:, 0] - table.place[:, 0]
    counts = np.bincount((top + 4).astype(int), minlength=9)
    assert len(counts) == 9 and stats.chisquare(counts).pvalue > 1e-4
    assert (table.place[:, 0] + table.place[:, 2] <= 32).all()
    assert ((table.box[:, 2] - table.box[:, 0]) == table.place[:, 2]).all()


def test_flips_and_erasing_come_as_often_as_asked():
    table = draw(
        [T.RandomResizedCrop(64), T.HorizontalFlip(0.5), T.VerticalFlip(0.1), T.RandomErasing(0.25)], 20000
    )
    assert abs((table.flips & 1).mean() - 0.5) < 0.02 and abs((table.flips >> 1).mean() - 0.1) < 0.01
    boxes = table.erase[:, 0]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 64**2
    assert abs((area > 0).mean() - 0.25) < 0.02
    assert area[area > 0].min() > 0.01 and area.max() < 0.36 and boxes.min() >= 0 and boxes.max() <= 64


def test_cutout_is_cut_at_the_edges():
    boxes = draw([T.CenterCrop(32), T.Cutout(8)], 5000, 32, 32).erase[:, 0]
    sides = boxes[:, 2] - boxes[:, 0]
    assert sides.max() == 8 and sides.min() >= 4 and boxes.min() == 0 and boxes.max() == 32


@pytest.mark.parametrize("alpha", [0.2, 0.4, 1.0, 2.0])
def test_mixup_weights_are_beta(alpha):
    weights = draw([T.CenterCrop(8), T.Mixup(alpha)], 8000).mix
    inner = weights[(weights > 1e-6) & (weights < 1 - 1e-6)]
    dist = stats.beta(alpha, alpha)
    share = dist.cdf(1 - 1e-6) - dist.cdf(1e-6)
    assert abs(len(inner) / 8000 - share) < 0.02
    uniform = (dist.cdf(inner) - dist.cdf(1e-6)) / share
    assert stats.kstest(uniform, "uniform").pvalue > 1e-4


def test_cutmix_weight_is_the_area_that_stays():
    table = draw([T.CenterCrop(32), T.CutMix(1.0)], 1000)
    b = table.mix_box
    assert np.allclose(table.mix, 1 - (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) / 1024)
    assert b.min() >= 0 and b.max() <= 32
    odd = draw([T.CenterCrop(32), T.CutMix(1.0)], 7)
    assert odd.mix[3] == 1 and (odd.mix_box[3] == 0).all()  # its own partner


FULL = (
    T.RandomResizedCrop(64), T.HorizontalFlip(), T.ColorJitter(0.4, 0.4, 0.4, 0.1), T.RandomErasing(), T.Normalize(),
    T.Mixup(), T.CutMix(),
)  # fmt: skip


def test_a_row_depends_on_seed_epoch_and_sample_only():
    plan = Plan(FULL)
    whole = plan.draw(5, 2, np.arange(100), np.full(100, 300), np.full(100, 400))
    part = plan.draw(5, 2, np.array([77, 3]), np.full(2, 300), np.full(2, 400))
    for name in ("box", "flips", "colour", "erase", "mix", "mix_box"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[[77, 3]]), name
    for seed, epoch in ((6, 2), (5, 3)):
        other = plan.draw(seed, epoch, np.arange(100), np.full(100, 300), np.full(100, 400))
        assert (other.box != whole.box).any(axis=1).mean() > 0.95


def test_a_longer_pipeline_leaves_the_earlier_draws_alone():
    short, long = draw(FULL[:2]), draw(FULL)
    assert np.array_equal(short.box, long.box) and np.array_equal(short.flips, long.flips)


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ([T.HorizontalFlip(), T.RandomResizedCrop(8)], "order is geometry"),
        ([T.Normalize(), T.ColorJitter(0.1)], "comes after Normalize"),
        ([T.Resize(8)], "add CenterCrop"),
        ([T.RandomResizedCrop(8), T.CenterCrop(4)], "not one of"),
        ([T.CenterCrop(8), T.Normalize(), T.Normalize()], "at most one Normalize"),
        ([T.CenterCrop(8), T.Mixup(), T.Mixup()], "at most one Mixup"),
        ([T.PerImage(lambda i: i)], "size=..."),
        ([v2.RandomHorizontalFlip()], "PerImage"),
        (["flip"], "not a fastload transform"),
    ],
)
def test_pipelines_are_checked(pipeline, words):
    with pytest.raises(UsageError, match=words):
        Plan(pipeline)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: T.RandomResizedCrop(0), "size .* got 0"),
        (lambda: T.RandomResizedCrop(8, scale=(0.5, 0.2)), r"scale .* got \(0.5, 0.2\)"),
        (lambda: T.HorizontalFlip(1.5), "p must be .* got 1.5"),
        (lambda: T.Normalize(std=(1, 0, 1)), "std"),
        (lambda: T.ColorJitter(brightness=-1), "brightness"),
        (lambda: T.ColorJitter(hue=0.7), "hue"),
        (lambda: T.Mixup(0), "alpha"),
        (lambda: T.Cutout(0), "size"),
        (lambda: T.RandomCrop(8, padding=-1), "padding"),
        (lambda: T.RandomErasing(value=(1, 2)), "colour"),
        (lambda: T.PerImage(3), "callable"),
        (lambda: T.eval(224, crop_ratio=0), "crop_ratio"),
    ],
)
def test_specs_are_checked_when_made(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_json_round_trip_and_unknown_names():
    import json

    assert T.from_json(json.loads(json.dumps(T.to_json(FULL)))) == FULL
    with pytest.raises(UsageError, match="did you mean 'Normalize'"):
        T.from_json([{"type": "Normalise"}])
    with pytest.raises(UsageError, match="option of HorizontalFlip 'q'"):
        T.from_json([{"type": "HorizontalFlip", "q": 1}])
    with pytest.raises(UsageError, match="cannot be written"):
        T.to_json([T.PerImage(len)])


def test_the_same_step_twice_draws_twice():
    eraser, flip = T.Cutout(8), T.HorizontalFlip()
    table = draw([T.CenterCrop(32), flip, flip, eraser, eraser])
    assert 0.4 < (table.flips & 1).mean() < 0.6
    assert (table.erase[:, 0] != table.erase[:, 1]).any(axis=1).mean() > 0.9
