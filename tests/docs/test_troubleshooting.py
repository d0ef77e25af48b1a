"""The errors on the page about troubleshooting are messages of this code."""

import ast
import re
from functools import cache

import pytest

from tests.processes import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"```text\n(.*?)\n```", PAGE, re.DOTALL)
SHORTEST_TEXT = 10  # characters of a text that may be part of a message: shorter ones are found everywhere
LEAST_SHARE = 0.45  # of a message that such texts account for; the rest are values


@cache
def message_patterns() -> list[re.Pattern]:
    """Every text of the package that could be a message: a group for each constant part, anything between them."""
    found = []
    for path in sorted((ROOT / "ptune_dist").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            else:
                continue
            if sum(len(part) for part in parts if part) >= SHORTEST_TEXT:
                found.append(re.compile("".join(".*" if part is None else f"({re.escape(part)})" for part in parts)))
    return found


def share_of_code(message: str) -> float:
    """The share of a message's characters that come from texts of the code."""
    covered: set[int] = set()
    for pattern in message_patterns():
        match = pattern.search(message)
        for group in range(1, pattern.groups + 1 if match else 0):
            covered |= set(range(*match.span(group)))
    return len(covered) / len(message)


@pytest.mark.parametrize("message", QUOTED, ids=lambda message: message[:60])
def test_a_quoted_error_is_one_of_this_code(message):
    assert "\n" not in message
    assert share_of_code(message) >= LEAST_SHARE, "no text of the package is like this: copy the message as it is now"


def test_an_error_that_the_code_does_not_have_would_be_found():
    assert share_of_code("error: runs/x: this run had another learning rate, so it wants another folder") < LEAST_SHARE


def test_each_entry_has_an_error_a_cause_and_a_fix():
    entries = PAGE.split("\n### ")[1:]
    assert len(entries) >= 20
    for entry in entries:
        title = entry.splitlines()[0]
        assert "```text" in entry and "**Cause.**" in entry and "**Fix.**" in entry, title
