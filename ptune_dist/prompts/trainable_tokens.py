"""Trainable tokens (PEFT's method of that name): the embeddings of some tokens of the vocabulary are trained.

Where the base ties its head to its embeddings, the head computes with the trained rows too. Shapes: R tokens, D width.
"""

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptune_dist.base.own_rows import put_rows
from ptune_dist.errors import UserError
from ptune_dist.prompts.method import BaseFacts, BaseTuning, Options, PeftAdapter, TrainingDefaults
from ptune_dist.prompts.start import Start, describe_held, find_prompt_file, read_adapter_settings, read_tensors

ROWS = "trainable_tokens"
INDICES = "token_indices"
DELTA = "trainable_tokens_delta"  # PEFT's, which holds the rows themselves


class TrainableTokensOptions(Options):
    """Which tokens are trained: one of these is needed."""

    tokens: list[str] | None = Field(default=None, min_length=1)
    """The tokens that are trained, each a text that is one token of the base's tokenizer, such as `["<task>"]`."""

    token_indices: list[int] | None = Field(default=None, min_length=1)
    """The same by their ids, as in PEFT."""


class TrainableTokens(BaseTuning):
    """R rows of width D in place of the base's."""

    options_type = TrainableTokensOptions
    default_training = TrainingDefaults(0.01, "tried on tiny bases; 0.2 in PEFT's comparison on MetaMathQA")
    names_modules = True

    def __init__(self, rows: torch.Tensor, token_ids: list[int]):
        super().__init__()
        self.trained_tokens = token_ids
        self.trainable_tokens = nn.Parameter(rows.detach().float().clone())

    @classmethod
    def build(
        cls, options: TrainableTokensOptions, num_virtual_tokens: int, base: BaseFacts, start: Start
    ) -> "TrainableTokens":
        ids = find_ids(options, start.tokenizer)
        check_ids(ids, base.num_embeddings)
        if start.kind == "file":
            return cls(read_rows(start.file or "", ids, base.width), ids)
        return cls(start.stored_embeddings(ids), ids)

    def attach(self, base: PreTrainedModel) -> None:
        put_rows(base, self.trained_tokens, self.trainable_tokens)

    def plain(self) -> dict[str, torch.Tensor]:
        return {ROWS: self.trainable_tokens.detach(), INDICES: torch.tensor(self.trained_tokens)}

    @classmethod
    def to_peft(cls, plain: dict[str, torch.Tensor]) -> PeftAdapter:
        ids = plain[INDICES].long().tolist()
        settings = {
            "peft_type": "TRAINABLE_TOKENS",
            INDICES: ids,
            "init_weights": True,
            "target_modules": "{embeddings}",
        }
        return PeftAdapter(None, settings, {"base_model.model.{embeddings}." + DELTA: plain[ROWS]})


def find_ids(options: TrainableTokensOptions, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Raises ValueError that begins with the key."""
    if (options.tokens is None) == (options.token_indices is None):
        raise ValueError("prompt.tokens: trainable_tokens needs either prompt.tokens or prompt.token_indices")
    if options.token_indices is not None:
        key, ids = "token_indices", options.token_indices
    else:
        key, ids = "tokens", [find_id(text, tokenizer) for text in options.tokens or []]
    for number, found in enumerate(ids):
        if found in ids[:number]:
            raise ValueError(f"prompt.{key}: token {found} is listed twice")
    return ids


def find_id(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a text that is one token. Raises ValueError."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    own = tokenizer.get_vocab().get(text)  # as the vocabulary spells it
    if len(ids) != 1 and own is None:
        raise ValueError(
            f"prompt.tokens: {text!r} is {len(ids)} tokens of this base's tokenizer, not one: "
            "add it to the tokenizer, or choose a token that it has"
        )
    return ids[0] if len(ids) == 1 else int(own or 0)


def check_ids(ids: list[int], num_embeddings: int | None) -> None:
    """Raise ValueError for an id without an embedding."""
    for found in ids:
        if found < 0 or (num_embeddings is not None and found >= num_embeddings):
            raise ValueError(f"prompt.token_indices: the base has no token {found}, only {num_embeddings} from 0 on")


def read_rows(source: str, ids: list[int], width: int) -> torch.Tensor:
    """The rows [R, D] of a run or of PEFT's adapter that trained the same tokens. Raises UserError."""
    file = find_prompt_file(source)
    stored = read_tensors(file)
    rows = next((t for name, t in stored.items() if name == ROWS or name.endswith(f".{DELTA}")), None)
    if rows is None:
        raise UserError(f"prompt.init_file: {file} holds no trained tokens, {describe_held(file, stored)}")
    settings = read_adapter_settings(file.parent)
    own = settings.get(INDICES) or stored.get(INDICES, torch.tensor(ids)).long().tolist()
    if own != ids or tuple(rows.shape) != (len(ids), width):
        raise UserError(
            f"prompt.init_file: {file} holds {tuple(rows.shape)} for tokens {own}, this prompt is {(len(ids), width)} "
            f"for {ids}"
        )
    return rows.float()
