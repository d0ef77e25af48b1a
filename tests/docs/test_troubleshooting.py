"""The errors on the page about troubleshooting are messages of this code."""

import ast
import re
from functools import cache

import pytest

from tests.processes import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"```text\n(.*?)\n```", PAGE, re.DOTALL)
SHORTEST_TEXT = 10  # characters of a text that may be part of a message: shorter ones are found everywhere
LEAST_TEXT = 16  # characters of a message that such texts account for


@cache
def message_patterns() -> list[re.Pattern]:
    """Every text of the package that could be a message, as a pattern in which a value is anything."""
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
                found.append(re.compile("".join(".*" if part is None else re.escape(part) for part in parts)))
    return found


def own_text(message: str) -> int:
    """How many characters of a message come from the texts of the code that occur in it."""
    return sum(len(p.pattern.replace(".*", "")) for p in message_patterns() if p.search(message))


@pytest.mark.parametrize("message", QUOTED, ids=lambda message: message[:60])
def test_a_quoted_error_is_one_of_this_code(message):
    assert "\n" not in message
    assert own_text(message) >= LEAST_TEXT, "no text of the package is like this: copy the message as it is now"


def test_an_error_that_the_code_does_not_have_would_be_found():
    assert own_text("error: the moon is not made of the cheese that train.cheese names") < LEAST_TEXT


def test_each_entry_has_an_error_a_cause_and_a_fix():
    entries = PAGE.split("\n### ")[1:]
    assert len(entries) >= 20
    for entry in entries:
        title = entry.splitlines()[0]
        assert "```text" in entry and "**Cause.**" in entry and "**Fix.**" in entry, title
