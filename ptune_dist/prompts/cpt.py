"""Context-aware prompt tuning (Tsachor et al. 2024, arXiv:2410.17222), as in PEFT: examples that move a little.

The virtual tokens are the embeddings of examples, inputs and targets one after another. What is trained is a step away
from them, no longer than a radius for each kind of token; tokens of targets stay. The loss is also on the examples' own
targets, which may weigh less the earlier an example stands.

The kinds of tokens are PEFT's numbers, 4 for each example: 1 the template before an input, 2 the input, 3 the template
after it, 4 the target; the next example has 5 to 8. Shapes: P virtual tokens, D width, C of them in targets.
"""

from collections.abc import Iterable
from itertools import takewhile
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ptune_dist.errors import UserError
from ptune_dist.prompts.method import (
    BaseFacts,
    Contribution,
    Method,
    Options,
    OwnTargets,
    PeftAdapter,
    TrainingDefaults,
)
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.prompts.start import NOTHING, Start

NUM_KINDS = 4
TARGET = 0  # of kinds modulo NUM_KINDS
INPUT = 2
SMALLEST_RADIUS = 1e-10  # of what is not trained, as in PEFT
USUAL_WIDTH = 2048  # the width for which radii are given; they grow with its square root


class CptOptions(Options):
    """PEFT's options under PEFT's names."""

    cpt_token_ids: list[int] | None = None
    """The tokens of the examples, as many as there are virtual tokens. Left out: those of the first training rows."""

    cpt_tokens_type_mask: list[int] | None = None
    """The kind of each token: 1 the template before an input, 2 the input, 3 the template after it, 4 the target; 5 to
    8 for the next example, and so on; 0: none, which stays as it is."""

    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    """`decay`: the targets of an example weigh `opt_loss_decay_factor` times those of the next one; the last example's
    weigh that factor times a row's."""

    opt_loss_decay_factor: float = Field(default=1.0, gt=0, le=1)
    """The factor of `opt_weighted_loss_type: decay`."""

    opt_projection_epsilon: float = Field(default=0.1, gt=0)
    """How far an input's tokens may move, for embeddings of width 2048; it grows with the width's square root."""

    opt_projection_format_epsilon: float = Field(default=0.1, gt=0)
    """The same for tokens of the template."""


class Cpt(Method):
    """Fixed embeddings [P, D] of examples and trained steps [P, D] away from them."""

    options_type = CptOptions
    families = ("causal",)
    placements = ("prefix",)
    starts = ("rows", "file")
    default_start = "rows"
    default_training = TrainingDefaults(1e-3, "tried on tiny bases: steps are short, for they end at a radius")

    embedding: torch.Tensor
    example_ids: torch.Tensor
    example_kinds: torch.Tensor

    def __init__(self, embedding: torch.Tensor, ids: list[int], kinds: list[int], options: CptOptions):
        super().__init__()
        self.num_virtual_tokens = len(embedding)
        self._options = options
        self._targets: list[OwnTargets | None] = []  # the one that belongs to the buffers, once it was asked for
        self.delta = nn.Parameter(torch.zeros_like(embedding, dtype=torch.float32))
        self.register_buffer("embedding", embedding.detach().float().clone())
        self.register_buffer("example_ids", torch.tensor(ids, dtype=torch.int64))
        self.register_buffer("example_kinds", torch.tensor(kinds, dtype=torch.int64))

    @classmethod
    def build(cls, options: CptOptions, num_virtual_tokens: int, base: BaseFacts, start: Start) -> "Cpt":
        check_tokens(options, num_virtual_tokens)
        if start.kind == NOTHING:
            nothing = [0] * num_virtual_tokens
            return cls(torch.zeros(num_virtual_tokens, base.width), nothing, nothing, options)
        if start.kind == "file":
            return cls._from_file(options, (num_virtual_tokens, base.width), start)
        if options.cpt_token_ids is not None:
            ids = options.cpt_token_ids
            check_known(ids, start, "prompt.cpt_token_ids")
            kinds = options.cpt_tokens_type_mask or [INPUT] * len(ids)
        else:
            ids, kinds = join_examples(start.examples(), num_virtual_tokens)
        check_moving(kinds)
        return cls(start.lookup(ids), ids, kinds, options)

    @classmethod
    def _from_file(cls, options: CptOptions, shape: tuple[int, int], start: Start) -> "Cpt":
        """An earlier prompt, or an adapter of PEFT's, which holds the sum of embeddings and steps.

        Raises UserError, ValueError.
        """
        source = start.read()
        vectors = start.vectors(*shape)
        ids = source.settings.get("cpt_token_ids")
        if "delta" in source.tensors:
            ids = source.tensors["example_ids"].tolist()
            kinds = source.tensors["example_kinds"].tolist()
        elif ids:
            kinds = source.settings["cpt_tokens_type_mask"]
        else:
            raise UserError(f"prompt.init_file: {source.file} is not a prompt of cpt, so its examples are unknown")
        for name, given, stored in (
            ("cpt_token_ids", options.cpt_token_ids, ids),
            ("cpt_tokens_type_mask", options.cpt_tokens_type_mask, kinds),
        ):
            if given is not None and given != stored:
                raise UserError(f"prompt.{name}: {source.file} has other ones: leave it out to train that prompt")
        embedding = source.tensors.get("embedding")
        if embedding is None:
            check_known(ids, start, f"prompt.init_file: {source.file}")
            embedding = start.lookup(ids)
        prompt = cls(embedding, ids, kinds, options)
        prompt.delta.data.copy_(source.tensors.get("delta", vectors - prompt.embedding))
        return prompt

    def begin_step(self, step: int) -> None:
        """Project the steps before the passes, as PEFT does, so that the optimizer continues from projected steps."""
        self.delta.data.copy_(self._project())

    def forward(self) -> Contribution:
        delta = self.delta if self.training else self._project()
        is_trained = (self.example_kinds % NUM_KINDS != TARGET)[:, None]
        return Contribution(vectors=self.embedding + delta * is_trained)

    @property
    def own_targets(self) -> OwnTargets | None:
        """The examples' tokens that are supervised."""
        if not self._targets:
            self._targets.append(find_targets(self.example_ids.tolist(), self.example_kinds.tolist(), self._options))
        return self._targets[0]

    def take(self, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self._targets.clear()  # the buffers are about to change
        return stored

    @torch.no_grad()
    def _project(self) -> torch.Tensor:
        """The steps [P, D], none longer than its token's radius."""
        lengths = torch.linalg.vector_norm(self.delta, dim=1)
        radii = self._radii()
        scales = torch.where(lengths > 0, radii / torch.maximum(lengths, radii), 1.0)
        return self.delta * scales[:, None]

    def _radii(self) -> torch.Tensor:
        """[P]."""
        unit = (self.embedding.shape[1] / USUAL_WIDTH) ** 0.5
        kinds = self.example_kinds % NUM_KINDS
        radii = torch.full_like(self.embedding[:, 0], self._options.opt_projection_format_epsilon * unit)
        radii[kinds == INPUT] = self._options.opt_projection_epsilon * unit
        radii[(kinds == TARGET) | (self.example_kinds <= 0)] = SMALLEST_RADIUS
        return radii

    @torch.no_grad()
    def plain(self) -> dict[str, torch.Tensor]:
        was_training = self.training
        vectors = self.eval()().vectors
        self.train(was_training)
        assert vectors is not None
        return {"virtual_tokens": vectors}

    @classmethod
    def to_peft(cls, plain: dict[str, torch.Tensor]) -> PeftAdapter:
        """As an adapter of prompt tuning: it gives the same outputs, and PEFT answers with it."""
        return PromptTuning.to_peft(plain)


def check_tokens(options: CptOptions, num_virtual_tokens: int) -> None:
    """Raise ValueError where given tokens and kinds do not belong together."""
    ids = options.cpt_token_ids
    kinds = options.cpt_tokens_type_mask
    if ids is None and kinds is not None:
        raise ValueError("prompt.cpt_tokens_type_mask is given without prompt.cpt_token_ids")
    if ids is not None and len(ids) != num_virtual_tokens:
        raise ValueError(f"prompt.num_virtual_tokens is {num_virtual_tokens} but prompt.cpt_token_ids has {len(ids)}")
    if kinds is not None and len(kinds) != num_virtual_tokens:
        raise ValueError(f"prompt.cpt_tokens_type_mask has {len(kinds)} numbers for {num_virtual_tokens} tokens")
    if kinds and min(kinds) < 0:
        raise ValueError("prompt.cpt_tokens_type_mask: kinds cannot be negative")
    if options.opt_weighted_loss_type == "none" and options.opt_loss_decay_factor != 1:
        raise ValueError("prompt.opt_loss_decay_factor is for prompt.opt_weighted_loss_type=decay")


def check_known(ids: list[int], start: Start, where: str) -> None:
    """Raise ValueError, which begins with `where`, for an id whose embedding the base lacks."""
    num = start.num_embeddings or len(start.tokenizer)
    unknown = next((number for number in ids if not 0 <= number < num), None)
    if unknown is not None:
        raise ValueError(f"{where}: {unknown} is not a token of the base")


def check_moving(kinds: list[int]) -> None:
    """Raise ValueError where no token would be trained."""
    if not any(kind > 0 and kind % NUM_KINDS != TARGET for kind in kinds):
        raise ValueError(
            f"prompt.num_virtual_tokens: all {len(kinds)} tokens of the examples belong to targets, which are not "
            "trained: set it higher"
        )


def join_examples(examples: Iterable[tuple[list[int], list[int]]], num: int) -> tuple[list[int], list[int]]:
    """Tokens [num] of examples (input, target) and their kinds: the first ones, the earliest of which may be cut.

    What all inputs begin and end with is taken for the template. Raises UserError where there are too few.
    """
    chosen: list[tuple[list[int], list[int]]] = []
    total = 0
    for example in examples:
        chosen.append(example)
        total += len(example[0]) + len(example[1])
        if total >= num:
            break
    if total < num:
        raise UserError(f"prompt.num_virtual_tokens is {num} but the training rows have {total} tokens: set it lower")
    inputs = [example[0] for example in chosen]
    shortest = min(map(len, inputs))
    before = count_same(inputs, shortest) if len(inputs) > 1 else 0
    after = count_same([ids[::-1] for ids in inputs], shortest - before) if len(inputs) > 1 else 0
    ids: list[int] = []
    kinds: list[int] = []
    for number, (own, target) in enumerate(chosen):
        parts = [1] * before + [INPUT] * (len(own) - before - after) + [3] * after + [NUM_KINDS] * len(target)
        ids += own + target
        kinds += [NUM_KINDS * number + part for part in parts]
    return ids[total - num :], kinds[total - num :]


def count_same(rows: list[list[int]], most: int) -> int:
    """How many of the first `most` tokens all rows have in common."""
    columns = list(zip(*rows, strict=False))[:most]
    return len(list(takewhile(lambda column: len(set(column)) == 1, columns)))


def find_targets(ids: list[int], kinds: list[int], options: CptOptions) -> OwnTargets | None:
    """The tokens of targets that a token precedes, with their weights; None where there are none."""
    places = [place for place, kind in enumerate(kinds) if place and kind > 0 and kind % NUM_KINDS == TARGET]
    if not places:
        return None
    factor = options.opt_loss_decay_factor if options.opt_weighted_loss_type == "decay" else 1.0
    # A row's own targets are the last of all; the first token of a prompt is predicted from nothing, but counts here.
    order = sorted({kind for kind in kinds if kind > 0 and kind % NUM_KINDS == TARGET}, reverse=True)
    weights = [factor ** (1 + order.index(kinds[place])) for place in places]
    return OwnTargets([place - 1 for place in places], [ids[place] for place in places], weights)
