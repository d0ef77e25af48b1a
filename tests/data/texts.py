"""Helpers of the tests of encoding: rows to tokens, and tokens back to text."""

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from ptune_dist.data import encode
from ptune_dist.data.encode import Encoding, TokenPair
from ptune_dist.data.examples import Examples
from ptune_dist.data.sources import Rows
from ptune_dist.data.template import compile_template
from ptune_dist.errors import UserError
from ptune_dist.families import FAMILIES
from ptune_dist.tiny.make import build_tokenizer


def tokenizer_with(single: str = "$A") -> PreTrainedTokenizerFast:
    """One token per byte; `single` is how the tokenizer wraps a text, such as "<bos> $A <sep>"."""
    backend = build_tokenizer().backend_tokenizer
    backend.add_special_tokens(["<bos>", "<sep>"])
    special = [(name, backend.token_to_id(name)) for name in ("<bos>", "<sep>", "<eos>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    names = {"bos_token": "<bos>", "sep_token": "<sep>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def compile_pair(template="{{ text }}", target="{{ label }}"):
    return {
        "template": compile_template(template, key="data.template"),
        "target": compile_template(target, key="data.target"),
    }


def encoding_of(
    tokenizer,
    *,
    max_length: int = 99,
    family: str = "causal",
    labels: list[str] | None = None,
    append_eos: bool = True,
    objective_target: str = "text",
    **options,
) -> Encoding:
    """How a family's rows become token ids."""
    found = FAMILIES[family]
    targets = found.build_targets(objective_target, tokenizer, labels, append_eos)
    return Encoding(tokenizer, found.frame_text(), targets, max_length, **options)


def split_options(options: dict) -> tuple[dict, dict]:
    """Options of `encode`'s functions, and those of `encoding_of`."""
    of_rows = {key: value for key, value in options.items() if key.startswith(("template", "target"))}
    return of_rows, {key: value for key, value in options.items() if key not in of_rows}


def encode_rows(rows: Rows, tokenizer, **options) -> Examples:
    of_rows, of_encoding = split_options(options)
    return encode.encode_rows(rows, encoding_of(tokenizer, **of_encoding), **of_rows)


def encode_inputs(rows: Rows, tokenizer, **options) -> list[TokenPair]:
    of_rows, of_encoding = split_options(options)
    return encode.encode_inputs(rows, encoding_of(tokenizer, **of_encoding), **of_rows)


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
