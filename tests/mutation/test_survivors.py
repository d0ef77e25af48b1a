"""The list of mutants that no test kills is current."""

import pytest

from tests.mutation.survivors import FILE, Survivor, load_survivors, read_survivors
from tests.processes import ROOT

LISTED = read_survivors(FILE.read_text(encoding="utf-8"))


def test_entries_are_read_with_their_kind_path_and_reason():
    text = "## Not killed\n\n### a.py\n\n```diff\n@@ f\n- x = 1\n+ x = 2\n```\n\nIt is\nlate.\n\nMore.\n"
    (found,) = read_survivors(text)
    assert found == Survivor("survived", "a.py", "@@ f\n- x = 1\n+ x = 2", "It is late.")


@pytest.mark.parametrize("entry", LISTED, ids=lambda entry: entry.path)
def test_every_entry_has_a_reason_and_changes_code_that_is_there(entry):
    lines = [line.strip() for line in (ROOT / entry.path).read_text(encoding="utf-8").splitlines()]
    scope, *changed = entry.difference.splitlines()
    replaced = [line[2:] for line in changed if line.startswith("- ")]
    assert scope.startswith("@@ ") and replaced and entry.why
    for line in replaced:
        assert line in lines, f"{entry.path} has no such line any more: {line}"


def test_no_entry_is_listed_twice():
    assert len(load_survivors()) == len(LISTED)
