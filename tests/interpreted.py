"""Scripts of cases in a process of their own, in which Triton's interpreter can be switched on before Triton is imported.

>>> result(start(gpu_cases, "crop", "0", "20"))
"""

from __future__ import annotations

import json
import os
import subprocess
import sys


def start(cases, *command, interpret=True):
    """The module ``cases`` as a script, with arguments."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.Popen(
        [sys.executable, cases.__file__, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    """What it printed as its last line, JSON."""
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])
