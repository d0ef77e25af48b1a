"""Prompts that enter at a later layer: our passes are those of transformers' own forward with hooks at that layer."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForSequenceClassification

from ptune_dist.base.layers import layers_of, num_first_layers
from ptune_dist.base.recompute import DEFAULTS, Recomputer
from ptune_dist.families import FAMILIES
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.late_prompt import LatePrompt
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.row_generator import RowGenerator
from tests.conftest import ENCODERS, SEQ2SEQ, extended_beyond
from tests.evaluation.test_decoding import decode
from tests.numerics.late import (
    build_deep,
    late_losses,
    plain_late_encoder_logits,
    plain_late_logits,
    plain_late_losses,
)
from tests.numerics.passes import assert_same, draw_batch, draw_tokens, placement_of, weights_of
from tests.numerics.test_labels import LABELS, assert_losses, label_batch, words_of
from tests.numerics.test_segments import build_reader

MOST = (6, 4, 1, 5)  # new tokens
KINDS = ["gpt2", "llama", "opt", "gpt_neox", "bloom", "qwen2_window", "gemma2"]


@pytest.fixture(scope="module")
def bases() -> dict:
    return {kind: build_deep(kind) for kind in KINDS}


def test_the_layers_that_a_prompt_can_enter_are_known_of_every_base(bases):
    assert {kind: num_first_layers(base) for kind, base in bases.items()} == dict.fromkeys(KINDS, 4)
    assert [num_first_layers(build_deep(kind)) for kind in [*SEQ2SEQ, *ENCODERS]] == [4] * 4
    shape = AutoConfig.for_model("albert", hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=99)
    assert num_first_layers(AutoModelForSequenceClassification.from_config(shape)) is None


def late(base, start: int, num: int, seed: int, *, generator_size: int | None = None) -> LatePrompt:
    """With a generator of so many hidden numbers, where a size is given, that has been trained a while."""
    draw = torch.Generator().manual_seed(seed)
    width = base.config.hidden_size
    generator = None
    if generator_size is not None:
        generator = RowGenerator(width, generator_size, seed)
        generator.down.data *= 4
        generator.up.data = generator_size * torch.randn(generator_size, width, generator=draw)
    return LatePrompt(torch.randn(num, width, generator=draw), start, generator)


def keys(base, start: int, num: int, seed: int, *, lower_seed: int | None = None) -> PrefixTuning:
    """With a `lower_seed` the layers below have keys and values too, which stay as they are."""
    config = base.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers - start, num, heads, width)
    draw = torch.Generator().manual_seed(seed)
    parts = [torch.randn(shape, generator=draw) for _ in range(2)]
    if lower_seed is not None:
        draw = torch.Generator().manual_seed(lower_seed)
        parts = [torch.cat([torch.randn(start, *shape[1:], generator=draw), part]) for part in parts]
    return PrefixTuning(*parts, from_layer=start, has_lower=lower_seed is not None)


def build(base, placement: str, prompts: list, *, recompute: bool = False):
    own = copy.deepcopy(base)
    if recompute:
        Recomputer(DEFAULTS, layers_of(own))
    return FAMILIES["causal"].model_class(own, prompts, CrossEntropy(), placement).train()


def both(base, case: str) -> list[tuple]:
    """Prompts that enter at one layer, recomputed; and prompts that enter at different layers, a pass for each."""
    placement = placement_of(case)
    return [
        build(base, placement, [late(base, 2, 4, 0), late(base, 2, 7, 1)], recompute=True),
        build(base, placement, [late(base, 1, 4, 0), late(base, 3, 7, 1)]),
    ]


@pytest.mark.parametrize("case", ["prefix", "infix", "shared", "template"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_plain_forward(bases, kind, case):
    batch, _ = draw_batch(case)
    for model in both(bases[kind], case):
        wanted = plain_late_losses(bases[kind], model, batch)
        reader = build_reader(model)
        cold, warm = (late_losses(model, reader.hold(batch)) for _ in range(2))
        assert_same(cold, wanted)
        assert all(torch.equal(one, other) for one, other in zip(cold, warm, strict=True))
        num = len({(row, model.start_layers[member]) for row, member in batch.readers})
        assert (reader.cache.hits, reader.cache.misses) == (num, num)
        assert_same(late_losses(model, build_reader(model, cache=False).hold(batch)), wanted)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom", "qwen2_window"])
def test_a_prefix_of_the_upper_layers_is_that_of_the_plain_forward(bases, kind):
    base = bases[kind]
    batch, _ = draw_batch("prefix")
    for prompts, num_distinct in (
        ([keys(base, 2, 4, 0), keys(base, 2, 5, 1)], 1),
        ([keys(base, 3, 4, 0), late(base, 3, 5, 1)], 1),
        ([keys(base, 3, 4, 0, lower_seed=7), keys(base, 3, 4, 1, lower_seed=7)], 1),
        ([keys(base, 2, 4, 0, lower_seed=7), keys(base, 2, 4, 1, lower_seed=8)], 2),
    ):
        model = build(base, "prefix", prompts)
        reader = build_reader(model)
        wanted = plain_late_losses(base, model, batch)
        assert_same(late_losses(model, reader.hold(batch)), wanted)
        # Members that start alike share what the layers below compute.
        assert reader.cache.misses == (6 if num_distinct == 1 else len(batch.readers))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom", "qwen2_window"])
def test_vectors_that_depend_on_a_row_are_those_of_the_plain_forward(bases, kind):
    base = bases[kind]
    batch, _ = draw_batch("prefix")
    for prompts in (
        [late(base, 2, 4, 0, generator_size=8), late(base, 2, 7, 1, generator_size=5)],
        [late(base, 2, 4, 0, generator_size=8), keys(base, 2, 4, 1)],
        [late(base, 1, 4, 0), late(base, 3, 7, 1, generator_size=8)],
    ):
        model = build(base, "prefix", prompts, recompute=True)
        reader = build_reader(model)
        wanted = plain_late_losses(base, model, batch)
        assert_same(late_losses(model, reader.hold(batch)), wanted)


@pytest.mark.parametrize("case", ["infix", "shared", "template"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom", "qwen2_window"])
def test_a_prefix_of_the_upper_layers_may_stand_after_contexts(bases, kind, case):
    base = bases[kind]
    batch = with_rests(draw_batch(case)[0])
    for prompts, num_distinct in (
        ([keys(base, 2, 4, 0), late(base, 3, 5, 1)], 2),
        ([keys(base, 3, 4, 0, lower_seed=7), keys(base, 3, 4, 1, lower_seed=7)], 1),
        ([keys(base, 2, 4, 0, lower_seed=7), keys(base, 2, 4, 1, lower_seed=8)], 2),
    ):
        model = build(base, placement_of(case), prompts)
        reader = build_reader(model)
        wanted = plain_late_losses(base, model, batch)
        assert_same(late_losses(model, reader.hold(batch)), wanted)
        assert reader.cache.misses == (6 if num_distinct == 1 else len(batch.readers))
        assert_same(late_losses(model, reader.hold(batch)), wanted)
        assert reader.cache.misses == reader.cache.hits


def with_rests(batch):
    """The batch with the last token of a context after the prompt where nothing else is: a prefix predicts nothing."""
    pairs = zip(batch.contexts, batch.rests, strict=True)
    split = [(c, rest) if len(rest) else (c[:-1], c[-1:]) for c, rest in pairs]
    return dataclasses.replace(batch, contexts=[c for c, _ in split], rests=[rest for _, rest in split])


@pytest.mark.parametrize("kind", [*SEQ2SEQ, *ENCODERS])
def test_in_an_encoder_losses_and_gradients_are_those_of_the_plain_forward(kind):
    base = build_deep(kind)
    family = "seq2seq" if kind in SEQ2SEQ else "encoder"
    # Of BART, whose layers end with a norm, the gradient of a generator is smaller than is compared here.
    generated = late(base, 2, 4, 0, generator_size=None if kind == "bart" else 8)
    prompts = [generated] + ([late(base, 1, 7, 1)] if kind in SEQ2SEQ else [])
    model = FAMILIES[family].model_class(copy.deepcopy(base), prompts, CrossEntropy(), "prefix").train()
    batch, _ = draw_batch("prefix", readers=[(row, row % len(prompts)) for row in range(6)])
    if family == "encoder":
        batch = dataclasses.replace(batch, targets=[np.array([row % 2]) for row in range(6)])
    own = [{name: p.detach().clone().requires_grad_() for name, p in prompt.named_parameters()} for prompt in prompts]
    losses = []
    for row, member in batch.readers:
        ids = torch.from_numpy(batch.rests[row]).long()[None]
        target = torch.from_numpy(batch.targets[row]).long()
        more = {} if family == "encoder" else {"decoder_input_ids": start_of(base, target), "use_cache": False}
        logits = plain_late_encoder_logits(base, model.start_layers[member], own[member], ids, **more)
        losses.append(cross_entropy(logits.flatten(0, -2), target, reduction="sum"))
    losses = torch.stack(losses)
    (losses * weights_of(batch)).sum().backward()
    wanted = [losses.detach(), *(p.grad for prompt in own for p in prompt.values())]
    reader = build_reader(model)
    for _ in range(2):
        assert_same(late_losses(model, reader.hold(batch)), wanted)
    assert reader.cache.hits == reader.cache.misses == 6


def start_of(base, target: torch.Tensor) -> torch.Tensor:
    """What a decoder reads for a target, [1, U]."""
    return torch.cat([torch.tensor([base.config.decoder_start_token_id]), target[:-1]])[None]


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_answers_of_an_encoder_decoder_are_those_of_the_plain_forward(kind):
    base = build_deep(kind)
    prompt = late(base, 2, 4, 0, generator_size=8)
    model = FAMILIES["seq2seq"].model_class(copy.deepcopy(base), [prompt], CrossEntropy(), "prefix").eval()
    draw = np.random.default_rng(3)
    texts = [draw_tokens(draw, length) for length in (3, 40, 1, 17)]
    wanted = []
    for text, most in zip(texts, MOST, strict=True):
        answer: list[int] = []
        while len(answer) < most:
            more = {"decoder_input_ids": start_of(base, torch.tensor([*answer, 0])), "use_cache": False}
            ids = torch.from_numpy(text).long()[None]
            with torch.no_grad():
                logits = plain_late_encoder_logits(base, 2, dict(prompt.named_parameters()), ids, **more)
            answer.append(int(logits[0, -1].argmax()))
        wanted.append(answer)
    assert decode(model, [([], text.tolist()) for text in texts], 4096, None, MOST) == wanted


@pytest.mark.parametrize("case", ["prefix", "infix", "template"])
@pytest.mark.parametrize("kind", extended_beyond(["llama", "bloom"], ["gpt2", "llama", "bloom"]))
def test_labels_have_the_losses_of_plain_forwards(bases, kind, case):
    batch = with_rests(label_batch(case)) if case != "prefix" else label_batch(case)
    base = bases[kind]
    first = keys(base, 2, 4, 0, lower_seed=7)
    second = late(base, 2, 7, 1, generator_size=8) if case == "prefix" else late(base, 3, 7, 1)
    model = build(base, case, [first, second])
    prompts = [dict(prompt.named_parameters()) | dict(prompt.named_buffers()) for prompt in model.prompts]
    wanted = []
    with torch.no_grad():
        for row, member in batch.readers:
            parts = (batch.contexts[row], batch.rests[row])
            labels = [torch.tensor(label) for label in words_of(batch.trees[row])]
            logits = [
                plain_late_logits(bases[kind], model.start_layers[member], prompts[member], *parts, label.numpy())
                for label in labels
            ]
            pairs = zip(logits, labels, strict=True)
            wanted.append(np.array([cross_entropy(*pair, reduction="sum").item() for pair in pairs]))
        if model.scores_trees:
            assert_losses(model.label_losses(batch), wanted)
            return
        reader = build_reader(model)
        assert model.read_inputs(reader.hold(batch)).read is None
        for number, label in enumerate(LABELS):
            targets = [np.array([] if row == 1 else label, np.int32) for row in range(len(batch.rests))]
            losses = model.losses(reader.hold(dataclasses.replace(batch, targets=targets))).tolist()
            for found, (row, _), expected in zip(losses, batch.readers, wanted, strict=True):
                assert found == pytest.approx(0.0 if row == 1 else expected[number], rel=1e-5)


@pytest.mark.parametrize("case", ["prefix", "infix"])
@pytest.mark.parametrize("kind", extended_beyond(["llama", "bloom"], ["gpt2", "llama", "bloom", "qwen2_window"]))
def test_rows_that_come_and_go_are_answered_as_each_alone(bases, kind, case):
    base = bases[kind]
    draw = np.random.default_rng(3)
    begin = draw_tokens(draw, 5)
    texts = [np.concatenate([begin, draw_tokens(draw, length)]) for length in (3, 40, 1, 17)]
    nothing = np.zeros(0, np.int32)
    prompts = [late(base, 2, 4, 0), keys(base, 3, 4, 0), keys(base, 2, 5, 0, lower_seed=7)]
    prompts += [late(base, 2, 4, 0, generator_size=8)] if case == "prefix" else []
    for prompt in prompts:
        num_rest = 0 if prompt.stands_in_sequence else 1
        rows = [(text[: len(text) - num_rest], text[len(text) - num_rest :]) for text in texts]
        rows = rows if case == "infix" else [(nothing, text) for text in texts]
        model = build(base, case, [prompt]).eval()
        numbers = {name: p.detach() for name, p in prompt.named_parameters()}
        numbers |= dict(prompt.named_buffers())
        wanted = [
            greedy(base, model.start_layers[0], numbers, *row, most) for row, most in zip(rows, MOST, strict=True)
        ]
        inputs = [(context.tolist(), rest.tolist()) for context, rest in rows]
        for budget in (4096, 60):
            assert decode(model, inputs, budget, None, MOST) == wanted


@torch.no_grad()
def greedy(base, start: int, prompt: dict, context, rest, most: int) -> list[int]:
    """The likeliest next token again and again, the whole text read anew each time."""
    answer: list[int] = []
    while len(answer) < most:
        target = np.array([*answer, 0], np.int64)  # its last token is not read
        answer.append(int(plain_late_logits(base, start, prompt, context, rest, target)[-1].argmax()))
    return answer
