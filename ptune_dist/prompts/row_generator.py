"""The pooling prompt generator of late prompt tuning (Liu et al. 2022, arXiv:2210.11292, section 4.2).

A small network makes what each row adds to the virtual tokens, from hidden states of the row's input. Sizes and order
(down, average pooling, ReLU, up) are those of the paper's code. Unlike there the hidden states are normalized first,
since those of a first token can be a thousand times larger than others; the network starts by adding nothing, so that
training begins at the prompt's own start; and its output is divided by M, so that one learning rate suits it and the
virtual tokens themselves.

Shapes: T tokens of an input, P virtual tokens, H hidden size, M hidden size of the network.
"""

import torch
from torch import nn
from torch.nn import functional

HIDDEN_SIZE = 256


class RowGenerator(nn.Module):
    """up(relu(pool(down(norm(x))))) / M of hidden states x [T, H]: P vectors, each from its share of the tokens."""

    def __init__(self, width: int, hidden_size: int, seed: int):
        """Draws the start from `seed` alone, as torch's linear layers do."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) * width**-0.5)

        self.down = draw(width, hidden_size)
        self.down_bias = draw(hidden_size)
        self.up = nn.Parameter(torch.zeros(hidden_size, width))

    def forward(self, rows: list[torch.Tensor], num_vectors: int) -> torch.Tensor:
        """[T, H] of each of R rows -> [R, P, H]."""
        hidden = torch.cat(rows).float()
        narrow = functional.layer_norm(hidden, hidden.shape[-1:]) @ self.down + self.down_bias
        parts = narrow.split([len(row) for row in rows])
        pooled = torch.stack([pooling(len(part), num_vectors).to(part.device) @ part for part in parts])
        return pooled.relu() @ self.up / len(self.up)


def pooling(num_tokens: int, num_vectors: int) -> torch.Tensor:
    """[P, T]: the weights of tokens in vectors, those of torch's adaptive average pooling; 0 where there are no tokens.

    As a matrix, because that pooling's backward adds in any order on CUDA.
    """
    weights = torch.zeros(num_vectors, num_tokens)
    for number in range(num_vectors if num_tokens else 0):
        first = number * num_tokens // num_vectors
        end = -(-(number + 1) * num_tokens // num_vectors)
        weights[number, first:end] = 1 / (end - first)
    return weights
