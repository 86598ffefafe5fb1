"""Losses and class weights against torch, timm, scikit-learn and the formulas of the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy
from torch.nn import functional as F

from fastload.errors import UsageError
from fastload.train.config import LOSSES, Config
from fastload.train.imbalance import class_weights, sample_weights
from fastload.train.losses import activation, make_loss

QUICK = settings(max_examples=30, deadline=None)  # a busy core is no reason to fail
WEIGHTS = torch.tensor([0.2, 3.0, 1.0, 0.7, 1.9])


def batch(seed: int = 0, n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, 5) and class numbers (n,)."""
    torch.manual_seed(seed)
    return 3 * torch.randn(n, 5), torch.randint(0, 5, (n,))


def soft(seed: int = 0, n: int = 12) -> torch.Tensor:
    return torch.distributions.Dirichlet(torch.ones(5)).sample((n,))


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    return F.one_hot(labels, 5).float()


# --- each loss against its definition


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("mixed", [False, True])
def test_cross_entropy_is_torchs(weights, smoothing, mixed):
    x, y = batch()
    y = soft() if mixed else y
    got = make_loss(Config(label_smoothing=smoothing), weights)(x, y)
    torch.testing.assert_close(
        got, F.cross_entropy(x, y, weights, reduction="none", label_smoothing=smoothing)
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_focal_is_the_papers(weights):
    x, y = batch()
    p = x.softmax(1)[torch.arange(len(y)), y]
    w = 1.0 if weights is None else weights[y]
    got = make_loss(Config(loss="focal", focal_gamma=2.5, label_smoothing=0.0), weights)(x, y)
    torch.testing.assert_close(got, w * (1 - p) ** 2.5 * -p.log())
    t = soft()
    got = make_loss(Config(loss="focal", focal_gamma=2.0, label_smoothing=0.1), weights)(x, t)
    q = x.double().softmax(1)
    mass = (0.9 * t + 0.02).double() * (1.0 if weights is None else weights)
    torch.testing.assert_close(got.double(), -(mass * (1 - q) ** 2 * q.log()).sum(1), rtol=1e-5, atol=1e-6)


def test_focal_without_its_exponent_is_cross_entropy():
    x, _ = batch()
    for y in (batch()[1], soft()):
        focal = make_loss(Config(loss="focal", focal_gamma=0.0), WEIGHTS)(x, y)
        torch.testing.assert_close(focal, make_loss(Config(), WEIGHTS)(x, y))


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
def test_one_vs_all_is_timms_binary_cross_entropy(smoothing):
    x, y = batch()
    got = make_loss(Config(loss="bce", label_smoothing=smoothing))(x, y)
    torch.testing.assert_close(got.mean(), BinaryCrossEntropy(smoothing=smoothing)(x, y))
    assert got.shape == (12,)


def test_binary_cross_entropy_of_several_labels():
    x, _ = batch()
    y = (torch.rand(12, 5) < 0.4).float()
    plain = make_loss(Config(loss="bce", label_smoothing=0.0), multilabel=True)(x, y)
    torch.testing.assert_close(plain, F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1))
    weighted = make_loss(Config(loss="bce", label_smoothing=0.2), WEIGHTS, multilabel=True)(x, y)
    t = 0.8 * y + 0.1  # half way to 1/2 for 1.0
    p = x.double().sigmoid()
    by_hand = -(WEIGHTS * t * p.log() + (1 - t) * (1 - p).log()).mean(1)
    torch.testing.assert_close(weighted.double(), by_hand, rtol=1e-5, atol=1e-6)


@QUICK
@given(st.integers(0, 10_000), st.integers(1, 30), st.booleans())
def test_soft_f1_of_certain_predictions_is_macro_f1(seed, n, weighted):
    rng = np.random.default_rng(seed)
    y, guess = rng.integers(0, 5, n), rng.integers(0, 5, n)
    weights = torch.from_numpy(rng.uniform(0.1, 3, 5).astype(np.float32)) if weighted else None
    logits = 1e4 * one_hot(torch.from_numpy(guess))
    got = make_loss(Config(loss="soft_f1"), weights)(logits, torch.from_numpy(y))
    known = None if weights is None else weights.numpy()[y]
    assert got.shape == (n,) and torch.equal(got, got[:1].expand(n))
    assert 1 - got[0].item() == pytest.approx(
        f1_score(y, guess, average="macro", sample_weight=known), abs=1e-5
    )


def test_soft_f1_from_sums_over_the_batch():
    x, _ = batch()
    t, p = soft().double(), x.double().softmax(1)
    tp, fp, fn = (t * p).sum(0), ((1 - t) * p).sum(0), (t * (1 - p)).sum(0)
    want = 1 - (2 * tp / (2 * tp + fp + fn)).mean()
    torch.testing.assert_close(
        make_loss(Config(loss="soft_f1"))(x, t.float()).double(), want.expand(12), rtol=1e-5, atol=1e-6
    )


# --- what all of them must do


@QUICK
@given(
    seed=st.integers(0, 10_000), lam=st.floats(0, 1), loss=st.sampled_from(["cross_entropy", "focal", "bce"])
)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixture_costs_the_mixture_of_its_weighted_losses(weights, smoothing, seed, lam, loss):
    """The trap: dividing by the summed weights of the batch, or weighing an image by its larger label."""
    x, a = batch(seed)
    b = a.roll(1)
    fn = make_loss(Config(loss=loss, label_smoothing=smoothing), weights)
    mixed = fn(x, lam * one_hot(a) + (1 - lam) * one_hot(b))
    torch.testing.assert_close(mixed, lam * fn(x, a) + (1 - lam) * fn(x, b), rtol=1e-4, atol=1e-5)


def test_weights_of_cross_entropy_are_those_of_the_labels():
    x, y = batch()
    fn = make_loss(Config(label_smoothing=0.0), WEIGHTS)
    plain = make_loss(Config(label_smoothing=0.0))
    torch.testing.assert_close(fn(x, y), WEIGHTS[y] * plain(x, y))
    lam, b = 0.3, y.roll(1)
    want = lam * WEIGHTS[y] * plain(x, y) + (1 - lam) * WEIGHTS[b] * plain(x, b)
    torch.testing.assert_close(fn(x, lam * one_hot(y) + (1 - lam) * one_hot(b)), want)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_hard_labels_are_one_hot_targets(loss, weights):
    x, y = batch()
    fn = make_loss(Config(loss=loss), weights)
    torch.testing.assert_close(fn(x, y), fn(x, one_hot(y)))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("size", [1e4, -1e4, 50.0])
def test_extreme_logits_have_a_finite_loss_and_gradient(loss, gamma, size):
    x = torch.zeros(4, 5)
    x[:, 2] = size
    x[3] = torch.tensor([size, -size, size, -size, 0.0])
    fn = make_loss(Config(loss=loss, focal_gamma=gamma), WEIGHTS)
    for y in (torch.tensor([2, 0, 1, 3]), soft(n=4)):
        for logits in (x.clone(), x.half()):
            logits.requires_grad_()
            got = fn(logits, y)
            got.mean().backward()
            assert got.dtype == torch.float32 and torch.isfinite(got).all()
            assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradients(loss, gamma):
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    fn = make_loss(Config(loss=loss, focal_gamma=gamma), WEIGHTS.double())
    for y in (torch.tensor([0, 1, 2, 3, 4, 1]), soft(n=6).double()):
        assert torch.autograd.gradcheck(lambda logits, y=y: fn(logits, y), (x,))


@pytest.mark.parametrize("loss", LOSSES)
def test_going_down_the_gradient_finds_the_labels(loss):
    torch.manual_seed(0)
    x, y = torch.zeros(20, 5, requires_grad=True), torch.arange(20) % 5
    fn = make_loss(Config(loss=loss))
    with torch.no_grad():
        x += 0.1 * torch.randn(20, 5)
    optimizer = torch.optim.Adam([x], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        fn(x, y).mean().backward()
        optimizer.step()
    assert (activation(loss, False)(x).argmax(1) == y).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_is_read_back_from_the_device(loss):
    """Tensors on the meta device have no values: what would make a GPU wait for a number fails there."""
    fn = make_loss(Config(loss=loss), torch.ones(5, device="meta"))
    for y in (torch.zeros(3, dtype=torch.int64, device="meta"), torch.zeros(3, 5, device="meta")):
        assert fn(torch.randn(3, 5, device="meta"), y).shape == (3,)


def test_several_labels_need_bce():
    for loss in ("cross_entropy", "focal", "soft_f1"):
        with pytest.raises(UsageError, match=f"bce.*{loss}"):
            make_loss(Config(loss=loss), multilabel=True)


# --- probabilities


def test_activations():
    x, _ = batch()
    for loss in ("cross_entropy", "focal", "soft_f1"):
        torch.testing.assert_close(activation(loss, False)(x), x.softmax(1))
    torch.testing.assert_close(activation("bce", True)(x), x.sigmoid())
    torch.testing.assert_close(activation("bce", False)(x), x.sigmoid() / x.sigmoid().sum(1, keepdim=True))


@pytest.mark.parametrize(("loss", "multilabel"), [("cross_entropy", False), ("bce", False), ("bce", True)])
def test_activations_of_extreme_logits(loss, multilabel):
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1.01e4], [1e4, 1e4, 1e4]])
    for logits in (x, x.half()):
        p = activation(loss, multilabel)(logits)
        assert p.dtype == torch.float32 and ((p >= 0) & (p <= 1)).all()
        assert multilabel or torch.allclose(p.sum(1), torch.ones(3))


# --- imbalance

LABELS = np.repeat([0, 1, 2, 3, 4], [50, 3, 20, 1, 26])


def test_balanced_weights_are_scikit_learns():
    want = compute_class_weight("balanced", classes=np.arange(5), y=LABELS)
    got = class_weights(LABELS, 5, "balanced", 0.0)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)


@QUICK
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=60), st.sampled_from(["balanced", "effective"]),
    st.floats(0, 0.9999),
)  # fmt: skip
def test_mean_weight_of_the_images_is_one(labels, kind, beta):
    labels = np.array(labels)
    for form in (labels, np.eye(6, dtype=np.float32)[labels]):
        got = class_weights(form, 6, kind, beta)
        assert got[labels].mean() == pytest.approx(1, rel=1e-5)
        assert (got[np.setdiff1d(np.arange(6), labels)] == 1).all()


def test_effective_numbers():
    """Cui et al. 2019: n images are worth 1 + beta + ... + beta ** (n - 1)."""
    counts = np.bincount(LABELS)
    got = class_weights(LABELS, 5, "effective", 0.9)
    worth = np.array([sum(0.9**i for i in range(n)) for n in counts])
    np.testing.assert_allclose(got * worth, got[0] * worth[0], rtol=1e-6)
    np.testing.assert_allclose(class_weights(LABELS, 5, "effective", 0.0), np.ones(5), rtol=1e-6)
    balanced = class_weights(LABELS, 5, "balanced", 0.0)
    np.testing.assert_allclose(class_weights(LABELS, 5, "effective", 1 - 1e-9), balanced, rtol=1e-5)
    assert class_weights(LABELS, 5, "none", 0.9) is None


def test_drawing_with_weights():
    balanced, half = sample_weights(LABELS, "balanced"), sample_weights(LABELS, "sqrt")
    counts = np.bincount(LABELS)
    share = np.bincount(LABELS, balanced) / balanced.sum()
    np.testing.assert_allclose(share, np.full(5, 0.2))
    share = np.bincount(LABELS, half) / half.sum()
    np.testing.assert_allclose(share, np.sqrt(counts) / np.sqrt(counts).sum())
    assert balanced.dtype == half.dtype == np.float64
    assert sample_weights(LABELS, "none") is None and sample_weights(LABELS, "bootstrap") is None
    as_rows = np.eye(5, dtype=np.float32)[LABELS]
    np.testing.assert_allclose(sample_weights(as_rows, "balanced"), balanced)
    np.testing.assert_allclose(sample_weights(as_rows, "sqrt"), half)


def test_the_rarest_of_several_labels_decides():
    rows = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]], np.float32)
    np.testing.assert_allclose(sample_weights(rows, "balanced"), [1 / 4, 1 / 4, 1 / 4, 1, 1 / 2, 1 / 2])
    np.testing.assert_allclose(sample_weights(rows, "sqrt") ** 2, sample_weights(rows, "balanced"))
