"""Averages of weights against sums by hand, batch norm against the statistics of the images."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastload.train.average import Ema, Swa, decay_at, greedy_soup, update_batch_norm

CPU = torch.device("cpu")


def model(seed: int = 0) -> nn.Sequential:
    """Weights, running statistics and a counter that have all been used."""
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for _ in range(seed + 1):
        made(torch.randn(8, 3))
    return made


def state(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([value]) for name, value in values.items()}


# --- moving average


def test_ema_averages_weights_and_copies_buffers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    ema = Ema(model, decay=0.9)
    oracle = {k: v.detach().clone().double() for k, v in model.named_parameters()}
    for t in range(1, 40):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(8, 3))
        ema.update(model, t)
        d = min(0.9, (1 + t) / (10 + t))
        oracle = {k: d * oracle[k] + (1 - d) * v.detach().double() for k, v in model.named_parameters()}
    for k, v in ema.model.named_parameters():
        torch.testing.assert_close(v.double(), oracle[k], rtol=1e-4, atol=1e-5)
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert torch.equal(ema.model[1].num_batches_tracked, model[1].num_batches_tracked)
    assert not ema.model.training and model.training


def test_ema_decay_is_warmed_up():
    values = [decay_at(t, 0.999) for t in range(1, 20_000)]
    assert values[0] == pytest.approx(2 / 11)
    assert values == sorted(values) and values[-1] == 0.999


# --- mean of epochs


def test_swa_is_the_mean_of_all_states():
    models = [model(seed) for seed in range(6)]
    swa = Swa()
    for each in models:
        swa.add(each.state_dict())
    assert swa.count == 6
    for name, value in swa.weights.items():
        values = [m.state_dict()[name] for m in models]
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack(values).double().mean(0).float())
        else:
            assert value.dtype == torch.int64 and torch.equal(value, values[-1])
    assert swa.weights["1.num_batches_tracked"] == 6
    model().load_state_dict(swa.weights)  # all that a model needs


def test_swa_keeps_no_tensor_of_the_model():
    trained, swa = model(), Swa()
    swa.add(trained.state_dict())
    before = copy.deepcopy(swa.weights)
    with torch.no_grad():
        for tensor in trained.state_dict().values():
            tensor.add_(1)
    assert all(torch.equal(swa.weights[name], before[name]) for name in before)


def test_swa_of_equal_states_is_that_state():
    swa, same = Swa(), model().state_dict()
    for _ in range(7):
        swa.add(same)
    assert all(torch.equal(swa.weights[name], same[name]) for name in same)


def test_swa_goes_on_from_its_state(tmp_path):
    whole, first, second = Swa(), Swa(), Swa()
    for seed in range(5):
        whole.add(model(seed).state_dict())
    for seed in range(3):
        first.add(model(seed).state_dict())
    torch.save(first.state_dict(), tmp_path / "swa.pt")
    second.load_state_dict(torch.load(tmp_path / "swa.pt", weights_only=True))
    for seed in range(3, 5):
        second.add(model(seed).state_dict())
    assert second.count == 5
    assert all(torch.equal(second.weights[name], whole.weights[name]) for name in whole.weights)
    empty = Swa()
    empty.load_state_dict(Swa().state_dict())
    assert empty.count == 0 and empty.weights == {}


# --- soup


def test_greedy_soup_takes_what_does_not_harm():
    """The score is the distance from 1: the mean of 0 and 2 is right; 9 never helps, 3 no longer then."""
    values = [0.0, 9.0, 2.0, 3.0, 1.0]
    candidates = [state(w=value) for value in values]
    tried = []

    def score(weights):
        tried.append(weights["w"].item())
        return -abs(weights["w"].item() - 1)

    soup, chosen = greedy_soup(candidates, score)
    assert chosen == [0, 2, 4] and soup["w"].item() == 1.0
    assert tried == pytest.approx([0.0, 4.5, 1.0, 5 / 3, 1.0])
    assert [c["w"].item() for c in candidates] == values


def test_greedy_soup_is_a_plain_mean_of_the_chosen():
    candidates = [model(seed).state_dict() for seed in range(4)]
    soup, chosen = greedy_soup(candidates, lambda weights: 0.0)
    assert chosen == [0, 1, 2, 3]
    for name in ("0.weight", "1.running_var"):
        torch.testing.assert_close(soup[name], torch.stack([c[name] for c in candidates]).mean(0))
    assert soup["1.num_batches_tracked"].dtype == torch.int64


def test_greedy_soup_of_nothing_better_is_the_best_one():
    candidates = [state(w=1.0), state(w=5.0), state(w=float("nan"))]
    soup, chosen = greedy_soup(candidates, lambda weights: -abs(weights["w"].item() - 1))
    assert chosen == [0] and torch.equal(soup["w"], candidates[0]["w"])


# --- batch norm


def test_update_batch_norm_measures_the_given_images():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.BatchNorm2d(3, momentum=0.3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, momentum=0.2)
    ).eval()
    with torch.no_grad():
        net[0].running_mean.fill_(50)
    weights = [p.detach().clone() for p in net.parameters()]
    batches = [torch.randn(8, 3, 5, 5) * 2 + 1 for _ in range(4)]
    update_batch_norm(net, iter(batches), CPU)
    torch.testing.assert_close(net[0].running_mean, torch.cat(batches).mean((0, 2, 3)))
    want = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in batches]).mean(0)
    torch.testing.assert_close(net[0].running_var, want)
    inner = [net[1](normed(b)) for b in batches]
    torch.testing.assert_close(net[2].running_mean, torch.cat(inner).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert (net[0].momentum, net[2].momentum) == (0.3, 0.2) and not net.training
    assert net[0].num_batches_tracked == 4 and net[0].num_batches_tracked.dtype == torch.int64
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters()))


def normed(batch: torch.Tensor) -> torch.Tensor:
    """A batch as batch norm in training mode passes it on."""
    return nn.functional.batch_norm(batch, None, None, training=True)


def test_update_batch_norm_reads_nothing_for_a_model_without_it():
    def batches():
        raise AssertionError("read")
        yield

    update_batch_norm(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), batches(), CPU)


def test_averaged_weights_need_new_statistics():
    """The mean of two networks whose hidden features differ: kept statistics are wrong for it, measured ones right."""
    torch.manual_seed(0)
    images = torch.randn(64, 3)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    swa = Swa()
    for net in nets:
        update_batch_norm(net, [images], CPU)
        swa.add(net.state_dict())
    mean = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    mean.load_state_dict(swa.weights)

    def spread() -> torch.Tensor:
        return mean.eval()(images).var(dim=0)

    assert (spread() < 0.9).any()
    update_batch_norm(mean, [images], CPU)
    torch.testing.assert_close(spread(), torch.ones(4), rtol=1e-3, atol=1e-3)
