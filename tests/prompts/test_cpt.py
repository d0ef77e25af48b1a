"""Context-aware prompts: which tokens of the rows they take, of what kind they are, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ptune_dist.errors import UserError
from ptune_dist.prompts.cpt import Cpt, CptOptions, join_examples
from ptune_dist.prompts.method import BaseFacts
from ptune_dist.prompts.start import NOTHING, Start
from ptune_dist.prompts.store import save_prompt
from ptune_dist.tiny.make import build_tokenizer

TOKENIZER = build_tokenizer()
EMBEDDINGS = torch.randn(len(TOKENIZER), 8, generator=torch.Generator().manual_seed(1))
ROWS = [([1, 2, 30, 31, 3], [40]), ([1, 2, 32, 3], [41, 42]), ([1, 2, 33, 3], [43])]


def build(num: int, kind: str = "rows", file: str | None = None, **options) -> Cpt:
    lookup = lambda ids: EMBEDDINGS[torch.tensor(ids)]  # noqa: E731
    start = Start(kind, 0, TOKENIZER, lookup, file=file, read_examples=lambda: iter(ROWS))
    return Cpt.build(CptOptions(**options), num, BaseFacts(8), start)


def test_examples_follow_each_other_and_what_their_inputs_share_is_the_template():
    ids, kinds = join_examples(ROWS, 12)
    assert ids == [1, 2, 30, 31, 3, 40, 1, 2, 32, 3, 41, 42]
    assert kinds == [1, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8]
    assert join_examples(ROWS, 3) == ([31, 3, 40], [2, 2, 4])  # one example shares nothing; its beginning is cut
    with pytest.raises(UserError, match="prompt.num_virtual_tokens is 18 but the training rows have 17 tokens"):
        join_examples(ROWS, 18)


def test_targets_weigh_less_the_earlier_they_stand_and_are_predicted_from_the_token_before():
    own = build(12, opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5).own_targets
    assert own == ([4, 9, 10], [40, 41, 42], [0.25, 0.5, 0.5])
    assert build(12).own_targets.weights == [1.0, 1.0, 1.0]
    given = {"cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [4, 4, 1]}
    assert build(3, **given).own_targets == ([0], [6], [1.0])  # nothing stands before the first
    assert build(3, cpt_token_ids=[5, 6, 7]).own_targets is None


def test_targets_are_those_that_were_loaded():
    prompt = build(12, NOTHING)
    assert prompt.own_targets is None
    for name, tensor in prompt.take(build(12).state_dict()).items():
        prompt.state_dict()[name].copy_(tensor)
    assert prompt.own_targets == build(12).own_targets


def test_steps_are_projected_before_each_step_and_in_every_answer():
    prompt = build(12, opt_projection_epsilon=16.0, opt_projection_format_epsilon=8.0)
    with torch.no_grad():
        prompt.delta.fill_(1.0)  # of length 8 ** 0.5
    plain = prompt.plain()["virtual_tokens"] - prompt.embedding
    radii = {1: 0.5, 2: 1.0, 3: 0.5, 0: 0.0}  # times the square root of 8 / 2048
    wanted = torch.tensor([radii[int(kind) % 4] for kind in prompt.example_kinds])
    torch.testing.assert_close(plain.norm(dim=1), wanted)
    assert prompt.delta.norm(dim=1).min() > 2
    prompt.begin_step(1)
    torch.testing.assert_close(prompt.train()().vectors - prompt.embedding, plain)
    prompt().vectors.sum().backward()
    assert torch.equal(prompt.delta.grad.any(dim=1), wanted > 0)


def test_wrong_tokens_and_kinds_take_one_line():
    cases = [
        ({"cpt_tokens_type_mask": [1, 2]}, "is given without prompt.cpt_token_ids"),
        ({"cpt_token_ids": [1, 2, 3]}, "prompt.num_virtual_tokens is 2 but prompt.cpt_token_ids has 3"),
        (
            {"cpt_token_ids": [1, 2], "cpt_tokens_type_mask": [1]},
            "cpt_tokens_type_mask has 1 numbers for 2 tokens",
        ),
        ({"cpt_token_ids": [1, 2], "cpt_tokens_type_mask": [1, -1]}, "kinds cannot be negative"),
        ({"cpt_token_ids": [1, 100000]}, "prompt.cpt_token_ids: 100000 is not a token of the base"),
        ({"cpt_token_ids": [-1, 1]}, "prompt.cpt_token_ids: -1 is not a token of the base"),
        ({"cpt_token_ids": [1, 2], "cpt_tokens_type_mask": [4, 0]}, "all 2 tokens of the examples belong to targets"),
        ({"opt_loss_decay_factor": 0.5}, "is for prompt.opt_weighted_loss_type=decay"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            build(2, **options)
    with pytest.raises(ValueError, match="prompt.num_virtual_tokens: all 1 tokens of the examples belong to targets"):
        build(1)


def test_an_adapter_of_tokens_that_the_base_lacks_is_refused(tmp_path):
    save_file({"prompt_embeddings": EMBEDDINGS[:3]}, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "CPT", "cpt_token_ids": [5, 9000, 7], "cpt_tokens_type_mask": [1, 2, 3]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"^prompt.init_file: .*/adapter_model.safetensors: 9000 is not a token of"):
        build(3, "file", str(tmp_path))


def test_an_earlier_prompt_keeps_its_tokens_and_others_are_refused(tmp_path):
    first = build(3, cpt_token_ids=[1, 2, 30])
    save_prompt(tmp_path, first.plain() | first.state_dict(), {})
    again = build(3, "file", str(tmp_path))
    assert again.example_ids.tolist() == [1, 2, 30]
    assert build(3, "file", str(tmp_path), cpt_token_ids=[1, 2, 30]).example_ids.tolist() == [1, 2, 30]
    for given in ({"cpt_token_ids": [1, 2, 31]}, {"cpt_token_ids": [1, 2, 30], "cpt_tokens_type_mask": [1, 2, 3]}):
        with pytest.raises(UserError, match="has other ones: leave it out to train that prompt"):
            build(3, "file", str(tmp_path), **given)
