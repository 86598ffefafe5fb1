"""The README says what was measured, and its commands are the ones that are tested."""

import json
from pathlib import Path

import pytest

from fastload.benchmarks.vs_ffcv import markdown
from fastload.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_claims_are_the_committed_result():
    lines = (ROOT / "benchmarks" / "results" / "vs-ffcv.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[-1])
    assert markdown(record) in README
    assert all(claim["holds"] for claim in record["claims"].values())
    assert record["check"]["passed"] and min(record[k]["ratio"]["n"] for k in ("train", "convert")) >= 5


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_mentioned(name):
    assert f"fastload {name}" in README or f"`{name}`" in README


def test_no_placeholder_is_left():
    assert "@@" not in README and README.count("<!-- demo -->") == README.count("<!-- tests -->") == 1
