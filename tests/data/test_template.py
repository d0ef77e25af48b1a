"""Templates know their columns, print values unchanged, and refuse missing values."""

import dataclasses
import datetime
import json
import pickle

import pytest

from ptune_dist.data.template import MARKER, check_columns, compile_template, find_absent, render_row, split_input
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


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ n }} {{ x }} {{ f }} {{ d.e[0] }}", "1 0.5 false g"),
        ("{{ d }}", '{"e": ["g", true, null, 2, "é"], "h": {}}'),
        ("{{ d.e }}", '["g", true, null, 2, "é"]'),
        ("{{ [f, d.h] }} {{ (1, f) }} {{ d.h.items() | list }}", "[false, {}] [1, false] []"),
        ("{{ f ~ d.h }} {{ f | string }} {{ [f, d.h] | join(' ') }}", "false{} false false {}"),
        (
            "{{ '%s %d' | format(f, f) }} {{ '%s' % f }} {{ '%s %s' % (f, d.h) }} {{ '%(h)s' % d }}",
            "false 0 false false {} {}",
        ),
        ("{{ '{0} {x} {0!s} {1[h]}'.format(f, d, x=d.e) }}", 'false ["g", true, null, 2, "é"] false {}'),
        ("{{ '{h}'.format_map(d) }} {{ d.e | pprint }}", '{} ["g", true, null, 2, "é"]'),
        ("{{ d.e | replace('g', 'G') }} {{ f | upper }}", '["G", true, null, 2, "é"] FALSE'),
        ("{{ day }} {{ [day] }}", '2024-05-06 ["2024-05-06"]'),
    ],
)
def test_values_print_as_the_file_writes_them(source, expected):
    row = {"n": 1, "x": 0.5, "f": False, "d": {"e": ["g", True, None, 2, "é"], "h": {}}}
    assert render(source, day=datetime.date(2024, 5, 6), **row) == expected


def test_expressions_see_the_values_themselves():
    row = {"flag": True, "tags": ["a", False], "meta": {"n": 2}}
    assert render("{% if flag %}yes{% endif %} {{ ['no', 'yes'][flag] }} {{ flag is true }}", **row) == "yes yes true"
    assert render("{% if tags[1] %}{% else %}no{% endif %} {{ tags | length }} {{ meta.n + flag }}", **row) == "no 2 3"
    assert render("{% for name, value in meta.items() %}{{ name }}={{ value }}{% endfor %}", **row) == "n=2"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("{{ s | int }}", "{{ s | int }}: 'abc' is not a number; write int(0) if it counts as 0"),
        ("{{ ['no', 'yes'][m.e | trim | int] }}", "{{ m.e | trim | int }}: '' is not a number"),
        ("{{ m['e'] | float }}", "{{ m['e'] | float }}: '' is not a number; write float(0)"),
        ("{{ '1_000' | int }}", "'1_000' is not a number"),
        ("{{ '１' | float }}", "'１' is not a number"),
        ("{{ 'nan' | float }}", "'nan' is not a number"),
        ("{{ '1e999' | int }}", "'1e999' is not a number"),
        ("{{ 'ff' | int }}", "'ff' is not a number"),
        ("{{ tags | int }}", "['b'] is not a number"),
        ("{{ tags | map('int') | list }}", "'b' is not a number"),
    ],
)
def test_int_and_float_invent_no_number(source, found):
    assert error_of(source, s="abc", m={"e": ""}, tags=["b"]).startswith(
        "a.jsonl line 7: data.template cannot be rendered: {{ "
    )
    assert found in error_of(source, s="abc", m={"e": ""}, tags=["b"])


def test_int_and_float_read_numbers_and_take_a_default():
    assert render("{{ a | int }} {{ ' 7 ' | int }} {{ '-3.9' | int }} {{ '1e3' | int }} {{ true | int }}", a=2.5) == (
        "2 7 -3 1000 1"
    )
    assert render("{{ 'ff' | int(base=16) }} {{ '.5' | float }} {{ a | float }}", a=1) == "255 0.5 1.0"
    assert render("{{ a | int(0) }} {{ a | int(default=-1) }} {{ a | float(0.5) }}", a="") == "0 -1 0.5"


def test_a_random_choice_would_differ_from_rank_to_rank():
    with pytest.raises(UserError, match="No filter named 'random'"):
        build("{{ tags | random }}")


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


def test_a_template_over_a_chat_is_told_where_the_texts_are():
    with pytest.raises(UserError) as caught:
        check_columns(build("{{ text }}"), ["messages"], key="data.template", source_name="a.jsonl")
    assert "{{ messages[0].content }} and so on, the last one's {{ messages[-1].content }}" in str(caught.value)
    assert str(caught.value).endswith("; its columns: messages")


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


# Columns that a row may lack

ALPACA = "{{ instruction }}{% if input %} with {{ input }}{% endif %}"


@pytest.mark.parametrize("row", [{}, {"input": None}, {"input": ""}])
def test_a_tested_column_may_be_absent_null_or_empty(row):
    for guard in ("input", "input is defined and input", "input | trim", "input is not none and input.strip()"):
        source = "{{ instruction }}{% if GUARD %} with {{ input }}{% endif %}".replace("GUARD", guard)
        assert build(source).guarded == {"input"}, guard
        assert render(source, instruction="add", **row) == "add", guard
        assert render(source, instruction="add", input="1 2") == "add with 1 2"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ a or 'none' }}", "none"),
        ("{{ a | default('none') }}", "none"),
        ("{{ a | trim | d('none') }}", "none"),
        ("{{ a.b.c | default('none') }}", "none"),
        ("{{ 'x' if a is defined else 'y' }}", "y"),
        ("{{ 'x' if a is none else 'y' }}", "x"),
        ("{{ 'x' if a == none else 'y' }}", "x"),
        ("{{ 'x' if a != none else 'y' }}", "y"),
        ("{% for b in a or [] %}{{ b }}{% endfor %}", ""),
        ("{{ (a or b or 'c') ~ '!' }}", "c!"),
    ],
)
@pytest.mark.parametrize("row", [{}, {"a": None}])
def test_a_column_with_a_fallback_may_be_absent_or_null(source, expected, row):
    assert render(source, **row) == expected
    assert "a" in build(source).guarded


@pytest.mark.parametrize(
    "source",
    [
        "{{ a }}",
        "{{ a | upper }}",
        "{{ a | trim }}",
        "{{ 'x' ~ a }}",
        "{{ 'x' + a }}",
        "{{ a.strip() }}",
        "{{ a.b }}",
        "{{ a['b'] }}",
        "{{ a | tojson }}",
        "{{ a | length }}",
        "{{ a | join(', ') }}",
        "{{ '%s' | format(a) }}",
        "{{ 'x' if a == 'b' else 'y' }}",
        "{{ 'x' if a != 'b' else 'y' }}",
        "{% if a | length > 0 %}x{% endif %}",
        "{% for b in a %}{{ b }}{% endfor %}",
        "{{ 'x' in a }}",
        "{% if b %}{% endif %}{% if not a %}{{ a }}{% endif %}",
        "{% set c = a %}{{ c }}",
    ],
)
@pytest.mark.parametrize("row", [{}, {"a": None}])
def test_a_missing_column_is_an_error_wherever_it_would_be_printed_or_computed_with(source, row):
    expected = "a.jsonl line 7: column 'a', which data.template uses, is missing or null; fill it"
    assert error_of(source, **row).startswith(expected)


@pytest.mark.parametrize("source", ["{% if label %}yes{% else %}no{% endif %}", "{{ 'yes' if label else 'no' }}"])
def test_a_target_does_not_follow_from_what_a_row_lacks(source):
    target = build(source, key="data.target")
    assert target.guarded == frozenset()
    options = {"key": "data.target", "where": lambda: "row 1"}
    assert render_row(target, {"label": False}, **options) == "no"
    for row in ({}, {"label": None}):
        with pytest.raises(UserError, match="^row 1: column 'label', which data.target uses, is missing or null"):
            render_row(target, row, **options)
    for fallback in ("{{ label or 'no' }}", "{{ label | default('no') }}", "{{ 'yes' if label is defined else 'no' }}"):
        assert render_row(build(fallback, key="data.target"), {}, **options) == "no"


def test_optional_columns_are_empty_text_where_a_row_lacks_them():
    template = compile_template("{{ a }}{{ b }}", key="data.template", optional=["b", "c"])
    assert template.empty == {"b"}
    options = {"key": "data.template", "where": lambda: "row 1"}
    assert [render_row(template, row, **options) for row in ({"a": 1, "b": None}, {"a": 1}, {"a": 1, "b": 2})] == [
        "1",
        "1",
        "12",
    ]
    with pytest.raises(UserError, match="column 'a', which data.template uses, is missing"):
        render_row(template, {"b": 1}, **options)
    check_columns(template, ["a"], key="data.template", source_name="x")


def test_an_absent_column_is_refused_unless_the_template_tests_it():
    check_columns(build(ALPACA), ["instruction", "inputs"], key="data.template", source_name="x")
    assert find_absent(build(ALPACA), ["instruction", "inputs"]) == ["input"]
    with pytest.raises(UserError, match="uses column 'instruction', which x does not have; did you mean"):
        check_columns(build(ALPACA), ["instructions", "input"], key="data.template", source_name="x")
    compared = build("{% if kind == 'a' %}{{ text }}{% endif %}")
    with pytest.raises(UserError, match="uses column 'kind'"):
        check_columns(compared, ["text"], key="data.template", source_name="x")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ m.author | upper }}", "'author' is null"),
        ("{{ 'by ' ~ m.author }}", "'author' is null"),
        ("{{ m.tags | join(', ') }}", "is null"),
        ("{% for t in m.tags %}{{ 'x' ~ t }}{% endfor %}", "is null"),
        ("{{ m.keys() }}", "is of type dict_keys, which has no text"),
        ("{{ m.items }}", "is the method 'items': write ['items'] for a key"),
        ("{{ m.words | map('upper') }}", "is a generator"),
        ("{{ m.bytes }}", "is bytes"),
        ("{{ m.parts }}", "a part of type 'image', which has no text"),
        ("{{ m.parts | trim }}", "a part of type 'image', which has no text"),
    ],
)
def test_what_nobody_means_to_print_is_an_error(source, reason):
    row = {"author": None, "tags": ["a", None], "words": ["a"], "bytes": b"a"}
    row["parts"] = [{"type": "text", "text": "a"}, {"type": "image", "image": "b"}]
    assert reason in error_of(source, m=row)


@pytest.mark.parametrize("source", ["{{ m.content }}", "{{ m.content ~ '' }}", "{{ m.content | trim }}"])
def test_a_messages_content_is_its_text_in_one_piece_or_in_parts(source):
    for content in ("hi you", [{"type": "text", "text": "hi "}, {"type": "text", "text": "you"}]):
        assert render(source, m={"content": content}) == "hi you"
    assert render("{{ m.content | length }}", m={"content": [{"type": "text", "text": "hi"}]}) == "1"
    assert render("{{ m }}", m=[{"type": "PER", "text": "Bob"}]) == '[{"type": "PER", "text": "Bob"}]'


def test_a_key_in_brackets_is_never_a_method():
    assert render("{{ m['items'] or 'none' }}{{ m['keys'] | default('!') }}", m={"a": 1}) == "none!"
    assert render("{{ m['items'] }}", m={"items": 3}) == "3"
    assert "has no attribute 'items'" in error_of("{{ m['items'] }}", m={"a": 1})


def test_tojson_is_plain_json_in_the_rows_order():
    value = {"b": "<é> & 'x'", "a": [1, None, True]}
    assert render("{{ m | tojson }}", m=value) == json.dumps(value, ensure_ascii=False)
    assert render("{{ m | tojson(indent=2) }}", m=value) == json.dumps(value, ensure_ascii=False, indent=2)
    assert render("{{ m.x | tojson }}", m={"x": None}) == "null"


def test_a_template_is_the_same_after_pickling():
    template = compile_template("{{ a }}{{ b }}", key="data.target", optional=["b"]).with_fixed("a", 3)
    again = pickle.loads(pickle.dumps(template))
    assert again == template
    assert again.render({}) == template.render({}) == "3"


# Labels


@pytest.mark.parametrize(
    ("value", "labels", "found"),
    [
        ("positive ", ["positive"], "; it differs from 'positive' by whitespace only: clean the rows"),
        ("Positive", ["positive"], "; it differs from 'positive' by upper and lower case: list it as 'Positive'"),
        (0.0, ["0", "1"], ": 0, 1; it is the same number as '0', but of another type: list it as '0.0'"),
        (False, ["no", "yes"], "; it is the same number as 'no', but of another type: list it as 'false'"),
        (True, ["False", "True"], "; it differs from 'True' by upper and lower case: list it as 'true'"),
        ("neutral", ["positive"], "which data.labels does not list: positive"),
        ("x", [str(i) for i in range(99)], ", 9, ... (99 labels)"),
        ("x", ["a b ", "c, d"], "list: 'a b ', 'c, d'"),
    ],
)
def test_a_value_that_is_no_label_is_refused_with_what_it_differs_by(value, labels, found):
    target = dataclasses.replace(build(" {{ label }}", key="data.target"), labels=tuple(labels))
    with pytest.raises(UserError) as caught:
        render_row(target, {"label": value}, key="data.target", where=lambda: "row 1")
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    assert str(caught.value).startswith(f"row 1: label is {shown}, which data.labels does not list: ")
    assert found in str(caught.value)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    listed = dataclasses.replace(target, labels=(text,))
    assert render_row(listed, {"label": value}, key="data.target", where=lambda: "row 1") == f" {text}"


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
