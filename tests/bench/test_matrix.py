"""A whole matrix is checked before anything runs, and errors are reported in one line."""

import pytest

from ptune_dist.bench.matrix import built_in_values, fill_command, load_matrix
from ptune_dist.errors import UserError
from tests.processes import ROOT

GOOD = "name: m\nsides: {a: 'run {size}'}\ncases: [{name: one, values: {size: 4}}]\n"


def load_text(tmp_path, text: str):
    path = tmp_path / "matrix.yaml"
    path.write_text(text)
    return load_matrix(path)


def test_a_good_matrix_is_read(tmp_path):
    matrix = load_text(tmp_path, GOOD)
    assert matrix.sides_of(matrix.cases[0]) == ["a"] and matrix.repeats == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "repeat: 3\n", "unknown key repeat, known here: name, about, sides, baseline"),
        (GOOD.replace("values", "vals"), "unknown key cases.0.vals, known here: name, about, values"),
        (GOOD.replace("name: m\n", ""), "name is missing"),
        (GOOD + "repeats: 0\n", "repeats: Input should be greater than 0"),
        (GOOD + "baseline: b\n", "'b' is not among the sides: a"),
        (GOOD.replace("{size}'", "{colour}'"), r"case one: sides.a: \{colour\} is not defined, known here: size"),
        (GOOD + "prepare: ['make {size}']\n", r"prepare: \{size\} is not defined"),
        (GOOD.replace("run {size}", '"run'), "No closing quotation"),
        (GOOD.replace("name: one", "name: a/b"), "cases.0.name: String should match"),
        (GOOD.replace("cases: [", "cases: [{name: one, values: {size: 1}}, "), "two cases have the same name"),
        ("- 1\n", "mapping"),
    ],
)
def test_a_wrong_matrix_is_refused_in_one_line_that_names_the_file_and_the_key(tmp_path, text, said):
    with pytest.raises(UserError, match=said) as caught:
        load_text(tmp_path, text)
    assert "\n" not in str(caught.value) and "matrix.yaml" in str(caught.value)


def test_placeholders_are_filled_also_inside_values_and_other_braces_stay(tmp_path):
    built_in = built_in_values(result=tmp_path / "a b.json", work=tmp_path, shared=tmp_path / "s", repeat=2)
    values = {"settings": "seed={repeat} data={shared}/x"} | built_in
    words = fill_command("go {settings} --out {result} \"{'k': 1}\"", values, "here")
    assert words == ["go", "seed=2", f"data={tmp_path}/s/x", "--out", f"{tmp_path}/a b.json", "{'k': 1}"]


def test_the_shipped_matrices_are_good():
    shipped = [path for path in sorted((ROOT / "configs/bench").glob("*.yaml")) if "\nsides:" in path.read_text()]
    assert shipped
    for path in shipped:
        load_matrix(path)
