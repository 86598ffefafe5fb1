"""A peer's process: started once, asked by lines, stopped between its turns, ended with all that it started.

The trade-off against measuring in one process: a little plumbing, and honest memory and CPU figures for each peer, none of which
can disturb or end another.

>>> with PeerProcess("ffcv") as peer: peer.ask(do="run", images=2000)["seconds"]
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from fastload.benchmarks import proctree
from fastload.errors import DataError

_LOOK_S = 0.2  # between two looks at a working peer: is it alive, how much memory has it
_LOOK_SHARE = 50  # a look that took t s is followed by at least 50 t s without one, so it costs at most 2%
_GRACE_S = 10.0
_MEASURED = ("run", "convert", "epochs")  # requests whose answer tells peak memory


class PeerProcess:
    """One peer of :mod:`fastload.benchmarks.peers` in a process (and a session) of its own.

    Between two questions the process is stopped (SIGSTOP) with its threads and its worker processes, so that nothing of it runs
    in another's turn. While it works, this side looks at its memory: the peer itself does nothing for it.

    Args:
        name: a peer of the registry, or "module:Class".
        python: the interpreter that runs it (see :mod:`fastload.benchmarks.environments`); None is this one.
        env: environment variables to add.
        timeout: seconds that an answer may take, unless ``ask`` says otherwise; None waits for ever.
    """

    def __init__(
        self,
        name: str,
        python: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = 900.0,
    ) -> None:
        self.name = name
        self.timeout = timeout
        self._known_memory = proctree.shared_memory_names()
        self._rest = b""
        self._over: str | None = None  # why it can answer no more
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # closed in close()
        try:
            self.process = subprocess.Popen(
                [python or sys.executable, "-m", "fastload.benchmarks.peers.serve", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                start_new_session=True,
                env={**os.environ, "PYTHONSAFEPATH": "1", **(env or {})},
            )
        except OSError as error:
            self.log.close()
            raise DataError(
                f"the peer {name!r} cannot be started with {python!r} ({error.strerror})"
            ) from error

    def ask(self, *, timeout: float | None = None, **request: Any) -> dict[str, Any]:
        """Send one request (``do=...``) and wait for its answer.

        "run", "convert" and "epochs" are answered with ``peak_bytes`` and ``mapped_bytes`` too: the most memory that was seen at
        about five looks a second (see :class:`fastload.benchmarks.proctree.Memory`). DataError in one sentence if the peer
        failed, ended, or did not answer within ``timeout`` seconds; it is then ended.
        """
        do = request["do"]
        if self._over is not None:
            raise DataError(f"the peer {self.name!r} cannot be asked {do!r}: {self._over}")
        limit = self.timeout if timeout is None else timeout
        self._signal(signal.SIGCONT)
        peak = proctree.Memory(0, 0)
        try:
            self._send(request)
            line, peak = self._line(limit, do in _MEASURED)
        except TimeoutError:
            self._end_all()
            self._over = f"it gave no answer to {do!r} within {limit:g} s and was ended"
            raise self._failure(f"gave no answer to {do!r} within {limit:g} s and was ended") from None
        except EOFError:
            how = self._how_it_ended()
            self._end_all()
            self._over = f"its process ended at {do!r} ({how})"
            raise self._failure(f"died at {do!r} ({how})") from None
        except BaseException:  # Ctrl-C: what it would answer later belongs to no question
            self._end_all()
            self._over = f"it was interrupted at {do!r}"
            raise
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            error = DataError(f"the peer {self.name!r} failed at {do!r}: {answer['error']}")
            if (tail := self._tail()) and hasattr(error, "add_note"):  # Python 3.11 or later
                error.add_note(f"end of its log: {tail}")
            raise error
        if do in _MEASURED:
            now = proctree.memory(self.process.pid)
            answer["peak_bytes"] = max(peak.unique, now.unique)
            answer["mapped_bytes"] = max(peak.mapped, now.mapped)
        return answer

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None  # for the type checker: a pipe was asked for
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise EOFError from None

    def _line(self, limit: float | None, measure: bool) -> tuple[bytes, proctree.Memory]:
        """The next line of its answers and the peak of its memory meanwhile; TimeoutError, or EOFError when it ended."""
        assert self.process.stdout is not None
        pipe, start, rest = self.process.stdout.fileno(), time.monotonic(), self._rest
        peak, look = proctree.Memory(0, 0), 0.0
        while b"\n" not in rest:
            now = time.monotonic()
            if limit is not None and now - start > limit:
                raise TimeoutError
            if measure and now >= look:
                seen = proctree.memory(self.process.pid)
                peak = proctree.Memory(max(peak.unique, seen.unique), max(peak.mapped, seen.mapped))
                look = now + max(_LOOK_S, _LOOK_SHARE * (time.monotonic() - now))
            left = _LOOK_S if limit is None else min(_LOOK_S, max(0.0, start + limit - now))
            ready, _, _ = select.select([pipe], [], [], left)
            if ready:
                part = os.read(pipe, 1 << 16)
                if not part:
                    raise EOFError
                rest += part
            elif self._ended():  # a worker that outlives it may hold its end of the pipe open
                raise EOFError
        line, _, self._rest = rest.partition(b"\n")
        return line, peak

    def _ended(self) -> bool:
        """Whether the process has ended. It is not reaped, so that its number stays taken and may be sent signals."""
        if self.process.returncode is not None:
            return True
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            return self.process.poll() is not None
        flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
        try:
            return os.waitid(os.P_PID, self.process.pid, flags) is not None
        except ChildProcessError:
            return True

    def _how_it_ended(self) -> str:
        deadline = time.monotonic() + 2
        while not self._ended() and time.monotonic() < deadline:
            time.sleep(0.01)
        status = None
        if self.process.returncode is None and hasattr(os, "waitid"):
            with contextlib.suppress(ChildProcessError):
                status = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if status is None:
            return "it closed its pipe"
        if status.si_code == os.CLD_EXITED:
            return f"exit code {status.si_status}"
        return f"signal {status.si_status}, {signal.Signals(status.si_status).name}"

    def _signal(self, number: int) -> None:
        """To its process group, and to descendants that left it; nothing once it has been reaped."""
        if self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)
        for pid in proctree.tree(self.process.pid)[1:]:
            entry = proctree.stat(pid)
            if entry is not None and entry.group != self.process.pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)

    def _failure(self, what: str) -> DataError:
        tail = self._tail()
        return DataError(f"the peer {self.name!r} {what}" + (f"; end of its log: {tail}" if tail else ""))

    def _tail(self) -> str:
        self.log.seek(0)
        return " | ".join(self.log.read()[-800:].strip().splitlines()[-4:])

    def close(self) -> None:
        """Let it end by itself within 10 s, then end it with all that it started. Called again, it does nothing."""
        if self.log.closed:
            return
        if self._over is None and self.process.returncode is None:
            self._signal(signal.SIGCONT)
            if self.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self.process.stdin.close()
            memory = self._memory()
            deadline = time.monotonic() + _GRACE_S
            while not self._ended() and time.monotonic() < deadline:
                time.sleep(0.01)
            self._end_all(memory)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.log.close()

    def _memory(self) -> set[str]:
        """Shared memory that it uses and that was not there before it."""
        return proctree.shared_memory_of(self._all()) - self._known_memory

    def _all(self) -> list[int]:
        """Its process, descendants and group."""
        return list(dict.fromkeys(proctree.tree(self.process.pid) + proctree.group(self.process.pid)))

    def _end_all(self, memory: set[str] | None = None) -> None:
        """Kill whatever of it still runs, reap it, and remove the shared memory that it leaves.

        Python's resource tracker, which removes the shared memory of a program that was killed, is let live for a moment.
        """
        if self.process.returncode is not None:
            return
        memory = self._memory() if memory is None else memory
        everyone = self._all()
        for pid in everyone:
            if not _is_tracker(pid):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        self._signal(signal.SIGCONT)  # a stopped tracker would sleep on
        deadline = time.monotonic() + 2
        while any(_runs(pid) for pid in everyone) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._signal(signal.SIGKILL)
        self.process.wait()
        proctree.remove_shared_memory(memory)

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _runs(pid: int) -> bool:
    entry = proctree.stat(pid)
    return entry is not None and entry.state not in "ZX"


def _is_tracker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"resource_tracker" in file.read()
    except OSError:
        return False
