"""The base without any prompt, evaluated once: an untrained prompt of random vectors would flatter the gain."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ptune_dist.data.examples import Examples
from ptune_dist.evaluation.evaluator import Evaluator
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.prompts.method import Contribution, Method
from ptune_dist.zero.engine import Engine


class NoPrompt(Method):
    """Contributes nothing to a pass."""

    stands_in_sequence = False
    num_virtual_tokens = 0

    def __init__(self, device: torch.device, num_tasks: int):
        super().__init__()
        self.num_tasks = num_tasks
        self.nothing = nn.Parameter(torch.empty(0, device=device), requires_grad=False)  # tells the model's device

    def forward(self) -> Contribution:
        return Contribution()

    def contributions(self) -> list[Contribution]:
        return [self()] * self.num_tasks


@contextlib.contextmanager
def without_prompt(model: PromptedModel, member: int) -> Iterator[None]:
    """Within the body, the member's rows are read by the base alone."""
    kept = model.prompt(member)
    placement = model.placement
    first = model.number_of(member)
    own = slice(first, first + kept.num_tasks)
    num_vectors = model.num_vectors[own]
    num_prefix = model.num_prefix[own]
    start_layers = model.start_layers[own]
    model.prompts[member] = NoPrompt(model.device, kept.num_tasks).eval()
    model.placement = "prefix"
    model.num_vectors[own] = [0] * kept.num_tasks
    model.num_prefix[own] = [0] * kept.num_tasks
    model.start_layers[own] = [0] * kept.num_tasks
    model.read_prompts()
    try:
        yield
    finally:
        model.prompts[member] = kept
        model.placement = placement
        model.num_vectors[own] = num_vectors
        model.num_prefix[own] = num_prefix
        model.start_layers[own] = start_layers
        model.read_prompts()


def can_read_without_prompt(model: PromptedModel, evaluator: Evaluator) -> bool:
    """Whether the base alone answers: not with a new head, nor where a row has no input to predict from.

    Where the base's own tensors are trained, it is what the evaluation before training shows.
    """
    if any(prompt.changes_base for prompt in model.members()):
        return False
    if not model.writes_text or evaluator.split.rows.kind == "text":
        return False
    return evaluator.split.examples.known.first_empty is None


def join_contexts(examples: Examples) -> Examples:
    """The same inputs without contexts: nothing stands between a context and what follows it."""
    if not examples.known.has_contexts:
        return examples
    facts = replace(examples.known, lead=[], is_lead_whole=False, has_contexts=False)
    return replace(examples, num_context=np.zeros(0, np.int32), facts=facts)


def join_contexts_of(evaluator: Evaluator) -> Evaluator:
    """An evaluator of the same rows, read whole."""
    split = replace(evaluator.split, examples=join_contexts(evaluator.split.examples))
    candidates = evaluator.candidates
    if candidates is not None:
        candidates = replace(candidates, examples=join_contexts(candidates.examples))
    return replace(evaluator, split=split, candidates=candidates)


def evaluate_without_prompt(
    engine: Engine, evaluator: Evaluator, member: str, between_batches: Callable[[], None]
) -> dict[str, float]:
    """The metrics of the base with the template; none where it cannot be read so. Collective."""
    if not can_read_without_prompt(engine.model, evaluator):
        return {}
    with without_prompt(engine.model, engine.members.index(member)):
        return join_contexts_of(evaluator)(engine, [member], between_batches)[member][0]
