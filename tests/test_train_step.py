"""One optimizer step: equal to the textbook's, however the batch is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from fastload.errors import UsageError
from fastload.train import Config, create_model, make_step, pick_device
from fastload.train import model as model_module
from fastload.train.distributed import Ranks
from fastload.train.losses import make_loss
from fastload.train.model import check_forward, normalisation, resolve_amp
from fastload.train.optim import make_optimizer
from fastload.train.schedule import make_schedule
from fastload.train.step import Step

CPU = torch.device("cpu")
BASE = Config(
    model="test_vit", size=32, batch_size=8, epochs=4, warmup_epochs=1.0, clip_grad=0.05, device="cpu"
)


def tiny(seed: int = 0) -> nn.Module:
    """A model without batch norm, so that a batch cut in parts has the same gradient."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 5)
    )


def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(n)
    return torch.randn(n, 3, 8, 8), torch.randint(0, 5, (n,))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("soft", [False, True])
def test_step_equals_the_textbook(clip, soft):
    cfg = replace(BASE, clip_grad=clip, optimizer="sgd", lr=0.1, weight_decay=0.01, label_smoothing=0.2)
    step = make_step(cfg, 5, CPU, model=tiny(), steps_per_epoch=3)
    model = tiny()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    opt = torch.optim.SGD(
        [{"params": others, "weight_decay": 0.0}, {"params": decayed}],
        lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01,
    )  # fmt: skip
    for k in range(12):
        images, labels = data(8)
        if soft:
            labels = torch.rand(8, 5).softmax(1)
        for group in opt.param_groups:
            group["lr"] = 0.1 * make_schedule(cfg, 3)(k, [])
        opt.zero_grad()
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.2)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        got = step(images, labels)
        assert got.requires_grad is False and got.shape == ()
        torch.testing.assert_close(got, loss.detach())
    torch.testing.assert_close(weights(step.model), weights(model))
    assert step.updates == 12


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("cuts", [(4, 4, 4), (4, 4, 1), (4,), (4, 2), (3, 4, 2)])
def test_accumulation_equals_one_large_batch_of_the_same_images(cuts, clip):
    """Also for a window that the epoch's end cuts short and for a short last batch."""
    n = sum(cuts)
    images, labels = data(n)
    cfg = replace(BASE, optimizer="sgd", lr=0.1, clip_grad=clip)
    small = make_step(replace(cfg, batch_size=4, accumulate=3), 5, CPU, model=tiny(), steps_per_epoch=2)
    large = make_step(replace(cfg, batch_size=n), 5, CPU, model=tiny(), steps_per_epoch=2)
    for _ in range(2):
        for a, b in zip(images.split(list(cuts)), labels.split(list(cuts))):
            small(a, b)
        small.flush()
        large(images, labels)
        assert small.updates == large.updates
    torch.testing.assert_close(weights(small.model), weights(large.model), rtol=1e-5, atol=1e-7)
    small.flush()  # nothing is due
    assert small.updates == 2


def test_learning_rate_follows_the_optimizer_steps_only():
    step = make_step(replace(BASE, accumulate=2, lr=1.0), 5, CPU, model=tiny(), steps_per_epoch=10)
    seen = []
    for _ in range(6):
        seen.append(step.optimizer.param_groups[0]["lr"])
        step(*data(8))
    assert seen == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    flat = make_step(replace(BASE, lr=0.5), 5, CPU, model=tiny())
    flat(*data(8))
    assert {g["lr"] for g in flat.optimizer.param_groups} == {0.5}


class _Scaler:
    """Stands for fp16's scaler: the second step overflows and is skipped, as torch's own does it."""

    def __init__(self) -> None:
        self.factor, self.calls = 1024.0, 0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.factor

    def unscale_(self, opt: torch.optim.Optimizer) -> None:
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad /= self.factor

    def step(self, opt: torch.optim.Optimizer) -> None:
        self.calls += 1
        if self.calls != 2:
            opt.step()

    def update(self) -> None:
        if self.calls == 2:
            self.factor /= 2

    def get_scale(self) -> float:
        return self.factor


def test_a_skipped_fp16_step_moves_neither_schedule_nor_average():
    cfg = replace(
        BASE, optimizer="sgd", lr=0.1, ema=0.5, clip_grad=10.0
    )  # more than any gradient here, unscaled
    step = make_step(cfg, 5, CPU, model=tiny(), steps_per_epoch=10)
    plain = make_step(cfg, 5, CPU, model=tiny(), steps_per_epoch=10)
    step.scaler = _Scaler()
    for k, batch in enumerate([data(8), data(7), data(6)]):
        before = step.optimizer.param_groups[0]["lr"], weights(step.best_model)
        step(*batch)
        if k == 1:
            assert step.updates == 1
            assert step.optimizer.param_groups[0]["lr"] == before[0]
            assert torch.equal(weights(step.best_model), before[1])
        else:
            plain(*batch)
    assert step.updates == 2
    torch.testing.assert_close(weights(step.model), weights(plain.model))  # unscaled before it was clipped
    torch.testing.assert_close(weights(step.best_model), weights(plain.best_model))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_reading_back_in_the_hot_loop(optimizer):
    """On the meta device tensors have no values: whatever would make a GPU wait for a number fails there."""
    meta = torch.device("meta")
    cfg = replace(BASE, optimizer=optimizer, accumulate=2, ema=0.9)
    model = tiny().to(meta)
    step = Step(
        cfg,
        model,
        make_optimizer(cfg, model),
        meta,
        "off",
        lambda updates, scores: 1.0,
        make_loss(cfg),
        Ranks(),
    )
    for _ in range(4):
        loss = step(torch.randn(7, 3, 8, 8, device=meta), torch.zeros(7, dtype=torch.int64, device=meta))
    assert step.updates == 2
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


def test_norms_and_biases_are_not_decayed():
    model = create_model("test_resnet", 3)
    step = make_step(replace(BASE, model="test_resnet", weight_decay=0.05), 3, CPU, model=model)
    decay = {id(p): g["weight_decay"] for g in step.optimizer.param_groups for p in g["params"]}
    norms = [
        p for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)) for p in m.parameters()
    ]
    assert norms and all(decay[id(p)] == 0 for p in norms)
    convs = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert convs and all(decay[id(p)] == 0.05 for p in convs)
    assert len(decay) == len(list(model.parameters()))


def test_state_continues_where_it_stopped():
    cfg = replace(BASE, ema=0.9)
    whole = make_step(cfg, 5, CPU, model=tiny(), steps_per_epoch=5)
    for n in (8, 7, 6, 5):
        whole(*data(n))
        whole.flush()
    first = make_step(cfg, 5, CPU, model=tiny(), steps_per_epoch=5)
    first(*data(8))
    first.flush()
    first(*data(7))
    first.flush()
    second = make_step(cfg, 5, CPU, model=tiny(seed=9), steps_per_epoch=5)
    second.load_state_dict(first.state_dict())
    for n in (6, 5):
        second(*data(n))
        second.flush()
    assert torch.equal(weights(second.model), weights(whole.model))
    assert torch.equal(weights(second.best_model), weights(whole.best_model))


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_real_model_learns(amp):
    torch.manual_seed(0)
    step = make_step(replace(BASE, model="test_resnet", amp=amp, lr=3e-3, label_smoothing=0.0), 2, "cpu")
    labels = torch.arange(8) % 2
    images = torch.randn(8, 3, 32, 32) * 0.1 + labels[:, None, None, None].float()
    losses = [step(images, labels).item() for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
    assert step.amp == amp and step.device == CPU
    assert next(iter(step.model.parameters())).dtype == torch.float32


def test_make_step_lays_out_the_weights():
    model = make_step(replace(BASE, model="test_resnet"), 2, "cpu").model
    conv = next(
        m
        for m in model.modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and m.in_channels > 1
    )
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


# --- models and devices


def test_unknown_model_and_optimizer():
    with pytest.raises(UsageError, match=r"resnet99.*did you mean"):
        create_model("resnet99", 2)
    with pytest.raises(UsageError, match=r"adanw3.*adanw"):
        make_step(replace(BASE, optimizer="adanw3"), 5, CPU, model=tiny())
    with pytest.raises(UsageError, match=r"test_resnet\.nope"):
        create_model("test_resnet.nope", 2)


def test_transformers_are_built_for_the_size():
    model = create_model("test_vit", 7, size=32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    with pytest.raises(UsageError, match="37 px"):
        check_forward(create_model("test_vit", 7, size=37), "test_vit", 37)


def test_no_weights_to_be_had(monkeypatch):
    real = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host")
        return real(name, **options)

    monkeypatch.setattr(model_module.timm, "create_model", offline)
    with pytest.raises(UsageError, match=r"no route to host.*leave --pretrained out"):
        create_model("test_resnet", 2, pretrained=True)


def test_normalisation_is_the_models_own():
    assert normalisation(create_model("test_vit", 2)) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert normalisation(create_model("test_byobnet", 2))[0] == (0.485, 0.456, 0.406)
    assert normalisation(nn.Linear(1, 1))[1] == (0.229, 0.224, 0.225)


def test_devices():
    assert pick_device("cpu") == CPU
    assert pick_device(None).type in ("cpu", "cuda", "mps")
    with pytest.raises(UsageError, match="gpu"):
        pick_device("gpu")
    with pytest.raises(UsageError, match="CUDA"):
        pick_device("cuda:99")


def test_precision(monkeypatch):
    assert resolve_amp("auto", CPU) == "off"
    assert resolve_amp("bf16", CPU) == "bf16"
    with pytest.raises(UsageError, match="CUDA"):
        resolve_amp("fp16", CPU)
    gpu = torch.device("cuda", 0)
    for capability, want in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert resolve_amp("auto", gpu) == want
        assert resolve_amp("fp16", gpu) == "fp16"
