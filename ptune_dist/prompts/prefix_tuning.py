"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): keys and values of every layer that all positions attend to.

They are trained directly, without the paper's reparameterization, and start as PEFT's do.
Shapes: L layers, P positions, G key/value heads, Dh width of a head.
"""

import torch
from pydantic import Field
from torch import nn

from ptune_dist.prompts.method import BaseFacts, Contribution, Method, Options, PeftAdapter, check_start_layer
from ptune_dist.prompts.start import Start


class PrefixTuningOptions(Options):
    """Which layers have a prefix."""

    from_layer: int = Field(default=0, ge=0)
    """The first layer that has trained keys and values. The layers below read a row without them and without gradient;
    what they leave of it can be kept in the context cache."""


class PrefixTuning(Method):
    """Keys and values [L, P, G, Dh] of the L layers from `from_layer` on."""

    options_type = PrefixTuningOptions
    families = ("causal",)
    placements = ("prefix",)
    starts = ("random", "file")
    default_start = "random"
    stands_in_sequence = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, from_layer: int = 0):
        super().__init__()
        self.from_layer = from_layer
        self.num_virtual_tokens = keys.shape[1]
        self.prefix_keys = nn.Parameter(keys.detach().float().clone())
        self.prefix_values = nn.Parameter(values.detach().float().clone())

    @classmethod
    def build(
        cls, options: PrefixTuningOptions, num_virtual_tokens: int, base: BaseFacts, start: Start
    ) -> "PrefixTuning":
        if base.num_layers is None or base.num_key_value_heads is None or base.head_width is None:
            raise ValueError("prompt.method: prefix_tuning needs a base with attention of one width in every layer")
        first = options.from_layer and check_start_layer(options.from_layer, base, "prompt.from_layer")
        shape = (base.num_layers - first, num_virtual_tokens, base.num_key_value_heads, base.head_width)
        if start.kind == "file":
            found = start.tensors({"prefix_keys": shape, "prefix_values": shape})
            return cls(found["prefix_keys"], found["prefix_values"], first)
        keys = torch.randn(shape, generator=start.generator)
        return cls(keys, torch.randn(shape, generator=start.generator), first)

    @classmethod
    def enters_late(cls, options: PrefixTuningOptions) -> bool:
        return options.from_layer > 0

    def forward(self) -> Contribution:
        return Contribution(keys=self.prefix_keys, values=self.prefix_values, start_layer=self.from_layer)

    def plain(self) -> dict[str, torch.Tensor]:
        return {"prefix_keys": self.prefix_keys.detach(), "prefix_values": self.prefix_values.detach()}

    @classmethod
    def to_peft(cls, plain: dict[str, torch.Tensor]) -> PeftAdapter:
        """PEFT's layout: for each position the keys and values of layer after layer, [P, L * 2 * G * Dh]."""
        both = torch.stack([plain["prefix_keys"], plain["prefix_values"]], dim=1)  # [L, 2, P, G, Dh]
        num_layers, _, num_positions, num_heads, head_width = both.shape
        settings = {
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": False,
            "encoder_hidden_size": None,
            "token_dim": num_heads * head_width,
            "num_attention_heads": num_heads,
            "num_layers": num_layers,
        }
        return PeftAdapter(both.permute(2, 0, 1, 3, 4).reshape(num_positions, -1), settings)
