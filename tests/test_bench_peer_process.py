"""The process and the environment of a peer: it is charged for its workers, stands still, leaves nothing, and fails alone."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fastload.benchmarks import environments, proctree
from fastload.benchmarks.peers.base import Work
from fastload.benchmarks.process import PeerProcess
from fastload.errors import DataError, MissingExtraError, UsageError

# -- the process ---------------------------------------------------------------------------------------------------------------

MADE = '''
import mmap, os, signal, sys, time
from multiprocessing import get_context, shared_memory
import numpy as np
from fastload.benchmarks.peers.base import Peer

MIB = 2**20
fork = get_context("fork")

class Made(Peer):
    name, title, requires, modules = "made", "Made", ("numpy",), ("numpy",)
    crops, settings = {"train": "area"}, "made for a test of peers"
    def imports(self): print("a library that talks")
    def load(self, work): pass
    def epoch(self):
        for start in (0, 4):
            yield np.full((4, 8, 8, 3), 100, np.uint8), np.arange(start, start + 4)

class Fails(Made):
    def load(self, work): raise ValueError("this library\\n  broke")
class Leaves(Made):
    def load(self, work): sys.exit(3)
class Killed(Made):
    def load(self, work):
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
class Ends(Made):
    def load(self, work): os._exit(7)

def sleep(): time.sleep(600)
def count(path):
    number = 0
    while True:
        number += 1
        with open(path + "-new", "w") as file: file.write(str(number))
        os.replace(path + "-new", path)  # a signal may stop it at any point
        time.sleep(0.005)

class Hangs(Made):
    """With a worker, and with shared memory that nobody will remove."""
    def load(self, work):
        fork.Process(target=sleep).start()
        with open(work.scratch, "w") as file:
            for tracked in (True, False):
                block = shared_memory.SharedMemory(create=True, size=MIB)
                if not tracked:
                    from multiprocessing import resource_tracker
                    resource_tracker.unregister(block._name, "shared_memory")
                if tracked: block.close()  # it is in nobody's memory map: only Python's tracker knows of it
                self.kept = getattr(self, "kept", []) + [block]
                file.write(block.name + " ")
        time.sleep(600)

class Counts(Made):
    """A worker that counts in a file, in the process group or in a session of its own; both outlive their parent."""
    def load(self, work):
        for path in (work.scratch, work.scratch + "-session"):
            if os.fork() == 0:
                if path.endswith("-session"): os.setsid()
                count(path)
        self.paths = [work.scratch, work.scratch + "-session"]
    def epoch(self):
        seen, until = [self.number(path) for path in self.paths], time.monotonic() + 20
        while any(self.number(path) <= old for path, old in zip(self.paths, seen)) and time.monotonic() < until:
            time.sleep(0.01)
        yield from super().epoch()
    def number(self, path):
        try:
            with open(path) as file: return int(file.read())
        except (OSError, ValueError): return 0  # not begun

def burn(pipe, size, path):
    block = np.ones(size, np.uint8)
    with open(path, "rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
        mapped[::4096].sum()
        pipe.send("ready")
        while pipe.recv():
            until = time.process_time() + 0.4
            while time.process_time() < until: block[:1000].sum()
            pipe.send("done")

class Works(Made):
    """200 MiB in one worker; 100 MiB that two workers share with their parent; a mapped file of 100 MiB that all read."""
    def load(self, work):
        self.shared = np.ones(100 * MIB, np.uint8)
        self.pipes = []
        for size in (200 * MIB, MIB):
            mine, theirs = fork.Pipe()
            fork.Process(target=burn, args=(theirs, size, work.scratch), daemon=True).start()
            assert mine.recv() == "ready"
            self.pipes.append(mine)
    def epoch(self):
        for pipe in self.pipes: pipe.send(True)
        for pipe in self.pipes: pipe.recv()
        yield from super().epoch()
'''


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The function that starts a made peer by its class."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "made_peers.py").write_text(MADE)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    return lambda kind, **options: PeerProcess(
        f"made_peers:{kind}", env={"PYTHONPATH": str(tmp_path / "lib")}, **{"timeout": 30, **options}
    )


def blank(scratch="", **more):
    return Work("t", "train", "jpeg", "", "", "", str(scratch), **more).to_json()


def gone(*pids, within=5.0):
    """Whether these processes end within some seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        states = [entry.state for pid in pids if (entry := proctree.stat(pid)) is not None]
        if all(state in "ZX" for state in states):
            return True
        time.sleep(0.02)
    return False


def test_a_peer_of_ones_own_answers(made):
    with made("Made") as peer:
        answer = peer.ask(do="import")
        assert answer["python"] and "numpy" in answer["versions"]
        peer.ask(do="load", work=blank())
        assert peer.ask(do="run", images=9)["images"] == 16
        check = peer.ask(do="check", images=1)
        assert check["labels"] == list(range(8)) and check["shapes"] == [[8, 8, 3]]
        assert np.allclose(check["mean_picture"], 100) and check["contrast"] == 0
        assert peer.ask(do="first_batch", work=blank())["images"] == 4
        kept = peer.ask(do="epochs", count=3, images=4)
        assert kept["images"] == 12 and len(kept["mib_by_epoch"]) == 3 and min(kept["mib_by_epoch"]) > 1
        with pytest.raises(DataError, match=r"failed at 'dance': ValueError"):
            peer.ask(do="dance")
        assert peer.ask(do="idle")["cpu_s"] > 0


@pytest.mark.parametrize("kind", ["Fails", "Leaves"])
def test_an_exception_is_an_answer_and_the_peer_lives_on(made, kind):
    with made(kind) as peer:
        with pytest.raises(
            DataError, match=r"failed at 'load': (ValueError: this library broke|SystemExit: 3)(\n|$)"
        ):
            peer.ask(do="load", work=blank())
        assert peer.ask(do="run", images=1)["images"] == 8


@pytest.mark.parametrize(
    "kind, how", [("Killed", r"signal 9, SIGKILL\); end of its log: last words"), ("Ends", "exit code 7")]
)
def test_a_death_is_one_sentence_and_others_go_on(made, kind, how):
    with made("Made") as other, made(kind) as peer:
        other.ask(do="load", work=blank())
        with pytest.raises(DataError, match=rf"died at 'load' \({how}") as caught:
            peer.ask(do="load", work=blank())
        assert "\n" not in str(caught.value)
        with pytest.raises(DataError, match="cannot be asked 'run': its process ended at 'load'"):
            peer.ask(do="run", images=1)
        assert other.ask(do="run", images=1)["images"] == 8


def test_a_hang_is_ended_with_its_workers_and_its_shared_memory(made, tmp_path):
    with made("Hangs") as peer:
        peer.ask(do="import")
        clock = time.monotonic()
        with pytest.raises(DataError, match="gave no answer to 'load' within 3 s and was ended"):
            peer.ask(do="load", work=blank(tmp_path / "names"), timeout=3)
        assert time.monotonic() - clock < 8
        assert not proctree.group(peer.process.pid)
    names = (tmp_path / "names").read_text().split()
    assert len(names) == 2 and not any((Path("/dev/shm") / name).exists() for name in names)


def test_workers_stand_still_between_turns_and_none_is_left(made, tmp_path):
    paths = [tmp_path / "number", tmp_path / "number-session"]
    with made("Counts") as peer:
        peer.ask(do="load", work=blank(paths[0]))
        before = ["", ""]
        for _ in range(2):
            peer.ask(do="run", images=1)
            time.sleep(0.1)  # a signal takes its time
            now = [path.read_text() for path in paths]
            assert all(one != other for one, other in zip(now, before)), "they work in their turn"
            time.sleep(0.3)
            assert [path.read_text() for path in paths] == now, "and only then"
            before = now
        everyone = proctree.tree(peer.process.pid)
        assert len(everyone) == 3
    assert gone(*everyone)


def test_all_end_when_the_one_who_asks_is_killed(made, tmp_path):
    code = f"""
        import time
        from fastload.benchmarks import proctree
        from fastload.benchmarks.process import PeerProcess
        with PeerProcess("made_peers:Counts", env={{"PYTHONPATH": {str(tmp_path / "lib")!r}}}) as peer:
            peer.ask(do="load", work={blank(tmp_path / "number")!r})
            peer.ask(do="run", images=1)
            print(*proctree.tree(peer.process.pid), flush=True)
            time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 3
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(*pids)


def test_cpu_and_memory_of_workers_count_and_shared_pages_count_once(made, tmp_path):
    (tmp_path / "mapped").write_bytes(bytes(100 * 2**20))
    with made("Made") as plain:
        plain.ask(do="load", work=blank())
        base = plain.ask(do="run", images=1)["peak_bytes"] / 2**20
    with made("Works") as peer:
        peer.ask(do="load", work=blank(tmp_path / "mapped"))
        answer = peer.ask(do="run", images=8)
        assert 0.75 < answer["cpu_s"] < 1.6, "two live workers of 0.4 s each"
        own = answer["peak_bytes"] / 2**20 - base
        assert 295 < own < 345, "200 in a worker, 100 shared by three, nothing for the mapped file"
        assert answer["mapped_bytes"] > 100 * 2**20


# -- environments --------------------------------------------------------------------------------------------------------------


def make_wheel(folder, name, version, code):
    """A wheel of one module, written by hand: no build tool, no network."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}\n"
        for path, text in files.items()
    )
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")


ENVIRONMENT_PEERS = '''
import sys
from made_peers import Made

class Pinned(Made):
    """Wants another click than fastload's own environment has."""
    requires, modules = ("click==99.0",), ("click",)
    def load(self, work):
        import click, numpy, fastload
        raise ValueError(f"click {click.__version__}, {click.__file__.startswith(sys.prefix)}, {numpy.__version__}")

class Absent(Made):
    requires, modules = ("nothing-of-that-name==1.0",), ("nothing_of_that_name",)
'''


@pytest.fixture
def cache(made, tmp_path, monkeypatch):
    """An empty cache folder, and pip that sees only a folder of made wheels."""
    (tmp_path / "lib" / "environment_peers.py").write_text(ENVIRONMENT_PEERS)
    monkeypatch.setenv("FASTLOAD_CACHE", str(tmp_path / "cache"))
    make_wheel(tmp_path / "wheels", "click", "99.0", "__version__ = 'made'\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "cache"


def test_this_python_runs_what_it_has(made):
    assert environments.locate("made_peers:Made") == environments.Environment(sys.executable, False)
    assert environments.locate("cpu") == environments.Environment(sys.executable, False)


def test_what_is_missing_is_one_sentence_with_its_cure(cache):
    with pytest.raises(MissingExtraError) as caught:
        environments.locate("environment_peers:Absent")
    assert "needs the module 'nothing_of_that_name'; --install" in str(caught.value)
    assert "pip install nothing-of-that-name==1.0" in str(caught.value)
    with pytest.raises(MissingExtraError, match=r"needs click==99.0 \(here is 8"):
        environments.locate("environment_peers:Pinned")


def test_an_environment_of_its_own_comes_first_and_sees_the_rest(cache, tmp_path):
    name, said = "environment_peers:Pinned", []
    made = environments.install(name, said.append)
    assert made.own and made.python.startswith(str(cache)) and "pip install click==99.0" in said[-1]
    assert environments.locate(name) == made
    assert environments.install(name, said.append) == made and len(said) == 2, "made once"
    with PeerProcess(name, made.python, env={"PYTHONPATH": str(tmp_path / "lib")}) as peer:
        assert peer.ask(do="import")["versions"] == {"click": "99.0"}
        with pytest.raises(DataError, match=f"click made, True, {np.__version__}"):
            peer.ask(do="load", work=blank())
    ready = Path(made.python).parents[1] / "ready.json"
    assert json.loads(ready.read_text())["requires"] == ["click==99.0"]
    ready.unlink()  # as an interrupted run leaves it
    with pytest.raises(MissingExtraError):
        environments.locate(name)


def test_pips_failure_is_one_sentence_and_leaves_nothing_that_counts(cache):
    with pytest.raises(
        DataError, match="environment_peers:Absent': ERROR: No matching distribution"
    ) as caught:
        environments.install("environment_peers:Absent")
    assert "\n" not in str(caught.value)
    with pytest.raises(MissingExtraError):
        environments.locate("environment_peers:Absent")


def test_a_gpu_peer_without_a_gpu_is_one_sentence():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for name in ("cuda", "torch-gpu"):
        for ask in (environments.locate, environments.install):
            with pytest.raises(UsageError, match=f"{name!r} needs an NVIDIA GPU"):
                ask(name)


def test_a_python_that_does_not_start_is_one_sentence():
    with pytest.raises(DataError, match="cannot be started with '/nowhere/python'"):
        PeerProcess("cpu", "/nowhere/python")
