"""Residual reparameterization (Razdaibiedina et al. 2023, arXiv:2305.03937): what a network makes of vectors is added.

Its sizes are those of the paper's code. Unlike there the gain of the layer norm starts at zero, so that training begins
at the prompt's own start: with a gain of one, noise of unit variance would hide embeddings, which are much smaller.

Shapes: P virtual tokens, D width, M hidden size, N networks: 1 for all virtual tokens, or P.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from ptune_dist.prompts.method import Options

HIDDEN_SIZE = 800
PREFIX = "residual."  # of the names of its parameters


class ResidualOptions(Options):
    """The options of methods that can be reparameterized."""

    reparameterization: Literal["none", "residual_mlp"] = "none"
    """`residual_mlp`: to each vector is added what a network with one hidden layer makes of it; folded away for serving
    and export."""

    reparameterization_hidden_size: int = Field(default=HIDDEN_SIZE, gt=0)
    """The width of the network's hidden layer."""

    reparameterization_per_token: bool = False
    """Whether each virtual token has a network of its own. `false`: all share one."""

    reparameterization_layer_norm: bool = True
    """Whether a layer norm ends the network."""


class ResidualMlp(nn.Module):
    """x + norm(up(relu(down(x)))) of vectors x [P, D]."""

    def __init__(self, num_vectors: int, width: int, options: ResidualOptions, seed: int):
        """Draws the start from `seed` alone, as torch's linear layers do."""
        super().__init__()
        num = num_vectors if options.reparameterization_per_token else 1
        hidden = options.reparameterization_hidden_size
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, fan_in: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) * fan_in**-0.5)

        self.down = draw(num, width, hidden, fan_in=width)
        self.down_bias = draw(num, 1, hidden, fan_in=width)
        self.up = draw(num, hidden, width, fan_in=hidden)
        self.up_bias = draw(num, 1, width, fan_in=hidden)
        self.has_norm = options.reparameterization_layer_norm
        if self.has_norm:
            self.gain = nn.Parameter(torch.zeros(num, 1, width))
            self.bias = nn.Parameter(torch.zeros(num, 1, width))
        else:  # the same start without a norm
            nn.init.zeros_(self.up)
            nn.init.zeros_(self.up_bias)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """[P, D] -> [P, D]."""
        rows = vectors.reshape(len(self.down), -1, vectors.shape[1])  # [N, P / N, D]
        hidden = torch.baddbmm(self.down_bias, rows, self.down).relu()
        added = torch.baddbmm(self.up_bias, hidden, self.up)
        if self.has_norm:
            added = functional.layer_norm(added, added.shape[-1:]) * self.gain + self.bias
        return vectors + added.reshape(vectors.shape)


def build_residual(num_vectors: int, width: int, options: ResidualOptions, seed: int) -> ResidualMlp | None:
    """None where the options ask for none. Raises ValueError that begins with the key."""
    if options.reparameterization == "residual_mlp":
        return ResidualMlp(num_vectors, width, options, seed)
    for name in ("hidden_size", "per_token", "layer_norm"):
        key = f"reparameterization_{name}"
        if getattr(options, key) != ResidualOptions.model_fields[key].default:
            raise ValueError(
                f"prompt.{key} is given but prompt.reparameterization is none: set "
                "prompt.reparameterization=residual_mlp"
            )
    return None
