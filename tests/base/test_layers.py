"""Facts about a model are found, whatever names its architecture uses."""

import pytest
import torch

from ptune_dist.base.layers import embedding_width, held_bytes, hidden_size, layer_stacks, layers_of, max_positions
from tests.base.bases import family_of, load, open_only
from tests.conftest import ARCHITECTURES, ENCODERS, LABELS, SEQ2SEQ

KINDS = ARCHITECTURES + SEQ2SEQ + ENCODERS
POSITIONS = {"gpt2": 128, "opt": 128, "bart": 128, "bert": 128, "roberta": 128}  # RoBERTa's table has 130 rows


@pytest.mark.parametrize("kind", KINDS)
def test_every_transformer_layer_is_found_and_nothing_else(tiny_bases, kind):
    model = open_only(tiny_bases[kind], labels=LABELS).model
    stacks = layer_stacks(model)
    assert [len(stack) for stack in stacks] == ([2, 2] if family_of(kind) == "seq2seq" else [2])
    assert {type(layer).__name__.endswith(("Layer", "Block")) for layer in layers_of(model)} == {True}
    inside = sum(p.numel() for layer in layers_of(model) for p in layer.parameters())
    outside = sum(p.numel() for name, p in model.named_parameters() if not any(c.isdigit() for c in name))
    assert inside + outside == sum(p.numel() for p in model.parameters())


def test_an_encoders_layers_come_before_its_decoders(tiny_bases):
    model = open_only(tiny_bases["t5"]).model
    assert layers_of(model) == [*model.encoder.block, *model.decoder.block]


def test_a_small_list_of_modules_is_no_stack_of_layers(tiny_bases):
    model = open_only(tiny_bases["llama"]).model
    model.adapters = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert layer_stacks(model) == [model.model.layers]


@pytest.mark.parametrize("kind", KINDS)
def test_widths_are_those_of_the_tensors(tiny_bases, kind):
    model = open_only(tiny_bases[kind], labels=LABELS).model
    assert embedding_width(model) == (16 if kind == "opt" else 32) == model.get_input_embeddings().weight.shape[1]
    assert hidden_size(model) == 32


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_learned_position_is_known(tiny_bases, kind):
    base = load(tiny_bases[kind], labels=LABELS)
    most = max_positions(base)
    assert most == POSITIONS.get(kind)

    def read(length: int) -> None:
        vectors = torch.zeros(1, length, embedding_width(base))
        base(inputs_embeds=vectors, **({"decoder_input_ids": torch.ones(1, 1).long()} if kind in SEQ2SEQ else {}))

    read(most or 300)
    if most:
        with pytest.raises((IndexError, RuntimeError)):
            read(most + 1)


def test_the_bytes_held_are_those_of_the_tensors(tiny_bases):
    floats = load(tiny_bases["qwen2"])
    weights = sum({p.data_ptr(): p.nbytes for p in floats.parameters()}.values())
    assert held_bytes(floats) == weights + sum(buffer.nbytes for buffer in floats.buffers())
    int8 = load(tiny_bases["qwen2"], int8={"include": ["embeddings", "head"], "threshold": None})
    matrices = sum(p.numel() for p in floats.parameters() if p.dim() > 1)
    rows = sum(len(p) for p in floats.parameters() if p.dim() > 1)
    assert held_bytes(floats) - held_bytes(int8) == 3 * matrices - 4 * rows
