"""Whether a base takes the keys and values of a prompt as those that it computes itself: parts of `base_check`."""

import numpy as np
import torch
from torch import nn

from ptune_dist.base.layers import layer_stacks
from ptune_dist.data.batches import Batch
from ptune_dist.errors import UserError
from ptune_dist.model.keys_values import KeysValues
from ptune_dist.model.members import contributions_in_eval
from ptune_dist.model.passes import Contexts
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.model.seq2seq_prefix import keys_values_of as keys_values_of_stack
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.layer_tensors import Heads, heads_of
from ptune_dist.prompts.method import Contribution, Method
from ptune_dist.prompts.stacks import ENCODER, FIELDS, STACKS


def check_stacks(
    model: PromptedModel, contributions: list[Contribution], virtual: np.ndarray, pad_id: int, placement: str
) -> None:
    """Raise UserError where an encoder-decoder computes keys and values of other sizes than a prompt's."""
    for contribution in contributions:
        parts = [keys_values_of_stack(contribution, stack) for stack in STACKS[placement]]
        found = [part for part in parts if part is not None]
        if found:
            computed = KeysValues.of(model.read_start(Contexts([virtual], pad_id)))
            layers = [pair for part in found for pair in zip(*part, strict=True)]
            check_prefix(KeysValues.of_layers(layers), 0, computed, model)


def check_prefix(prefix: KeysValues | None, start: int, held: KeysValues, model: PromptedModel) -> None:
    """Raise UserError where a base's layers keep keys and values [L, C, G, D] of other sizes than a prompt's.

    start: the layer that the prompt's begin with.
    """
    if prefix is None:
        return
    kind = model.base.config.model_type
    sizes = [heads_of(part[start:]) for part in held]
    own = [heads_of(part) for part in prefix]
    if sizes != own:
        raise UserError(
            f"prompt.method: prefix_tuning has keys and values of {describe_sizes(own)}, and {kind} models keep "
            f"{describe_sizes(sizes)}: choose another method"
        )


def describe_sizes(sizes: list[Heads]) -> str:
    """Layers, heads, and widths of a key and of a value; several of each where layers differ."""
    keys, values = sizes
    columns = ([n for n, _ in keys], [width for _, width in keys], [width for _, width in values])
    num_heads, width, value_width = ("/".join(map(str, dict.fromkeys(column))) for column in columns)
    return f"{len(keys)} layers x {num_heads} heads x {width} and {value_width} numbers"


def use_prompt(model: PromptedModel, prompt: Method, placement: str) -> None:
    """The model with one other prompt, which enters at the first layer."""
    (contribution,) = contributions_in_eval([prompt])
    model.prompts = nn.ModuleList([prompt])
    model.num_vectors = [contribution.num_vectors]
    model.num_prefix = [contribution.num_prefix]
    model.start_layers = [0]
    model.placement = placement
    model.objective = CrossEntropy()


def run_after_keys(
    model: PromptedModel, virtual: np.ndarray, target: np.ndarray, pad_id: int, placement: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a decoder after keys and values that were computed of tokens, and where it writes these tokens first.

    The input is these tokens too. So keys and values of the encoder's output, given before those of the same output,
    change nothing. Leaves the model with a prompt of its own.
    """
    stacks = [name for name in STACKS[placement] if name != ENCODER]
    model.placement = placement
    computed = KeysValues.of(model.read_start(Contexts([virtual], pad_id)))
    each = len(layer_stacks(model.base)[1])
    parts = [computed.keys[-each * len(stacks) :], computed.values[-each * len(stacks) :]]
    given = {
        FIELDS[name] + kind: part[number * each : (number + 1) * each]
        for kind, part in zip(("keys", "values"), parts, strict=True)
        for number, name in enumerate(stacks)
    }
    start = model.base.config.decoder_start_token_id
    use_prompt(model, Fixed(Contribution(**given), model.device), "decoder")
    nothing = np.zeros(0, np.int32)
    batch = Batch([virtual], [nothing], [target], [(0, 0)], pad_id)
    held = model.read_contexts(Contexts(batch.contexts, batch.pad_id))
    ours = model.outputs(batch.with_held([(some[0],) for some in held]))
    written = np.concatenate([[start], virtual[:-1]])
    return ours, model.plain_outputs(batch, written)


class Fixed(Method):
    """Contributes what it is given."""

    num_virtual_tokens = 0

    def __init__(self, contribution: Contribution, device: torch.device):
        super().__init__()
        self._contribution = contribution
        self.nothing = nn.Parameter(torch.empty(0, device=device), requires_grad=False)  # tells the model's device

    def forward(self) -> Contribution:
        return self._contribution
