"""A peer's process: started once, asked by lines, blocked on its pipe between its turns.

>>> with PeerProcess("ffcv") as peer: peer.ask(do="run", images=2000)["seconds"]
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

from fastload.errors import DataError


class PeerProcess:
    """One peer of :mod:`fastload.benchmarks.peers` in a process of its own.

    Between two questions the process is stopped (SIGSTOP), threads and all, so that nothing of it runs in the other's turn.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # closed in __exit__
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastload.benchmarks.peers", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer; DataError with the end of the peer's log if there is none."""
        stdin, stdout = self.process.stdin, self.process.stdout
        line = ""
        if stdin is not None and stdout is not None:
            with contextlib.suppress(BrokenPipeError, ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
                stdin.write(json.dumps(request) + "\n")
                stdin.flush()
                line = stdout.readline()
                self.process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line) if line else {"error": "its process ended"}
        if "error" in answer:
            error = DataError(f"the peer {self.name!r} failed at {request['do']!r}: {answer['error']}")
            if (tail := self._tail()) and hasattr(error, "add_note"):  # Python 3.11 or later
                error.add_note(f"end of its log: {tail}")
            raise error
        return answer

    def _tail(self) -> str:
        self.log.seek(0)
        return " | ".join(self.log.read()[-800:].strip().splitlines()[-4:])

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()
