"""The README says what was measured, and its commands are the ones that are tested."""

import re
from pathlib import Path

import pytest

from fastload.benchmarks.compare_table import CLAIMS, claims, markdown
from fastload.benchmarks.harness import MIN_ROUNDS, read_jsonl
from fastload.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def claimed():
    """The newest record of each workload in the file that the README's claims name."""
    (path,) = re.findall(r"<!-- claims: (\S+) -->", README)
    return list({record["workload"]: record for record in read_jsonl(ROOT / path)}.values())


def test_the_tables_are_the_committed_result():
    block = README.partition("<!-- claims: ")[2].partition("<!-- end of claims -->")[0]
    shown = [record for record in claimed() if f"**{record['workload']}**" in block]
    assert shown
    for record in shown:
        assert markdown([record]) in block
        assert all(row["check"]["passed"] and row["figure"]["n"] >= MIN_ROUNDS for row in record["rows"])
    assert block.count("\n|---") == len(shown)  # no table but those


def test_the_claims_hold_in_the_committed_result():
    found = claims(claimed())
    assert set(found) == set(CLAIMS)
    assert all(claim["holds"] for claim in found.values()), found


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_mentioned(name):
    assert f"fastload {name}" in README or f"`{name}`" in README


def test_no_placeholder_is_left():
    assert "@@" not in README and README.count("<!-- demo -->") == README.count("<!-- tests -->") == 1
