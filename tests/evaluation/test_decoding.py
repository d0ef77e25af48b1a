"""Rows that come and go are answered as a plain loop answers each alone, whatever shares their passes."""

import collections
import itertools
from functools import partial

import numpy as np
import pytest
import torch

from ptune_dist.data.encode import TokenPair
from ptune_dist.distributed.world import World
from ptune_dist.evaluation.decoding import AnswerLoop, Base, Row
from ptune_dist.evaluation.generate import generate_ids
from ptune_dist.evaluation.sampling import Chooser, build_sampler
from ptune_dist.families import FAMILIES
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.method import Method
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.prompt_tuning import PromptTuning
from tests.conftest import ARCHITECTURES, SEQ2SEQ
from tests.evaluation.test_generate import (
    SETTINGS,
    answer_plainly,
    build_model,
    draw_inputs,
    draw_prefix,
    load_base,
    until_end,
    with_rests,
)
from tests.numerics.passes import draw_tokens, plain_seq2seq_logits
from tests.numerics.test_segments import build_reader

KINDS = [kind for kind in ARCHITECTURES if kind != "bloom"]
LENGTHS = (3, 40, 1, 17, 30, 2, 9, 40, 26)
MOST_TOKENS = (9, 3, 1, 6, 9, 8, 2, 9, 7)


def build_loop(
    model: PromptedModel,
    budget: int,
    end: int | None,
    sampling: dict | None = None,
    seed: int = 0,
    *,
    is_bank: bool = False,
) -> AnswerLoop:
    def run(work):
        with torch.no_grad():
            return work()

    base = Base(run, build_reader(model).hold, World(0, 1, torch.device("cpu")), is_sharded=False, pad_id=1)
    decoder = model.open_bank_decoder() if is_bank else model.open_decoder(0)
    assert decoder is not None
    return AnswerLoop(decoder, base, Chooser(sampling, seed, torch.device("cpu")), end=end, budget=budget)


def decode(
    model: PromptedModel,
    inputs: list[TokenPair],
    budget: int,
    end: int | None,
    most_tokens: tuple[int, ...] = MOST_TOKENS,
    readers: list[int] | None = None,
    **how,
) -> list[list[int]]:
    """`readers`: of each row, the number of its prompt, where the model's prompts answer together."""
    loop = build_loop(model, budget, end, **how, is_bank=readers is not None)
    numbers = readers or [0] * len(inputs)
    rows = [
        Row(number, np.array(context, np.int32), np.array(rest, np.int32), most, reader)
        for number, ((context, rest), most, reader) in enumerate(zip(inputs, most_tokens, numbers, strict=True))
    ]
    loop.start(rows, list(rows))
    found: dict[int, list[int]] = {}
    is_left = True
    while is_left:
        finished, is_left = loop.run_round()
        found |= {row.number: row.answer for row in finished}
    assert len(found) == len(inputs)
    return [found[number] for number in range(len(inputs))]


@torch.no_grad()
def answer_seq2seq_plainly(model: PromptedModel, row: TokenPair, most: int) -> list[int]:
    """One row alone, the whole text read anew for each token."""
    context, rest = (np.array(part, np.int64) for part in row)
    answer: list[int] = []
    while len(answer) < most:
        target = np.array([*answer, 0])  # its last token is not read
        logits = plain_seq2seq_logits(model.base, model.prompt(0)().vectors, context, rest, target)
        answer.append(int(logits[-1].argmax()))
    return answer


def plain_answers(model: PromptedModel, inputs: list[TokenPair]) -> tuple[list[list[int]], int]:
    """Each row alone, and the token that ends answers: one that many have, so that rows leave at all times."""
    plainly = answer_seq2seq_plainly if model.base.config.is_encoder_decoder else partial(answer_plainly, end=-1)
    whole = [plainly(model, row, most) for row, most in zip(inputs, MOST_TOKENS, strict=True)]
    (end, _), *_ = collections.Counter(token for answer in whole for token in answer[1:]).most_common()
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in whole], end


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *itertools.product(["shipped", "mistral_window", "granite", *KINDS], [PromptTuning, PrefixTuning]),
        *((kind, PromptTuning) for kind in ("deepseek_v2", "deepseek_v3")),  # no prefix: transformers keeps latents
    ],
)
def test_rows_that_come_and_go_are_answered_as_by_a_plain_loop(kind: str, method: type[Method]):
    model = build_model(kind, method)
    inputs = draw_inputs(LENGTHS)
    expected, end = plain_answers(model, inputs)
    for budget in (4096, 120, 1):
        assert decode(model, inputs, budget, end) == expected
    assert len({tuple(row) for row in expected}) > 1


@pytest.mark.parametrize("placement", ["prefix", "infix", "template"])
@pytest.mark.parametrize("kind", ["gpt2", "mistral_window"])
def test_rows_of_several_prompts_share_passes_and_are_answered_as_with_each_prompt_alone(kind: str, placement: str):
    base = load_base(kind)
    draw = torch.Generator().manual_seed(7)
    width = base.get_input_embeddings().embedding_dim
    vectors = [torch.randn(count, width, generator=draw) * 0.5 for count in (4, 2)]
    prompts: list[Method] = [PromptTuning(vectors[0]), draw_prefix(base), PromptTuning(vectors[1])]
    inputs = with_rests(draw_inputs(LENGTHS, placement))
    model_class = FAMILIES["causal"].model_class
    alone = [
        decode(model_class(base, [prompt], CrossEntropy(), placement).eval(), inputs, 4096, end=-1)
        for prompt in prompts
    ]
    readers = [number % len(prompts) for number in range(len(inputs))]
    expected = [alone[reader][number] for number, reader in enumerate(readers)]
    bank = model_class(base, prompts, CrossEntropy(), placement).eval()
    for budget in (4096, 60, 1):
        assert decode(bank, inputs, budget, -1, readers=readers) == expected
    assert expected != alone[0] and expected != alone[1]


@pytest.mark.parametrize("placement", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_rows_of_a_seq2seq_base_begin_together_and_leave_one_by_one(kind: str, placement: str):
    model = build_model(kind, PromptTuning, placement)
    inputs = draw_inputs(LENGTHS, placement)
    expected, end = plain_answers(model, inputs)
    for budget in (4096, 200, 1):
        assert decode(model, inputs, budget, end) == expected
    assert len({tuple(row) for row in expected}) > 1


@pytest.mark.parametrize("case", ["infix", "template", "same context", "no rest"])
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *itertools.product(["gpt2", "llama", "mistral_window"], [PromptTuning, PrefixTuning]),
        ("deepseek_v3", PromptTuning),
    ],
)
def test_contexts_are_read_from_the_cache_and_stand_before_the_prompt(kind: str, method: type[Method], case: str):
    model = build_model(kind, method, "infix" if case == "infix" else "template")
    inputs = draw_inputs(LENGTHS, "infix" if case == "infix" else "template")
    if case == "same context":
        inputs = [(inputs[1][0], rest or [7]) for _, rest in inputs]
    if case == "no rest":
        inputs = [(inputs[1][0], rest if number % 2 else []) for number, (_, rest) in enumerate(inputs)]
    if method is PrefixTuning:
        inputs = with_rests(inputs)
    expected, end = plain_answers(model, inputs)
    for budget in (4096, 120):
        assert decode(model, inputs, budget, end) == expected


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral_window"])
def test_what_all_inputs_begin_with_is_read_once(kind: str):
    model = build_model(kind, PromptTuning)
    begin = draw_tokens(np.random.default_rng(5), 12).tolist()
    inputs = [([], begin + rest) for _, rest in draw_inputs(LENGTHS)]
    inputs[3] = ([], begin)  # its last token is its own
    expected, end = plain_answers(model, inputs)
    read: list[int] = []
    embed_tokens = model.embed_tokens
    model.embed_tokens = lambda tokens, embeddings=None: read.append(len(tokens)) or embed_tokens(tokens, embeddings)
    assert decode(model, inputs, 120, end) == expected
    num_inputs = 11 + sum(len(rest) - 11 for _, rest in inputs)
    assert sum(read) == num_inputs + sum(len(answer) - 1 for answer in expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_sampled_row_is_what_transformers_samples_of_it_alone(kind: str):
    model = build_model(kind, PromptTuning)
    inputs = draw_inputs(LENGTHS)
    sampling = {"temperature": 1.5, "top_k": 200, "top_p": 0.95}
    found = decode(model, inputs, 4096, None, sampling=sampling)
    assert decode(model, inputs, 100, None, sampling=sampling) == found
    for number in (0, 1, 4):
        sampler = build_sampler(sampling, 0, [number], torch.device("cpu"))
        (alone,) = until_end(generate_ids(model, [inputs[number]], SETTINGS, sampler=sampler))
        count = min(len(alone), MOST_TOKENS[number])
        assert found[number][:count] == alone[:count]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_a_sampled_row_depends_on_its_number_and_the_seed_and_on_no_other_row(kind: str):
    model = build_model(kind, PromptTuning, "encoder" if kind == "t5" else "prefix")
    inputs = draw_inputs(LENGTHS)

    def sample(rows: list[int], seed: int = 0, budget: int = 4096) -> dict[int, list[int]]:
        loop = build_loop(model, budget, None, sampling={"temperature": 1.5, "top_k": 200}, seed=seed)
        asked = [Row(i, *(np.array(part, np.int32) for part in inputs[i]), 5) for i in rows]
        loop.start(asked, list(asked))
        found: list[Row] = []
        while len(found) < len(rows):
            found += loop.run_round()[0]
        return {row.number: row.answer for row in found}

    together = sample([0, 1, 2, 3, 4])
    assert sample([3, 2, 0]) == {i: together[i] for i in (3, 2, 0)}
    assert {i: sample([i])[i] for i in range(5)} == together == sample([0, 1, 2, 3, 4], budget=80)
    assert sample([0, 1, 2, 3, 4], seed=1) != together


def test_a_row_that_is_not_a_number_harms_no_other():
    model = build_model("llama", PromptTuning)
    inputs = draw_inputs(LENGTHS)
    wanted = decode(model, inputs, 120, None)
    weight = model.base.get_input_embeddings().weight
    bad = next(
        token for token in inputs[4][1] if all(token not in rest for i, (_, rest) in enumerate(inputs) if i != 4)
    )
    assert all(bad not in answer for i, answer in enumerate(wanted) if i != 4)
    weight[bad] = torch.nan
    found = decode(model, inputs, 120, None)
    assert [row for i, row in enumerate(found) if i != 4] == [row for i, row in enumerate(wanted) if i != 4]
