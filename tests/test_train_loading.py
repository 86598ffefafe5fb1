"""The trainer's engine, decoder and cache: passed on, within the GPU's memory, and the same training as with the CPU engine."""

from __future__ import annotations

import pytest
import torch
from conftest import make_beton

from fastload.errors import UsageError
from fastload.train import Config, Trainer, trainer
from fastload.train.loading import loading

CFG = Config(
    model="test_resnet", epochs=3, size=32, batch_size=8, lr=3e-3, augment="light", ema=0.0, device="cpu", threads=1,
    allow_leak=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_beton(
        tmp_path_factory.mktemp("data") / "photos.beton", 42, classes=3, store="raw", size=(32, 32)
    )


def test_options_go_to_the_loader_that_knows_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7_000_000_000, 16_000_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5_000_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2_000_000_000)
    assert loading(Config(threads=3), None, keep=True) == {"threads": 3, "engine": "cpu"}
    cuda = Config(engine="cuda", gpu_decode="segments", cache="device")
    plain = {"threads": None, "engine": "cuda", "gpu_decode": "segments"}
    assert loading(cuda, "cuda:0", keep=False) == plain  # of validation
    assert loading(cuda, "cuda:0", keep=True) == {**plain, "cache": "device", "vram": 4_000_000_000}
    small = Config(engine="auto", cache="device", cache_gb=1.5)
    assert loading(small, "cuda", keep=True)["vram"] == 1_500_000_000
    host = Config(engine="cuda", cache="host")
    assert loading(host, "cuda", keep=True)["ram"] is None


def test_wrong_options_are_told():
    with pytest.raises(UsageError, match="--engine cuda"):
        Config(cache="device")
    with pytest.raises(UsageError, match="did you mean 'dali'"):
        Config(engine="dalli")
    with pytest.raises(UsageError, match="cache_gb"):
        Config(engine="cuda", cache="device", cache_gb=0)


def test_training_with_other_engines(photos, tmp_path, monkeypatch):
    """Stored pixels, which every engine crops alike to a level: so the runs stay close, and each asks its own engine."""
    pytest.importorskip("nvidia.dali")
    losses, engines = {}, []
    original = trainer.Loader

    def recorded(*args, **options):
        # There is no GPU here: the cuda engine is given the CPU, on which it does the same.
        made = original(
            *args, **{**options, "device": "cpu" if options["engine"] == "cuda" else options["device"]}
        )
        engines.append(made.engine)
        return made

    monkeypatch.setattr(trainer, "Loader", recorded)
    for engine, more in (
        ("cpu", {}),
        ("dali", {}),
        ("cuda", {"cache": "device", "gpu_decode": "cpu", "cache_gb": 0.1}),
    ):
        cfg = Config.from_dict({**CFG.to_dict(), "engine": engine, **more})
        run = Trainer(cfg).fit(photos, out=tmp_path / engine)
        losses[engine] = [line["train_loss"] for line in run.history]
    assert engines == [engine for engine in ("cpu", "dali", "cuda") for _ in range(2)]
    assert losses["dali"] == pytest.approx(losses["cpu"], rel=0.05)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)
    assert losses["cpu"][0] != losses["cpu"][-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_engine_that_is_named_is_wanted(photos, tmp_path):
    cfg = Config.from_dict({**CFG.to_dict(), "engine": "cuda"})
    with pytest.raises(UsageError, match="'cuda' is not available here"):
        Trainer(cfg).fit(photos, out=tmp_path / "run")
