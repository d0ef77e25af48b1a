"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): keys and values of every layer that later positions attend to.

They start from what the base itself computes of a text, and the first position may stay as it is (Eyuboglu et al. 2025,
arXiv:2506.06266). Random numbers and the paper's reparameterization are options.
Of an encoder-decoder they are those of the encoder's self-attention, of the decoder's, and of its cross-attention,
whichever the placement has, one stack of layers after another.

Shapes: L layers that are trained, M fixed ones below, P positions, F of them frozen, G key/value heads, Dh width of a
head (of values, another one in some architectures), E width of the MLP's embeddings. Where layers differ in their
heads, L and G of a stored tensor are 1, and Dh is what all its layers have of a position.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from ptune_dist.errors import UserError
from ptune_dist.prompts.layer_tensors import (
    Heads,
    Layers,
    Shape,
    count_positions,
    heads_of,
    join_layers,
    pack,
    packed_shape,
    place,
    unpack,
)
from ptune_dist.prompts.method import (
    BaseFacts,
    Contribution,
    Method,
    Options,
    PeftAdapter,
    Stack,
    TrainingDefaults,
    check_start_layer,
)
from ptune_dist.prompts.peft_prefix import is_adapter, pack_keys_values, read_adapter
from ptune_dist.prompts.stacks import check_stored, heads_of_stacks, split_stacks, stacks_of
from ptune_dist.prompts.start import Start

OF_TEXT = ("text", "rows")  # starts whose first position is that of a text, which attention falls back on
PLAIN = ("prefix_keys", "prefix_values")
LOWER = ("lower_keys", "lower_values")


class PrefixOptions(Options):
    """What is trained of the keys and values, and how."""

    from_layer: int = Field(default=0, ge=0)
    """The first layer, counted from 0, whose keys and values are trained. The layers below it read a row without
    gradient, and what they leave of it can be kept in the context cache."""

    lower_layers: Literal["start", "none"] | None = None
    """What layers below `from_layer` read before a row: the keys and values of the `start`, which stay as they are, or
    `none`. Left out: `start` where that is a text, rows or a file."""

    num_frozen: int | None = Field(default=None, ge=0)
    """The first positions that stay as they start: models attend to the first token of a text when nothing else fits,
    and moving it harms training. Where left out: 1 with `init: text` and `rows`, as many as the prompt of an
    `init_file` has, else 0."""

    train_keys: bool = True
    """`false` trains the values alone."""

    reparameterization: Literal["none", "mlp"] = "none"
    """`mlp`: a trained embedding of each position and an MLP give what is added to the start, as in the paper. It is
    folded away for serving and export."""

    encoder_hidden_size: int | None = Field(default=None, gt=0)
    """The hidden size of `reparameterization: mlp`; the width of a layer's keys where left out."""

    init_rows: int | None = Field(default=None, gt=0)
    """With `init: rows`: the number of training rows to start from; as many as fill the positions where left out."""


class PrefixTuning(Method):
    """Keys and values [L, P, G, Dh] of the layers from `from_layer` on.

    prefix_keys, prefix_values are what is trained of them [L, P - F, G, Dh], frozen_keys, frozen_values the rest. With
    an MLP, and for keys that are not trained, start_keys and start_values hold the start. lower_keys, lower_values
    [M, P, G, Dh]: what the layers below read, if they read something.
    """

    options_type = PrefixOptions
    families = ("causal", "seq2seq", "encoder")
    placements = ("prefix", "infix", "template", "encoder", "decoder", "both")
    starts = ("text", "rows", "random", "zero", "file")
    default_start = "rows"
    default_training = TrainingDefaults(0.01, "a sweep on SmolLM2-135M; 5e-3 in PEFT's comparison on MetaMathQA")
    stands_in_sequence = False

    def __init__(
        self,
        keys: Layers,
        values: Layers,
        *,
        num_frozen: int = 0,
        train_keys: bool = True,
        mlp: "PrefixMLP | None" = None,
        from_layer: int = 0,
        has_lower: bool = False,
        stacks: Mapping[str, Stack] | None = None,
    ):
        """keys, values: of the layers from `from_layer` on, after those below it where it `has_lower`.

        stacks: those of an encoder-decoder, in the order of their layers.
        """
        super().__init__()
        self._stacks = stacks
        self.from_layer = from_layer
        self._has_lower = has_lower
        self.num_virtual_tokens = count_positions(keys)
        self.num_frozen = num_frozen
        self._train_keys = train_keys
        self._is_plain = mlp is None
        self._heads: dict[str, Heads] = {}
        for name, layers, is_trained in (("keys", keys, train_keys), ("values", values, True)):
            num_lower = from_layer if has_lower else 0
            self._heads[f"lower_{name}"] = heads_of(layers[:num_lower])
            self._heads[name] = heads_of(layers[num_lower:])
            if has_lower:
                self.register_buffer(f"lower_{name}", pack(layers[:num_lower]).detach().float().clone())
            whole = pack(layers[num_lower:]).detach().float()
            frozen, own = (part.contiguous().clone() for part in whole.tensor_split([num_frozen], dim=1))
            self.register_buffer(f"frozen_{name}", frozen)
            if is_trained and mlp is None:
                self.register_parameter(f"prefix_{name}", nn.Parameter(own))
            else:
                self.register_buffer(f"start_{name}", own)
        if mlp is not None:
            self.embedding = mlp.embedding
            self.transform = mlp.transform

    @classmethod
    def build(cls, options: PrefixOptions, num_virtual_tokens: int, base: BaseFacts, start: Start) -> "PrefixTuning":
        """Raises ValueError that begins with the key, UserError for a file."""
        stacks = stacks_of(base, start.placement)
        heads = list_heads(base) if stacks is None else (heads_of_stacks(stacks), heads_of_stacks(stacks))
        num_frozen = count_frozen(options, num_virtual_tokens, start)
        check_options(options, start)
        if stacks is not None and options.from_layer:
            raise ValueError("prompt.from_layer is for bases with one stack of layers: an encoder-decoder has several")
        first = options.from_layer and check_start_layer(options.from_layer, base, "prompt.from_layer")
        has_lower = keeps_lower(options, start)
        mlp = None
        if options.reparameterization == "mlp":
            trained = [packed_shape(num_virtual_tokens, some[first:]) for some in heads]
            mlp = PrefixMLP(trained, num_frozen, options, start)
        kept = heads if has_lower else [some[first:] for some in heads]
        layers: dict[str, Any] = {"from_layer": first, "has_lower": has_lower, "stacks": stacks}
        if start.kind == "file":
            return cls._from_file(kept, num_virtual_tokens, num_frozen, options, mlp, start, layers)
        shapes = [packed_shape(num_virtual_tokens, some) for some in kept]
        packed = [torch.zeros(shape) for shape in shapes]
        if start.kind == "random" and mlp is None:
            packed = [torch.randn(shape, generator=start.generator) for shape in shapes]
        keys, values = map(unpack, packed, kept)
        prompt = cls(keys, values, num_frozen=num_frozen, train_keys=options.train_keys, mlp=mlp, **layers)
        if start.kind in OF_TEXT:
            prompt.start_tokens = start.tokens(num_virtual_tokens, options.init_rows)
        return prompt

    @classmethod
    def _from_file(
        cls,
        heads: Sequence[Heads],
        num_positions: int,
        num_frozen: int,
        options: PrefixOptions,
        mlp: "PrefixMLP | None",
        start: Start,
        layers: dict[str, Any],
    ) -> "PrefixTuning":
        """From a prompt's keys and values, or from all that was trained where the file has an MLP of the same shape."""
        if layers["stacks"] is not None:
            check_stored(start.file or "", layers["stacks"])
        if is_adapter(start.file or ""):
            keys, values = read_adapter(start.file or "", num_positions, heads, layers["stacks"])
        else:
            first = layers["from_layer"] if layers["has_lower"] and start.holds("lower_keys") else 0
            parts = {name: some[:first] for name, some in zip(LOWER, heads, strict=True) if first}
            parts |= {name: some[first:] for name, some in zip(PLAIN, heads, strict=True)}
            found = start.tensors({name: packed_shape(num_positions, some) for name, some in parts.items()})
            whole = {name: unpack(found[name], some) for name, some in parts.items()}
            keys, values = (whole[name] for name in PLAIN)
            if first:
                keys, values = (
                    join_layers([*whole[low], *whole[high]]) for low, high in zip(LOWER, PLAIN, strict=True)
                )
        prompt = cls(keys, values, num_frozen=num_frozen, train_keys=options.train_keys, mlp=mlp, **layers)
        wanted = {name: tuple(tensor.shape) for name, tensor in prompt.state_dict().items()}
        stored = start.read().tensors
        if mlp is not None and all(name in stored and stored[name].shape == wanted[name] for name in wanted):
            prompt.load_state_dict(start.tensors(wanted))
        return prompt

    @torch.no_grad()
    def begin_from(self, *computed: torch.Tensor) -> None:
        half = len(computed) // 2
        halves = computed if half == 1 else (computed[:half], computed[half:])
        for name, parts in zip(("keys", "values"), halves, strict=True):
            layers = list(parts)
            heads = self._heads[f"lower_{name}"] + self._heads[name]
            own = layers[-sum(1 for num_heads, _ in heads if num_heads) :]
            wanted = [(self.num_virtual_tokens, *some) for some in heads if some[0]]
            found = [tuple(part.shape) for part in own]
            if found != wanted:
                both = [list(dict.fromkeys(shapes)) for shapes in (wanted, found)]
                raise ValueError(f"prompt.method: prefix_tuning has {name} {both[0]}, the base computes {both[1]}")
            whole = place(own, heads, self.num_virtual_tokens)
            num_lower = len(self._heads[f"lower_{name}"])
            if num_lower:
                self.get_buffer(f"lower_{name}").copy_(pack(whole[:num_lower]))
            frozen, moved = pack(whole[num_lower:]).tensor_split([self.num_frozen], dim=1)
            self.get_buffer(f"frozen_{name}").copy_(frozen)
            self._own(name).copy_(moved)

    def _own(self, name: str) -> torch.Tensor:
        """What is not frozen of the keys or of the values [L, P - F, G, Dh], without what an MLP adds."""
        trained = getattr(self, f"prefix_{name}", None)
        return self.get_buffer(f"start_{name}") if trained is None else trained

    def forward(self) -> Contribution:
        keys, values = self._whole()
        if self._stacks is not None:
            return Contribution(**split_stacks(keys, values, self._stacks))
        return Contribution(
            keys=keys,
            values=values,
            start_layer=self.from_layer,
            **{name: unpack(self.get_buffer(name), self._heads[name]) for name in LOWER if self._has_lower},
        )

    def _whole(self) -> tuple[Layers, Layers]:
        """Keys and values [L, P, G, Dh] of all layers from `from_layer` on."""
        keys = self._own("keys")
        values = self._own("values")
        if not self._is_plain:
            added = self.transform(self.embedding.weight)  # [P - F, L * 2 * G * Dh], or without the keys
            trained = [keys, values] if self._train_keys else [values]
            by_layer = added.unflatten(1, (len(values), -1)).transpose(0, 1)  # [L, P - F, 2 * G * Dh]
            parts = by_layer.split([part[0, 0].numel() for part in trained], dim=2)
            sums = [part + own.view_as(part) for part, own in zip(trained, parts, strict=True)]
            keys = sums[0] if self._train_keys else keys
            values = sums[-1]
        if self.num_frozen:
            keys = torch.cat([self.get_buffer("frozen_keys"), keys], dim=1)
            values = torch.cat([self.get_buffer("frozen_values"), values], dim=1)
        return unpack(keys, self._heads["keys"]), unpack(values, self._heads["values"])

    @torch.no_grad()
    def plain(self) -> dict[str, torch.Tensor]:
        keys, values = self._whole()
        plain = {"prefix_keys": pack(keys).detach(), "prefix_values": pack(values).detach()}
        return plain | {name: self.get_buffer(name) for name in LOWER if self._has_lower}

    def take(self, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A prompt folder has whole keys and values, a checkpoint what is trained of them. Raises UserError."""
        taken = dict(stored)
        for name in ("keys", "values"):
            whole = stored.get(f"prefix_{name}")
            if whole is not None and whole.shape[1] == self.num_virtual_tokens:
                frozen, own = whole.tensor_split([self.num_frozen], dim=1)
                taken |= {f"frozen_{name}": frozen, f"prefix_{name}": own}
        num_stored = taken["frozen_values"].shape[1] if "frozen_values" in taken else self.num_frozen
        if num_stored != self.num_frozen:  # what it started from is gone, or is another
            raise UserError(
                f"prompt.num_frozen: {self.num_frozen} positions stay of this prompt and {num_stored} of the stored "
                f"one: set prompt.num_frozen={num_stored}"
            )
        return taken

    @classmethod
    def to_peft(cls, plain: dict[str, torch.Tensor]) -> PeftAdapter:
        """Of all layers, those below `from_layer` included. Raises UserError where these have none."""
        if "lower_keys" not in plain:
            return PeftAdapter(*pack_keys_values(plain["prefix_keys"], plain["prefix_values"]))
        pairs = zip(LOWER, PLAIN, strict=True)
        return PeftAdapter(*pack_keys_values(*(torch.cat([plain[low], plain[high]]) for low, high in pairs)))

    @classmethod
    def enters_late(cls, options: PrefixOptions) -> bool:
        return options.from_layer > 0


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


def list_heads(base: BaseFacts) -> tuple[Heads, Heads]:
    """Of the keys and of the values. Raises ValueError that begins with the key."""
    if base.layer_heads is not None:
        keys = tuple((num_heads, width) for num_heads, width, _ in base.layer_heads)
        return keys, tuple((num_heads, width) for num_heads, _, width in base.layer_heads)
    if base.num_layers is None or base.num_key_value_heads is None or base.head_width is None:
        raise ValueError("prompt.method: prefix_tuning needs a base whose layers keep keys and values")
    widths = (base.head_width, base.value_width or base.head_width)
    keys, values = (((base.num_key_value_heads, width),) * base.num_layers for width in widths)
    return keys, values


def count_frozen(options: PrefixOptions, num_positions: int, start: Start) -> int:
    """F. Raises ValueError that begins with the key where nothing would be trained."""
    if options.num_frozen is None:
        found = 1 if start.asked in OF_TEXT else 0
        if start.asked == "file":
            found = count_stored(start)
        return min(found, num_positions - 1)
    if options.num_frozen >= num_positions:
        raise ValueError(
            f"prompt.num_frozen: {options.num_frozen} of prompt.num_virtual_tokens={num_positions} leaves nothing to "
            "train"
        )
    return options.num_frozen


def count_stored(start: Start) -> int:
    """The positions that stay of the prompt in `prompt.init_file`. Raises UserError where it is to be read."""
    try:
        source = start.read()
    except UserError:
        if start.kind == "file":
            raise
        return 0  # the prompt is loaded, and what it started from may be gone
    if "frozen_values" in source.tensors:
        return source.tensors["frozen_values"].shape[1]
    return int(source.settings.get("num_frozen_tokens") or 0)


def keeps_lower(options: PrefixOptions, start: Start) -> bool:
    """Whether layers below `from_layer` have the keys and values of the start."""
    if options.from_layer == 0 or options.lower_layers is not None:
        return options.from_layer > 0 and options.lower_layers == "start"
    return start.asked in (*OF_TEXT, "file")


def check_options(options: PrefixOptions, start: Start) -> None:
    """Raise ValueError for options that belong to what was not chosen."""
    if options.lower_layers is not None and options.from_layer == 0:
        raise ValueError("prompt.lower_layers is for layers below prompt.from_layer, which is 0")
    if options.lower_layers == "start" and start.asked in ("random", "zero"):
        raise ValueError(f"prompt.lower_layers: start needs a start from text, rows or a file, not {start.asked}")
    if options.encoder_hidden_size is not None and options.reparameterization != "mlp":
        raise ValueError("prompt.encoder_hidden_size is for the MLP: set prompt.reparameterization=mlp")
    if options.init_rows is not None and start.asked != "rows":
        raise ValueError(f"prompt.init_rows is given but prompt.init is {start.asked}: set prompt.init=rows")
