"""An input is split where the virtual tokens stand; the part before them is the context, cut to what fits."""

import pickle

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ptune_dist.data.examples import Examples, common_context, token_statistics
from ptune_dist.data.sources import Rows
from ptune_dist.data.template import compile_template
from tests.data.texts import encode_inputs, encode_split, error_of, parts_of, tokenizer_with


@pytest.mark.parametrize(
    ("family", "placement", "template", "single", "parts"),
    [
        ("causal", "prefix", "{{ text }}:", "$A", ("", "ab:")),
        ("causal", "prefix", "{{ text }}:", "<bos> $A <sep>", ("", "<bos>ab:")),
        ("causal", "infix", "{{ text }}:", "$A", ("ab:", "")),
        ("causal", "infix", "{{ text }}:", "<bos> $A <sep>", ("<bos>ab:", "")),
        ("causal", "template", "{{ text }}{{ prompt }}:", "$A", ("ab", ":")),
        ("causal", "template", "{{ text }}{{ prompt }}:", "<bos> $A <sep>", ("<bos>ab", ":")),
        ("seq2seq", "encoder", "{{ text }}:", "<bos> $A <sep>", ("", "<bos>ab:<sep>")),
        ("seq2seq", "decoder", "{{ text }}:", "<bos> $A <sep>", ("<bos>ab:<sep>", "")),
        ("seq2seq", "decoder", "{{ text }}:", "$A <eos>", ("ab:<eos>", "")),
        ("seq2seq", "template", "{{ text }}{{ prompt }}:", "<bos> $A <sep>", ("<bos>ab", ":<sep>")),
        ("seq2seq", "template", "{{ text }}:{{ prompt }}", "<bos> $A <sep>", ("<bos>ab:", "<sep>")),
    ],
)
def test_an_input_is_split_where_the_virtual_tokens_stand(write, family, placement, template, single, parts):
    tokenizer = tokenizer_with(single)
    rows = write(("ab", "c"))
    options = {"placement": placement, "template": template, "family": family}
    examples = encode_split(rows, tokenizer, **options)
    assert parts_of(tokenizer, examples) == [parts]
    assert tokenizer.decode(examples.target_ids(0)).endswith("c<eos>")
    compiled = compile_template(template, key="data.template", marker=placement == "template")
    pairs = encode_inputs(rows, tokenizer, **options | {"template": compiled}, max_length=99)
    assert pairs == [(examples.context_ids(0).tolist(), examples.rest_ids(0).tolist())]


@pytest.mark.parametrize("single", ["$A", "<bos> $A", "<bos> $A <sep>"])
@pytest.mark.parametrize(
    ("placement", "template"), [("prefix", "{{ prompt }}{{ text }}:"), ("infix", "{{ text }}:{{ prompt }}")]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_marker_first_is_prefix_and_a_marker_last_is_infix(write, single, placement, template, side):
    tokenizer = tokenizer_with(single)
    rows = write(("ab", "c"), ("abcdefgh", "x"), ("abc", "uvwxy"), ("", "z"))
    options = {"max_length": 7, "truncation_side": side}
    wanted = encode_split(rows, tokenizer, placement=placement, template="{{ text }}:", **options)
    examples = encode_split(rows, tokenizer, template=template, **options)
    for name in ("ids", "offsets", "num_targets", "num_context", "is_truncated"):
        assert getattr(examples, name).tolist() == getattr(wanted, name).tolist()
        assert getattr(examples, name).dtype == getattr(wanted, name).dtype
    assert examples.num_context.dtype == np.int32
    assert examples.num_truncated == 2


@pytest.mark.parametrize(
    ("placement", "template", "wanted"),
    [
        ("infix", "{{ text }}:", [("<bos>ab", ":"), ("<bos>", ":"), ("<bos>cdefgh", ":")]),
        ("infix", "{{ text }}", [("<bos>a", "b"), ("", "<bos>"), ("<bos>bcdefg", "h")]),
        ("template", "{{ text }}{{ prompt }}:", [("<bos>ab", ":"), ("", "<bos>:"), ("<bos>cdefgh", ":")]),
        ("template", "{{ text }}{{ prompt }}", [("<bos>a", "b"), ("", "<bos>"), ("<bos>bcdefg", "h")]),
    ],
)
def test_a_last_token_that_predicts_the_target_is_no_context(write, placement, template, wanted):
    tokenizer = tokenizer_with("<bos> $A")
    rows = write(("ab", "c"), ("", "z"), ("abcdefgh", "x"))
    options = {"placement": placement, "template": template, "max_length": 10, "needs_rest": True}
    examples = encode_split(rows, tokenizer, **options)
    assert parts_of(tokenizer, examples) == wanted
    without = encode_split(rows, tokenizer, **options | {"needs_rest": False})
    assert examples.ids.tolist() == without.ids.tolist()
    assert examples.num_truncated == without.num_truncated == 1


def test_the_parts_are_tokenized_apart(write):
    vocab = {"<eos>": 0, "a": 1, "b": 2, "ab": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")])), eos_token="<eos>"
    )
    rows = write(("a", "b"))
    assert encode_split(rows, tokenizer, placement="infix", template="ab").input_ids(0).tolist() == [3]
    examples = encode_split(rows, tokenizer, template="a{{ prompt }}b")
    assert (examples.context_ids(0).tolist(), examples.rest_ids(0).tolist()) == ([1], [2])


def test_a_start_stands_with_the_rest_in_rows_that_have_no_context(write):
    tokenizer = tokenizer_with("<bos> $A")
    examples = encode_split(write(("ab", "x"), ("", "y")), tokenizer, template="{{ text }}{{ prompt }}:")
    assert parts_of(tokenizer, examples) == [("<bos>ab", ":"), ("", "<bos>:")]


def test_under_infix_a_start_is_context_even_of_an_empty_input(write):
    tokenizer = tokenizer_with("<bos> $A")
    assert parts_of(tokenizer, encode_split(write(("", "y")), tokenizer, placement="infix")) == [("<bos>", "")]


@pytest.mark.parametrize(
    ("context", "rest", "room", "left", "right"),
    [
        ("ab", "123456", 8, ("ab", "123456"), ("ab", "123456")),
        ("ab", "123456", 7, ("ab", "23456"), ("ab", "12345")),
        ("ab", "123456", 3, ("ab", "6"), ("ab", "1")),  # the longer part is cut to nothing
        ("ab", "123456", 2, ("ab", ""), ("ab", "")),
        ("ab", "123456", 1, ("b", ""), ("a", "")),  # and only then the other part
        ("abcdef", "12", 4, ("ef", "12"), ("ab", "12")),
        ("abcdef", "12", 1, ("", "2"), ("", "1")),
        ("abcdef", "12", 0, ("", ""), ("", "")),
        ("abc", "123", 4, ("abc", "3"), ("abc", "1")),  # if equal, the rest is cut
    ],
)
def test_the_longer_part_is_cut_first_and_special_tokens_stay(write, context, rest, room, left, right):
    tokenizer = tokenizer_with("<bos> $A <sep>")
    rows = write((context, "x"))
    options = {"template": "{{ text }}{{ prompt }}" + rest, "family": "seq2seq", "max_length": room + 5}
    for side, (kept_context, kept_rest) in (("left", left), ("right", right)):
        examples = encode_split(rows, tokenizer, truncation_side=side, **options)
        assert parts_of(tokenizer, examples) == [("<bos>" + kept_context, kept_rest + "<sep>")]
        assert examples.is_truncated.tolist() == [room < len(context + rest)]


def test_rows_that_render_no_single_marker_are_named(write):
    rows = write(("ab", "x"), ("", "y"))
    template = "{% if text %}{{ prompt }}{% endif %}:"
    message = error_of(encode_split, rows, tokenizer_with(), template=template)
    assert message.startswith(f"{rows.name} line 3: data.template renders {{{{ prompt }}}} 0 times for this row; ")
    compiled = compile_template("{{ prompt }}{{ text and prompt }}", key="a.template", marker=True)
    options = {"template": compiled, "max_length": 9, "placement": "template", "template_key": "a.template"}
    message = error_of(encode_inputs, rows, tokenizer_with(), **options)
    assert message.startswith(f"{rows.name} line 2: a.template renders {{{{ prompt }}}} 2 times for this row; ")


def test_a_column_named_prompt_is_a_column_under_prefix():
    rows = Rows("rows", datasets.Dataset.from_dict({"prompt": ["ab", "c"], "label": ["x", "y"]}), "rows")
    tokenizer = tokenizer_with()
    examples = encode_split(rows, tokenizer, placement="prefix", template="{{ prompt }}:")
    assert parts_of(tokenizer, examples) == [("", "ab:"), ("", "c:")]


@pytest.mark.parametrize(
    ("texts", "shared"),
    [
        (["abX", "abY", "abXZ"], "<bos>Do: ab"),
        (["ab", "ab"], "<bos>Do: ab"),
        (["ab", ""], "<bos>Do: "),
        (["abcdefghijkl", "abX", "abY"], "<bos>Do: ab"),  # the first is cut
        (["abcdefghijkl", "mnopqrstuvwx"], ""),  # all are cut
    ],
)
def test_the_common_context_is_what_all_whole_rows_begin_with(write, texts, shared):
    tokenizer = tokenizer_with("<bos> $A")
    rows = write(*[(text, "x") for text in texts])
    examples = encode_split(rows, tokenizer, template="Do: {{ text }}{{ prompt }}:", max_length=12)
    common = common_context(examples)
    assert common.dtype == np.int32
    assert tokenizer.decode(common) == shared
    assert examples.is_truncated.tolist() == [len(text) > 4 for text in texts]


def test_there_is_no_common_context_where_a_row_has_none_or_another(write):
    rows = write(("ab", "x"), ("cd", "y"), ("", "z"))
    tokenizer = tokenizer_with()
    assert len(common_context(encode_split(rows, tokenizer, placement="prefix"))) == 0
    assert len(common_context(encode_split(rows, tokenizer, placement="infix"))) == 0
    assert len(common_context(encode_split(rows, tokenizer, template="{{ text }}{{ prompt }}:"))) == 0


def test_examples_made_without_contexts_have_none():
    examples = Examples(np.arange(5, dtype=np.int32), np.array([0, 3, 5]), np.array([1, 2], np.int32), 0, str)
    assert (examples.num_context.tolist(), examples.num_truncated) == ([0, 0], 0)
    assert (examples.context_ids(0).tolist(), examples.rest_ids(0).tolist()) == ([], [0, 1])
    copy = pickle.loads(pickle.dumps(examples))
    assert copy.num_context.tolist() == [0, 0]


def test_lines_are_counted_for_messages_alone(write, monkeypatch):
    rows = write(("ab", "no"), ("c", "yes"))
    tokenizer = tokenizer_with()
    monkeypatch.setattr(Rows, "where", lambda *_: pytest.fail("a row was looked up"))
    encode_split(rows, tokenizer, template="{{ prompt }}{{ text }}", family="encoder", labels=["yes", "no"])


def test_statistics_of_contexts(write):
    rows = write(("ab", "x"), ("ab", "y"), ("abc", "x"), ("", "z"))
    examples = encode_split(rows, tokenizer_with(), template="{{ text }}{{ prompt }}:")
    statistics = token_statistics(examples)
    assert statistics["input_tokens"] == {"p50": 3, "p90": 4, "max": 4, "total": 11}
    assert statistics["context_tokens"] == {"p50": 2, "p90": 3, "max": 3, "total": 7}
    assert (statistics["num_distinct_contexts"], statistics["shared_context_tokens"]) == (2, 0)
    statistics = token_statistics(encode_split(rows, tokenizer_with(), template="Do: {{ text }}{{ prompt }}:"))
    assert (statistics["num_distinct_contexts"], statistics["shared_context_tokens"]) == (3, 4)
