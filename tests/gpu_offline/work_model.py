"""The whole prompted model on a fake GPU: every method and placement, forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from ptune_dist.base.int8 import make_int8
from ptune_dist.base.layers import layers_of
from ptune_dist.base.recompute import DEFAULTS, Recomputer
from ptune_dist.data.batches import Batch
from ptune_dist.families import FAMILIES
from ptune_dist.model import attention_flex
from ptune_dist.model.attention import KeysValues
from ptune_dist.model.passes import Contexts
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.method import Method
from ptune_dist.prompts.p_tuning import PTuning, PTuningOptions
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.prompt_tuning import PromptTuning
from tests.gpu_offline.counting import CountingFakeTensors, fake_tensors, report

WIDTH = 64
AUTO = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM, "encoder": AutoModelForSequenceClassification}
KINDS = {"causal": "llama", "seq2seq": "t5", "encoder": "bert"}
SHAPES = {
    "causal": {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96,
    },
    "seq2seq": {"d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1},
    "encoder": {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
        "num_labels": 3,
    },
}  # fmt: skip
METHODS: dict[str, Callable[[], Method]] = {
    "prompt_tuning": lambda: PromptTuning(torch.zeros(5, WIDTH)),
    "p_tuning": lambda: PTuning(5, WIDTH, PTuningOptions(), 0),
    "prefix_tuning": lambda: PrefixTuning(*torch.zeros(2, 2, 5, 2, 16)),
}


@dataclass(frozen=True)
class Case:
    family: str
    placement: str
    method: str
    dtype: str = "bfloat16"
    int8: bool = False
    recompute: bool = False
    narrow: bool = False  # heads that flex attention refuses


def run_case(**settings: Any) -> dict[str, Any]:
    """What a pass forward and backward asks of the GPU, and where the gradients are; flex attention is not compiled."""
    case = Case(**settings)
    flex: Any = attention_flex
    flex.compiled_attend_blocks = lambda: stand_in
    base = build_base(case)
    prompts = [METHODS[case.method]() for _ in range(2)]
    with fake_tensors() as mode:
        to_gpu(base)
        model = FAMILIES[case.family].model_class(base, prompts, CrossEntropy(), case.placement).train()
        for prompt in model.prompts:
            to_gpu(prompt)
        needs_rest = case.method == "prefix_tuning"
        batch = hold(model, draw_batch(case.family, case.placement, needs_rest=needs_rest), mode)
        found = report(lambda: model.losses(batch).sum().backward(), mode)
        trained = [p for n in range(2) for p in model.trainable(n).values()]
        gradients = [str(p.grad.device) if p.grad is not None else "none" for p in trained]
        return {"counts": found["counts"], "gradients": sorted(set(gradients)), "segments": model.uses_segments}


def stand_in(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: list[torch.Tensor], scale: float
) -> torch.Tensor:
    """In place of the compiled attention, which other tests compile: checks its tensors and gives its output."""
    assert all(tensor.is_cuda for tensor in (q, k, v, *tables))
    assert k.shape == v.shape and q.dtype == k.dtype == v.dtype and q.shape[-1] == k.shape[-1]
    return q * (k.mean() + v.mean()) * scale


def build_base(case: Case) -> PreTrainedModel:
    """Without memory."""
    dtype = getattr(torch, case.dtype)
    shape = SHAPES[case.family] | ({"num_attention_heads": 8} if case.narrow else {})
    config = AutoConfig.for_model(KINDS[case.family], vocab_size=300, pad_token_id=0, **shape)
    with torch.device("meta"):
        base = AUTO[case.family].from_config(config, dtype=dtype).eval().requires_grad_(False)
        if case.int8:
            make_int8(base, include=[], threshold=None, dtype=dtype, skip=set())
    if case.recompute:
        Recomputer(DEFAULTS, layers_of(base))
    return base


def to_gpu(module: nn.Module) -> None:
    """Fake tensors on the GPU in place of parameters and buffers."""
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            made = torch.empty(p.shape, dtype=p.dtype, device="cuda")
            setattr(part, name, nn.Parameter(made, requires_grad=p.requires_grad))
        for name, b in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty(b.shape, dtype=b.dtype, device="cuda"))


def draw_batch(family: str, placement: str, *, needs_rest: bool) -> Batch:
    """Three rows of different length, read by two members, some rows by one. `needs_rest`: as in an `Encoding`."""
    nothing = np.zeros(0, np.int32)
    texts = [np.arange(2, 2 + n, dtype=np.int32) for n in (7, 9, 30)]
    rests = [nothing] * 3 if placement in ("infix", "decoder") else texts
    if needs_rest:
        rests = [rest if len(rest) else text[-1:] for rest, text in zip(rests, texts, strict=True)]
    contexts = texts if placement in ("infix", "template", "decoder") else [nothing] * 3
    targets = [np.arange(1 if family == "encoder" else n, dtype=np.int32) for n in (3, 2, 4)]
    return Batch(contexts, rests, targets, [(0, 0), (1, 1), (0, 1), (2, 0)], 0)


def hold(model: PromptedModel, batch: Batch, mode: CountingFakeTensors) -> Batch:
    """The batch with what its contexts leave, which nothing waits for."""
    if model.placement not in ("infix", "template", "decoder"):
        return batch
    found: list[list[tuple[torch.Tensor, ...]]] = []
    with torch.no_grad():
        counts = report(lambda: found.append(model.read_contexts(Contexts(batch.contexts, 0))), mode)["counts"]
    assert not counts["waits"], counts["waits"]
    return batch.with_held([(KeysValues(*parts) if len(parts) == 2 else parts[0],) for parts in found[0]])
