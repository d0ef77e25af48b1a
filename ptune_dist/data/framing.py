"""How an example is framed in token ids: the special tokens around its input, and what its target is.

Families differ only in these two things; `families/` chooses.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ptune_dist.data.label_names import describe_unlisted
from ptune_dist.data.numbers import read_number
from ptune_dist.errors import UserError

# Methods by which a class of tokenizers may make other ids than its backend.
WAYS_TO_ENCODE = ("__call__", "_call_one", "_encode_plus", "_batch_encode_plus", "backend_tokenizer")
LEAD = "\n"
SPACES = ("\u2581", "\u0120")  # how tokens show a space: SentencePiece, byte-level BPE
Where = Callable[[int], str]  # index of a text -> the name of its row, for messages


@dataclass(frozen=True)
class Framing:
    """ends_input: the input ends as the tokenizer ends a text; else the target continues it.

    starts_target: the target is a text of its own and begins as any text does. reads_plain_text: a text without input
    and target can be learned. is_bare: nothing is put around the input, as around a block of plain text.
    """

    ends_input: bool
    starts_target: bool = False
    reads_plain_text: bool = False
    is_bare: bool = False


class Target(NamedTuple):
    """The supervised part of one row: token ids, or one placeholder id for a label or a number."""

    ids: list[int]
    number: float | None = None


class Targets:
    """Turns rendered targets into what is supervised."""

    takes_room = True  # of data.max_length
    specials: tuple[list[int], list[int]] = ([], [])  # what is put before and after a target

    def encode(self, texts: list[str], where: Where, key: str) -> list[Target]:
        """Raises UserError with the row's name for a text that cannot be a target; `key` is the config's."""
        raise NotImplementedError

    def render(self, ids: np.ndarray, number: float | None) -> str:
        """A target for people."""
        raise NotImplementedError


class TextTargets(Targets):
    """Tokens of a text, ended by the tokenizer's end-of-sequence token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, append_eos: bool = True, starts: bool = False):
        """`starts`: begin as the tokenizer begins a text. Raises UserError where there is no token to end with."""
        self._tokenizer = tokenizer
        self._starts = starts
        self.specials = (special_ids(tokenizer)[0] if starts else [], end_ids(tokenizer) if append_eos else [])

    def encode(self, texts: list[str], where: Where, key: str) -> list[Target]:
        before, after = self.specials
        found = []
        split = tokenize if self._starts else tokenize_continuations
        for index, (text, ids) in enumerate(zip(texts, split(self._tokenizer, texts), strict=True)):
            if not text.strip() or not ids:
                raise UserError(describe_empty(where(index), key))
            found.append(Target(before + without_end(without_beginning(ids, before), after) + after))
        return found

    def render(self, ids: np.ndarray, number: float | None) -> str:
        return decode(self._tokenizer, ids)


class LabelTargets(Targets):
    """The number of a label."""

    takes_room = False

    def __init__(self, labels: list[str]):
        self._labels = labels

    def encode(self, texts: list[str], where: Where, key: str) -> list[Target]:
        found = []
        for index, text in enumerate(texts):
            label = text.strip()
            if not label:
                raise UserError(describe_empty(where(index), key))
            if label not in self._labels:
                raise UserError(describe_unlisted(where(index), key, label, self._labels))
            found.append(Target([self._labels.index(label)]))
        return found

    def render(self, ids: np.ndarray, number: float | None) -> str:
        return self._labels[int(ids[0])]


class NumberTargets(Targets):
    """A real number, for regression; the one id of the target is a placeholder."""

    takes_room = False

    def encode(self, texts: list[str], where: Where, key: str) -> list[Target]:
        found = []
        for index, text in enumerate(texts):
            if not text.strip():
                raise UserError(describe_empty(where(index), key))
            number = read_number(text)
            if number is None:
                raise UserError(
                    f"{where(index)}: {key} is {text.strip()!r}, but train.objective needs a plain decimal number"
                )
            found.append(Target([0], number))
        return found

    def render(self, ids: np.ndarray, number: float | None) -> str:
        return f"{number:g}"


def describe_empty(where: str, key: str) -> str:
    return f"{where}: {key} is empty for this row; fill it or drop the row"


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids without special tokens; equal texts may share one list."""
    distinct = dict.fromkeys(texts)
    if 2 * len(distinct) <= len(texts):  # as labels, or the empty contexts under prefix
        found = dict(zip(distinct, tokenize_distinct(tokenizer, list(distinct)), strict=True))
        return [found[text] for text in texts]
    return tokenize_distinct(tokenizer, texts)


def tokenize_continuations(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts that continue others.

    A tokenizer that puts a space before every text would put one between an input and its target too
    (transformers#26273): texts are then tokenized after a line break, whose tokens are dropped.
    """
    if not puts_space(tokenizer):
        return tokenize(tokenizer, texts)
    (lead,) = tokenize(tokenizer, [LEAD])
    led = tokenize(tokenizer, [LEAD + text for text in texts])
    if all(ids[: len(lead)] == lead for ids in led):
        return [ids[len(lead) :] for ids in led]
    plain = tokenize(tokenizer, texts)
    return [ids[len(lead) :] if ids[: len(lead)] == lead else own for ids, own in zip(led, plain, strict=True)]


def puts_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text begins with a space that is not in it, as SentencePiece's dummy prefix."""
    (ids,) = tokenize(tokenizer, ["a"])
    first = str(tokenizer.convert_ids_to_tokens(ids[:1])[0]) if ids else ""
    return first.startswith(SPACES)


def tokenize_distinct(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """As `tokenize`. Where the tokenizer is a plain one, its backend takes half the time without its wrapper."""
    first = texts[:1] if len(texts) > 1 and is_plain(type(tokenizer)) else texts  # sets the backend's options
    ids = tokenizer(first, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    if len(first) == len(texts):
        return ids
    backend = cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer
    rest = backend.encode_batch_fast(texts[1:], add_special_tokens=False)
    return [*ids, *(encoding.ids for encoding in rest)]


@functools.cache
def is_plain(kind: type[PreTrainedTokenizerBase]) -> bool:
    """Whether this class of tokenizers leaves the ids to the backend of `tokenizers`."""
    classes = kind.__mro__
    if PreTrainedTokenizerFast not in classes:
        return False
    own = [vars(one) for one in classes[: classes.index(PreTrainedTokenizerFast)]]
    return not any(name in found for found in own for name in WAYS_TO_ENCODE)


def without_beginning(ids: list[int], special: list[int]) -> list[int]:
    """Token ids without special tokens that a template writes at the beginning, where they are put anyway."""
    return ids[len(special) :] if special and ids[: len(special)] == special else ids


def without_end(ids: list[int], special: list[int]) -> list[int]:
    """As `without_beginning`, of those at the end."""
    return ids[: -len(special)] if special and ids[-len(special) :] == special else ids


def check_ids(
    ids: Sequence[int], num_embeddings: int | None, tokenizer: PreTrainedTokenizerBase, where: Callable[[], str]
) -> None:
    """Raise UserError for a token that the base has no embedding of; `num_embeddings` None: it has one of each."""
    if num_embeddings is None or max(ids, default=0) < num_embeddings:
        return
    beyond = next(i for i in ids if i >= num_embeddings)
    raise UserError(
        f"{where()} has the token {tokenizer.convert_ids_to_tokens(beyond)!r} with id {beyond}, but the base has "
        f"{num_embeddings} embeddings: take it out of the text, or give a base whose embeddings were resized"
    )


def decode(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, *, skip_special_tokens: bool = False) -> str:
    """The text of one row of token ids."""
    # transformers' type allows for several rows, which would give a list.
    return cast(str, tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text: a BOS, a CLS, a SEP, or none."""
    probe = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids: list[int] = list(cast(list[int], probe["input_ids"]))  # of one text; transformers' type allows for several
    mask: list[int] = list(cast(list[int], probe["special_tokens_mask"]))
    if 0 in mask:
        return ids[: mask.index(0)], ids[len(mask) - mask[::-1].index(0) :]
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)  # it has no token for "a"
    return [i for i in ids if i not in ends], [i for i in ids if i in ends]


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or 'of the base'} has no end-of-sequence token to end targets "
            "with; name its eos_token in its tokenizer_config.json"
        )
    return [cast(int, tokenizer.eos_token_id)]  # transformers' type is that of any attribute of a tokenizer
