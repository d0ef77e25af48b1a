"""What the survey of architectures has found: each of these gave other numbers than the plain model, or a traceback."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.utils import logging

from ptune_dist.base.fused import fuse
from ptune_dist.base.layers import head_width, heads_by_layer, layers_differ, num_key_value_heads, setting_of
from ptune_dist.base.load import fill_whole
from ptune_dist.base.merge import read_directly
from ptune_dist.base.quantized import is_linear
from ptune_dist.errors import UserError
from ptune_dist.evaluation.answer_plan import Decoding, plan_answers
from ptune_dist.families.causal import PromptedCausal, check_inputs
from ptune_dist.families.find import open_any
from ptune_dist.families.generation import name_vectors
from ptune_dist.model.attention import narrow_windows, windows_of
from ptune_dist.model.given_cache import keeps_more
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.tiny.make import build_tokenizer
from tests.architectures.bases import build_base, build_shape, small_config

IDS = torch.tensor([[5, 6, 7, 8, 9, 60, 70, 80, 90, 100]])
INT8 = {"include": (), "threshold": None}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


def make(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(build_shape(kind), dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model: nn.Module, **more: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False, **more).logits


def test_a_norm_that_also_takes_a_gate_computes_with_it() -> None:
    model = make("mamba2")
    before = logits_of(model)
    fuse(model, set(), print)
    assert torch.allclose(logits_of(model), before, atol=1e-6)


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5", "longt5", "switch_transformers"])
def test_int8_weights_that_a_layer_asks_for_their_type_are_multiplied_all_the_same(kind: str, tmp_path: Path) -> None:
    build_base(kind, "seq2seq", tmp_path)
    found = fill_whole(open_any(str(tmp_path), dtype=torch.float32, int8=INT8))
    wanted = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    weights = [parameter.dtype for name, parameter in found.named_parameters() if name.endswith("wo.weight")]
    assert weights and set(weights) == {torch.int8}
    ours, plain = (logits_of(model, decoder_input_ids=IDS) for model in (found, wanted))
    assert (ours - plain).abs().max() < 0.05 * plain.abs().max()


def test_a_layer_whose_type_inputs_are_cast_to_is_left_as_it_is() -> None:
    assert "model.layers.0.self_attn.indexer.weights_proj" in read_directly(make("deepseek_v32"))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "mistral3", "gemma3"])
def test_the_language_model_of_a_multimodal_checkpoint_has_its_logits(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = small_config(CONFIG_MAPPING[kind], {})
    whole = AutoModelForImageTextToText.from_config(shape, dtype=torch.float32).eval()
    whole.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    opened = open_any(str(tmp_path), dtype=torch.float32)
    assert "language model" in (opened.note or "")
    assert torch.allclose(logits_of(fill_whole(opened)), logits_of(whole), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "windows"),
    [("exaone4", {16, None}), ("gemma3_text", {16, None}), ("mistral", {16}), ("moshi", {None}), ("llama", {None})],
)
def test_each_layer_has_its_own_window(kind: str, windows: set[int | None]) -> None:
    model = make(kind)
    assert windows_of(model) == windows
    with narrow_windows(model, 5):
        assert windows_of(model) == {5 if window == 16 else window for window in windows}
    assert windows_of(model) == windows


def test_heads_that_differ_by_layer_are_told() -> None:
    shape = build_shape("gemma4_text")
    assert heads_by_layer(shape) == [(2, 256, 256), (2, 512, 512)] and layers_differ(shape)
    assert (num_key_value_heads(shape), head_width(shape), setting_of(shape, "head_dim")) == (2, None, None)
    assert (num_key_value_heads(build_shape("falcon")), num_key_value_heads(build_shape("gpt_bigcode"))) == (1, 1)
    assert all(layers_differ(build_shape(kind)) for kind in ("inkling_text", "mimo_v2_flash"))
    assert not layers_differ(build_shape("gemma3_text"))


def test_falcons_layers_are_linear_and_those_that_compute_something_else_are_not() -> None:
    class Clipped(FalconLinear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).clamp(-0.1, 0.1)

    assert is_linear(FalconLinear(4, 3)) and not is_linear(Clipped(4, 3))


@pytest.mark.parametrize("kind", ["bamba", "falcon_h1", "nemotron_h", "zamba2"])
def test_bases_that_hand_inputs_on_generate_from_vectors(kind: str) -> None:
    model = make(kind)
    settings = GenerationConfig(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=1)
    wanted = model.generate(IDS, attention_mask=torch.ones_like(IDS), generation_config=settings)[:, IDS.shape[1] :]
    name_vectors(model)
    vectors = model.get_input_embeddings()(IDS)
    found = model.generate(inputs_embeds=vectors, attention_mask=torch.ones_like(IDS), generation_config=settings)
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("kind", ["deepseek_v4", "git"])
def test_rows_of_one_length_are_answered_together_where_padding_moves_positions(kind: str) -> None:
    model = PromptedCausal(make(kind), [PromptTuning(torch.zeros(2, 32))], CrossEntropy())
    inputs = [([], [5] * length) for length in (3, 7, 3)]
    ((first,), (second,)) = (batch.shares for batch in plan_answers(model, inputs, Decoding(4, 4096), 0, 1))
    assert sorted([first, second]) == [[0, 2], [1]]


def test_states_beside_keys_and_values_are_told() -> None:
    assert keeps_more(make("lfm2_moe")) and keeps_more(make("glm_moe_dsa")) and not keeps_more(make("exaone4"))


def test_an_embedding_with_a_norm_of_its_own_gives_a_prompt_what_the_base_reads(tmp_path: Path) -> None:
    build_base("inkling_text", "causal", tmp_path)
    opened = open_any(str(tmp_path), dtype=torch.float32)
    with torch.no_grad():
        wanted = fill_whole(opened).get_input_embeddings()(IDS[0])
    assert torch.allclose(open_any(str(tmp_path), dtype=torch.float32).embed(IDS[0].tolist()), wanted, atol=1e-6)


def test_the_model_below_the_head_is_found_where_its_prefix_is_another_models() -> None:
    model = PromptedCausal(make("llama4_text"), [PromptTuning(torch.zeros(2, 32))], CrossEntropy())
    assert model.inner is model.base.model


@pytest.mark.parametrize(("kind", "why"), [("blt", "group bytes"), ("gemma3n_text", "per-layer embeddings")])
def test_bases_that_look_token_ids_up_again_are_refused(kind: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        check_inputs(build_shape(kind), "BASE")
