"""The reparameterization of prefix tuning (Li & Liang 2021, section 4.3): an MLP makes what is added to the start.

Shapes: L layers, P positions, F of them frozen, G key/value heads, Dh width of a head, E width of the embeddings.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ptune_dist.prompts.layer_tensors import Shape
from ptune_dist.prompts.prefix_options import PrefixOptions
from ptune_dist.prompts.start import Start


class PrefixMLP:
    """The paper's reparameterization with PEFT's names and shapes: an embedding [P - F, E] and a perceptron over it.

    It starts as PEFT's does with `init: random`, and adds nothing to any other start.
    """

    def __init__(self, shapes: list[Shape], num_frozen: int, options: PrefixOptions, start: Start):
        """`shapes`: of the keys and of the values."""
        num_layers, num_positions, num_heads, _ = shapes[0]
        of_keys, of_values = (num_heads * shape[3] for shape in shapes)
        width = of_keys
        hidden = options.encoder_hidden_size or width
        of_layer = of_values + (of_keys if options.train_keys else 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(start.seed)
            self.embedding = nn.Embedding(num_positions - num_frozen, width)
            last = nn.Linear(hidden, num_layers * of_layer)
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), last)
        if start.kind != "random":
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)


def add_output(output: torch.Tensor, starts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The start of the keys and of the values, or of the values alone, with what the MLP makes of each position.

    output: [P - F, L * (numbers of a layer)]. starts: [L, P - F, G, Dh] each.
    """
    by_layer = output.unflatten(1, (len(starts[0]), -1)).transpose(0, 1)  # [L, P - F, numbers of a layer]
    parts = by_layer.split([start[0, 0].numel() for start in starts], dim=2)
    return [start + part.view_as(start) for part, start in zip(parts, starts, strict=True)]
