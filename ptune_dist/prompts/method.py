"""The interface of a method: how a prompt is parameterized, and what it contributes to a pass.

Shapes: P positions, D width, L layers, G key/value heads, Dh width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.prompts.head_start import HeadStart
from ptune_dist.prompts.layer_tensors import Layers, count_positions
from ptune_dist.prompts.start import Start


class Options(BaseModel):
    """The options of one method, which stand under `prompt:` beside the keys that all methods share."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Stack(NamedTuple):
    """Layers whose attention is of one kind, and the heads of their keys and values."""

    num_layers: int
    num_heads: int
    head_width: int


@dataclass(frozen=True)
class BaseFacts:
    """What a method may need to know of the base. The numbers of attention are None where the base has none."""

    width: int  # of an input embedding
    num_layers: int | None = None
    num_key_value_heads: int | None = None
    head_width: int | None = None  # of a key
    value_width: int | None = None  # of a value; None: as a key's
    # Of each layer, where they differ: the key/value heads, which may be none, and the widths of a key and of a value.
    layer_heads: tuple[tuple[int, int, int], ...] | None = None
    num_embeddings: int | None = None
    model_type: str | None = None
    hidden_size: int | None = None  # of what a layer reads
    num_first_layers: int | None = None  # of the first stack, an encoder's; None where they cannot be run in parts
    # Of an encoder-decoder, of which `num_layers` and the numbers of heads are the decoder's.
    encoder: Stack | None = None


class OwnTargets(NamedTuple):
    """Tokens of a prompt that training predicts too, beside those of each row that is read with it.

    places: of the virtual tokens that they follow. tokens: their ids. weights: of their losses.
    """

    places: list[int]
    tokens: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Contribution:
    """What a prompt adds to a pass; each part may be absent.

    vectors [P, D]: virtual tokens that stand in the sequence. keys, values [L, P, G, Dh], or of each layer [P, G, Dh]
    where they differ: attended to by all positions and read before the sequence; rotary bases take them as already
    rotated. adapters [A, P, D]: tokens of the last A layers that all positions attend to by a softmax of their own, and
    gate [A] what scales the result.

    start_layer: the first layer that any of these are for; the layers below read a row without them, and L counts from
    that layer on. lower_keys, lower_values [M, P, G, Dh]: what the M layers below read before a row; they never change.

    Of an encoder-decoder, `keys` and `values` are those of the decoder's self-attention. encoder_keys, encoder_values:
    of the encoder's. cross_keys, cross_values: of the decoder's attention to the encoder's output.
    """

    vectors: torch.Tensor | None = None
    keys: Layers | None = None
    values: Layers | None = None
    adapters: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    start_layer: int = 0
    lower_keys: Layers | None = None
    lower_values: Layers | None = None
    encoder_keys: Layers | None = None
    encoder_values: Layers | None = None
    cross_keys: Layers | None = None
    cross_values: Layers | None = None

    @property
    def num_vectors(self) -> int:
        return 0 if self.vectors is None else len(self.vectors)

    @property
    def num_adapted(self) -> int:
        """Layers, from the last, that have adapter tokens."""
        return 0 if self.adapters is None else len(self.adapters)

    @property
    def num_prefix(self) -> int:
        return 0 if self.keys is None else count_positions(self.keys)


@dataclass(frozen=True)
class PeftAdapter:
    """What PEFT stores of a prompt: `prompt_embeddings`, entries of adapter_config.json, and more tensors by name.

    An adapter that is no prompt has the latter alone. In their names and in the settings, `{embeddings}` and
    `{attentions_from_last[0]}` stand for names of the base's modules.
    """

    prompt_embeddings: torch.Tensor | None
    settings: dict[str, Any]
    more: dict[str, torch.Tensor] = field(default_factory=dict)


class TrainingDefaults(NamedTuple):
    """How a prompt is trained where the config leaves it out.

    learning_rate: the highest one, for AdamW. source: where it comes from, for the docs. warmup_share: of the steps,
    over which the rate rises.
    """

    learning_rate: float
    source: str
    warmup_share: float = 0.0


def check_start_layer(layer: int, base: BaseFacts, key: str) -> int:
    """The layer, if a prompt can enter there. Raises ValueError that begins with the key."""
    if base.num_first_layers is None:
        raise ValueError(f"{key}: a prompt cannot enter in the middle of this base, whose layers are not a plain stack")
    if not 0 < layer < base.num_first_layers:
        last = base.num_first_layers - 1
        if last < 1:
            raise ValueError(f"{key}: this base has one layer, and a prompt can enter above the first one only")
        choice = f"one from 1 to {last}" if last > 1 else "1"
        raise ValueError(f"{key}: {layer} is not a layer above the first of {base.num_first_layers}: choose {choice}")
    return layer


class Method(nn.Module):
    """One soft prompt. Its parameters are what is trained, in float32; they are checkpointed with its buffers.

    A method is one file: this class with the attributes below, and a line in `prompts.METHODS`.
    """

    options_type: ClassVar[type[Options]] = Options  # its own keys under `prompt:`
    families: ClassVar[tuple[str, ...] | None] = None  # of bases; None: all
    placements: ClassVar[tuple[str, ...] | None] = None  # None: all that the family has, but for `both`
    starts: ClassVar[tuple[str, ...]] = ("vocab", "random", "text", "labels", "file")  # values of prompt.init
    default_start: ClassVar[str] = "vocab"
    has_tasks: ClassVar[bool] = False  # it may have something of its own for each task of the rows
    stands_in_sequence: ClassVar[bool] = True  # False: keys and values only, so nothing can be predicted from it alone

    takes_positions: ClassVar[bool] = True  # False: num_virtual_tokens is 0
    is_gated: ClassVar[bool] = False  # adapter tokens and a gate
    changes_base: ClassVar[bool] = False  # what every member would compute with: no sweeps
    peft_bases: ClassVar[tuple[str, ...] | None] = None  # model types that PEFT has this method for; None: all
    names_modules: ClassVar[bool] = False  # PEFT's adapter has names of the base's modules
    trains_base: ClassVar[bool] = False  # what is trained are copies of the base's own tensors

    of_file: ClassVar[tuple[str, ...]] = ()  # options that the prompt to start from decides where they are left out

    default_training: ClassVar[TrainingDefaults] = TrainingDefaults(1e-3, "that of a method that names none")
    default_training_of: ClassVar[dict[str, TrainingDefaults]] = {}  # where a family needs others

    num_virtual_tokens: int  # positions that the prompt takes
    trained_tokens: Sequence[int] = ()  # tokens whose embeddings are trained
    # Where the start is what the base computes of a text, its token ids; `begin_from` gets what was computed.
    start_tokens: Sequence[int] = ()
    reads_layer: int = 0  # the layer whose input that is; 0: keys and values of all layers
    reads_rows: bool = False  # its vectors depend on what the layers below leave of a row's input: see `of_rows`
    num_tasks: int = 1  # that it has vectors of its own for
    base_start: dict[str, torch.Tensor] | None = None  # what the trained tensors of the base start from; None: its own
    head_start: HeadStart | None = None  # what a trained head starts from, where the prompt starts from a file
    head_note: str = ""  # a line about that

    @classmethod
    def build(cls, options: Any, num_virtual_tokens: int, base: BaseFacts, start: Start) -> "Method":
        """A prompt at its start. Reading the start may raise UserError."""
        raise NotImplementedError

    @classmethod
    def choose_training(cls, options: Any, family: str) -> TrainingDefaults:
        """How a prompt with these options is trained by default over a base of this family."""
        return cls.default_training_of.get(family, cls.default_training)

    @classmethod
    def enters_late(cls, options: Any) -> bool:
        """Whether the lowest layers read rows without the prompt, so that what they leave can be kept."""
        return False

    @classmethod
    def choose_trained(cls, options: Any, base: PreTrainedModel) -> set[str]:
        """Names of the base's parameters that are trained, as float32 copies in their place.

        `base` has no memory yet. Raises ValueError that begins with the key.
        """
        return set()

    def attach(self, base: PreTrainedModel) -> None:
        """Have a base compute with what is trained, for methods that change more than what a pass reads."""

    def forward(self) -> Contribution:
        raise NotImplementedError

    def contributions(self) -> list[Contribution]:
        """What it contributes to rows of each task."""
        return [self()]

    def of_rows(self, rows: list[torch.Tensor]) -> list[Contribution]:
        """What it contributes to each row, from hidden states [T, H] of the row's input before `start_layer`."""
        raise NotImplementedError

    def begin_from(self, *computed: torch.Tensor) -> None:
        """Start from keys and values [L, P, G, Dh] of `start_tokens`, or from hidden states [P, H] of `reads_layer`.

        Where layers differ: from the keys [P, G, Dh] of each layer that has some, and then their values.

        Raises ValueError that begins with the key.
        """
        raise NotImplementedError

    def begin_step(self, step: int) -> None:
        """Called before the passes of optimizer step `step`: for methods whose forward draws random numbers."""

    def settled_options(self) -> dict[str, Any]:
        """What options that a config leaves out have come to. They are stored with the prompt; those `of_file` are put
        into the run's config.
        """
        return {}

    @property
    def own_targets(self) -> OwnTargets | None:
        """What training predicts of the prompt itself, for each row that is read with it."""
        return None

    def plain(self) -> dict[str, torch.Tensor]:
        """The prompt with any reparameterization folded in, by name: what is served and exported."""
        raise NotImplementedError

    def take(self, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This prompt's parameters and buffers by name, from a prompt folder or a checkpoint, which may hold more."""
        return stored

    @classmethod
    def to_peft(cls, plain: dict[str, torch.Tensor]) -> PeftAdapter:
        """A plain prompt in PEFT's format."""
        raise NotImplementedError


class BaseTuning(Method):
    """A method whose trained tensors stand in the base's place: it adds nothing to a pass and takes no positions."""

    placements = ("prefix",)
    starts = ("base", "file")
    default_start = "base"
    stands_in_sequence = False
    takes_positions = False
    changes_base = True
    num_virtual_tokens = 0

    def forward(self) -> Contribution:
        return Contribution()
