"""What the segment pass is held against: transformers' own forward of one whole text at a time, without a cache.

Shapes: S readers, T tokens, P virtual tokens, D width, V vocabulary.
"""

import copy

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from ptune_dist.base.layers import layers_of
from ptune_dist.base.recompute import DEFAULTS, Recomputer
from ptune_dist.data.batches import Batch
from ptune_dist.families import FAMILIES
from ptune_dist.model.attention import KeysValues
from ptune_dist.model.passes import Contexts
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.prompt_tuning import PromptTuning
from tests.conftest import SEQ2SEQ, tiny_shape

WIDE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "num_key_value_heads": 2, "vocab_size": 272, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
LATENT = {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 6, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 10, "q_lora_rank": 16, "kv_lora_rank": 16, "first_k_dense_replace": 1, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
# Bases beside those of conftest: the name here, transformers' name, what differs.
MORE = {
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "mistral_window": ("mistral", {"sliding_window": 5, "head_dim": 16}),
    # its scores are capped, so its attention is its own; its logits are too
    "gemma2": (
        "gemma2", {"final_logit_softcapping": 3.0, "sliding_window": 8, "head_dim": 8, "query_pre_attn_scalar": 8},
    ),
    # keys of width 12 and values of width 10, made of one latent
    "deepseek_v2": ("deepseek_v2", LATENT | {"topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "granite": ("granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3}),
}  # fmt: skip
NUM_VIRTUAL = (4, 7)


def build_base(kind: str) -> PreTrainedModel:
    """A random two-layer base, frozen, in eval mode."""
    name, more = MORE.get(kind, (kind, None))
    config = AutoConfig.for_model(name, **(tiny_shape(kind) if more is None else WIDE | more))
    torch.manual_seed(0)
    base = (AutoModelForSeq2SeqLM if kind in SEQ2SEQ else AutoModelForCausalLM).from_config(config).eval()
    with torch.no_grad():  # larger than they come, so that the prompt is felt
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5 if kind == "t5" else 3.0)
        if kind == "bart":
            base.final_logits_bias.normal_()
    return base.requires_grad_(False)


def build_model(
    base: PreTrainedModel, family: str, placement: str, *, num_virtual=NUM_VIRTUAL, recompute: bool = False
) -> PromptedModel:
    """Our model over a copy of `base`."""
    draw = torch.Generator().manual_seed(3)
    base, width = copy.deepcopy(base), base.get_input_embeddings().embedding_dim
    prompts = [PromptTuning(torch.randn(count, width, generator=draw) * 0.5) for count in num_virtual]
    if recompute:
        Recomputer(DEFAULTS, layers_of(base))
    return FAMILIES[family].model_class(base, prompts, CrossEntropy(), placement).train()


def draw_tokens(draw: np.random.Generator, count: int) -> np.ndarray:
    return draw.integers(5, 250, count).astype(np.int32)


def draw_batch(case: str, lengths=(3, 40, 17, 2, 29, 5), readers=None) -> tuple[Batch, np.ndarray]:
    """Rows of very different length for two members who read some rows each, and what their contexts begin with.

    case: prefix, infix, shared (template, one context for all rows), or template (contexts and rests that differ); for
    seq2seq bases encoder or decoder.
    """
    draw = np.random.default_rng(0)
    lead, nothing = draw_tokens(draw, 9), np.zeros(0, np.int32)
    inputs = [draw_tokens(draw, length) for length in lengths]
    targets = [draw_tokens(draw, count) for count in draw.integers(1, 8, len(lengths))]
    targets[0] = targets[0][:1]
    contexts, rests = {
        "prefix": ([nothing] * len(inputs), inputs),
        "encoder": ([nothing] * len(inputs), inputs),
        "decoder": (inputs, [nothing] * len(inputs)),
        "infix": ([np.concatenate([lead, one]) for one in inputs], [nothing] * len(inputs)),
        "shared": ([lead] * len(inputs), inputs),
        "template": (
            [np.concatenate([lead, one]) for one in inputs],
            [draw_tokens(draw, count) for count in draw.integers(0, 20, len(inputs))],
        ),
    }[case]
    readers = readers or [(i, m) for i in range(len(inputs)) for m in (0, 1) if (i, m) not in ((2, 1), (4, 0), (5, 0))]
    return Batch(contexts, rests, targets, readers, 1), lead


def placement_of(case: str) -> str:
    return "template" if case == "shared" else case


def hold(model: PromptedModel, batch: Batch) -> Batch:
    """The batch with what each row's context leaves, computed in one pass."""
    if not any(map(len, batch.contexts)):
        return batch
    passed = model.read_contexts(Contexts(batch.contexts, batch.pad_id))
    return batch.with_held([(KeysValues(*tensors) if len(tensors) == 2 else tensors[0],) for tensors in passed])


def losses_and_gradients(model: PromptedModel, batch: Batch) -> list[torch.Tensor]:
    """Losses [S], and the gradient [P, D] of each member's prompt under weights that differ from reader to reader."""
    model.zero_grad()
    losses = model.losses(batch)
    (losses * weights_of(batch)).sum().backward()
    return [losses.detach(), *(prompt.virtual_tokens.grad for prompt in model.prompts)]


def weights_of(batch: Batch) -> torch.Tensor:
    return torch.linspace(0.5, 2.0, len(batch.readers))


def plain_losses_and_gradients(base: PreTrainedModel, model: PromptedModel, batch: Batch) -> list[torch.Tensor]:
    """What `losses_and_gradients` should give: every reader's text alone, in one piece, all logits."""
    prompts = [prompt.virtual_tokens.detach().clone().requires_grad_() for prompt in model.prompts]
    forward = plain_seq2seq_logits if base.config.is_encoder_decoder else plain_causal_logits
    losses = []
    for row, member in batch.readers:
        logits = forward(base, prompts[member], batch.contexts[row], batch.rests[row], batch.targets[row])
        target = torch.from_numpy(batch.targets[row]).long()
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    losses = torch.stack(losses)
    (losses * weights_of(batch)).sum().backward()
    return [losses.detach(), *(prompt.grad for prompt in prompts)]


def plain_causal_logits(base, prompt, context, rest, target) -> torch.Tensor:
    """Logits [T, V] for a target of T tokens: the text is [context, prompt, rest, target]."""
    vectors = torch.cat([embed(base, context), prompt, embed(base, np.concatenate([rest, target]))])
    return base(inputs_embeds=vectors[None], use_cache=False).logits[0, -len(target) - 1 : -1]


def plain_seq2seq_logits(base, prompt, context, rest, target) -> torch.Tensor:
    """Logits [T, V]: [prompt, rest] is encoded, or, where there is a context, that; then [prompt, start, target]."""
    written = torch.tensor([[base.config.decoder_start_token_id, *target[:-1].tolist()]])
    if not len(context):
        vectors = torch.cat([prompt, embed(base, rest)])[None]
        return base(inputs_embeds=vectors, decoder_input_ids=written, use_cache=False).logits[0]
    vectors = torch.cat([prompt, base.get_decoder().get_input_embeddings()(written)[0]])[None]
    read = torch.from_numpy(context).long()[None]
    return base(input_ids=read, decoder_inputs_embeds=vectors, use_cache=False).logits[0, len(prompt) :]


def embed(base: PreTrainedModel, tokens: np.ndarray) -> torch.Tensor:
    return base.get_input_embeddings()(torch.from_numpy(tokens).long())


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor], rel: float = 1e-5) -> None:
    """Losses each to `rel`; gradients to `rel` of their largest element."""
    torch.testing.assert_close(found[0], wanted[0], rtol=rel, atol=0)
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        assert theirs.abs().max() > 1e-3  # the prompt is felt
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rel * theirs.abs().max().item())
