"""Is this data what it seems: copies, subjects spread over a split, wrong labels, a test set that looks different?

The work behind ``fastload check``, and the cheap part of it that training runs first. Nothing is changed and nothing is decided
here: what looks wrong is told in sentences and shown in pictures. The trade-off: every image is decoded once, small.

>>> print(check("train.beton", "test.beton").text())
"""

from fastload.check.checks import check
from fastload.check.groups import PathGroups, path_groups
from fastload.check.hashing import duplicate_groups
from fastload.check.leaks import guard
from fastload.check.report import Report

__all__ = ["PathGroups", "Report", "check", "duplicate_groups", "guard", "path_groups"]
