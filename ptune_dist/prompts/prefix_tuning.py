"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): keys and values of every layer that later positions attend to.

They start from what the base itself computes of a text, and the first position may stay as it is (Eyuboglu et al. 2025,
arXiv:2506.06266). Random numbers and the paper's reparameterization are options.
Of an encoder-decoder they are those of the encoder's self-attention, of the decoder's, and of its cross-attention,
whichever the placement has, one stack of layers after another.

Shapes: L layers that are trained, M fixed ones below, P positions, F of them frozen, G key/value heads, Dh width of a
head (of values, another one in some architectures), E width of the MLP's embeddings. Where layers differ in their
heads, L and G of a stored tensor are 1, and Dh is what all its layers have of a position.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ptune_dist.errors import UserError
from ptune_dist.prompts.layer_tensors import (
    Heads,
    Layers,
    count_positions,
    heads_of,
    pack,
    packed_shape,
    place,
    unpack,
)
from ptune_dist.prompts.method import (
    BaseFacts,
    Contribution,
    Method,
    PeftAdapter,
    Stack,
    TrainingDefaults,
    check_start_layer,
)
from ptune_dist.prompts.peft_prefix import pack_keys_values
from ptune_dist.prompts.prefix_file import LOWER, PLAIN, read_layers
from ptune_dist.prompts.prefix_mlp import PrefixMLP, add_output
from ptune_dist.prompts.prefix_options import OF_TEXT, PrefixOptions, check_options, count_frozen, keeps_lower
from ptune_dist.prompts.stacks import heads_of_stacks, split_stacks, stacks_of
from ptune_dist.prompts.start import Start


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
    of_file = ("num_frozen", "lower_layers")

    def __init__(
        self,
        keys: Layers,
        values: Layers,
        *,
        num_frozen: int = 0,
        train_keys: bool = True,
        mlp: PrefixMLP | None = None,
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
        settled: dict[str, Any] = {
            "num_frozen": num_frozen,
            "train_keys": options.train_keys,
            "from_layer": first,
            "has_lower": has_lower,
            "stacks": stacks,
        }
        mlp = None
        if options.reparameterization == "mlp":
            trained = [packed_shape(num_virtual_tokens, some[first:]) for some in heads]
            mlp = PrefixMLP(trained, num_frozen, options, start)
        lowest = 0 if has_lower else first
        if start.kind == "file":
            keys, values = read_layers(start, num_virtual_tokens, heads, lowest, stacks)
            prompt = cls(keys, values, mlp=mlp, **settled)
            if mlp is not None:
                prompt._take_mlp(start)
            return prompt
        kept = [some[lowest:] for some in heads]
        shapes = [packed_shape(num_virtual_tokens, some) for some in kept]
        packed = [torch.zeros(shape) for shape in shapes]
        if start.kind == "random" and mlp is None:
            packed = [torch.randn(shape, generator=start.generator) for shape in shapes]
        keys, values = map(unpack, packed, kept)
        prompt = cls(keys, values, mlp=mlp, **settled)
        if start.kind in OF_TEXT:
            prompt.start_tokens = start.tokens(num_virtual_tokens, options.init_rows)
        return prompt

    def _take_mlp(self, start: Start) -> None:
        """Continue with all that was trained, where the file has an MLP of the same shape. Raises UserError."""
        wanted = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        stored = start.read().tensors
        if all(name in stored and stored[name].shape == shape for name, shape in wanted.items()):
            self.load_state_dict(start.tensors(wanted))

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
            fields: dict[str, Any] = split_stacks(keys, values, self._stacks)
            return Contribution(**fields)
        found = Contribution(keys=keys, values=values, start_layer=self.from_layer)
        if not self._has_lower:
            return found
        lower_keys, lower_values = (unpack(self.get_buffer(name), self._heads[name]) for name in LOWER)
        return replace(found, lower_keys=lower_keys, lower_values=lower_values)

    def _whole(self) -> tuple[Layers, Layers]:
        """Keys and values [L, P, G, Dh] of all layers from `from_layer` on."""
        keys = self._own("keys")
        values = self._own("values")
        if not self._is_plain:
            output = self.transform(self.embedding.weight)
            if self._train_keys:
                keys, values = add_output(output, [keys, values])
            else:
                (values,) = add_output(output, [values])
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
                f"prompt.num_frozen: this prompt has {self.num_frozen} frozen positions and the stored one "
                f"{num_stored}: set prompt.num_frozen={num_stored}"
            )
        return taken

    def settled_options(self) -> dict[str, Any]:
        lower = ("start" if self._has_lower else "none") if self.from_layer else None
        return {"num_frozen": self.num_frozen, "lower_layers": lower}

    @classmethod
    def to_peft(cls, plain: dict[str, torch.Tensor]) -> PeftAdapter:
        """Of all layers, those below `from_layer` included. Raises UserError where these have none."""
        if "lower_keys" not in plain:
            return PeftAdapter(*pack_keys_values(plain["prefix_keys"], plain["prefix_values"]))
        pairs = zip(LOWER, PLAIN, strict=True)
        return PeftAdapter(*pack_keys_values(*(torch.cat([plain[low], plain[high]]) for low, high in pairs)))

    @classmethod
    def choose_training(cls, options: PrefixOptions, family: str) -> TrainingDefaults:
        if options.reparameterization == "mlp":
            return TrainingDefaults(1e-3, "that of `p_tuning`, which trains such an MLP too")
        return super().choose_training(options, family)

    @classmethod
    def enters_late(cls, options: PrefixOptions) -> bool:
        return options.from_layer > 0


def list_heads(base: BaseFacts) -> tuple[Heads, Heads]:
    """Of the keys and of the values. Raises ValueError that begins with the key."""
    if base.layer_heads is not None:
        keys = tuple((num_heads, width) for num_heads, width, _ in base.layer_heads)
        return keys, tuple((num_heads, width) for num_heads, _, width in base.layer_heads)
    if base.num_layers is None or base.num_key_value_heads is None or base.head_width is None:
        raise ValueError("prompt.method: prefix_tuning needs a base whose layers can be given keys and values")
    widths = (base.head_width, base.value_width or base.head_width)
    keys, values = (((base.num_key_value_heads, width),) * base.num_layers for width in widths)
    return keys, values
