"""Adaption prompts (LLaMA-Adapter, Zhang et al. 2023, arXiv:2303.16199): gated adapter tokens in the upper layers.

Each of these layers has tokens of its own, to which all positions attend by a softmax of their own; the gate that
scales the result starts at zero, so training starts from the base itself. Parameters start as PEFT's do.
Shapes: A adapted layers, P adapter tokens, C width of the base.
"""

import re

import torch
from pydantic import Field
from torch import nn

from ptune_dist.errors import UserError
from ptune_dist.prompts.method import BaseFacts, Contribution, Method, Options, PeftAdapter, TrainingDefaults
from ptune_dist.prompts.start import NOTHING, Start, describe_held, find_prompt_file, read_tensors

TOKENS = "adaption_prompt"
GATE = "adaption_gate"
BASES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")  # their layers' projections are known
PEFT_BASES = ("llama", "mistral", "gpt2")
NUM_LOWER = 2  # layers without adapter tokens where `adapter_layers` is left out: 30 of 32 in the paper


class AdaptionPromptOptions(Options):
    """PEFT's options under PEFT's names."""

    adapter_len: int = Field(default=10, gt=0)
    """Adapter tokens in each adapted layer."""

    adapter_layers: int | None = Field(default=None, gt=0)
    """How many layers are adapted, counted from the last. Where left out, all but the first two."""


class AdaptionPrompt(Method):
    """Adapter tokens [A, P, C] and gates [A]."""

    options_type = AdaptionPromptOptions
    families = ("causal",)
    placements = ("prefix",)
    starts = ("random", "file")
    default_start = "random"
    default_training = TrainingDefaults(9e-3, "Zhang et al. 2023; 5e-3 in PEFT's comparison on MetaMathQA")
    stands_in_sequence = False
    takes_positions = False
    is_gated = True
    names_modules = True
    peft_bases = PEFT_BASES
    num_virtual_tokens = 0

    def __init__(self, tokens: torch.Tensor, gate: torch.Tensor):
        super().__init__()
        self.adaption_prompt = nn.Parameter(tokens.detach().float().clone())
        self.adaption_gate = nn.Parameter(gate.detach().float().clone())

    @classmethod
    def build(
        cls, options: AdaptionPromptOptions, num_virtual_tokens: int, base: BaseFacts, start: Start
    ) -> "AdaptionPrompt":
        if base.model_type not in BASES or base.num_layers is None:
            known = ", ".join(BASES)
            raise ValueError(f"prompt.method: adaption_prompt is for {known} bases, this is {base.model_type}")
        number = options.adapter_layers or max(1, base.num_layers - NUM_LOWER)
        if number > base.num_layers:
            raise ValueError(f"prompt.adapter_layers: {number} is more than the base has, {base.num_layers}")
        shape = (number, options.adapter_len, base.width)
        if start.kind == "file":
            return cls(*read_adapter(start.file or "", shape))
        tokens = torch.zeros(shape) if start.kind == NOTHING else torch.randn(shape, generator=start.generator)
        return cls(tokens, torch.zeros(number))

    def forward(self) -> Contribution:
        return Contribution(adapters=self.adaption_prompt, gate=self.adaption_gate)

    def plain(self) -> dict[str, torch.Tensor]:
        return {TOKENS: self.adaption_prompt.detach(), GATE: self.adaption_gate.detach()}

    @classmethod
    def to_peft(cls, plain: dict[str, torch.Tensor]) -> PeftAdapter:
        number, length, _ = plain[TOKENS].shape
        settings = {"peft_type": "ADAPTION_PROMPT", "adapter_len": length, "adapter_layers": number}
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(number):
            module = f"base_model.model.{{attentions_from_last[{number - 1 - layer}]}}"
            tensors[f"{module}.{TOKENS}"] = plain[TOKENS][layer][None]
            tensors[f"{module}.{GATE}"] = plain[GATE][layer][None]
        return PeftAdapter(None, settings, tensors)


def read_adapter(source: str, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and gates of a run or of PEFT's adapter. Raises UserError."""
    file = find_prompt_file(source)
    stored = read_tensors(file)
    if TOKENS in stored and GATE in stored:
        tokens, gate = stored[TOKENS], stored[GATE]
    else:
        names = sorted((name for name in stored if name.endswith(f".{TOKENS}")), key=layer_in)
        if not names:
            raise UserError(f"prompt.init_file: {file} holds no {TOKENS}, {describe_held(file, stored)}")
        tokens = torch.cat([stored[name] for name in names])
        gate = torch.cat([stored[name.removesuffix(TOKENS) + GATE] for name in names])
    if tuple(tokens.shape) != shape:
        raise UserError(
            f"prompt.init_file: {file} holds {tuple(tokens.shape)}, this prompt is "
            f"(adapter_layers, adapter_len, width) = {shape}"
        )
    return tokens, gate


def layer_in(name: str) -> int:
    """The number of the layer that a tensor's name has."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0
