"""Late prompt tuning (Liu et al. 2022, arXiv:2210.11292): virtual tokens that enter in the middle of the base's layers.

The layers below read a row without them, so they need no gradient, and what they leave of a row is computed once. With
a generator, the virtual tokens depend on what these layers leave.
Shapes: P virtual tokens, H hidden size.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from ptune_dist.config.schema import PLACEMENTS_WITH_CONTEXTS
from ptune_dist.prompts.method import (
    BaseFacts,
    Contribution,
    Method,
    Options,
    PeftAdapter,
    TrainingDefaults,
    check_start_layer,
)
from ptune_dist.prompts.row_generator import HIDDEN_SIZE, RowGenerator
from ptune_dist.prompts.start import NOTHING, Start, random_vectors

VECTORS = "late_tokens"
GENERATOR = "generator."  # of the names of its parameters


class LatePromptOptions(Options):
    """Where the virtual tokens enter."""

    start_layer: int | None = Field(default=None, ge=1)
    """The layer, counted from 0, whose input the virtual tokens stand in. Left out: the middle one, such as layer 12 of
    24, the paper's choice for RoBERTa-large. Of an encoder-decoder, a layer of its encoder."""

    generator: Literal["none", "pooled"] = "none"
    """`pooled`: to the virtual tokens is added what a small network makes of each row's input at `start_layer`: the
    paper's pooling prompt generator."""

    generator_hidden_size: int = Field(default=HIDDEN_SIZE, gt=0)
    """The hidden size of that network."""


class LatePrompt(Method):
    """P trainable vectors of the width of hidden states, and perhaps a generator of what each row adds to them."""

    options_type = LatePromptOptions
    placements = ("prefix", "infix", "template", "encoder")
    starts = ("text", "rows", "random", "file")
    default_start = "rows"
    default_training = TrainingDefaults(0.3, "tried on tiny bases")
    default_training_of = {"encoder": TrainingDefaults(0.01, "on encoders as `prompt_tuning`")}

    def __init__(self, vectors: torch.Tensor, start_layer: int, generator: RowGenerator | None = None):
        super().__init__()
        self.num_virtual_tokens = len(vectors)
        self.start_layer = start_layer
        self.reads_layer = start_layer
        self.late_tokens = nn.Parameter(vectors.detach().float().clone())
        self.generator = generator
        self.reads_rows = generator is not None

    @classmethod
    def build(cls, options: LatePromptOptions, num_virtual_tokens: int, base: BaseFacts, start: Start) -> "LatePrompt":
        layer = choose_layer(options.start_layer, base)
        assert base.hidden_size is not None, "a base with layers has a hidden size"
        check_generator(options, start)
        shape = (num_virtual_tokens, base.hidden_size)
        generator = None
        if options.generator == "pooled":
            generator = RowGenerator(base.hidden_size, options.generator_hidden_size, start.seed)
        if start.kind == "file":
            check_stored_layer(layer, base, start)
            return cls._from_file(shape, layer, generator, start)
        if start.kind == "random":
            return cls(random_vectors(*shape, start.generator), layer, generator)
        prompt = cls(torch.zeros(shape), layer, generator)
        if start.kind != NOTHING:
            prompt.start_tokens = start.tokens(num_virtual_tokens)
        return prompt

    @classmethod
    def _from_file(
        cls, shape: tuple[int, int], layer: int, generator: RowGenerator | None, start: Start
    ) -> "LatePrompt":
        """From a prompt's vectors, and its generator if it has one. Raises UserError, ValueError for another one."""
        if generator is None and start.holds(GENERATOR):
            raise ValueError("prompt.init_file: that prompt has a generator: set prompt.generator=pooled")
        prompt = cls(torch.zeros(shape), layer, generator)
        own = {name: tuple(parameter.shape) for name, parameter in prompt.named_parameters()}
        wanted = own if start.holds(GENERATOR) else {VECTORS: shape}
        prompt.load_state_dict(start.tensors(wanted), strict=False)
        return prompt

    @torch.no_grad()
    def begin_from(self, *computed: torch.Tensor) -> None:
        (hidden,) = computed
        self.late_tokens.copy_(hidden)

    @classmethod
    def enters_late(cls, options: LatePromptOptions) -> bool:
        return True

    def forward(self) -> Contribution:
        return Contribution(vectors=self.late_tokens, start_layer=self.start_layer)

    def of_rows(self, rows: list[torch.Tensor]) -> list[Contribution]:
        assert self.generator is not None, "without a generator all rows get the same"
        vectors = self.late_tokens + self.generator(rows, self.num_virtual_tokens)
        return [Contribution(vectors=own, start_layer=self.start_layer) for own in vectors]

    def settled_options(self) -> dict[str, Any]:
        return {"start_layer": self.start_layer}

    def plain(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @classmethod
    def to_peft(cls, plain: dict[str, torch.Tensor]) -> PeftAdapter:
        raise NotImplementedError("PEFT has no method whose virtual tokens enter at a later layer")


def choose_layer(start_layer: int | None, base: BaseFacts) -> int:
    """The layer that was asked for, or the middle one. Raises ValueError that begins with the key."""
    return check_start_layer(start_layer or middle_layer(base), base, "prompt.start_layer")


def middle_layer(base: BaseFacts) -> int:
    return max(1, (base.num_first_layers or 0) // 2)


def check_stored_layer(layer: int, base: BaseFacts, start: Start) -> None:
    """Raise ValueError where the prompt in `prompt.init_file` is known to enter at another layer. Raises UserError."""
    facts = start.read().facts
    options = facts.get("options", {}) | facts.get("settled_options", {})
    # Older prompts without the option do not say; the middle layer of this base is likely the same one.
    stored = (options["start_layer"] or middle_layer(base)) if "start_layer" in options else layer
    if stored != layer:
        raise ValueError(
            f"prompt.init_file: that prompt enters at layer {stored}, this one at layer {layer}: set "
            f"prompt.start_layer={stored}"
        )


def check_generator(options: LatePromptOptions, start: Start) -> None:
    """Raise ValueError for options that do not fit each other or the placement."""
    if options.generator == "none" and options.generator_hidden_size != HIDDEN_SIZE:
        raise ValueError("prompt.generator_hidden_size is for a generator: set prompt.generator=pooled")
    if options.generator != "none" and start.placement in PLACEMENTS_WITH_CONTEXTS:
        raise ValueError(
            f"prompt.generator: {options.generator} reads whole inputs, which placement {start.placement} keeps as "
            "contexts: use placement prefix"
        )
