"""Optimizers and schedules, step for step against those of torch."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import timm
import timm.optim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from fastload.errors import UsageError
from fastload.train.config import SCHEDULES, Config
from fastload.train.optim import make_optimizer
from fastload.train.schedule import make_schedule

QUICK = settings(max_examples=40, deadline=None)  # a busy core is no reason to fail


def decay_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The weight decay of each parameter by its name; each must be in one group."""
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(decay) == len(names)
    return decay


# --- optimizers

TORCHS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "plain_sgd": (torch.optim.SGD, {}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-8}),
    "adadelta": (torch.optim.Adadelta, {}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.9, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
}


@pytest.mark.parametrize("name", TORCHS)
def test_optimizers_are_torchs_of_that_name_and_learn(name):
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
    theirs = copy.deepcopy(mine)
    x = torch.randn(32, 6)
    y = x[:, :1] - 2 * x[:, 1:2]
    optimizer = make_optimizer(Config(optimizer=name, lr=0.01, weight_decay=0.1), mine)
    kind, options = TORCHS[name]
    oracle = kind(
        [
            {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.01, **options,
    )  # fmt: skip
    losses = []
    for _ in range(5):
        for model, opt in ((mine, optimizer), (theirs, oracle)):
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            opt.step()
            losses.append(loss.item())
    for a, b in zip(mine.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert losses[-1] < losses[0]
    assert type(optimizer) is kind


# Not kron, which compiles for half a minute.
@pytest.mark.parametrize("name", timm.optim.list_optimizers(exclude_filters=["kron*"]))
def test_every_name_of_timm_makes_a_step_or_is_refused(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    before = copy.deepcopy(model.state_dict())
    try:
        optimizer = make_optimizer(Config(optimizer=name, lr=1e-3), model)
    except UsageError as error:
        assert name in str(error)
        assert name.startswith(("bnb", "fused")) or name == "adahessian"
        return
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 4, 4)).square().mean().backward()
        optimizer.step()
    after = model.state_dict()
    assert all(torch.isfinite(after[k]).all() for k in after)
    assert not torch.equal(after["2.weight"], before["2.weight"])


def test_unknown_optimizer():
    with pytest.raises(UsageError, match=r"'adamm'.*'adam'"):
        make_optimizer(Config(optimizer="adamm"), nn.Linear(2, 2))


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_vit2"]
)
@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_norms_biases_and_embeddings_are_not_decayed(name, layer_decay):
    model = timm.create_model(name, num_classes=3)
    decay = decay_of(model, make_optimizer(Config(weight_decay=0.05, layer_decay=layer_decay), model))
    params = dict(model.named_parameters())
    matrices = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    norms = {
        f"{path}.{leaf}"
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for leaf, _ in module.named_parameters(recurse=False)
    }
    spared = getattr(model, "no_weight_decay", set)() & set(params)
    assert norms and matrices and norms <= set(params)
    assert {name for name, value in decay.items() if value == 0.05} == matrices
    assert all(decay[k] == 0 for k in norms | spared)
    if name == "test_vit":
        assert {"pos_embed", "cls_token"} & spared


class Scaled(nn.Module):
    """Parameters that a rule by names, or by dimensions alone, takes for matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.LayerNorm((4, 6, 6))  # three dimensions
        self.standardise = nn.GroupNorm(2, 4)
        self.rms = nn.RMSNorm((4, 6, 6))
        self.layer_scale = nn.Parameter(torch.ones(4, 1, 1))
        self.gamma = nn.Parameter(torch.ones(4))
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 36, 4))
        self.bias = nn.Parameter(torch.zeros(4, 4))
        self.mix = nn.Parameter(torch.ones(4, 4))
        self.bn = nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 1)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}


def test_parameters_of_unusual_names_and_shapes():
    model = Scaled()
    decay = decay_of(model, make_optimizer(Config(weight_decay=0.1), model))
    assert {name for name, value in decay.items() if value} == {"mix", "out.weight"}
    inside = nn.Sequential(model)
    decay = decay_of(inside, make_optimizer(Config(weight_decay=0.1), inside))
    assert {name for name, value in decay.items() if value} == {"0.mix", "0.out.weight", "0.pos_embed"}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_layer_decay_slows_earlier_layers(name):
    model = timm.create_model(name, num_classes=3)
    optimizer = make_optimizer(Config(lr=0.01, layer_decay=0.5), model)
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    rate = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert set(scale) == set(names.values())
    order = {
        "test_resnet": ["conv1.0.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight", "layer4.0.conv1.weight", "fc.weight"],
        "test_vit": ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "blocks.5.mlp.fc1.weight", "head.weight"],
        "test_efficientnet": ["conv_stem.weight", "blocks.0.0.conv.weight", "blocks.3.0.conv_pw.weight", "classifier.weight"],
    }[name]  # fmt: skip
    got = [scale[n] for n in order]
    assert got == sorted(got) and len(set(got)) == len(got) and got[-1] == 1
    assert all(math.log2(value) == int(math.log2(value)) for value in scale.values())
    assert all(rate[n] == pytest.approx(0.01 * scale[n]) for n in scale)
    plain = make_optimizer(Config(lr=0.01), model)
    assert {g["lr"] for g in plain.param_groups} == {0.01} and "lr_scale" not in plain.param_groups[0]


def test_layer_decay_of_a_model_without_layers_is_refused():
    with pytest.raises(UsageError, match=r"layer_decay.*0\.8"):
        make_optimizer(Config(layer_decay=0.8), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    groups = make_optimizer(Config(), model).param_groups
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model[1].parameters()}


# --- schedules


def course(cfg: Config, steps_per_epoch: int, scores: list[float] | None = None) -> list[float]:
    """The factor of every step of the training."""
    schedule = make_schedule(cfg, steps_per_epoch)
    return [
        schedule(step, [] if scores is None else scores[: step // steps_per_epoch])
        for step in range(cfg.epochs * steps_per_epoch)
    ]


def torchs(steps: int, make, metrics: list[float] | None = None, steps_per_epoch: int = 1) -> list[float]:
    """The same from a scheduler of torch, for a peak of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    got = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about optimizer.step(), which moves nothing here
        for step in range(steps):
            got.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if metrics is None:
                scheduler.step()
            elif (step + 1) % steps_per_epoch == 0:
                scheduler.step(metrics[step // steps_per_epoch])
    return got


def warmed(values: list[float], warmup: int) -> list[float]:
    """Linear warm-up, then ``values``."""
    return [(i + 1) / warmup for i in range(warmup)] + values


epochs, per_epoch, floors = st.integers(1, 12), st.integers(1, 9), st.sampled_from([0.0, 0.01, 0.3])


@QUICK
@given(epochs=epochs, n=per_epoch, share=st.floats(0, 0.9), floor=floors)
def test_cosine(epochs, n, share, floor):
    cfg = Config(epochs=epochs, warmup_epochs=share * epochs, min_lr=floor)
    warmup, total = round(share * epochs * n), epochs * n
    if warmup == total:
        return
    want = torchs(total - warmup, lambda o: lr_scheduler.CosineAnnealingLR(o, total - warmup, eta_min=floor))
    got = course(cfg, n)
    assert got == pytest.approx(warmed(want, warmup), abs=1e-6)
    assert min(got[warmup:]) > floor
    schedule = make_schedule(cfg, n)
    assert schedule(total, []) == schedule(total + 7, []) == floor


@QUICK
@given(cycles=st.integers(1, 5), length=st.integers(1, 10), warmup=st.integers(0, 3), floor=floors)
def test_cosine_restarts(cycles, length, warmup, floor):
    n = 1  # an epoch a step, so that the cycles can have any length
    cfg = Config(
        epochs=cycles * length + warmup, warmup_epochs=float(warmup), schedule="cosine_restarts", cycles=cycles, min_lr=floor,
    )  # fmt: skip
    want = torchs(
        cycles * length, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, length, eta_min=floor)
    )
    assert course(cfg, n) == pytest.approx(warmed(want, warmup), abs=1e-6)
    assert make_schedule(cfg, n)(cfg.epochs, []) == floor


def test_cosine_restarts_of_unequal_lengths_start_at_the_peak():
    values = course(Config(epochs=10, warmup_epochs=0.0, schedule="cosine_restarts", cycles=3), 1)
    rises = [i for i in range(1, 10) if values[i] > values[i - 1]]
    assert rises == [4, 7] and values[0] == 1 and min(values[i] for i in rises) > 0.9


@QUICK
@given(epochs=epochs, n=per_epoch, warmup=st.integers(0, 4), power=st.sampled_from([0.5, 0.9, 1.0, 2.0]))
def test_polynomial(epochs, n, warmup, power):
    if warmup >= epochs:
        return
    cfg = Config(epochs=epochs, warmup_epochs=float(warmup), schedule="polynomial", power=power)
    left = (epochs - warmup) * n
    want = torchs(left, lambda o: lr_scheduler.PolynomialLR(o, left, power))
    assert course(cfg, n) == pytest.approx(warmed(want, warmup * n), abs=1e-6)
    lifted = Config(
        epochs=epochs, warmup_epochs=float(warmup), schedule="polynomial", power=power, min_lr=0.2
    )
    want = [0.2 + 0.8 * value for value in want]
    assert course(lifted, n) == pytest.approx(warmed(want, warmup * n), abs=1e-6)
    assert make_schedule(lifted, n)(epochs * n, []) == 0.2


@QUICK
@given(epochs=epochs, n=per_epoch, every=st.integers(1, 5), gamma=st.sampled_from([0.1, 0.5, 0.9]))
def test_step(epochs, n, every, gamma):
    cfg = Config(epochs=epochs, warmup_epochs=0.0, schedule="step", step_epochs=float(every), gamma=gamma)
    assert course(cfg, n) == pytest.approx(
        torchs(epochs * n, lambda o: lr_scheduler.StepLR(o, every * n, gamma))
    )


@QUICK
@given(epochs=epochs, n=per_epoch, milestones=st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_multi_step(epochs, n, milestones):
    cfg = Config(
        epochs=epochs, warmup_epochs=0.0, schedule="multi_step", milestones=tuple(map(float, milestones)), gamma=0.5,
    )  # fmt: skip
    got = course(cfg, n)
    want = torchs(epochs * n, lambda o: lr_scheduler.MultiStepLR(o, [m * n for m in milestones], 0.5))
    assert got == pytest.approx(want)


def test_drops_at_parts_of_epochs():
    step = Config(epochs=3, warmup_epochs=0.0, schedule="step", step_epochs=0.1, gamma=0.5)
    assert course(step, 30) == pytest.approx([0.5 ** (i // 3) for i in range(90)])
    many = Config(epochs=2, warmup_epochs=0.0, schedule="multi_step", milestones=(0.5, 1.5), gamma=0.1)
    assert course(many, 4) == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("schedule", ["step", "multi_step", "plateau", "constant"])
def test_warm_up_and_floor_of_the_courses_with_drops(schedule):
    cfg = Config(
        epochs=6, warmup_epochs=2.0, schedule=schedule, step_epochs=2.0, milestones=(2.0, 4.0), plateau_epochs=2,
        gamma=0.1, min_lr=0.05,
    )  # fmt: skip
    got = course(cfg, 2, [0.5, 0.6, 0.6, 0.6, 0.6, 0.6])
    rise = [0.25, 0.5, 0.75, 1.0]
    late = {
        "step": [0.1] * 4 + [0.05] * 4,
        "multi_step": [0.1] * 4 + [0.05] * 4,
        "plateau": [1.0] * 4 + [0.1] * 4,
        "constant": [1.0] * 8,
    }[schedule]
    assert got == pytest.approx(rise + late)


@QUICK
@given(epochs=st.integers(2, 12), n=st.integers(4, 20), given_rise=st.booleans(), floor=floors)
def test_one_cycle(epochs, n, given_rise, floor):
    rise, total = max(1, epochs // 2), epochs * n
    cfg = Config(
        epochs=epochs, schedule="one_cycle", min_lr=floor, warmup_epochs=float(rise) if given_rise else None
    )
    want = torchs(
        total,
        lambda o: lr_scheduler.OneCycleLR(
            o, max_lr=1.0, total_steps=total, pct_start=rise / epochs if given_rise else 0.3, cycle_momentum=False,
            final_div_factor=1 / (25 * floor) if floor else 1e4,
        ),
    )  # fmt: skip
    assert course(cfg, n) == pytest.approx(want, abs=1e-6)
    assert make_schedule(cfg, n)(total, []) == pytest.approx(max(floor, 4e-6))


def test_one_cycle_of_a_single_step_and_without_a_rise():
    assert course(Config(epochs=1, schedule="one_cycle"), 1) == [1.0]
    make_schedule(Config(epochs=1, schedule="one_cycle"), 1)(1, [])  # asked for after the last step
    values = course(Config(epochs=5, schedule="one_cycle", warmup_epochs=0.0), 2)
    assert values[0] == 1.0 and values == sorted(values, reverse=True)


@QUICK
@given(
    scores=st.lists(st.one_of(st.integers(0, 6), st.just(float("nan"))), min_size=2, max_size=20),
    n=st.integers(1, 4), patience=st.integers(1, 4), floor=floors,
)  # fmt: skip
def test_plateau(scores, n, patience, floor):
    cfg = Config(
        epochs=len(scores), warmup_epochs=0.0, schedule="plateau", plateau_epochs=patience, gamma=0.5, min_lr=floor,
    )  # fmt: skip
    want = torchs(
        len(scores) * n,
        lambda o: lr_scheduler.ReduceLROnPlateau(
            o, mode="max", factor=0.5, patience=patience - 1, threshold=0.0, min_lr=floor, eps=0.0
        ),
        scores,
        n,
    )
    assert course(cfg, n, scores) == pytest.approx(want)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_pure_and_within_the_peak(schedule):
    """Asked in any order, also by another function of the same options, it says the same: so a run can be resumed anywhere."""
    cfg = Config(epochs=7, schedule=schedule, milestones=(3.0, 5.0), step_epochs=2.0, min_lr=0.02)
    scores = [0.3, 0.4, 0.4, 0.4, 0.4, 0.2, 0.1]
    values = course(cfg, 5, scores)
    again = make_schedule(cfg, 5)
    assert [again(step, scores[: step // 5]) for step in reversed(range(35))] == values[::-1]
    assert max(values) == pytest.approx(1, abs=0.02) and min(values[4:]) >= 0.02
    assert all(math.isfinite(value) and value > 0 for value in values)
