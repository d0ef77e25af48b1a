"""Answers are a plain loop's, token after token, each row alone: with virtual tokens or with keys and values before.

Shapes: B rows, P positions of the prompt, T tokens, L layers, G key/value heads, Dh head width.
"""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel

from ptune_dist.data.encode import TokenPair
from ptune_dist.evaluation.answer_plan import Decoding, plan_answers
from ptune_dist.evaluation.generate import generate_ids
from ptune_dist.evaluation.sampling import build_sampler
from ptune_dist.families import FAMILIES
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.method import Method
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.prompt_tuning import PromptTuning
from tests.conftest import ARCHITECTURES, SEQ2SEQ, TINY
from tests.numerics.passes import build_base, draw_tokens
from tests.numerics.prefixes import plain_prefix_logits

EOS, PAD, NUM_NEW, NUM_VIRTUAL = 0, 1, 5, 4
SETTINGS = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, max_new_tokens=NUM_NEW, do_sample=False, use_cache=True)


def load_base(kind: str) -> PreTrainedModel:
    """A random tiny base, or the shipped one, which is trained."""
    if kind == "shipped":
        return AutoModelForCausalLM.from_pretrained(TINY / "causal", dtype=torch.float32).eval().requires_grad_(False)
    if kind == "rwkv":
        sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        torch.manual_seed(0)
        shape = AutoConfig.for_model(kind, vocab_size=272, eos_token_id=EOS, bos_token_id=EOS, **sizes)
        return AutoModelForCausalLM.from_config(shape).eval().requires_grad_(False)
    base = build_base(kind)
    if kind == "bart":  # larger layers, so that it answers one row unlike another
        for name, parameter in base.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "shared" not in name:
                parameter.mul_(4.0)
        base.final_logits_bias.zero_()[0, EOS] = -1000.0
    return base


def build_model(kind: str, method: type[Method], placement: str = "prefix") -> PromptedModel:
    family = FAMILIES["seq2seq" if kind in SEQ2SEQ else "causal"]
    base = load_base(kind)
    width = base.get_input_embeddings().embedding_dim
    vectors = torch.randn(NUM_VIRTUAL, width, generator=torch.Generator().manual_seed(5)) * 0.5
    prompt = draw_prefix(base) if method is PrefixTuning else PromptTuning(vectors)
    return family.model_class(base, [prompt], CrossEntropy(), placement).eval()


def draw_prefix(base: PreTrainedModel) -> PrefixTuning:
    text = base.config.get_text_config()
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    draw = torch.Generator().manual_seed(5)
    shape = (text.num_hidden_layers, NUM_VIRTUAL, num_heads, width)
    return PrefixTuning(torch.randn(shape, generator=draw), torch.randn(shape, generator=draw))


def with_rests(inputs: list[TokenPair]) -> list[TokenPair]:
    """The last token of an input is always read after a prompt of keys and values."""
    return [(context, rest) if rest else (context[:-1], context[-1:]) for context, rest in inputs]


def draw_inputs(lengths: tuple[int, ...], placement: str = "prefix") -> list[TokenPair]:
    draw = np.random.default_rng(1)
    rows = [draw_tokens(draw, length).tolist() for length in lengths]
    if placement == "template":
        return [(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows]
    return [(row, []) if placement in ("infix", "decoder") else ([], row) for row in rows]


@torch.no_grad()
def answer_plainly(model: PromptedModel, inputs: TokenPair, num_new: int = NUM_NEW, end: int = EOS) -> list[int]:
    """One row of a causal base alone, everything computed anew for each token, positions counted from the prompt's."""
    base, found = model.base, model.prompts[0]()
    embed = base.get_input_embeddings()
    answer: list[int] = []
    while len(answer) < num_new and end not in answer:
        before, after = (embed(torch.tensor([part], dtype=torch.long)) for part in (inputs[0], [*inputs[1], *answer]))
        if found.vectors is not None:
            vectors = torch.cat([before, found.vectors[None], after], dim=1)
            logits = base(inputs_embeds=vectors, use_cache=False).logits
        elif inputs[0]:
            parts = (np.array(part, np.int64) for part in (inputs[0], [*inputs[1], *answer], [0]))
            logits = plain_prefix_logits(base, found, *parts)[None]
        else:
            cache = DynamicCache()
            for layer in range(len(found.keys)):
                cache.update(*(part[layer].transpose(0, 1)[None] for part in (found.keys, found.values)), layer)
            vectors = torch.cat([before, after], dim=1)
            positions = {"position_ids": NUM_VIRTUAL + torch.arange(vectors.shape[1])[None]}
            logits = base(
                inputs_embeds=vectors, past_key_values=cache, use_cache=True,
                attention_mask=torch.ones(1, NUM_VIRTUAL + vectors.shape[1], dtype=torch.long),
                **(positions if model._takes_positions else {}),
            ).logits  # fmt: skip
        answer.append(int(logits[0, -1].argmax()))
    return answer


def until_end(ids: torch.Tensor) -> list[list[int]]:
    """Each row's tokens up to the first end, as the plain loop gives them."""
    rows = ids.tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


@pytest.mark.parametrize("method", [PromptTuning, PrefixTuning])
@pytest.mark.parametrize("kind", ["shipped", *ARCHITECTURES])
def test_a_batch_of_unequal_rows_is_answered_as_by_a_plain_loop(kind, method):
    model = build_model(kind, method)
    inputs = draw_inputs((3, 40, 1, 17))
    expected = [answer_plainly(model, row) for row in inputs]
    assert until_end(generate_ids(model, inputs, SETTINGS)) == expected
    assert until_end(generate_ids(model, inputs[:1], SETTINGS)) == expected[:1]
    assert len({tuple(row) for row in expected}) > 1


@pytest.mark.parametrize(
    ("kind", "method", "num_batches"),
    [
        ("mistral_window", PromptTuning, 1),
        ("mistral_window", PrefixTuning, 3),
        ("gemma2", PromptTuning, 1),
        ("gemma2", PrefixTuning, 3),
        ("rwkv", PromptTuning, 4),
    ],
)
def test_rows_that_others_would_change_are_answered_with_rows_of_their_length_or_alone(kind, method, num_batches):
    model = build_model(kind, method)
    inputs = draw_inputs((3, 12, 3, 9))
    batches = plan_answers(model, inputs, Decoding(NUM_NEW, micro_batch_tokens=4096), 0, 1)
    assert len(batches) == num_batches
    for (rows,), _ in batches:
        chosen = [inputs[i] for i in rows]
        assert until_end(generate_ids(model, chosen, SETTINGS)) == [answer_plainly(model, row) for row in chosen]


@pytest.mark.parametrize(("rope_type", "num_batches"), [("default", 1), ("dynamic", 3), ("longrope", 3)])
@pytest.mark.parametrize("is_nested", [False, True])
def test_rotations_that_are_scaled_to_the_longest_row_want_rows_of_one_length(rope_type, num_batches, is_nested):
    model = build_model("llama", PromptTuning)
    found = {"rope_type": rope_type, "rope_theta": 10000.0}
    model.base.config.rope_parameters = {"full_attention": found} if is_nested else found
    batches = plan_answers(model, draw_inputs((3, 12, 3, 9)), Decoding(NUM_NEW, micro_batch_tokens=4096), 0, 1)
    assert len(batches) == num_batches


@pytest.mark.parametrize("placement", ["infix", "template"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("method", [PromptTuning, PrefixTuning])
def test_virtual_tokens_stand_where_the_placement_puts_them(kind, placement, method):
    model = build_model(kind, method, placement)
    inputs = draw_inputs((3, 40, 17, 2), placement)
    if method is PrefixTuning:
        inputs = [*with_rests(inputs), ([], [9])]  # an input of one token has no context
    expected = [answer_plainly(model, row) for row in inputs]
    assert until_end(generate_ids(model, inputs, SETTINGS)) == expected
    assert until_end(generate_ids(model, inputs[-1:], SETTINGS)) == expected[-1:]


@pytest.mark.parametrize("kind", ["mistral_window", "gemma2"])
def test_keys_and_values_after_a_context_are_in_the_windows_of_what_follows(kind):
    model = build_model(kind, PrefixTuning, "infix")
    for row in with_rests(draw_inputs((3, 12, 3, 9), "infix")):
        assert until_end(generate_ids(model, [row], SETTINGS)) == [answer_plainly(model, row)]


def test_a_row_that_fills_the_learned_positions_takes_nothing_from_a_short_one():
    model = build_model("gpt2", PromptTuning)  # 128 positions
    inputs = draw_inputs((124, 3, 122, 119, 120, 5))
    batches = plan_answers(model, inputs, Decoding(NUM_NEW, micro_batch_tokens=4096), 0, 1)
    allowed = {i: num_new for (rows,), num_new in batches for i in rows}
    assert allowed == {0: 0, 1: 5, 2: 2, 3: 5, 4: 4, 5: 5}
    for (rows,), num_new in batches:
        if num_new:
            settings = GenerationConfig(**SETTINGS.to_diff_dict() | {"max_new_tokens": num_new})
            chosen = [inputs[i] for i in rows]
            expected = [answer_plainly(model, row, num_new) for row in chosen]
            assert until_end(generate_ids(model, chosen, settings)) == expected


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom"])
def test_a_sampled_row_depends_on_its_number_and_the_seed_and_on_no_other_row(kind):
    model = build_model(kind, PromptTuning)
    inputs = draw_inputs((3, 40, 17, 1))

    def sample(rows: list[int], seed: int = 0) -> dict[int, tuple[int, ...]]:
        sampler = build_sampler({"temperature": 1.5, "top_k": 200}, seed, rows, torch.device("cpu"))
        found = until_end(generate_ids(model, [inputs[i] for i in rows], SETTINGS, sampler=sampler))
        return dict(zip(rows, map(tuple, found), strict=True))

    together = sample([0, 1, 2, 3])
    assert sample([3, 2, 0]) == {i: together[i] for i in (3, 2, 0)}
    assert {i: sample([i])[i] for i in range(4)} == together
    assert sample([0, 1, 2, 3], seed=1) != together
    same = generate_ids(
        model, [inputs[0]] * 2, SETTINGS, sampler=build_sampler({"temperature": 1.5}, 0, [0, 1], torch.device("cpu"))
    )
    assert until_end(same)[0] != until_end(same)[1]
