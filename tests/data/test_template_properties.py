"""Random rows render exactly, or end in one line that names the row; token ids decode back to what was rendered."""

import json

import hypothesis.strategies as st
from hypothesis import given, settings

from ptune_dist.data.sources import load_rows
from ptune_dist.data.template import compile_template, render_row
from ptune_dist.errors import UserError
from tests.data.texts import compile_pair, encode_rows, tokenizer_with

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abxy"), inner, max_size=3)),
    max_leaves=6,
)
ROWS = st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4)
PIECES = [
    "{{ a }}", "{{ b | upper }}", "{{ a ~ b }}", "{% if c %}{{ c }}{% endif %}", "{{ d or 'none' }}", "{{ a.x }}",
    "{{ b | default('') }}", "{{ c | tojson }}", "{{ d | join(',') }}", "{{ a['y'] }}", "{{ b | length }}", "plain {a}",
    "{% for e in d %}{{ e }};{% endfor %}", "{{ a.items }}", "{{ b | map('upper') }}", "{{ c.strip() }}",
]  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3), ROWS)
def test_any_row_renders_without_traces_of_python_or_is_named_in_one_line(pieces, row):
    template = compile_template("".join(pieces), key="data.template")
    try:
        text = render_row(template, row, key="data.template", where=lambda: "row 1")
    except UserError as error:
        assert str(error).startswith("row 1: ") and "data.template" in str(error) and "\n" not in str(error)
        return
    holds = json.dumps(row, ensure_ascii=False)
    for trace in ("<built-in", "<generator", "<bound method", "Undefined", "Missing"):
        assert trace not in text or trace in holds


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ROWS)
def test_a_column_prints_as_its_value_or_is_an_error(row):
    value = row.get("a")
    expected = value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        found = render_row(compile_template("{{ a }}", key="k"), row, key="k", where=str)
    except UserError:
        found = None
    assert found == expected
    if row.get("a") is not None:
        rendered = render_row(compile_template("{{ a | tojson }}", key="k"), row, key="k", where=str)
        assert json.loads(rendered) == row["a"]


WORDS = st.text("ab <bos>seé\n:", min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(WORDS, WORDS.filter(str.strip)), min_size=1, max_size=4),
    single=st.sampled_from(["$A", "<bos> $A", "<bos> $A <sep>"]),
    family=st.sampled_from(["causal", "seq2seq"]),
    source=st.sampled_from(["{{ text }}", "<bos>{{ text }}", "{{ text }}<sep>", "<bos>x {{ text }}"]),
)
def test_ids_decode_to_what_was_rendered_between_special_tokens(tmp_path_factory, rows, single, family, source):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    tokenizer = tokenizer_with(single)
    loaded = load_rows(str(path), key="data.train", default_split="train")
    examples = encode_rows(loaded, tokenizer, **compile_pair(source), max_length=999, family=family)
    start = "<bos>" if "<bos>" in single else ""
    end = "<sep>" if "<sep>" in single and family == "seq2seq" else ""
    for index, (text, label) in enumerate(rows):
        body = source.replace("{{ text }}", text)
        body = body if start and body.startswith(start) else start + body
        body = body if end and body.endswith(end) and len(body) >= len(start + end) else body + end
        target = label if family == "causal" or not start or label.startswith(start) else start + label
        assert tokenizer.decode(examples.input_ids(index)) == body
        assert tokenizer.decode(examples.target_ids(index)) == target.removesuffix("<eos>") + "<eos>"
