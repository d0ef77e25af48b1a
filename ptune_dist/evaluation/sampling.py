"""Sampling in which every row has a generator of its own, so that its tokens depend on no other row.

A token is drawn as the largest of scores plus Gumbel noise, which picks each token with its probability (Gumbel, 1954;
Maddison et al., 2014, arXiv:1411.0030); that of transformers draws from one generator for all rows of a batch.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

TOP_K = 50  # where it is left out, as in transformers


class GumbelNoise(LogitsProcessor):
    """Adds to the scores of each row noise from the row's own generator."""

    def __init__(self, seed: int, rows: Sequence[int], device: torch.device):
        """`rows` are the numbers, among all rows, of those whose scores come; they may be changed from call to call."""
        self.rows = rows
        self._seed = seed
        self._device = device
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[B, V] in float64: in float32 the noise is too coarse for tokens of small probability."""
        noise = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
        for into, row in zip(noise, self.rows, strict=True):
            if row not in self._generators:
                self._generators[row] = torch.Generator(self._device).manual_seed(seed_of_row(self._seed, row))
            into.exponential_(generator=self._generators[row])
        return scores.double() - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()


def seed_of_row(seed: int, row: int) -> int:
    return int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0])


def build_sampler(
    sampling: dict[str, Any] | None, seed: int, rows: Sequence[int], device: torch.device
) -> LogitsProcessorList | None:
    """What makes the likeliest token a sampled one; None for greedy answers. `sampling` has transformers' names."""
    if sampling is None:
        return None
    processors = LogitsProcessorList()
    if sampling.get("temperature", 1.0) != 1.0:
        processors.append(TemperatureLogitsWarper(sampling["temperature"]))
    processors.append(TopKLogitsWarper(sampling.get("top_k", TOP_K)))
    if sampling.get("top_p", 1.0) < 1.0:
        processors.append(TopPLogitsWarper(sampling["top_p"]))
    processors.append(GumbelNoise(seed, rows, device))
    return processors


class Chooser:
    """The next token of rows that come and go: the likeliest, or a sampled one."""

    def __init__(self, sampling: dict[str, Any] | None, seed: int, device: torch.device):
        self._processors = build_sampler(sampling, seed, [], device)

    def choose(self, logits: torch.Tensor, rows: Sequence[int]) -> list[int]:
        """Token ids for logits [B, V] of rows, which are known by their numbers among all rows."""
        scores = logits.float()
        if self._processors is not None:
            noise = self._processors[-1]
            assert isinstance(noise, GumbelNoise)
            noise.rows = rows
            no_ids = torch.zeros(len(rows), 0, dtype=torch.long, device=scores.device)
            scores = self._processors(cast(torch.LongTensor, no_ids), cast(torch.FloatTensor, scores))
        return scores.argmax(dim=-1).tolist()
