"""Trained rows in place of some of a base's token embeddings, and of a head that is tied to them.

The base's own tensors stay as they are: its modules compute with them, and what belongs to the trained tokens is put in
afterwards. So it makes no difference how the base is stored. Shapes: R trained tokens, D width, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel

from ptune_dist.base.quantized import QuantizedWeight
from ptune_dist.base.trained import change_class
from ptune_dist.errors import UserError

ROWS = "own_rows"  # of a head: the trained rows that it computes with


class Places:
    """Which row stands for a token: tables on the device that asks."""

    def __init__(self, token_ids: Sequence[int], num_embeddings: int):
        self.num_rows = len(token_ids)
        self._ids = torch.tensor(token_ids)
        self._table = torch.full((num_embeddings,), self.num_rows)
        self._table[self._ids] = torch.arange(self.num_rows)

    def ids(self, device: torch.device) -> torch.Tensor:
        """[R]."""
        self._ids = self._ids.to(device)
        return self._ids

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The number of each token's row; R for a token that has none."""
        self._table = self._table.to(ids.device)
        return self._table[ids]


def put_rows(base: PreTrainedModel, token_ids: Sequence[int], rows: nn.Parameter) -> None:
    """Have a base compute with `rows` [R, D] for these tokens, wherever its input embeddings are used.

    Raises UserError for embeddings that are more than a table.
    """
    tokens = cast(Any, base.get_input_embeddings())
    if {name for name, _ in tokens.named_parameters()} - {"weight", "scales"}:
        raise UserError(f"prompt.method: trainable_tokens is not for {base.config.model_type} models' embeddings")
    places = Places(token_ids, tokens.num_embeddings)
    shared = tokens.weight
    for module in list(base.modules()):
        if getattr(module, "weight", None) is not shared:
            continue
        if hasattr(module, "embedding_dim"):
            put_in_embedding(module, places, rows)
        else:
            module.__dict__[ROWS] = rows
            put_in_head(module, places, rows)


def put_in_embedding(module: nn.Module, places: Places, rows: nn.Parameter) -> None:
    forward = type(module).forward
    vectors_of = vectors_by_module(module, places.num_rows)

    def run(self: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        found = forward(self, ids)
        vectors = vectors_of(rows).to(found.dtype)
        own = places.rows(ids)
        padded = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])
        return torch.where((own < places.num_rows)[..., None], embedding(own, padded), found)

    change_class(module, {"forward": run})


def vectors_by_module(module: nn.Module, num_rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What an embedding would give for its rows [R, D]: Gemma's scales them."""
    if isinstance(module, QuantizedWeight):
        return lambda rows: rows
    few = cast(Any, copy.copy(module))
    few._parameters = {}
    few.num_embeddings = num_rows
    few.padding_idx = None
    forward = type(module).forward

    def run(rows: torch.Tensor) -> torch.Tensor:
        few.__dict__["weight"] = rows
        try:
            return forward(few, torch.arange(num_rows, device=rows.device))
        finally:
            del few.__dict__["weight"]

    return run


def put_in_head(module: nn.Module, places: Places, rows: nn.Parameter) -> None:
    forward = type(module).forward

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        found = forward(self, x)
        ids = places.ids(x.device)
        bias = getattr(self, "bias", None)
        own = linear(x, rows.to(x.dtype), None if bias is None else bias[ids])
        return found.index_copy(-1, ids, own.to(found.dtype))

    change_class(module, {"forward": run})
