"""Merged projections give what transformers' own give, from the same stored numbers."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from ptune_dist.base.int8 import Int8Linear, quantize_rows
from ptune_dist.base.load import fill_whole
from ptune_dist.base.merge import MergedPart, MergedWeights, merge_projections, reads_one_input
from ptune_dist.families.find import open_any
from tests.conftest import build_tiny_base

IDS = torch.arange(2 * 9).reshape(2, 9) + 5


@pytest.mark.parametrize(
    ("kind", "num_parts"), [("llama", 10), ("qwen2", 10), ("opt", 6), ("gpt2", 0), ("bloom", 0), ("t5", 0), ("bart", 0)]
)
def test_merged_where_all_read_one_input_and_nothing_else_changes(kind, num_parts, tmp_path):
    folder = build_tiny_base(kind, tmp_path)
    model = fill_whole(open_any(str(folder), dtype=torch.float32))
    assert sum(isinstance(module, MergedPart) for module in model.modules()) == num_parts
    plain = type(model).from_pretrained(folder).eval()
    inputs = {"decoder_input_ids": IDS} if kind in ("t5", "bart") else {}
    with torch.no_grad():
        found = model(input_ids=IDS, **inputs).logits
        wanted = plain(input_ids=IDS, **inputs).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())


def test_an_encoder_is_merged_too(tmp_path):
    folder = build_tiny_base("bert", tmp_path)
    model = fill_whole(open_any(str(folder), dtype=torch.float32))
    plain = AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found = model.bert(input_ids=IDS).last_hidden_state
        wanted = plain.bert(input_ids=IDS).last_hidden_state
    assert isinstance(model.get_submodule("bert.encoder.layer.0.attention.self.query"), MergedPart)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_input_are_those_of_separate_projections(tmp_path):
    folder = build_tiny_base("llama", tmp_path)
    model = fill_whole(open_any(str(folder), dtype=torch.float32))
    plain = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    vectors = torch.randn(2, 7, model.config.hidden_size)
    grads = []
    for base in (model, plain):
        given = vectors.clone().requires_grad_()
        base(inputs_embeds=given).logits.square().sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5 * grads[1].abs().max().item())


def test_int8_rows_and_scales_are_those_of_separate_projections(tmp_path):
    folder = build_tiny_base("llama", tmp_path)
    model = fill_whole(open_any(str(folder), dtype=torch.float32, int8={"include": [], "threshold": None}))
    attention = model.model.layers[0].self_attn
    plain = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].self_attn
    assert isinstance(attention.qkv_proj, Int8Linear)
    pieces = [quantize_rows(getattr(plain, leaf).weight.detach()) for leaf in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(attention.qkv_proj.weight, torch.cat([rows for rows, _ in pieces]))
    assert torch.equal(attention.qkv_proj.float_scales, torch.cat([scales for _, scales in pieces]))


class Stored:
    """Two stored matrices of different heights."""

    shapes = {"a": (3, 4), "b": (5, 4)}
    bytes_read = 0
    tensors = {"a": torch.arange(12.0).reshape(3, 4), "b": 100 + torch.arange(20.0).reshape(5, 4)}

    def read_flat(self, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self.tensors[name].view(-1)[start : start + len(out)])

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self.tensors[name][first:last]


def test_any_part_of_a_merged_weight_can_be_read():
    stored = Stored()
    weights = MergedWeights(stored, {"ab": ["a", "b"]})
    whole = torch.cat([stored.tensors["a"], stored.tensors["b"]])
    for start in range(32):
        for stop in range(start, 33):
            out = torch.full((stop - start,), -1.0)
            weights.read_flat("ab", start, out)
            assert torch.equal(out, whole.view(-1)[start:stop])
    for first in range(8):
        for last in range(first + 1, 9):
            assert torch.equal(weights.read_rows("ab", first, last), whole[first:last])
    assert torch.equal(weights.read_rows("b", 1, 3), stored.tensors["b"][1:3])


class Three(nn.Module):
    """Three projections, read as `forward` of a subclass says."""

    def __init__(self, sizes: tuple[int, int, int] = (4, 2, 2), *, bias: tuple[bool, bool, bool] = (True, True, True)):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(4, size, bias=has) for size, has in zip(sizes, bias, strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


class OfTwoInputs(Three):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(y), self.v_proj(y)], dim=-1)


class ReadsAWeight(Three):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x.to(self.v_proj.weight.dtype))], dim=-1)


class Expression(Three):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x + 1), self.k_proj(x + 1), self.v_proj(x + 1)], dim=-1)


@pytest.mark.parametrize(
    ("kind", "is_merged"), [(Three, True), (OfTwoInputs, False), (ReadsAWeight, False), (Expression, False)]
)
def test_what_is_not_read_alike_is_not_merged(kind, is_merged):
    assert reads_one_input(kind, ("q_proj", "k_proj", "v_proj")) == is_merged


def merge(module: nn.Module, skip: set[str]) -> dict[str, list[str]]:
    return merge_projections(module, {name: name for name, _ in module.named_parameters()}, skip)


def test_trained_tied_and_unlike_projections_are_not_merged():
    assert set(merge(Three(), set())) == {"qkv_proj.weight", "qkv_proj.bias"}
    assert not merge(Three(), {"k_proj"})
    assert not merge(Three(bias=(True, False, True)), set())
    tied = Three((4, 4, 4))
    tied.v_proj.weight = tied.k_proj.weight
    assert not merge(tied, set())


def test_inputs_may_alternate_and_a_pass_may_end_early():
    module = Three()
    plain = Three()
    plain.load_state_dict(module.state_dict())
    merge(module, set())
    module.qkv_proj = nn.Linear(4, 8)
    with torch.no_grad():
        for tensor in ("weight", "bias"):
            parts = [getattr(getattr(plain, leaf), tensor) for leaf in ("q_proj", "k_proj", "v_proj")]
            getattr(module.qkv_proj, tensor).copy_(torch.cat(parts))
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    module.q_proj(first)  # recomputation in backward may stop here
    torch.testing.assert_close(module(second), plain(second))
    torch.testing.assert_close(module(first), plain(first))
    assert not module.q_proj._held
    torch.testing.assert_close(module.v_proj(first), plain.v_proj(first))
    torch.testing.assert_close(module.v_proj(first), plain.v_proj(first))
    torch.testing.assert_close(module.k_proj(second), plain.k_proj(second))


def test_a_state_dict_has_the_projections_under_their_own_names(tmp_path):
    folder = build_tiny_base("llama", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = fill_whole(open_any(str(folder), dtype=torch.float32)).state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
