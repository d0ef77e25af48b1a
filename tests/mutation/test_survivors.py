"""The list of mutants that no test kills is current, and the table is that of the stored results."""

import pytest

from tests.mutation.areas import AREAS
from tests.mutation.results import README, count_outcomes, fill_table, load_results
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


@pytest.mark.parametrize("name", AREAS)
def test_each_fault_that_people_thought_of_fits_the_code_as_it_is(name):
    for path, text, _ in AREAS[name].given:
        assert (ROOT / path).read_text(encoding="utf-8").count(text) == 1, f"{path}: {text}"


def test_stored_survivors_are_explained_and_nine_of_ten_mutants_are_killed():
    known = load_survivors()
    results = load_results()
    assert set(results) == set(AREAS)
    for area, result in results.items():
        assert count_outcomes(result["mutants"])["share"] >= 0.9, area
        for mutant in result["mutants"]:
            if mutant["outcome"] == "survived":
                assert (mutant["path"], mutant["difference"]) in known, f"{area}: {mutant['name']}"


def test_the_table_is_that_of_the_stored_results():
    text = README.read_text(encoding="utf-8")
    assert fill_table(text, load_results()) == text
