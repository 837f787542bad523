#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prints the essential lines of what failed: `explain.py NAME FILE`, a JUnit file of ctest or pytest, or any log."""

from __future__ import annotations

import itertools
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Optional

MAX_TESTS = 3
MAX_LINES = 12
MAX_COLUMNS = 220

# What a message begins with, and how many lines after it belong to it.
MESSAGES = (
    (re.compile(r": Failure$"), 6),  # GoogleTest
    (re.compile(r"(WARNING|ERROR): \w+Sanitizer|: runtime error: "), 5),
    (re.compile(r"^SUMMARY: "), 0),
    (re.compile(r"^E  "), 0),  # pytest
    (
        re.compile(
            r"\b(fatal )?error: |^FAILED: |undefined reference to |^CMake Error|^[\w./]+:\d+: \w*(Error|Exception)"
        ),
        1,
    ),
    (re.compile(r"terminate called|what\(\): |Segmentation fault|\*\*\*(Timeout|Exception)"), 0),
)
SUMMARY = re.compile(r"^SUMMARY: ")


def essential(text: str) -> list[str]:
    """At most MAX_LINES lines: messages of known tools, or else the end."""
    lines = [line.rstrip()[:MAX_COLUMNS] for line in text.splitlines() if line.strip()]
    chosen: set[int] = set()
    for line_idx, line in enumerate(lines):
        for pattern, num_following in MESSAGES:
            if pattern.search(line):
                following = itertools.takewhile(
                    lambda after_idx: not lines[after_idx].startswith("[ "),
                    range(line_idx + 1, min(line_idx + num_following + 1, len(lines))),
                )
                chosen.update([line_idx, *following])
    if not chosen:
        return lines[-MAX_LINES:]
    kept = sorted(chosen)
    if len(kept) > MAX_LINES:  # a sanitizer's summary comes last and says the most
        summary = [line_idx for line_idx in kept if SUMMARY.search(lines[line_idx])][:1]
        kept = sorted({*kept[: MAX_LINES - len(summary)], *summary})
    return [lines[line_idx] for line_idx in kept]


def failed_tests(junit: Path) -> Optional[list[tuple[str, str]]]:
    """Name and output of each failed test; None if this is no JUnit file."""
    try:
        cases = ElementTree.parse(junit).iter("testcase")
    except (ElementTree.ParseError, OSError):
        return None
    failed = []
    for case in cases:
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        if problem is not None:
            name = case.get("name", "?")
            text = "\n".join([problem.text or "", case.findtext("system-out") or "", case.findtext("system-err") or ""])
            failed.append((name, text if text.strip() else problem.get("message", "")))
    return failed


def main() -> None:
    name, path = sys.argv[1], Path(sys.argv[2])
    failed = failed_tests(path)
    if failed is None:
        failed = [("", path.read_text(errors="replace"))]
    for test, text in failed[:MAX_TESTS]:
        print(f"---- {name} {test}".rstrip())
        print("\n".join(essential(text)))
    if len(failed) > MAX_TESTS:
        print(
            f"---- {name}: and {len(failed) - MAX_TESTS} more: "
            + " ".join(test for test, _ in failed[MAX_TESTS:])[:MAX_COLUMNS]
        )


if __name__ == "__main__":
    main()
