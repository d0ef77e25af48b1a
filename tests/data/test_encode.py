"""Token ids are those of the texts, start with the tokenizer's start and nothing else, and every target is whole."""

import logging
import pickle

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from ptune_dist.data import encode
from ptune_dist.data.encode import (
    Examples,
    common_context,
    encode_inputs,
    encode_rows,
    encode_text_blocks,
    special_ids,
    token_statistics,
)
from ptune_dist.data.sources import Rows, load_rows
from ptune_dist.data.template import compile_template
from ptune_dist.errors import UserError
from ptune_dist.tiny.make import build_tokenizer


def tokenizer_with(single: str = "$A") -> PreTrainedTokenizerFast:
    """One token per byte; `single` is how the tokenizer wraps a text, as "<bos> $A <sep>"."""
    backend = build_tokenizer().backend_tokenizer
    backend.add_special_tokens(["<bos>", "<sep>"])
    special = [(name, backend.token_to_id(name)) for name in ("<bos>", "<sep>", "<eos>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    names = {"bos_token": "<bos>", "sep_token": "<sep>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows: tuple, name="a.csv") -> Rows:
        path = tmp_path / name
        path.write_text("text,label\n" + "".join(f'"{text}","{label}"\n' for text, label in rows))
        return load_rows(str(path), key="data.train", default_split="train")

    return write_rows


def compile_pair(template="{{ text }}", target="{{ label }}"):
    return {
        "template": compile_template(template, key="data.template"),
        "target": compile_template(target, key="data.target"),
    }


def texts_of(tokenizer, examples):
    """(input, target) of every example as text, special tokens shown."""
    return [
        (tokenizer.decode(examples.input_ids(i)), tokenizer.decode(examples.target_ids(i)))
        for i in range(len(examples))
    ]


def error_of(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Examples of rows


@pytest.mark.parametrize(
    ("single", "start", "end"),
    [
        ("$A", "", ""),
        ("<bos> $A", "<bos>", ""),
        ("<bos> $A <sep>", "<bos>", "<sep>"),
        ("$A <eos>", "", "<eos>"),
        ("<bos> <sep> $A", "<bos><sep>", ""),
    ],
)
def test_nothing_stands_between_input_and_target(write, single, start, end):
    tokenizer = tokenizer_with(single)
    examples = encode_rows(write(("ab", "c")), tokenizer, **compile_pair("{{ text }}:", " {{ label }}"), max_length=99)
    assert [tokenizer.decode(ids) for ids in special_ids(tokenizer)] == [start, end]
    assert texts_of(tokenizer, examples) == [(start + "ab:", " c<eos>")]


def test_start_and_end_are_found_for_a_tokenizer_that_does_not_know_the_probe():
    backend = Tokenizer(models.BPE(vocab={"<bos>": 0, "<eos>": 1, "b": 2}, merges=[]))
    backend.post_processor = processors.TemplateProcessing(
        "<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    assert special_ids(tokenizer) == ([0], [1])


def test_special_tokens_written_in_the_template_are_special_and_stay(write):
    tokenizer = tokenizer_with("<bos> $A <sep>")
    examples = encode_rows(write(("ab", "c")), tokenizer, **compile_pair("{{ text }}<sep>"), max_length=99)
    assert texts_of(tokenizer, examples) == [("<bos>ab<sep>", "c<eos>")]
    assert examples.input_ids(0)[-1] == tokenizer.sep_token_id


def test_eos_is_left_out_on_request(write):
    tokenizer = tokenizer_with()
    examples = encode_rows(write(("ab", "c")), tokenizer, **compile_pair(), max_length=99, append_eos=False)
    assert texts_of(tokenizer, examples) == [("ab", "c")]


def test_storage_is_flat_int32_and_lengths_add_up(write):
    tokenizer = tokenizer_with("<bos> $A")
    examples = encode_rows(write(("ab", "cde"), ("", "x")), tokenizer, **compile_pair(), max_length=99)
    assert examples.ids.dtype == np.int32
    assert examples.lengths.tolist() == [1 + 2 + 3 + 1, 1 + 1 + 1]
    assert examples.num_targets.tolist() == [4, 2]
    assert len(examples.ids) == examples.lengths.sum()
    assert len(examples) == 2
    assert examples.input_ids(1).tolist() == [tokenizer.bos_token_id]


def test_empty_input_is_allowed_without_a_bos(write):
    examples = encode_rows(write(("", "x")), tokenizer_with(), **compile_pair(), max_length=99)
    assert examples.input_ids(0).tolist() == []
    assert len(examples.target_ids(0)) == 2


def test_batches_of_rows_join_without_a_seam(write, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_ROWS", 3)
    tokenizer = tokenizer_with("<bos> $A")
    rows = write(*[("x" * i, str(i)) for i in range(8)])
    expected = [("<bos>" + "x" * i, f"{i}<eos>") for i in range(8)]
    assert texts_of(tokenizer, encode_rows(rows, tokenizer, **compile_pair(), max_length=99)) == expected
    inputs = encode_inputs(rows, tokenizer, template=compile_pair()["template"], max_length=99)
    assert tokenizer.batch_decode([rest for _, rest in inputs]) == [text for text, _ in expected]


def test_templates_without_columns_are_rendered_for_every_row(write):
    tokenizer = tokenizer_with()
    examples = encode_rows(write(("a", "b"), ("c", "d")), tokenizer, **compile_pair("in", "out"), max_length=99)
    assert texts_of(tokenizer, examples) == [("in", "out<eos>")] * 2


def test_truncation_cuts_the_input_from_its_left_end_and_keeps_its_start(write):
    tokenizer = tokenizer_with("<bos> $A")
    rows = write(("abcdef", "xy"), ("abc", "x"), ("ab", "xy"), ("abcdef", "uvwxyz"))
    examples = encode_rows(rows, tokenizer, **compile_pair(), max_length=8)
    assert texts_of(tokenizer, examples) == [
        ("<bos>cdef", "xy<eos>"),
        ("<bos>abc", "x<eos>"),
        ("<bos>ab", "xy<eos>"),
        ("<bos>", "uvwxyz<eos>"),
    ]
    assert examples.lengths.max() == 8
    assert examples.num_truncated == 2
    assert examples.truncated_share == 0.5


def test_truncation_from_the_right_keeps_the_input_s_first_tokens(write):
    tokenizer = tokenizer_with("<bos> $A")
    rows = write(("abcdef", "xy"), ("abcdef", "uvwxyz"))
    examples = encode_rows(rows, tokenizer, **compile_pair(), max_length=8, truncation_side="right")
    assert texts_of(tokenizer, examples) == [("<bos>abcd", "xy<eos>"), ("<bos>", "uvwxyz<eos>")]


def test_input_that_just_fits_is_not_counted_as_cut(write):
    examples = encode_rows(write(("abcd", "xyz")), tokenizer_with(), **compile_pair(), max_length=8)
    assert (examples.num_truncated, examples.lengths.tolist()) == (0, [8])


@pytest.mark.parametrize(
    ("single", "label", "needs"),
    [("$A", "uvwxyz12", "9 tokens, more"), ("<bos> $A", "uvwxyz1", "8 tokens beside 1 special ones, more")],
)
def test_target_that_does_not_fit_names_the_line(write, single, label, needs):
    rows = write(("ab", "x"), ("ab", label))
    message = error_of(encode_rows, rows, tokenizer_with(single), **compile_pair(), max_length=8)
    assert message.startswith(f"{rows.name} line 3: data.target is {needs} than data.max_length 8; ")


@pytest.mark.parametrize("label", ["", "  ", "\t"])
def test_empty_target_names_the_line(write, label):
    rows = write(("ab", "x"), ("cd", label))
    message = error_of(encode_rows, rows, tokenizer_with(), **compile_pair(), max_length=8)
    assert message == f"{rows.name} line 3: data.target is empty for this row; fill it or drop the row"


def test_null_in_a_used_column_names_line_column_and_key(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": "b", "note": null}\n\n{"text": null, "label": "b"}\n{"text": "c"}\n')
    rows = load_rows(str(path), key="data.train", default_split="train")
    message = error_of(encode_rows, rows, tokenizer_with(), **compile_pair(), max_length=9, template_key="a.template")
    assert message.startswith(f"{path} line 3: column 'text', which a.template uses, is missing or null")
    only_label = compile_pair("", "{{ label }}")
    message = error_of(encode_rows, rows, tokenizer_with(), **only_label, max_length=9, target_key="a.target")
    assert message.startswith(f"{path} line 4: column 'label', which a.target uses, is missing or null")
    template = compile_template("{{ text.x }}", key="data.template")
    message = error_of(encode_inputs, rows, tokenizer_with(), template=template, max_length=9)
    assert message.startswith(f"{path} line 1: data.template cannot be rendered: ")


def test_tokenizer_without_an_eos_says_so(write):
    tokenizer = tokenizer_with()
    tokenizer.eos_token = None
    message = error_of(encode_rows, write(("a", "b")), tokenizer, **compile_pair(), max_length=9)
    assert "no end-of-sequence token" in message
    assert len(encode_rows(write(("a", "b")), tokenizer, **compile_pair(), max_length=9, append_eos=False)) == 1


def test_long_texts_are_encoded_without_a_warning(write, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = tokenizer_with()
    tokenizer.model_max_length = 4
    encode_rows(write(("a" * 50, "b")), tokenizer, **compile_pair(), max_length=99)
    assert caplog.text == ""
    tokenizer("a" * 50)
    assert "longer than the specified maximum" in caplog.text  # the warning that `encode_rows` avoids


def test_examples_know_their_rows_and_can_be_pickled(write):
    rows = write(("ab", "c"), ("de", "f"))
    examples = encode_rows(rows, tokenizer_with(), **compile_pair(), max_length=99)
    assert examples.where(1) == f"{rows.name} line 3"
    copy = pickle.loads(pickle.dumps(examples))
    assert copy.where(1) == examples.where(1)
    assert copy.ids.tolist() == examples.ids.tolist()


# Inputs and targets that are read apart


@pytest.mark.parametrize(
    ("single", "wanted"),
    [
        ("<bos> $A <sep>", ("<bos>ab<sep>", "<bos>c<eos>")),  # as BART's
        ("$A <eos>", ("ab<eos>", "c<eos>")),  # as T5's
        ("$A", ("ab", "c<eos>")),
    ],
)
def test_a_seq2seq_input_is_ended_and_its_target_begins_as_any_text_does(write, single, wanted):
    tokenizer = tokenizer_with(single)
    examples = encode_rows(write(("ab", "c")), tokenizer, **compile_pair(), max_length=99, family="seq2seq")
    assert texts_of(tokenizer, examples) == [wanted]


def test_an_encoders_target_is_the_number_of_its_label(write):
    tokenizer = tokenizer_with("<bos> $A <sep>")
    pair = compile_pair(target=" {{ label }} ")
    rows = write(("ab", "no"), ("c", "yes"))
    examples = encode_rows(rows, tokenizer, **pair, max_length=99, family="encoder", labels=["yes", "no"])
    assert [tokenizer.decode(examples.input_ids(i)) for i in (0, 1)] == ["<bos>ab<sep>", "<bos>c<sep>"]
    assert [examples.target_ids(i).tolist() for i in (0, 1)] == [[1], [0]]


def test_an_encoder_needs_no_eos_and_a_label_that_is_not_listed_names_the_line(write):
    tokenizer = tokenizer_with()
    tokenizer.eos_token = None
    options = {"max_length": 99, "family": "encoder", "labels": ["yes", "no"]}
    assert len(encode_rows(write(("ab", "no")), tokenizer, **compile_pair(), **options)) == 1
    rows = write(("ab", "no"), ("c", "maybe"))
    message = error_of(encode_rows, rows, tokenizer, **compile_pair(), **options)
    assert message == f"{rows.name} line 3: data.target is 'maybe', which data.labels does not list"


@pytest.mark.parametrize(("side", "kept"), [("left", "f"), ("right", "a")])
def test_a_cut_input_keeps_its_start_and_its_end(write, side, kept):
    tokenizer = tokenizer_with("<bos> $A <sep>")
    options = {"max_length": 6, "family": "seq2seq", "truncation_side": side}
    examples = encode_rows(write(("abcdef", "x")), tokenizer, **compile_pair(), **options)
    assert texts_of(tokenizer, examples) == [(f"<bos>{kept}<sep>", "<bos>x<eos>")]
    assert (examples.num_truncated, examples.lengths.tolist()) == (1, [6])


def test_widths_are_those_of_inputs_and_of_targets(write):
    examples = encode_rows(write(("abc", "d"), ("e", "fg")), tokenizer_with(), **compile_pair(), max_length=99)
    assert examples.widths.tolist() == [[3, 2], [1, 3]]


# Contexts: what precedes the virtual tokens


def encode_split(rows, tokenizer, *, placement="template", template="{{ text }}", **options):
    compiled = {
        "template": compile_template(template, key="data.template", marker=placement == "template"),
        "target": compile_template("{{ label }}", key="data.target"),
    }
    return encode_rows(rows, tokenizer, **compiled, placement=placement, **{"max_length": 99} | options)


def parts_of(tokenizer, examples):
    """(context, rest) of every example as text, special tokens shown."""
    for i in range(len(examples)):
        assert [*examples.context_ids(i), *examples.rest_ids(i)] == examples.input_ids(i).tolist()
        assert len(examples.context_ids(i)) == examples.num_context[i]
    return [
        (tokenizer.decode(examples.context_ids(i)), tokenizer.decode(examples.rest_ids(i)))
        for i in range(len(examples))
    ]


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
    tokenizer, rows = tokenizer_with(single), write(("ab", "c"), ("abcdefgh", "x"), ("abc", "uvwxy"), ("", "z"))
    options = {"max_length": 7, "truncation_side": side}
    wanted = encode_split(rows, tokenizer, placement=placement, template="{{ text }}:", **options)
    examples = encode_split(rows, tokenizer, template=template, **options)
    for name in ("ids", "offsets", "num_targets", "num_context", "is_truncated"):
        assert getattr(examples, name).tolist() == getattr(wanted, name).tolist()
        assert getattr(examples, name).dtype == getattr(wanted, name).dtype
    assert examples.num_context.dtype == np.int32
    assert examples.num_truncated == 2


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
        ("ab", "123456", 3, ("ab", "6"), ("ab", "1")),  # of the longer part down to nothing
        ("ab", "123456", 2, ("ab", ""), ("ab", "")),
        ("ab", "123456", 1, ("b", ""), ("a", "")),  # and only then of the other
        ("abcdef", "12", 4, ("ef", "12"), ("ab", "12")),
        ("abcdef", "12", 1, ("", "2"), ("", "1")),
        ("abcdef", "12", 0, ("", ""), ("", "")),
        ("abc", "123", 4, ("abc", "3"), ("abc", "1")),  # of equals the rest
    ],
)
def test_the_longer_part_is_cut_first_and_special_tokens_stay(write, context, rest, room, left, right):
    tokenizer, rows = tokenizer_with("<bos> $A <sep>"), write((context, "x"))
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
        (["abcdefghijkl", "mnopqrstuvwx"], ""),  # all are
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
    rows, tokenizer = write(("ab", "x"), ("cd", "y"), ("", "z")), tokenizer_with()
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
    rows, tokenizer = write(("ab", "no"), ("c", "yes")), tokenizer_with()
    monkeypatch.setattr(Rows, "where", lambda *_: pytest.fail("a row was looked up"))
    encode_split(rows, tokenizer, template="{{ prompt }}{{ text }}", family="encoder", labels=["yes", "no"])


# Inputs alone


def test_inputs_alone_need_no_target_column_and_are_cut_to_max_length():
    rows = Rows("prompts", datasets.Dataset.from_dict({"text": ["abcdef", "ab", ""]}), "rows")
    tokenizer, template = tokenizer_with("<bos> $A <sep>"), compile_template("{{ text }}:", key="data.template")
    options = {"template": template, "max_length": 5}

    def decoded(**more) -> list[tuple[str, str]]:
        pairs = encode_inputs(rows, tokenizer, **options, **more)
        assert all(isinstance(ids, list) for pair in pairs for ids in pair)
        return [(tokenizer.decode(context), tokenizer.decode(rest)) for context, rest in pairs]

    assert decoded() == [("", "<bos>def:"), ("", "<bos>ab:"), ("", "<bos>:")]
    assert decoded(truncation_side="right") == [("", "<bos>abcd"), ("", "<bos>ab:"), ("", "<bos>:")]
    assert decoded(family="encoder") == [("", "<bos>ef:<sep>"), ("", "<bos>ab:<sep>"), ("", "<bos>:<sep>")]
    assert decoded(placement="infix") == [("<bos>def:", ""), ("<bos>ab:", ""), ("<bos>:", "")]


# Blocks of text


def load_text(tmp_path, text: str) -> Rows:
    path = tmp_path / "a.txt"
    path.write_text(text)
    return load_rows(str(path), key="data.train", default_split="train")


@pytest.mark.parametrize("chunk_characters", [1 << 20, 1])
def test_text_is_cut_into_blocks_of_which_the_last_may_be_short(tmp_path, monkeypatch, chunk_characters):
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", chunk_characters)
    monkeypatch.setattr(encode, "BATCH_ROWS", 2)
    text = "one\n\ntwo three\nfour\nfive"
    tokenizer = tokenizer_with("<bos> $A <sep>")
    examples = encode_text_blocks(load_text(tmp_path, text), tokenizer, max_length=7)
    assert examples.lengths.tolist() == [7, 7, 7, 3]
    assert examples.num_targets.tolist() == [7, 7, 7, 3]
    assert "".join(target for _, target in texts_of(tokenizer, examples)) == text
    assert all(len(examples.input_ids(i)) == 0 for i in range(4))
    assert examples.num_truncated == 0
    assert examples.where(3) == f"{tmp_path}/a.txt block 4 (the first is block 1)"


def test_text_of_a_whole_number_of_blocks_has_no_empty_one(tmp_path):
    examples = encode_text_blocks(load_text(tmp_path, "abcdef"), tokenizer_with(), max_length=3)
    assert examples.lengths.tolist() == [3, 3]


# Statistics


def test_statistics_of_tokens(write):
    rows = write(*[("x" * i, "y" * (i % 3 + 1)) for i in range(10)])
    examples = encode_rows(rows, tokenizer_with(), **compile_pair(), max_length=10, append_eos=False)
    statistics = token_statistics(examples)
    assert statistics == {
        "num_examples": 10,
        "input_tokens": {"p50": 4, "p90": 7, "max": 9, "total": 44},
        "target_tokens": {"p50": 2, "p90": 3, "max": 3, "total": 19},
        "num_truncated": 1,
        "truncated_share": 0.1,
        "context_tokens": {"p50": 0, "p90": 0, "max": 0, "total": 0},
        "num_distinct_contexts": 0,
        "shared_context_tokens": 0,
    }


def test_statistics_of_contexts(write):
    rows = write(("ab", "x"), ("ab", "y"), ("abc", "x"), ("", "z"))
    examples = encode_split(rows, tokenizer_with(), template="{{ text }}{{ prompt }}:")
    statistics = token_statistics(examples)
    assert statistics["input_tokens"] == {"p50": 3, "p90": 4, "max": 4, "total": 11}
    assert statistics["context_tokens"] == {"p50": 2, "p90": 3, "max": 3, "total": 7}
    assert (statistics["num_distinct_contexts"], statistics["shared_context_tokens"]) == (2, 0)
    statistics = token_statistics(encode_split(rows, tokenizer_with(), template="Do: {{ text }}{{ prompt }}:"))
    assert (statistics["num_distinct_contexts"], statistics["shared_context_tokens"]) == (3, 4)
