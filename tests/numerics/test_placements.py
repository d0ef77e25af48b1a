"""Placements with contexts, end to end: the curve of a plain loop over whole texts, its answers, and the cache."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ptune_dist.prompts.store import load_prompt
from ptune_dist.run.metrics_log import read_metrics
from tests.commands import run_commands
from tests.conftest import SEQ2SEQ, write_config
from tests.evaluation.test_decoding import decode
from tests.numerics.banks import NUM_ROWS, read_json, train_all, write_rows
from tests.numerics.passes import (
    build_base,
    build_model,
    draw_tokens,
    plain_causal_logits,
    plain_seq2seq_logits,
)
from tests.numerics.plain import BATCH, NUM_VIRTUAL, PEAK, initial_vectors, load_plain, write_initial_prompt
from tests.numerics.test_curves import zero_json

pytestmark = pytest.mark.long

TEMPLATES = {
    "infix": "Write in capitals: {{ word }} =",
    "decoder": "Write in capitals: {{ word }} =",
    "template": "Write in capitals: {{ word }}{{ prompt }}, that is,",
    "shared": "Write in capitals: {{ prompt }}{{ word }} =",
}
NUM_NEW = 5
NUM_STEPS = 8
CACHED = {"context_cache_gib": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("placements")
    write_rows(made)
    return made


def write_run(folder: Path, name: str, base: Path, case: str, **overrides) -> Path:
    width = 16 if base.name == "opt" else 32
    initial = write_initial_prompt(width, folder / f"{name}.safetensors")
    placement = "template" if case == "shared" else case
    sections = {
        "model": {"path": str(base)},
        "prompt": {
            "num_virtual_tokens": NUM_VIRTUAL, "placement": placement, "init": "file", "init_file": str(initial),
        },
        "data": {"train": str(folder / "train.jsonl"), "template": TEMPLATES[case]},
        "train": {"max_steps": NUM_STEPS, "batch_size": BATCH, "learning_rate": PEAK},
    }  # fmt: skip
    for key, value in overrides.items():
        sections[key] = {**sections[key], **value} if isinstance(sections.get(key), dict) else value
    return write_config(folder / f"{name}.json", output_dir=str(folder / name), **sections)


def curve(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


def encode(tokenizer, case: str, row: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Context, rest and target of a row; the parts of a template are tokenized apart."""
    before, _, after = TEMPLATES[case].replace("{{ word }}", row["word"]).partition("{{ prompt }}")
    ids = tokenizer.encode(before)
    target = tokenizer.encode(" " + row["answer"], add_special_tokens=False) + [tokenizer.eos_token_id]
    rest = tokenizer.encode(after, add_special_tokens=False) if after else []
    return tuple(np.array(part, np.int64) for part in (ids, rest, target))


def plain_run(folder: Path, base_dir: Path, case: str) -> tuple[list[float], torch.Tensor]:
    """A plain loop's losses and its last prompt: AdamW, clipping at 1, linear to zero, each row's text by itself."""
    is_seq2seq = case == "decoder"
    base = load_plain(base_dir, "seq2seq" if is_seq2seq else "causal")
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    prompt = torch.nn.Parameter(initial_vectors(base.get_input_embeddings().embedding_dim))
    optimizer = torch.optim.AdamW([prompt], lr=PEAK, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / NUM_STEPS)
    orders = np.concatenate([np.random.default_rng([0, epoch]).permutation(len(rows)) for epoch in range(9)])
    forward, losses = plain_seq2seq_logits if is_seq2seq else plain_causal_logits, []
    for step in range(NUM_STEPS):
        coded = [encode(tokenizer, case, rows[i]) for i in orders[step * BATCH : (step + 1) * BATCH]]
        logits = torch.cat([forward(base, prompt, *parts) for parts in coded])
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(np.concatenate([one[2] for one in coded])))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([prompt], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, prompt.detach()


KINDS = {
    "infix": ("llama", "infix"), "template": ("llama", "template"), "shared": ("gpt2", "shared"),
    "bloom": ("bloom", "infix"), "t5": ("t5", "decoder"), "bart": ("bart", "decoder"),
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(folder, tiny_bases) -> dict[str, tuple[list[float], torch.Tensor]]:
    return {name: plain_run(folder, tiny_bases[kind], case) for name, (kind, case) in KINDS.items()}


@pytest.fixture(scope="module")
def runs(folder, tiny_bases) -> dict[str, Path]:
    """On one rank at ZeRO 0, each kind with and without a cache; int8 with a cache, also without."""
    configs, labels = {}, ["a", "b"]
    for name, (kind, case) in KINDS.items():
        configs[name] = write_run(folder, name, tiny_bases[kind], case)
        configs[f"{name}-cached"] = write_run(folder, f"{name}-cached", tiny_bases[kind], case, train=CACHED)
    model = {"model": {"path": str(tiny_bases["llama"]), "quantization": "int8"}}
    configs["int8"] = write_run(folder, "int8", tiny_bases["llama"], "infix", **model)
    configs["accuracy"] = write_accuracy(folder, tiny_bases["llama"], labels)
    train_all(list(configs.values()), folder)
    return {name: folder / name for name in configs}


def write_accuracy(folder: Path, base: Path, labels: list[str]) -> Path:
    """Rows whose answer is one of two labels."""
    rows = [json.loads(line) | {"label": labels[i % 2]} for i, line in enumerate(open(folder / "train.jsonl"))]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = str(folder / "labelled.jsonl")
    data = {"train": file, "validation": file, "target": " {{ label }}", "labels": labels}
    evaluate = {"metrics": ["accuracy"], "num_samples": 0}
    return write_run(folder, "accuracy", base, "infix", data=data, evaluate=evaluate, train=CACHED | {"max_steps": 4})


@pytest.mark.parametrize("name", KINDS)
def test_the_curve_and_the_prompt_are_those_of_a_plain_loop_over_whole_texts(expected, runs, name):
    losses, prompt = expected[name]
    for run in (runs[name], runs[f"{name}-cached"]):
        assert curve(run) == pytest.approx(losses, rel=1e-5)
        found = load_prompt(run / "prompt")[0]["virtual_tokens"]
        torch.testing.assert_close(found, prompt, rtol=0, atol=1e-4 * prompt.abs().max().item())
    rates = [line.get("context_hit_rate") for line in read_metrics(runs[f"{name}-cached"])]
    # Three steps are an epoch. A text that all rows share is not read from the cache.
    assert rates[3:] == [None if name == "shared" else 1.0] * (NUM_STEPS - 3)


# Without a cache contexts are cut over ranks in the same way for all kinds: one of each family is enough.
@pytest.mark.parametrize(
    "uncached", [["infix", "t5"], pytest.param(list(KINDS), marks=pytest.mark.extended)], ids=["some", "all"]
)
def test_sharded_over_two_ranks_with_and_without_a_cache_the_curve_is_the_same(
    expected, runs, folder, tiny_bases, uncached
):
    configs = {}
    for name, (kind, case) in KINDS.items():
        for suffix, train in (("", {}), ("-cached", CACHED)) if name in uncached else (("-cached", CACHED),):
            train = train | {"micro_batch_tokens": 150}
            wide = f"{name}-zero3{suffix}-{len(uncached)}"
            configs[wide] = write_run(folder, wide, tiny_bases[kind], case, deepspeed=zero_json(3), train=train)
    model = {"model": {"path": str(tiny_bases["llama"]), "quantization": "int8"}}
    more = {"deepspeed": zero_json(3), "train": CACHED}
    int8 = f"int8-zero3-{len(uncached)}"
    configs[int8] = write_run(folder, int8, tiny_bases["llama"], "infix", **model, **more)
    train_all(list(configs.values()), folder, num_ranks=2)
    for wide in configs:
        name = wide.partition("-")[0]
        losses = curve(runs["int8"]) if name == "int8" else expected[name][0]
        assert curve(folder / wide) == pytest.approx(losses, rel=1e-5), wide
        if "cached" in wide and name != "shared":
            rates = [line["context_hit_rate"] for line in read_metrics(folder / wide)]
            # A context is missed once by its owner, and at most once more by the other rank, to even their work.
            assert rates[0] == 0.0 and BATCH * sum(1 - rate for rate in rates) <= 2 * NUM_ROWS, (wide, rates)


def test_answers_are_those_of_greedy_decoding_by_whole_forwards(runs, folder, tiny_bases, tmp_path):
    out = {name: tmp_path / f"{name}.jsonl" for name in KINDS}
    more = ["--input-file", str(folder / "held_out.jsonl"), "--max-new-tokens", str(NUM_NEW), "--output"]
    run_commands([["generate", str(runs[name]), *more, str(file)] for name, file in out.items()])
    for name, (kind, case) in KINDS.items():
        base = load_plain(tiny_bases[kind], "seq2seq" if case == "decoder" else "causal")
        tokenizer, prompt = (
            AutoTokenizer.from_pretrained(tiny_bases[kind]), load_prompt(runs[name] / "prompt")[0]["virtual_tokens"],
        )  # fmt: skip
        answers = [json.loads(line) for line in out[name].read_text().splitlines()]
        for row in answers:
            context, rest, _ = encode(tokenizer, case, row)
            wanted = greedy(base, prompt, context, rest, tokenizer.eos_token_id)
            assert row["generated"] == tokenizer.decode(wanted, skip_special_tokens=True).strip(), name
        # bloom answers spaces, which are stripped: tests/evaluation/test_generate.py compares its tokens
        assert any(row["generated"] for row in answers) or name in ("bart", "bloom"), name


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_after_a_prompt_in_the_decoder_rows_of_unequal_length_are_answered_as_each_alone(kind):
    base = build_base(kind)
    model = build_model(base, "seq2seq", "decoder", num_virtual=(NUM_VIRTUAL,))
    draw = np.random.default_rng(0)
    contexts = [draw_tokens(draw, length) for length in (12, 25, 3, 40)]
    found = decode(model, [(one.tolist(), []) for one in contexts], 4096, None, (NUM_NEW,) * len(contexts))
    prompt = model.prompts[0].virtual_tokens.detach()
    assert found == [greedy(base, prompt, context, context[:0], -1) for context in contexts]


@torch.no_grad()
def greedy(base, prompt, context, rest, eos: int) -> list[int]:
    """The likeliest next token again and again, the whole text read anew each time."""
    forward = plain_seq2seq_logits if base.config.is_encoder_decoder else plain_causal_logits
    answer: list[int] = []
    while len(answer) < NUM_NEW and answer[-1:] != [eos]:
        target = np.array([*answer, 0], np.int64)  # its last token is not read
        answer.append(int(forward(base, prompt, context, rest, target)[-1].argmax()))
    return answer


def test_accuracy_by_likelihood_is_that_of_whole_forwards(runs, folder, tiny_bases):
    run = runs["accuracy"]
    tokenizer, base = AutoTokenizer.from_pretrained(tiny_bases["llama"]), load_plain(tiny_bases["llama"])
    prompt = load_prompt(run / "prompt")[0]["virtual_tokens"]
    rows = [json.loads(line) for line in (folder / "labelled.jsonl").read_text().splitlines()]

    @torch.no_grad()
    def loss_of(row: dict, label: str) -> float:
        context, rest, target = encode(tokenizer, "infix", row | {"answer": label})
        logits = plain_causal_logits(base, prompt, context, rest, target)
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(target), reduction="sum").item()

    right = [min("ab", key=lambda label: loss_of(row, label)) == row["label"] for row in rows]
    assert read_json(run / "summary.json")["validation"]["accuracy"] == pytest.approx(sum(right) / len(rows))


def test_a_second_job_finds_the_contexts_of_the_first_on_disk_and_never_those_of_another_base(
    expected, folder, tiny_bases
):
    train = {"context_cache_dir": str(folder / "contexts")}
    changed = folder / "changed" / "llama"
    copy_changed(tiny_bases["llama"], changed)
    configs = [write_run(folder, f"job{n}", tiny_bases["llama"], "infix", train=train) for n in (1, 2)]
    configs.append(write_run(folder, "job3", changed, "infix", train=train))
    train_all(configs, folder)
    first, second, third = (read_metrics(folder / f"job{n}") for n in (1, 2, 3))
    assert first[0]["context_hit_rate"] == 0.0 and second[0]["context_hit_rate"] == 1.0
    assert [line["loss"] for line in second] == [line["loss"] for line in first]
    assert third[0]["context_hit_rate"] == 0.0
    assert curve(folder / "job3") == pytest.approx(plain_run(folder, changed, "infix")[0], rel=1e-5)
    assert abs(third[0]["loss"] - first[0]["loss"]) > 1e-3


def copy_changed(base: Path, to: Path) -> None:
    """A copy of a base with other numbers in one tensor of its first layer."""
    shutil.copytree(base, to)
    tensors = load_file(to / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"] *= 1.5
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
