"""Rows of answers in progress, over an encoder-decoder.

A decoder counts positions for the whole batch, so rows begin together; those that are finished leave, and the batch
shrinks. The encoder reads all rows of a batch at once, and its keys and values are kept.

Shapes: S rows of the batch, n rows in progress, T tokens of an input, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from ptune_dist.data.batches import Batch
from ptune_dist.model.encoder_output import EncoderOutput
from ptune_dist.model.members import vectors_of
from ptune_dist.model.passes import Supervised
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.model.seq2seq_prefix import open_cache, prefixes_of
from ptune_dist.prompts.stacks import CROSS, DECODER

KEPT_SHARE = 0.75  # the batch shrinks where so few of its rows or fewer are in progress


Encode = Callable[[Batch, list[int]], tuple[torch.Tensor, torch.Tensor]]


class State(NamedTuple):
    """A batch: the encoder's output [S, T, D], its mask [S, T], and the decoder's keys and values."""

    hidden: torch.Tensor
    mask: torch.Tensor
    cache: EncoderDecoderCache

    def select(self, rows: torch.Tensor) -> "State":
        """Some of the rows, and no more positions of the encoder's output than they have."""
        mask = self.mask[rows]
        longest = int(mask.sum(dim=1).max())
        self.cache.batch_select_indices(rows)
        for layer in cast(list[DynamicLayer], self.cache.cross_attention_cache.layers):
            assert layer.keys is not None and layer.values is not None
            layer.keys = layer.keys[:, :, :longest]
            layer.values = layer.values[:, :, :longest]
        return State(self.hidden[rows, :longest], mask[:, :longest], self.cache)


class Seq2SeqDecoder:
    """`model.decode.Decoder` over an encoder and a decoder."""

    enters_any_time = False
    shares_beginnings = False
    takes_contexts = True
    held_per_position = 1

    def __init__(self, model: PromptedModel, encode: Encode, number: int):
        """`encode`: what the encoder leaves of a batch's readers, each with a contribution, and its mask.

        `number`: of the contribution that all rows are read with.
        """
        self._model = model
        self._encode = encode
        self._number = number
        self._state: State | None = None
        self._places: list[int] = []  # in the batch, of the rows in progress
        self._fresh: State | None = None  # rows whose inputs were read in the last pass
        self.needs_contexts = model.placement == "decoder"

    def own_length(self, context: np.ndarray, rest: np.ndarray) -> int:
        return len(context) + len(rest) + self._model.num_virtual(self._number)

    def start(self, batch: Batch) -> None:
        raise NotImplementedError("every input is encoded whole")

    def run(self, tokens: list[int], new: Batch, *, is_any_new: bool, is_new: bool) -> torch.Tensor:
        encoded = self._encode(new, [self._number] * len(new.rests)) if is_any_new else None
        if is_new:
            assert encoded is not None and not tokens, "rows begin together"
            self._fresh = self._open_state(*encoded)
            return self._decode(self._fresh, self._first_vectors(len(new.rests)))
        if not tokens:  # for a pass that only other ranks need
            width = self._model.base.config.get_text_config(decoder=True).hidden_size
            ones = torch.ones(1, 1, device=self._model.device)
            like = self._embed(np.zeros(1, np.int64))
            state = State(like.new_zeros(1, 1, width), ones, EncoderDecoderCache(DynamicCache(), DynamicCache()))
            return self._decode(state, like[:, None])
        self._shrink()
        assert self._state is not None
        written = np.zeros(len(self._state.mask), np.int64)
        written[self._places] = tokens
        return self._decode(self._state, self._embed(written)[:, None])[self._places]

    def settle(self, leaving: list[int], entering: list[int], needs: list[int]) -> list[int]:
        if self._fresh is not None:
            self._state = self._fresh
            self._fresh = None
            self._places = list(entering)
            return self._places.copy()
        order = [row for row in range(len(self._places)) if row not in leaving]
        self._places = [self._places[row] for row in order]
        return order

    def _open_state(self, hidden: torch.Tensor, mask: torch.Tensor) -> State:
        """Rows that a decoder has read nothing of but the prompt's own keys and values, which stand first."""
        members = [self._number] * len(mask)
        contributions = self._model.contributions()
        own = prefixes_of(DECODER, members, contributions, hidden)
        cross = prefixes_of(CROSS, members, contributions, hidden)
        caches = [DynamicCache() if prefixes is None else prefixes.cache() for prefixes in (own, cross)]
        return State(hidden, mask if cross is None else cross.before(mask), open_cache(*caches))

    def _first_vectors(self, num_rows: int) -> torch.Tensor:
        """The start token, after the virtual tokens where the decoder reads them: [S, P + 1, D]."""
        start = self._embed(np.array([self._model.base.config.decoder_start_token_id]))
        if self._model.placement == "decoder":
            start = torch.cat([vectors_of(self._model.contributions()[self._number], start), start])
        return start.expand(num_rows, -1, -1)

    def _embed(self, tokens: np.ndarray) -> torch.Tensor:
        return self._model.embed_tokens(tokens, self._model.base.get_decoder().get_input_embeddings())

    def _decode(self, state: State, vectors: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] after the last of vectors [S, P, D], which the decoder reads after those before."""
        assert self._model.head is not None
        rows = torch.arange(len(vectors), device=vectors.device)
        inputs = {
            "encoder_outputs": EncoderOutput(state.hidden),
            "attention_mask": state.mask,
            "decoder_inputs_embeds": vectors,
            "past_key_values": state.cache,
        }
        places = torch.full_like(rows, vectors.shape[1] - 1)
        return self._model.head.logits(Supervised(rows, places, rows, np.arange(len(rows)), inputs))

    def _shrink(self) -> None:
        """Leave rows behind that are finished."""
        assert self._state is not None
        if len(self._places) <= KEPT_SHARE * len(self._state.mask):
            index = torch.tensor(self._places, device=self._state.mask.device)
            self._state = self._state.select(index)
            self._places = list(range(len(index)))
