"""Multitask prompts: their start, what a target takes of a source, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from ptune_dist.errors import UserError
from ptune_dist.prompts.method import BaseFacts
from ptune_dist.prompts.multitask import MultitaskOptions, MultitaskPromptTuning, select_task
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.prompts.residual import ResidualOptions
from ptune_dist.prompts.start import Start
from ptune_dist.prompts.store import load_prompt, save_prompt
from ptune_dist.tiny.make import build_tokenizer

P, WIDTH = 5, 16
TOKENIZER = build_tokenizer()
EMBEDDINGS = torch.randn(len(TOKENIZER), WIDTH, generator=torch.Generator().manual_seed(1))


def start_of(kind: str = "vocab", file=None, tasks=()) -> Start:
    file = str(file) if file else None
    return Start(kind, 0, TOKENIZER, lambda ids: EMBEDDINGS[torch.tensor(ids)], file=file, tasks=list(tasks))


def build(start: Start, **options) -> MultitaskPromptTuning:
    return MultitaskPromptTuning.build(MultitaskOptions(**options), P, BaseFacts(WIDTH), start)


@pytest.fixture
def source(tmp_path):
    """A trained prompt of tasks a, b, c with rank 2."""
    prompt = build(start_of(tasks="abc"), num_ranks=2)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    facts = {"method": "multitask_prompt_tuning", "tasks": ["a", "b", "c"]}
    save_prompt(tmp_path, prompt.plain() | {name: p.detach() for name, p in prompt.named_parameters()}, facts)
    return tmp_path, prompt


def test_every_task_starts_near_the_shared_prompt(tmp_path):
    plain = PromptTuning.build(ResidualOptions(), P, BaseFacts(WIDTH), start_of())().vectors
    prompt = build(start_of(tasks=["a", "b"]), num_ranks=3)
    for contribution in prompt.contributions():
        torch.testing.assert_close(contribution.vectors, plain, rtol=0.2, atol=0.05)
    assert not torch.equal(*(contribution.vectors for contribution in prompt.contributions()))
    assert build(start_of()).num_tasks == 1 and build(start_of()).plain()["virtual_tokens"].shape == (P, WIDTH)
    save_file({"virtual_tokens": plain.detach()}, tmp_path / "plain.safetensors")
    from_plain = build(start_of("file", tmp_path / "plain.safetensors", "ab"))
    assert torch.equal(from_plain.shared_prompt, plain)


def test_a_target_takes_what_pefts_inits_take(source):
    folder, prompt = source
    shared, cols, rows = (p.detach() for p in prompt.parameters())

    def taken(tasks=(), **options) -> list[torch.Tensor]:
        found = build(start_of("file", folder, tasks), num_ranks=2, **options)
        assert torch.equal(found.shared_prompt, shared)
        return [found.task_cols.detach(), found.task_rows.detach()]

    def assert_same(ours, theirs) -> None:
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)

    assert_same(taken(source_tasks="average"), [cols.mean(0, keepdim=True), rows.mean(0, keepdim=True)])
    assert_same(taken(), [cols.mean(0, keepdim=True), rows.mean(0, keepdim=True)])
    assert_same(taken(source_tasks="exact", source_task="c"), [cols[2:], rows[2:]])
    assert_same(taken("de", source_tasks="exact", source_task="a"), [cols[[0, 0]], rows[[0, 0]]])
    assert_same(taken("cab"), [cols[[2, 0, 1]], rows[[2, 0, 1]]])  # the same tasks, by their names
    own = build(start_of(tasks="de"), num_ranks=2)
    assert_same(taken("de", source_tasks="shared"), [own.task_cols.detach(), own.task_rows.detach()])
    assert build(start_of("file", folder), num_ranks=4, source_tasks="shared").task_rows.shape == (1, 4, WIDTH)


def test_pefts_adapters_are_sources(source, tmp_path):
    from peft import MultitaskPromptTuningConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.for_model("gpt2", n_embd=WIDTH, n_layer=1, n_head=2, vocab_size=20, n_positions=32)
    settings = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=3, num_ranks=2)
    model = get_peft_model(AutoModelForCausalLM.from_config(shape), settings)
    model.save_pretrained(tmp_path / "adapter")
    encoder = model.prompt_encoder["default"]
    prompt = build(start_of("file", tmp_path / "adapter", "xyz"), num_ranks=2)
    for number, contribution in enumerate(prompt.contributions()):
        wanted = encoder(torch.arange(P)[None], torch.tensor([number]))[0]
        torch.testing.assert_close(contribution.vectors, wanted)
    by_number = build(start_of("file", tmp_path / "adapter"), num_ranks=2, source_tasks="exact", source_task=1)
    torch.testing.assert_close(by_number().vectors, prompt.contributions()[1].vectors)


def test_what_a_source_does_not_have_is_refused_in_one_line(source, tmp_path):
    folder, _ = source
    (tmp_path / "plain").mkdir()
    save_file({"virtual_tokens": torch.zeros(P, WIDTH)}, tmp_path / "plain" / "prompt.safetensors")
    cases = [
        (start_of("file", folder), {"num_ranks": 1}, "has tasks of rank 2: set prompt.num_ranks=2"),
        (start_of("file", folder), {"source_tasks": "exact", "source_task": "d"}, "d is none of a, b, c"),
        (start_of("file", folder), {"source_tasks": "exact"}, "give both or none"),
        (start_of("file", folder), {"source_task": "a"}, "give both or none"),
        (start_of("file", folder, "abd"), {"source_tasks": "same"}, "are a, b, c: set average, exact or shared"),
        (start_of("vocab"), {"source_tasks": "average"}, "but prompt.init is vocab: set prompt.init=file"),
        (start_of("file", tmp_path / "plain"), {"source_tasks": "average"}, "is of another method: leave it out"),
    ]
    for start, options, message in cases:
        with pytest.raises((UserError, ValueError)) as caught:
            build(start, **{"num_ranks": 2} | options)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"holds \(5, 16\), this prompt is \(num_virtual_tokens, width\) = \(4, 16\)"):
        MultitaskPromptTuning.build(MultitaskOptions(num_ranks=2), 4, BaseFacts(WIDTH), start_of("file", folder))
    with pytest.raises(UserError, match="is a prompt of 3 tasks: export one"):
        PromptTuning.build(ResidualOptions(), P, BaseFacts(WIDTH), start_of("file", folder))


def test_one_task_is_selected_by_its_name(source):
    folder, prompt = source
    tensors, facts = select_task(*load_prompt(folder), "b")
    assert facts["method"] == "prompt_tuning" and set(tensors) == {"virtual_tokens"}
    assert torch.equal(tensors["virtual_tokens"], prompt.plain()["virtual_tokens"][1])
    assert select_task(*load_prompt(folder), None)[1]["method"] == "multitask_prompt_tuning"
    with pytest.raises(UserError, match="--task: d is none of a, b, c"):
        select_task(*load_prompt(folder), "d")
    with pytest.raises(UserError, match="--task: a is given but the prompt has no tasks"):
        select_task({"virtual_tokens": torch.zeros(P, WIDTH)}, {}, "a")
