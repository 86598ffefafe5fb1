"""The peers of ``fastload bench --compare``: one file each, imported when it is asked for.

>>> make("ffcv").title
'FFCV'
"""

from __future__ import annotations

import importlib

from fastload.benchmarks.peers.base import Peer
from fastload.errors import UsageError, unknown

# Name on the command line -> (module, class). "fastload" rows come first in every table.
PEERS = {
    "cpu": ("cpu", "Cpu"),
    "cpu-exact": ("cpu", "CpuExact"),
    "cuda": ("cuda", "Cuda"),
    "dali": ("dali", "Dali"),
    "ffcv": ("ffcv", "Ffcv"),
    "torch": ("torch", "Torch"),
    "torch-gpu": ("torch_gpu", "TorchGpu"),
    "timm": ("timm", "Timm"),
    "spdl": ("spdl", "Spdl"),
    "grain": ("grain", "Grain"),
    "tfdata": ("tfdata", "TfData"),
    "albumentations": ("albumentations", "Albumentations"),
    "webdataset": ("webdataset", "WebDataset"),
    "litdata": ("litdata", "LitData"),
    "mosaic": ("mosaic", "Mosaic"),
}


def peer_class(name: str) -> type[Peer]:
    """The class of a peer, with nothing of its library imported.

    ``name`` is one of ``PEERS``, or "module:Class" for a peer of one's own: any importable subclass of :class:`Peer`, as in
    ``fastload bench DATA --compare cpu,mypackage.peer:Mine``. UsageError for a wrong one, with the nearest names.
    """
    if ":" in name:
        return _foreign(name)
    if name not in PEERS:
        raise unknown("peer", name, PEERS, "a peer of your own is named module:Class")
    module, kind = PEERS[name]
    found: type[Peer] = getattr(importlib.import_module(f"fastload.benchmarks.peers.{module}"), kind)
    return found


def _foreign(name: str) -> type[Peer]:
    module, _, kind = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"the module of the peer {name!r} cannot be imported ({error}); install it, or add its folder to PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise UsageError(f"the module {module!r} has no class {kind!r}, got peer {name!r}") from error
    if not (isinstance(found, type) and issubclass(found, Peer)):
        raise UsageError(
            f"a peer must be a class made from fastload.benchmarks.peers.base.Peer, got {name!r}"
        )
    return found


def make(name: str) -> Peer:
    """A peer, ready to be asked."""
    return peer_class(name)()
