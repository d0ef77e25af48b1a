"""Special tokens that a template writes where the tokenizer puts them are there once; ids must have an embedding."""

import pytest

from tests.data.texts import (
    compile_pair,
    encode_inputs,
    encode_rows,
    encode_split,
    error_of,
    parts_of,
    texts_of,
    tokenizer_with,
)

SOURCES = ["{{ text }}", "<bos>{{ text }}", "{{ text }}<sep>", "<bos>{{ text }}<sep>"]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("family", "label"), [("seq2seq", "<bos>c<eos>"), ("encoder", None)])
def test_a_framed_input_begins_and_ends_once(write, source, family, label):
    tokenizer = tokenizer_with("<bos> $A <sep>")
    options = {"family": family, "labels": ["c"], "max_length": 99}
    examples = encode_rows(write(("ab", "c")), tokenizer, **compile_pair(source), **options)
    assert tokenizer.decode(examples.input_ids(0)) == "<bos>ab<sep>"
    assert label is None or tokenizer.decode(examples.target_ids(0)) == label
    (pair,) = encode_inputs(write(("ab", "c")), tokenizer, template=compile_pair(source)["template"], **options)
    assert tokenizer.decode(pair[1]) == "<bos>ab<sep>"


def test_a_causal_input_begins_once_and_only_the_second_of_two_is_the_templates(write):
    tokenizer = tokenizer_with("<bos> $A")
    for source, expected in {"<bos>{{ text }}": "<bos>ab", "<bos><bos>{{ text }}": "<bos><bos>ab"}.items():
        examples = encode_rows(write(("ab", "c")), tokenizer, **compile_pair(source), max_length=99)
        assert texts_of(tokenizer, examples) == [(expected, "c<eos>")]
    plain = encode_rows(write(("ab", "c")), tokenizer_with("$A"), **compile_pair("<bos>{{ text }}"), max_length=99)
    assert texts_of(tokenizer, plain) == [("<bos>ab", "c<eos>")]


@pytest.mark.parametrize("target", ["{{ label }}", "{{ label }}<eos>", "<bos>{{ label }}", "<bos>{{ label }}<eos>"])
def test_a_target_begins_and_ends_once(write, target):
    tokenizer = tokenizer_with("<bos> $A")
    pair = compile_pair("{{ text }}", target)
    examples = encode_rows(write(("ab", "c")), tokenizer, **pair, max_length=99, family="seq2seq")
    assert texts_of(tokenizer, examples) == [("<bos>ab", "<bos>c<eos>")]


def test_an_input_that_writes_its_beginning_is_cut_like_any_other(write):
    tokenizer = tokenizer_with("<bos> $A")
    found = [
        encode_rows(write(("abcdef", "c")), tokenizer, **compile_pair(source), max_length=6)
        for source in ("{{ text }}", "<bos>{{ text }}")
    ]
    assert texts_of(tokenizer, found[0]) == texts_of(tokenizer, found[1]) == [("<bos>def", "c<eos>")]
    exact = encode_rows(write(("abc", "c")), tokenizer, **compile_pair("<bos>{{ text }}"), max_length=6)
    assert not exact.num_truncated


def test_a_beginning_that_is_written_before_the_virtual_tokens_stays_there(write):
    tokenizer = tokenizer_with("<bos> $A")
    for source in ("<bos>{{ prompt }}{{ text }}", "<bos>{{ prompt }}{{ text }}<bos>"):
        ((context, rest),) = parts_of(tokenizer, encode_split(write(("ab", "c")), tokenizer, template=source))
        assert (context, rest) == ("<bos>", source.partition("}}")[2].replace("{{ text }}", "ab"))


def test_only_a_row_with_a_token_beyond_the_embeddings_is_refused(write):
    tokenizer = tokenizer_with()
    beyond = tokenizer.convert_tokens_to_ids("<sep>")
    options = {"max_length": 99, "num_embeddings": beyond}
    pair = compile_pair()
    assert len(encode_rows(write(("ab", "c")), tokenizer, **pair, **options)) == 1
    for row in (("<sep>", "d"), ("d", "<sep>")):
        rows = write(("ab", "c"), row)
        message = error_of(encode_rows, rows, tokenizer, **pair, **options)
        place = f"{rows.name} line 3 has the token '<sep>'"
        assert message.startswith(f"{place} with id {beyond}, but the base has {beyond} embeddings")
        assert len(encode_rows(rows, tokenizer, **pair, max_length=99)) == 2
    rows = write(("<sep>", "d"))
    assert "line 2 has the token" in error_of(encode_inputs, rows, tokenizer, template=pair["template"], **options)
