"""What a rank computes of a unit, known before anything is computed, so that ranks can have even work."""

from torch import nn

from ptune_dist.base.layers import layer_stacks, parameter_size
from ptune_dist.data.batches import Unit
from ptune_dist.data.examples import Examples
from ptune_dist.model.prompted_model import PromptedModel

FORWARD = 2  # operations of a position for each weight
WITH_BACKWARD = 4  # the base is frozen: backward has no products for gradients of weights


class UnitFlops:
    """Floating-point operations of a unit in training, without attention's scores, the prompts and recomputation."""

    def __init__(self, model: PromptedModel):
        self._starts = [model.start_layers[model.number_of(member)] for member in range(len(model.prompts))]
        first, *others = [[count_weights(layer) for layer in stack] for stack in layer_stacks(model.base)]
        self._below = {start: sum(first[:start]) for start in self._starts}
        self._first = sum(first)
        # An encoder-decoder reads inputs with its first stack and targets with the other.
        self._others = sum(map(sum, others))
        head = model.base.get_output_embeddings()
        self._head = 0 if head is None else count_weights(head)

    def __call__(self, unit: Unit, examples: Examples) -> int:
        """Contexts, and what the layers below later prompts read, are computed once for all members of the unit."""
        example, members = unit
        num_targets = int(examples.num_targets[example])
        num_context = int(examples.num_context[example])
        num_own = int(examples.lengths_of([example])[0]) - num_context - (num_targets if self._others else 0)
        starts = [self._starts[member] for member in members]
        once = num_context * self._first + num_own * sum(self._below[start] for start in set(starts))
        each = num_targets * (self._others + self._head)
        own = sum(num_own * (self._first - self._below[start]) + each for start in starts)
        return FORWARD * once + WITH_BACKWARD * own


def count_weights(module: nn.Module) -> int:
    return sum(map(parameter_size, module.parameters()))
