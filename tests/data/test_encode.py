"""Token ids are those of the texts, with only the tokenizer's start before them, and every target is complete."""

import logging
import pickle

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from ptune_dist.data import encode
from ptune_dist.data.framing import special_ids
from ptune_dist.data.sources import Rows, load_rows
from ptune_dist.data.template import compile_template
from tests.data.texts import compile_pair, encode_inputs, encode_rows, error_of, texts_of, tokenizer_with


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


# Inputs and targets that are read separately


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
    assert message == f"{rows.name} line 3: data.target is 'maybe', which data.labels does not list: yes, no"


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


# Inputs only


def test_inputs_alone_need_no_target_column_and_are_cut_to_max_length():
    rows = Rows("prompts", datasets.Dataset.from_dict({"text": ["abcdef", "ab", ""]}), "rows")
    tokenizer = tokenizer_with("<bos> $A <sep>")
    template = compile_template("{{ text }}:", key="data.template")
    options = {"template": template, "max_length": 5}

    def decoded(**more) -> list[tuple[str, str]]:
        pairs = encode_inputs(rows, tokenizer, **options, **more)
        assert all(isinstance(ids, list) for pair in pairs for ids in pair)
        return [(tokenizer.decode(context), tokenizer.decode(rest)) for context, rest in pairs]

    assert decoded() == [("", "<bos>def:"), ("", "<bos>ab:"), ("", "<bos>:")]
    assert decoded(truncation_side="right") == [("", "<bos>abcd"), ("", "<bos>ab:"), ("", "<bos>:")]
    assert decoded(family="encoder") == [("", "<bos>ef:<sep>"), ("", "<bos>ab:<sep>"), ("", "<bos>:<sep>")]
    assert decoded(placement="infix") == [("<bos>def:", ""), ("<bos>ab:", ""), ("<bos>:", "")]
