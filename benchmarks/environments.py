"""Which Python runs a peer: this one, or a virtual environment of its own that is made once and kept.

A peer whose library is missing here, or is here in another version than it is measured in, gets an environment in the cache
folder. There its own requirements come first, and behind them all packages of this Python, so that torch and fastload are not
installed twice. The trade-off: such an environment belongs to the Python that made it.

>>> environments.locate("ffcv").python
'/home/me/.cache/fastload/peers/ffcv-3.11-5f3c90d1/bin/python'
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastload.benchmarks.peers import peer_class
from fastload.benchmarks.peers.base import Peer
from fastload.errors import DataError, MissingExtraError, UsageError

_READY = "ready.json"  # written last: an environment without it was never finished


@dataclass(frozen=True)
class Environment:
    """``python``: path of an interpreter in which the peer can be imported; ``own``: whether it is the peer's alone."""

    python: str
    own: bool


def cache_folder() -> Path:
    """Where environments are kept: ``$FASTLOAD_CACHE``, else ``fastload`` in the user's cache folder."""
    given = os.environ.get("FASTLOAD_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastload"


def locate(name: str) -> Environment:
    """The environment of a peer.

    This Python if it has all that the peer needs in the versions that it asks for, else the peer's own if it was made.
    MissingExtraError says what is missing and how it is had; UsageError if it needs a GPU and there is none.
    """
    peer = peer_class(name)
    _check_gpu(name, peer)
    missing = _missing_here(peer)
    if not missing:
        return Environment(sys.executable, False)
    python = _python(_folder(name))
    if _is_ready(_folder(name), peer):
        return Environment(str(python), True)
    raise MissingExtraError(
        f"the peer {name!r} needs {' and '.join(missing)}; --install makes an environment of its own for it, "
        f"or install it here: {_pip_command(peer)}"
    )


def install(name: str, progress: Callable[[str], object] | None = None) -> Environment:
    """Make the peer's own environment, if this Python cannot run it and none was made; a minute or so and some disk.

    ``progress`` is called with what is done next. DataError with pip's last word if it cannot be installed.
    """
    peer = peer_class(name)
    try:
        return locate(name)
    except MissingExtraError:
        if not peer.requires:
            raise
    say = progress or (lambda text: None)
    folder = _folder(name)
    python = _python(folder)
    say(f"{name}: make an environment in {folder}")
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run, or for other requirements
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make an environment in {str(folder)!r} ({error.strerror}); set FASTLOAD_CACHE to a folder that is yours"
        ) from error
    borrow_pip = importlib.util.find_spec("pip") is not None
    _command(name, [sys.executable, "-m", "venv", *(["--without-pip"] if borrow_pip else []), str(folder)])
    _see_packages_of_this_python(python)
    say(f"{name}: pip install {' '.join(peer.requires)}")
    _command(name, [str(python), "-m", "pip", "install", "--no-input", *peer.requires])
    absent = _absent_there(python, peer)
    if absent:
        raise DataError(
            f"the environment of the peer {name!r} has no module {absent[0]!r} after pip install {' '.join(peer.requires)}"
        )
    (folder / _READY).write_text(json.dumps(_facts(peer)), encoding="utf-8")
    return Environment(str(python), True)


def _check_gpu(name: str, peer: type[Peer]) -> None:
    if not peer.needs_cuda:
        return
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            f"the peer {name!r} needs an NVIDIA GPU and torch sees none here; see: fastload doctor"
        )


def _missing_here(peer: type[Peer]) -> list[str]:
    """What this Python lacks, in words for a sentence; a requirement that no distribution answers counts if it names a version."""
    from packaging.requirements import Requirement

    missing = [f"the module {module!r}" for module in peer.modules if not _has_module(module)]
    for text in peer.requires:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            if wanted.specifier and not missing:
                missing.append(text)
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            missing.append(f"{text} (here is {found})")
    return missing


def _has_module(module: str) -> bool:
    with contextlib.suppress(ImportError, ValueError):  # a parent package that is absent or broken
        return importlib.util.find_spec(module) is not None
    return False


def _pip_command(peer: type[Peer]) -> str:
    return "pip install " + " ".join(shlex.quote(text) for text in peer.requires or peer.modules)


def _folder(name: str) -> Path:
    """One for each peer, Python version and installation: an environment sees the packages of the one that made it."""
    here = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    version = ".".join(platform.python_version_tuple()[:2])
    return cache_folder() / "peers" / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}-{version}-{here}"


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _facts(peer: type[Peer]) -> dict[str, Any]:
    return {"requires": list(peer.requires), "python": platform.python_version(), "prefix": sys.prefix}


def _is_ready(folder: Path, peer: type[Peer]) -> bool:
    try:
        facts = json.loads((folder / _READY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(facts == _facts(peer)) and _python(folder).exists()


def _see_packages_of_this_python(python: Path) -> None:
    """Add this Python's site-packages behind the environment's own, editable installations in them included.

    ``--system-site-packages`` would show those of the Python that this environment was made from, not this environment's.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    inside = python.parent.parent / "lib" / version / "site-packages"
    places = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    if site.ENABLE_USER_SITE:
        places[site.getusersitepackages()] = None
    lines = (f"import site; site.addsitedir({place!r})\n" for place in places if os.path.isdir(place))
    (inside / "zz-fastload-parent.pth").write_text("".join(lines), encoding="utf-8")


def _command(name: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith(("WARNING:", "[notice]"))]
        errors = [line for line in lines if line.lower().startswith("error")] or lines
        said = errors[-1] if errors else f"exit code {done.returncode}"
        raise DataError(f"cannot make an environment for the peer {name!r}: {said}")


def _absent_there(python: Path, peer: type[Peer]) -> list[str]:
    """Modules of the peer that its environment lacks."""
    code = (
        "import importlib.util, json, sys\n"
        "def has(name):\n"
        "    try: return importlib.util.find_spec(name) is not None\n"
        "    except (ImportError, ValueError): return False\n"
        "print(json.dumps([name for name in sys.argv[1:] if not has(name)]))"
    )
    done = subprocess.run([str(python), "-c", code, *peer.modules], capture_output=True, text=True)
    if done.returncode:
        raise DataError(
            f"the Python of an environment does not start: {(done.stderr.strip() or '?').splitlines()[-1]}"
        )
    absent: list[str] = json.loads(done.stdout)
    return absent
