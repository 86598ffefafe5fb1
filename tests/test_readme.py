"""The README says what was measured, and its commands are the ones that are tested."""

import re
from pathlib import Path

import pytest

from fastload.benchmarks.compare_table import CLAIMS, claims, claims_table, markdown, summary
from fastload.benchmarks.harness import MIN_ROUNDS, read_jsonl
from fastload.benchmarks.peers import PEERS
from fastload.benchmarks.workloads import WORKLOADS
from fastload.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def claimed():
    """The newest record of each workload in the file that the README's claims name."""
    (path,) = re.findall(r"<!-- claims: (\S+) -->", README)
    return list({record["workload"]: record for record in read_jsonl(ROOT / path)}.values())


def test_the_tables_are_the_committed_result():
    records = claimed()
    block = README.partition("<!-- claims: ")[2].partition("<!-- end of claims -->")[0]
    assert claims_table(records) in block and summary(records) in block
    assert block.count("\n|---") == 2  # no table but those
    for record in records:
        assert markdown([record]) in PAGE
        assert all(f"- **{row['title']}**: {row['settings']}\n" in PAGE for row in record["rows"])
        assert all(row["check"]["passed"] and row["figure"]["n"] >= MIN_ROUNDS for row in record["rows"])


def test_all_that_can_run_here_was_run():
    """Who has no figure says why, and the reason is not that it broke."""
    records = {record["workload"]: record for record in claimed()}
    assert set(records) == set(WORKLOADS)
    peers = set(PEERS) - {"cuda", "torch-gpu"}  # no GPU
    assert {row["peer"] for row in records["train500"]["rows"]} == peers
    for record in records.values():
        for failed in record["failed"]:
            assert any(
                why in failed["reason"] for why in ("needs an NVIDIA GPU", "no conversion", "does not")
            )


def test_the_claims_hold_in_the_committed_result():
    found = claims(claimed())
    assert set(found) == set(CLAIMS)
    assert all(claim["holds"] for claim in found.values()), found


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_mentioned(name):
    assert f"fastload {name}" in README or f"`{name}`" in README


def test_no_placeholder_is_left():
    assert "@@" not in README and README.count("<!-- demo -->") == README.count("<!-- tests -->") == 1
