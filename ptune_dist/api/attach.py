"""A trained prompt on a model of transformers that the user already holds, without a copy of the model.

Of a causal model, virtual tokens are read once, and every call of the model begins with what they leave in its cache
(keys and values, or whatever else the architecture keeps). A prefix is such a cache already. Of an encoder-decoder,
virtual tokens stand before the encoder's input.

Shapes: B rows, T tokens, P positions of the prompt, D width, L layers, G key/value heads, Dh width of a head.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import nn
from transformers import BatchEncoding, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ptune_dist.api.cached_calls import CachedCalls, name_arguments, put_before, replace_method
from ptune_dist.errors import UserError
from ptune_dist.prompts.start import BASE
from ptune_dist.prompts.trainable_tokens import INDICES, ROWS

MARK = "ptune_dist_prompt"  # the attribute of a model that has a prompt
ELSEWHERE = "use generate and score of the loaded prompt, or ptune-dist export"


class Attached:
    """A prompt that is on a model until `detach`, or until the end of a `with` block. See `TrainedPrompt.attach`."""

    def __init__(self, model: PreTrainedModel, undo: Sequence[Callable[[], None]]):
        self.model = model
        self._undo = list(undo)
        setattr(model, MARK, self)

    def detach(self) -> None:
        """Take the prompt off: the model is what it was. A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        if getattr(self.model, MARK, None) is self:
            delattr(self.model, MARK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(model: PreTrainedModel, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> Attached:
    """Put the plain prompt in `tensors`, of these facts, onto a model. Raises UserError."""
    check_model(model, facts)
    trained = {name.removeprefix(BASE): tensor for name, tensor in tensors.items() if name.startswith(BASE)}
    if trained or ROWS in tensors:
        return Attached(model, put_in(model, trained, tensors))
    if facts["base"]["family"] == "seq2seq":
        return Attached(model, attach_to_encoder(model, take_vectors(tensors, facts, "encoder")))
    if facts["base"]["family"] != "causal" or any(name.startswith(("head.", "value_head.")) for name in tensors):
        raise UserError(f"attach: this prompt was trained with a head of its own: {ELSEWHERE}")
    if "prefix_keys" in tensors:
        check_placement(facts, "prefix")
        cache = cache_of_prefix(model, tensors, facts)
    else:
        cache = read_vectors(model, take_vectors(tensors, facts, "prefix"))
    return Attached(model, CachedCalls(model, cache).attach())


def check_model(model: PreTrainedModel, facts: dict[str, Any]) -> None:
    """Raise UserError for a model that cannot be the one that a prompt was trained over, or has one already."""
    if hasattr(model, MARK):
        raise UserError("attach: this model has a prompt already: detach it first")
    base = facts["base"]
    text = model.config.get_text_config(decoder=True)
    embeddings: Any = model.get_input_embeddings()
    found = {
        "model_type": model.config.model_type,
        "num_layers": getattr(text, "num_hidden_layers", None),
        "width": getattr(embeddings, "embedding_dim", facts["width"]),
    }
    wanted = {"model_type": base["model_type"], "num_layers": base["num_layers"], "width": facts["width"]}
    for name, value in wanted.items():
        if value is not None and found[name] != value:
            raise UserError(f"attach: the prompt was trained over a base with {name} {value}, this has {found[name]}")


def check_placement(facts: dict[str, Any], wanted: str) -> None:
    if facts["placement"] != wanted:
        raise UserError(f"attach: this prompt's placement is {facts['placement']}, not before a text: {ELSEWHERE}")


def take_vectors(tensors: dict[str, torch.Tensor], facts: dict[str, Any], placement: str) -> torch.Tensor:
    """The virtual tokens [P, D] of a prompt at a placement. Raises UserError."""
    if "virtual_tokens" not in tensors:
        raise UserError(f"attach: a prompt of {facts['method']} is more than virtual tokens: {ELSEWHERE}")
    check_placement(facts, placement)
    if tensors["virtual_tokens"].dim() == 3:
        raise UserError(f"attach: this prompt is of {len(tensors['virtual_tokens'])} tasks: name one of them")
    return tensors["virtual_tokens"]


def embedding_weight(model: PreTrainedModel) -> torch.Tensor:
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight


def read_vectors(model: PreTrainedModel, vectors: torch.Tensor) -> Any:
    """The cache that a model leaves of virtual tokens [P, D], of one row."""
    weight = embedding_weight(model)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = model(inputs_embeds=vectors.to(weight)[None], use_cache=True)
    model.train(was_training)
    cache = getattr(found, "past_key_values", None)
    if cache is None:
        raise UserError(f"attach: {type(model).__name__} keeps no keys and values: {ELSEWHERE}")
    return cache


def cache_of_prefix(model: PreTrainedModel, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> Any:
    """A cache of stored keys and values [L, P, G, Dh], of one row."""
    keys, values = (
        torch.cat([tensors[name] for name in (lower, upper) if name in tensors])
        for lower, upper in (("lower_keys", "prefix_keys"), ("lower_values", "prefix_values"))
    )
    if len(keys) != facts["base"]["num_layers"]:
        raise UserError(f"attach: this prefix is not one of all layers alike: {ELSEWHERE}")
    weight = embedding_weight(model)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for layer, pair in enumerate(zip(keys, values, strict=True)):
        own_keys, own_values = (part.transpose(0, 1)[None].to(weight) for part in pair)  # [1, G, P, Dh]
        cache.update(own_keys, own_values, layer)
    return cache


def attach_to_encoder(model: PreTrainedModel, vectors: torch.Tensor) -> list[Callable[[], None]]:
    """Have the encoder of an encoder-decoder read virtual tokens [P, D] before its input; returns what undoes that."""
    encoder: Any = model.get_encoder()
    plain_encode = encoder.forward
    plain_forward = model.forward
    num_positions = len(vectors)

    @functools.wraps(plain_encode)
    def encode(*args: Any, **inputs: Any) -> Any:
        inputs = name_arguments(plain_encode, args, inputs)
        ids = inputs.pop("input_ids", None)
        own = inputs.pop("inputs_embeds", None)
        own = encoder.get_input_embeddings()(ids) if own is None else own
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape[1] == own.shape[1]:
            inputs["attention_mask"] = put_before(mask, num_positions)
        before = vectors.to(own)[None].expand(len(own), -1, -1)
        return plain_encode(inputs_embeds=torch.cat([before, own], dim=1), **inputs)

    @functools.wraps(plain_forward)
    def forward(*args: Any, **inputs: Any) -> Any:
        inputs = name_arguments(plain_forward, args, inputs)
        mask = inputs.get("attention_mask")
        if mask is not None:
            inputs["attention_mask"] = put_before(mask, num_positions)
        return plain_forward(**inputs)

    return [replace_method(encoder, "forward", encode), replace_method(model, "forward", forward)]


@torch.no_grad()
def put_in(
    model: PreTrainedModel, trained: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
) -> list[Callable[[], None]]:
    """Set the tensors of the model that a method has trained; returns what sets them back."""
    undo: list[Callable[[], None]] = []

    def set_to(target: torch.Tensor, value: torch.Tensor) -> None:
        before = target.detach().clone()
        undo.append(functools.partial(copy_into, target, before))
        target.copy_(value)

    for name, tensor in trained.items():
        set_to(model.get_parameter(name), tensor)
    if ROWS in tensors:
        weight = embedding_weight(model)
        for index, row in zip(tensors[INDICES].tolist(), tensors[ROWS], strict=True):
            set_to(weight[int(index)], row)
    return undo


@torch.no_grad()
def copy_into(target: torch.Tensor, value: torch.Tensor) -> None:
    target.copy_(value)


def pad_ids(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, side: str) -> BatchEncoding:
    """Token ids and their mask, [B, T] each."""
    from ptune_dist.evaluation.generate import pad_id

    ids = nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], True, pad_id(tokenizer), padding_side=side
    )
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    places = torch.arange(ids.shape[1])[None]
    mask = places >= ids.shape[1] - lengths if side == "left" else places < lengths
    return BatchEncoding({"input_ids": ids, "attention_mask": mask.long()})
