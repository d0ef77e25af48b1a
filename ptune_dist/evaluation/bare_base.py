"""The base without any prompt, evaluated once: an untrained prompt of random vectors would flatter the gain."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ptune_dist.evaluation.evaluator import Evaluator
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.prompts.method import Contribution, Method
from ptune_dist.zero.engine import Engine


class NoPrompt(Method):
    """Contributes nothing to a pass."""

    stands_in_sequence = False
    num_virtual_tokens = 0

    def __init__(self, device: torch.device):
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0, device=device), requires_grad=False)  # tells the model's device

    def forward(self) -> Contribution:
        return Contribution()


@contextlib.contextmanager
def without_prompt(model: PromptedModel, member: int) -> Iterator[None]:
    """Within the body, the member's rows are read by the base alone."""
    kept = model.prompts[member]
    num_vectors = model.num_vectors[member]
    num_prefix = model.num_prefix[member]
    model.prompts[member] = NoPrompt(model.device).eval()
    model.num_vectors[member] = 0
    model.num_prefix[member] = 0
    try:
        yield
    finally:
        model.prompts[member] = kept
        model.num_vectors[member] = num_vectors
        model.num_prefix[member] = num_prefix


def can_read_without_prompt(model: PromptedModel, evaluator: Evaluator) -> bool:
    """Whether the base alone answers: not with a new head, nor where a row has no input to predict from."""
    examples = evaluator.split.examples
    if not model.writes_text or evaluator.split.rows.kind == "text":
        return False
    return all(len(examples.input_ids(i)) for i in range(len(examples)))


def evaluate_without_prompt(
    engine: Engine, evaluator: Evaluator, member: str, between_batches: Callable[[], None]
) -> dict[str, float]:
    """The metrics of the base with the template; none where it cannot be read so. Collective."""
    if not can_read_without_prompt(engine.model, evaluator):
        return {}
    with without_prompt(engine.model, engine.members.index(member)):
        return evaluator(engine, [member], between_batches)[member][0]
