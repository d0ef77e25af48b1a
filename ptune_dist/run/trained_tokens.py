"""Whether the training rows have the tokens whose embeddings are trained: where none has any, nothing is learned."""

from collections.abc import Iterator, Mapping

from ptune_dist.data.build import Split
from ptune_dist.data.examples import Examples, count_rows_with
from ptune_dist.errors import UserError
from ptune_dist.prompts.method import Method
from ptune_dist.run.reading import Reading

MOST_NAMED = 5


def check_trained_tokens(prompt: Method, examples: Examples, reading: Reading) -> None:
    """Raise UserError where no training row has any of the tokens that a prompt trains."""
    if prompt.trained_tokens and not count_own(prompt, examples, reading)[-1]:
        shown = name_tokens(list(prompt.trained_tokens), reading)
        where = "input" if reading.family.trains_head else "input or target"
        raise UserError(
            f"prompt.tokens: no training row has {shown} in its {where}, so there is nothing to learn for it: "
            "write it into data.template"
        )


def describe_trained_tokens(
    prompts: Mapping[str, Method], splits: Mapping[str, Split], reading: Reading
) -> Iterator[str]:
    """A line about the rows that have the tokens that a prompt trains, and one about the tokens that no row has."""
    for name, prompt in prompts.items():
        if not prompt.trained_tokens:
            continue
        examples = splits[name].examples
        *counts, num_rows = count_own(prompt, examples, reading)
        yield f"prompt.tokens: {num_rows:,} of the {len(examples):,} training rows have one of the trained tokens"
        absent = [token for token, count in zip(prompt.trained_tokens, counts, strict=True) if not count]
        if absent:
            shown = name_tokens(absent, reading)
            yield f"warning: prompt.tokens: no training row has {shown}, so nothing is learned for it"


def count_own(prompt: Method, examples: Examples, reading: Reading) -> list[int]:
    """In how many examples each trained token stands, and last in how many any does; an encoder reads no targets."""
    return count_rows_with(examples, list(prompt.trained_tokens), in_targets=not reading.family.trains_head)


def name_tokens(ids: list[int], reading: Reading) -> str:
    """Tokens as the tokenizer writes them, and their ids."""
    shown = ", ".join(f"{reading.tokenizer.decode([one])!r} ({one})" for one in ids[:MOST_NAMED])
    return shown + (f" and {len(ids) - MOST_NAMED:,} more" if len(ids) > MOST_NAMED else "")
