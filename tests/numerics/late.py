"""What passes of prompts that enter at a later layer are held against: transformers' own forward, with hooks on it.

Shapes: T tokens, P virtual tokens, H hidden size, L layers, G key/value heads, Dh width of a head.
"""

from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedModel,
)

from ptune_dist.data.batches import Batch
from ptune_dist.model.prompted_model import PromptedModel
from tests.conftest import ENCODERS, SEQ2SEQ, tiny_shape
from tests.numerics.passes import MORE, WIDE, weights_of

NUM_LAYERS = {"gpt2": "n_layer", "bloom": "n_layer", "t5": "num_layers", "bart": "encoder_layers"}


def build_deep(kind: str, num_layers: int = 4) -> PreTrainedModel:
    """A random base of so many layers, frozen, in eval mode."""
    name, more = MORE.get(kind, (kind, None))
    shape = tiny_shape(kind) if more is None else WIDE | more
    config = AutoConfig.for_model(name, **shape | {NUM_LAYERS.get(kind, "num_hidden_layers"): num_layers})
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if kind in SEQ2SEQ else AutoModelForCausalLM
    base = (AutoModelForSequenceClassification if kind in ENCODERS else auto).from_config(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5 if kind == "t5" else 3.0)
    return base.requires_grad_(False)


def stack_of(base: nn.Module) -> nn.ModuleList:
    """The layers, of an encoder-decoder its encoder's."""
    inner = base.get_encoder() if base.config.is_encoder_decoder else base
    lists = [module for module in inner.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


@contextmanager
def hooked(layer: nn.Module, hook):
    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def read_to(layer: nn.Module, run) -> torch.Tensor:
    """The input of a layer [1, T, H] in a pass."""
    found = []
    with hooked(layer, lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"])):
        run()
    return found[0]


def run_from(layer: nn.Module, hidden: torch.Tensor, run):
    """What a pass gives where the input of a layer is `hidden` [1, T, H]."""

    def replace(_, args, kwargs):
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    with hooked(layer, replace):
        return run()


def plain_late_logits(base, start: int, prompt: dict[str, torch.Tensor], context, rest, target) -> torch.Tensor:
    """Logits [U, V] of a target: virtual tokens [P, H] after the context, or keys/values [L - start, P, G, Dh]."""
    layer = stack_of(base)[start]
    ids = torch.from_numpy(np.concatenate([context, rest, target])).long()[None]
    with torch.no_grad():
        hidden = read_to(layer, lambda: base(input_ids=ids, use_cache=False))
    if "late_tokens" in prompt:
        before, after = hidden[0].split([len(context), ids.shape[1] - len(context)])
        hidden = torch.cat([before, plain_vectors(prompt, after[: len(rest)]), after])[None]
    vectors = torch.zeros(1, hidden.shape[1], base.get_input_embeddings().embedding_dim)
    if "late_tokens" in prompt:
        run = lambda: base(inputs_embeds=vectors, use_cache=False)  # noqa: E731
        return run_from(layer, hidden, run).logits[0, -len(target) - 1 : -1]
    return plain_prefix_logits(base, start, prompt, hidden, ids, len(context))[-len(target) - 1 : -1]


def plain_prefix_logits(base, start: int, prompt, hidden, ids: torch.Tensor, num_context: int) -> torch.Tensor:
    """Logits [T - C, V] after [context, prefix], of tokens [1, T] or of what layers below `start` leave of them."""
    keys, values = prompt["prefix_keys"], prompt["prefix_values"]
    lower = prompt.get("lower_keys", keys[:0]), prompt.get("lower_values", values[:0])
    cache = DynamicCache(config=base.config)
    for number, context in enumerate(read_keys_values(base, ids[:, :num_context], keys)):
        parts = lower if number < len(lower[0]) else (keys, values)
        place = number if number < len(lower[0]) else max(0, number - start)  # of those below nothing is read
        prefix = (part[place].transpose(0, 1)[None] for part in parts)
        cache.update(*(torch.cat(pair, dim=2) for pair in zip(context, prefix, strict=True)), number)
    own = ids[:, num_context:]
    if len(lower[0]):  # an ordinary prefix, part of which does not change
        return base(input_ids=own, past_key_values=cache).logits[0]
    mask = torch.ones(1, keys.shape[1] + ids.shape[1], dtype=torch.long)
    vectors = torch.zeros(*own.shape, base.get_input_embeddings().embedding_dim)
    run = lambda: base(inputs_embeds=vectors, attention_mask=mask, past_key_values=cache)  # noqa: E731
    return run_from(stack_of(base)[start], hidden[:, num_context:], run).logits[0]


@torch.no_grad()
def read_keys_values(base, ids: torch.Tensor, like: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer, keys and values [1, G, C, Dh] of tokens [1, C]."""
    if ids.shape[1]:
        cache = DynamicCache()
        base(input_ids=ids, past_key_values=cache)
        return [(layer.keys, layer.values) for layer in cache.layers]
    nothing = like.new_zeros(1, like.shape[2], 0, like.shape[3])
    return [(nothing, nothing)] * len(stack_of(base))


def plain_vectors(prompt: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Virtual tokens [P, H] of a row whose input has left `hidden` [T, H]."""
    own = prompt["late_tokens"]
    if "generator.up" not in prompt:
        return own
    normal = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    narrow = normal @ prompt["generator.down"] + prompt["generator.down_bias"]
    pooled = torch.nn.functional.adaptive_avg_pool1d(narrow.T[None], len(own))[0].T
    return own + pooled.relu() @ prompt["generator.up"] / len(prompt["generator.up"])


def plain_late_encoder_logits(
    base, start: int, prompt: dict[str, torch.Tensor], ids: torch.Tensor, **more
) -> torch.Tensor:
    """Logits of a classifier [1, V], or of a target [U, V] after `decoder_input_ids`."""
    layer = stack_of(base)[start]
    with torch.no_grad():
        hidden = read_to(layer, lambda: base(input_ids=ids, **more))
    hidden = torch.cat([plain_vectors(prompt, hidden[0])[None], hidden], dim=1)
    vectors = torch.zeros(1, hidden.shape[1], base.get_input_embeddings().embedding_dim)
    return run_from(layer, hidden, lambda: base(inputs_embeds=vectors, **more)).logits


def plain_late_losses(base, model: PromptedModel, batch: Batch) -> list[torch.Tensor]:
    """Each reader's loss, and the gradients of all prompts' parameters, as `weights_of` weighs the readers."""
    trained = [
        {name: p.detach().clone().requires_grad_() for name, p in prompt.named_parameters()} for prompt in model.prompts
    ]
    prompts = [dict(prompt.named_buffers()) | own for prompt, own in zip(model.prompts, trained, strict=True)]
    losses = []
    for row, member in batch.readers:
        parts = (batch.contexts[row], batch.rests[row], batch.targets[row])
        logits = plain_late_logits(base, model.start_layers[member], prompts[member], *parts)
        target = torch.from_numpy(batch.targets[row]).long()
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    stacked = torch.stack(losses)
    (stacked * weights_of(batch)).sum().backward()
    return [stacked.detach(), *(p.grad for own in trained for p in own.values())]


def late_losses(model: PromptedModel, batch: Batch) -> list[torch.Tensor]:
    """As `plain_late_losses`, of our pass."""
    for parameter in model.prompts.parameters():
        parameter.grad = None
    losses = model.losses(batch)
    (losses * weights_of(batch)).sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in model.prompts.parameters())]
