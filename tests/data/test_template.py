"""Templates know their columns, print values unchanged, and refuse missing values."""

import pytest

from ptune_dist.data.template import MARKER, check_columns, compile_template, render_row, split_input
from ptune_dist.errors import UserError


def build(source, key="data.template"):
    return compile_template(source, key=key)


def render(source, **row):
    return render_row(build(source), row, key="data.template", where=lambda: "a.jsonl line 7")


def error_of(source, **row):
    with pytest.raises(UserError) as caught:
        render(source, **row)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_columns_are_the_names_that_a_row_must_give():
    source = "{% set n = 1 %}{% for tag in tags %}{{ tag }}{% endfor %}{{ meta.author }} {{ text | upper }} {{ n }}"
    assert build(source).columns == ("meta", "tags", "text")
    assert build("no columns").columns == ()
    assert build("{{ a }}").source == "{{ a }}"


def test_names_of_jinja_helpers_are_columns_like_any_other():
    assert build("{{ range }} {{ dict }} {{ namespace }}").columns == ("dict", "namespace", "range")
    assert render("{{ dict }}", dict="a word") == "a word"


def test_text_around_columns_stays_as_written():
    assert render(" {{ text }}\n\n", text="a\n") == " a\n\n\n"
    assert render("{{ text }} &amp;", text="<b> & {{ c }}") == "<b> & {{ c }} &amp;"


def test_values_are_printed_as_python_prints_them():
    assert render("{{ a }} {{ b }} {{ c }} {{ d.e[0] }}", a=1, b=0.5, c=False, d={"e": ["f"]}) == "1 0.5 False f"


def test_render_takes_only_the_columns_that_it_uses():
    assert build("{{ text }}").render({"text": "a", "other": None}) == "a"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("one\n{{ text", "data.target: line 2 of the template: "),
        ("{% if a %}", "data.target: line 1 of the template: Unexpected end of template"),
        ("{{ a | no_such_filter }}", "data.target: line 1 of the template: No filter named 'no_such_filter'"),
    ],
)
def test_syntax_error_names_key_and_line(source, expected):
    with pytest.raises(UserError) as caught:
        build(source, key="data.target")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_column_names_the_nearest_and_what_there_is():
    template = build("{{ txt }} {{ label }}")
    check_columns(template, ["label", "txt"], key="data.template", source_name="a.jsonl")
    with pytest.raises(UserError) as caught:
        check_columns(template, ["text", "label"], key="data.template", source_name="a.jsonl")
    assert str(caught.value) == (
        "data.template uses column 'txt', which a.jsonl does not have; did you mean 'text'? its columns: text, label"
    )
    with pytest.raises(UserError, match="does not have; its columns: zzz"):
        check_columns(build("{{ label }}"), ["zzz"], key="data.template", source_name="a.jsonl")


@pytest.mark.parametrize("row", [{"text": None}, {}])
def test_null_or_missing_value_names_row_and_column(row):
    assert error_of("{{ text }}", **row) == (
        "a.jsonl line 7: column 'text', which data.template uses, is missing or null; fill it or drop the row, or, "
        "if rows may lack it, write {% if text %} or list it in data.optional_columns"
    )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ m.author }}", "'author' is null"),
        ("{{ m.title }}", "'dict object' has no attribute 'title'"),
        ("{{ m.n + 'x' }}", "unsupported operand"),
        ("{{ m.n / 0 }}", "division by zero"),
        ("{{ none or m.author }}", "is null"),
        ("{{ m.__class__.__mro__ }}", "unsafe"),
        ("{% include 'other' %}{{ m.n }}", "no loader"),
        ("{{ m.update({'n': 2}) }}", "unsafe"),
    ],
)
def test_expression_that_fails_names_row_and_reason(source, reason):
    message = error_of(source, m={"author": None, "n": 1})
    assert message.startswith("a.jsonl line 7: data.template cannot be rendered: ")
    assert reason in message


def test_null_inside_a_row_may_be_tested_for():
    assert render("{{ m.author or 'nobody' }}{% if m.author %}!{% endif %}", m={"author": None}) == "nobody"


def test_row_is_named_only_when_something_is_wrong():
    def refuse():
        raise AssertionError

    assert render_row(build("{{ a }}"), {"a": 1}, key="data.template", where=refuse) == "1"


# Where the virtual tokens stand


def split(source, placement="template", **row):
    template = compile_template(source, key="data.template", marker=placement == "template")
    options = {"key": "data.template", "where": lambda: "a.jsonl line 7"}
    return split_input(render_row(template, row, **options), placement, **options)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ a }} {{ prompt }} {{ b }}", ("one ", " two")),
        ("{{ a }} {{- prompt -}} {{ b }}", ("one", "two")),
        ("{{ prompt }}{{ a }}", ("", "one")),
        ("{{ a }}{{prompt}}", ("one", "")),
        ("{% if a == 'one' %}{{ a }}{{ prompt }}{% else %}{{ prompt }}{% endif %}{{ b }}", ("one", "two")),
        ("{% if a == 'ten' %}{{ a }}{{ prompt }}{% else %}{{ prompt }}{% endif %}{{ b }}", ("", "two")),
        ("{% if prompt %}{{ a ~ prompt ~ b }}{% endif %}", ("one", "two")),
        ("{{ (a ~ prompt ~ b) | upper | trim | e }}", ("ONE", "TWO")),
    ],
)
def test_a_rendering_is_split_at_its_marker(source, expected):
    assert split(source, a="one", b="two") == expected


def test_the_marker_is_no_column_even_where_the_row_has_one_of_its_name():
    template = compile_template("{{ prompt }}{{ a }}", key="data.template", marker=True)
    assert template.columns == ("a",)
    assert split("{{ a }}{{ prompt }}!", a="one", prompt="a column") == ("one", "!")
    assert split("{{ prompt }}{{ a }}", a="one", prompt=None) == ("", "one")


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("prefix", ("", "a column!")),
        ("encoder", ("", "a column!")),
        ("infix", ("a column!", "")),
        ("decoder", ("a column!", "")),
    ],
)
def test_elsewhere_prompt_is_a_column_like_any_other(placement, expected):
    assert split("{{ prompt }}!", placement, prompt="a column") == expected


@pytest.mark.parametrize("source", ["{{ a }}", "prompt", "{{ a.prompt }}", "{% set prompt = a %}{{ prompt }}"])
def test_a_template_without_a_marker_is_refused(source):
    with pytest.raises(UserError) as caught:
        compile_template(source, key="data.template", marker=True)
    assert str(caught.value) == "data.template: placement template needs {{ prompt }} where the virtual tokens stand"


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("{% if a == 'ten' %}{{ prompt }}{% endif %}{{ a }}", 0),
        ("{{ a }}{{ prompt | length }}", 0),
        ("{{ prompt }}{{ a }}{{ prompt }}", 2),
        ("{% for letter in a %}{{ letter }}{{ prompt }}{% endfor %}", 3),
    ],
)
def test_a_row_that_renders_no_marker_or_several_is_named(source, count):
    with pytest.raises(UserError) as caught:
        split(source, a="one")
    assert str(caught.value) == (
        f"a.jsonl line 7: data.template renders {{{{ prompt }}}} {count} times for this row; it must occur exactly once"
    )


def test_data_that_holds_the_marker_itself_is_refused():
    with pytest.raises(UserError, match="a.jsonl line 7: data.template renders .* 2 times"):
        split("{{ a }}{{ prompt }}", a=MARKER)
