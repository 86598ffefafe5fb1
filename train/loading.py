"""How a training asks for its batches: engine, decoder, cache, and the cache's share of the GPU's memory.

A model wants memory, too, and takes most of it after the first step; so a cache may take 40% of what is free, where a
:class:`fastload.Loader` of its own would take 80%. Only training images are kept: they are read in each epoch in another order. The trade-off
of any engine but "cpu" is pixels that differ within its tolerance, so runs go on with the engine they began with.

>>> Loader(data, 64, transforms=pipeline, device="cuda", **loading(cfg, "cuda", keep=True))
"""

from __future__ import annotations

from typing import Any

import torch

from fastload.train.config import Config

_SHARE = 0.4  # of the free memory


def loading(cfg: Config, where: str | None, keep: bool) -> dict[str, Any]:
    """Options of a Loader on the device ``where`` (None: the CPU); ``keep``: its images may be cached."""
    options: dict[str, Any] = {"threads": cfg.threads, "engine": cfg.engine}
    if cfg.engine in ("cuda", "auto"):
        options["gpu_decode"] = cfg.gpu_decode
        if keep and cfg.cache != "none":
            options["cache"] = cfg.cache
            options["vram" if cfg.cache == "device" else "ram"] = _budget(cfg, where)
    return options


def _budget(cfg: Config, where: str | None) -> int | None:
    """Bytes that the cache may take; None is the loader's own choice."""
    if cfg.cache_gb is not None:
        return int(cfg.cache_gb * 1e9)
    if cfg.cache == "host" or where is None or not where.startswith("cuda"):
        return None
    device = torch.device(where)
    # What torch holds and nobody uses is free, too, such as the cache of a loader that was closed.
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(_SHARE * (torch.cuda.mem_get_info(device)[0] + held))
