"""Invariants 8 and 9: an exported adapter gives PEFT our logits, and an answer depends on nothing but its own row."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptune_dist.prompts.store import load_prompt
from tests.commands import run_command, run_commands, run_module
from tests.conftest import ARCHITECTURES, TINY, write_config
from tests.numerics.plain import with_prompt
from tests.numerics.test_curves import SCRIPT

WORDS = ["a", "held", "adaptive", "of", "prompting"]


@pytest.fixture(scope="module")
def runs(tiny_bases, tmp_path_factory) -> dict[str, Path]:
    """A short run on each architecture."""
    root = tmp_path_factory.mktemp("runs")
    specs = []
    for kind in ARCHITECTURES:
        (root / kind).mkdir()
        config = write_config(
            root / kind / "config.json", model={"path": str(tiny_bases[kind])}, prompt={"init": "random"},
            train={"max_steps": 3},
        )  # fmt: skip
        specs.append([str(config), []])
    (root / "specs.json").write_text(json.dumps(specs))
    done = run_module(SCRIPT, str(root / "specs.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    return {kind: root / kind / "run" for kind in ARCHITECTURES}


def one_pass_logits(base, prompt: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, P + T, V] with the virtual tokens before every row."""
    return base(**with_prompt(base, prompt, ids, mask)).logits


def greedy(base, prompt: torch.Tensor, ids: list[int], num_tokens: int, eos: int) -> list[int]:
    """One row alone, without padding, without a cache."""
    answer: list[int] = []
    while len(answer) < num_tokens:
        row = torch.tensor([ids + answer])
        answer.append(int(one_pass_logits(base, prompt, row, torch.ones_like(row))[0, -1].argmax()))
        if answer[-1] == eos:
            return answer[:-1]
    return answer


@pytest.mark.long
def test_an_exported_adapter_gives_peft_equal_logits(runs, tiny_bases, tmp_path):
    from peft import PeftModel

    run_commands([["export", str(run), "--to", "peft", "--out", str(tmp_path / k)] for k, run in runs.items()])
    for kind, run in runs.items():
        tokenizer = AutoTokenizer.from_pretrained(tiny_bases[kind])
        batch = tokenizer(WORDS, return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False)
        prompt = load_prompt(run / "prompt")[0]["virtual_tokens"]
        with torch.no_grad():
            base = AutoModelForCausalLM.from_pretrained(tiny_bases[kind], dtype=torch.float32).eval()
            ours = one_pass_logits(base, prompt, batch["input_ids"], batch["attention_mask"])
            theirs = PeftModel.from_pretrained(base, tmp_path / kind).eval()(**batch).logits
        seen = torch.nn.functional.pad(batch["attention_mask"], (len(prompt), 0), value=1).bool()
        torch.testing.assert_close(theirs[seen], ours[seen], rtol=1e-5, atol=1e-5, msg=lambda m, k=kind: f"{k}: {m}")


@pytest.mark.long
def test_a_batch_of_unequal_rows_is_answered_as_each_row_alone(runs, tiny_bases, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"word": word}) + "\n" for word in WORDS))
    more = ["--input-file", str(rows), "--max-new-tokens", "6", "--output"]
    run_commands([["generate", str(run), *more, str(tmp_path / f"{k}.jsonl")] for k, run in runs.items()])
    for kind, run in runs.items():
        out = tmp_path / f"{kind}.jsonl"
        tokenizer = AutoTokenizer.from_pretrained(tiny_bases[kind])
        base = AutoModelForCausalLM.from_pretrained(tiny_bases[kind], dtype=torch.float32).eval()
        prompt = load_prompt(run / "prompt")[0]["virtual_tokens"]
        with torch.no_grad():
            wanted = [
                tokenizer.decode(
                    greedy(base, prompt, tokenizer.encode(f"{word} ="), 6, tokenizer.eos_token_id),
                    skip_special_tokens=True,
                ).strip()
                for word in WORDS
            ]
        answers = [json.loads(line) for line in out.read_text().splitlines()]
        assert [answer["word"] for answer in answers] == WORDS, kind
        assert [answer["generated"] for answer in answers] == wanted, kind


# How a base knows positions (learned, rotary, ALiBi; in an encoder-decoder) and where a prompt stands.
TOKENS = {"method": "trainable_tokens", "num_virtual_tokens": 0, "init": "base", "tokens": ["a", "=", "i"]}
ANSWERING = {
    "gpt2": ("gpt2", {}),
    "gpt2_keys": ("gpt2", {"method": "prefix_tuning"}),
    "llama_late": ("llama", {"method": "late_prompt"}),
    "llama_gated": ("llama", {"method": "adaption_prompt", "num_virtual_tokens": 0}),
    "bloom_tokens": ("bloom", TOKENS),
    "bloom_late": ("bloom", {"method": "late_prompt"}),
    "t5": ("t5", {}),
    "bart": ("bart", {"placement": "decoder"}),
}
# Inputs of gpt2 and bart have 124 of 128 positions at most: the third row fills them, the fifth leaves three.
LONG_WORDS = ["a", "held", "x" * 122, "adaptive", "y" * 119, "of", "prompting"]
ANSWER_SCRIPT = str(Path(__file__).with_name("answer_many.py"))


@pytest.fixture(scope="module")
def answering_runs(tiny_bases, tmp_path_factory) -> dict[str, Path]:
    """A run of one step for each of ANSWERING, in one launch."""
    root = tmp_path_factory.mktemp("answering")
    specs = []
    for name, (kind, prompt) in ANSWERING.items():
        (root / name).mkdir()
        method = {"init": "random", **prompt}
        config = write_config(
            root / name / "config.json",
            model={"path": str(tiny_bases[kind])},
            prompt=method,
            data={"max_length": 124},
            train={"max_steps": 1},
        )
        specs.append([str(config), []])
    (root / "specs.json").write_text(json.dumps(specs))
    done = run_module(SCRIPT, str(root / "specs.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: root / name / "run" for name in ANSWERING}


def answer_all(runs: dict[str, Path], folder: Path, hows: list[dict], num_ranks: int) -> list[dict[str, dict]]:
    """Answers to LONG_WORDS for each `how` (overrides, alone), by run and kind of decoding, in one launch."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"word": word}) + "\n" for word in LONG_WORDS))
    specs = [{"run": str(run), **how} for how in hows for run in runs.values()]
    (folder / "specs.json").write_text(json.dumps(specs))
    files = [str(folder / name) for name in ("specs.json", "rows.jsonl", "out.json")]
    done = run_module(ANSWER_SCRIPT, *files, num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    found = iter(json.loads((folder / "out.json").read_text()))
    return [{name: next(found) for name in runs} for _ in hows]


@pytest.mark.long
def test_an_answer_does_not_depend_on_its_batch_the_ranks_or_the_size_of_a_batch(answering_runs, tiny_bases, tmp_path):
    def how(stage: int, micro_batch_tokens: int, alone: bool = False) -> dict:
        json_file = f"deepspeed=configs/deepspeed/zero{stage}_fp32.json"
        return {"overrides": [json_file, f"train.micro_batch_tokens={micro_batch_tokens}"], "alone": alone}

    one_rank = [how(0, 4096, alone=True), how(0, 40), how(3, 300)]
    alone, *others = answer_all(answering_runs, tmp_path / "one", one_rank, 1)
    others += answer_all(answering_runs, tmp_path / "two", [how(0, 4096), how(3, 40)], 2)
    assert all(other == alone for other in others)
    for name, found in alone.items():
        assert len(set(found["sampled"])) > 3 and found["sampled"] != found["greedy"], name

    base = AutoModelForCausalLM.from_pretrained(tiny_bases["gpt2"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bases["gpt2"])
    prompt = load_prompt(answering_runs["gpt2"] / "prompt")[0]["virtual_tokens"]
    rows = [tokenizer.encode(f"{word} =") for word in LONG_WORDS]
    allowed = [min(6, 128 - len(prompt) - len(row)) for row in rows]
    assert allowed == [6, 6, 0, 6, 3, 6, 6]
    with torch.no_grad():
        expected = [
            tokenizer.decode(greedy(base, prompt, row, most, tokenizer.eos_token_id), skip_special_tokens=True).strip()
            for row, most in zip(rows, allowed, strict=True)
        ]
    assert alone["gpt2"]["greedy"] == expected


@pytest.mark.long
def test_evaluation_and_generation_over_ranks_count_every_row_once(tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    lines = (TINY / "data" / "validation.jsonl").read_text().splitlines()[:7]  # shared by neither 2 nor 4 ranks
    held_out.write_text("\n".join(lines) + "\n")
    config = write_config(
        tmp_path / "config.json", prompt={"num_virtual_tokens": 6}, train={"max_steps": 30, "batch_size": 32},
        evaluate={"metrics": ["exact_match", "perplexity"]}, data={"validation": str(held_out)},
    )  # fmt: skip
    done = run_command("train", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    found = []
    for num_ranks, stage in ((1, 0), (2, 3), (4, 2)):
        done = run_command(
            "evaluate", str(run), f"deepspeed=configs/deepspeed/zero{stage}_fp32.json",
            "train.micro_batch_tokens=64", num_ranks=num_ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads((run / "evaluation.json").read_text()))
    for other in found[1:]:
        assert other["num_examples"] == found[0]["num_examples"] == 7
        assert other["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
        assert other["exact_match"] == found[0]["exact_match"]
        assert other["samples"] == found[0]["samples"]
    assert json.loads((run / "summary.json").read_text())["validation"]["loss"] == pytest.approx(found[0]["loss"])

    done = run_command("generate", str(run), "--input-file", str(held_out), num_ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["word"] for row in rows] == [json.loads(line)["word"] for line in lines]
    right = [row["generated"].strip() == row["answer"] for row in rows]
    assert sum(right) / 7 == found[0]["exact_match"]


def test_accuracy_is_the_share_of_rows_whose_label_is_likeliest(tiny_bases, tmp_path):
    rows = [{"text": word, "label": ["yes", "no", "maybe"][i % 3]} for i, word in enumerate(WORDS * 2)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(
        tmp_path / "config.json", model={"path": str(tiny_bases["gpt2"])},
        data={
            "train": str(data), "validation": str(data), "template": "{{ text }}:", "target": " {{ label }}",
            "labels": ["yes", "no", "maybe"],
        },
        prompt={"init": "labels"}, train={"max_steps": 2}, evaluate={"metrics": ["accuracy"], "num_samples": 0},
    )  # fmt: skip
    done = run_command("train", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(tiny_bases["gpt2"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bases["gpt2"])
    prompt = load_prompt(tmp_path / "run" / "prompt")[0]["virtual_tokens"]

    def log_likelihood(text: str, label: str) -> float:
        before = tokenizer.encode(f"{text}:")
        after = tokenizer.encode(f" {label}") + [tokenizer.eos_token_id]
        ids = torch.tensor([before + after])
        with torch.no_grad():
            logits = one_pass_logits(base, prompt, ids, torch.ones_like(ids))[0]
        start = len(prompt) + len(before) - 1
        return logits[start:-1].log_softmax(-1)[range(len(after)), after].sum().item()

    chosen = [max(["yes", "no", "maybe"], key=lambda label: log_likelihood(row["text"], label)) for row in rows]
    right = [label == row["label"] for label, row in zip(chosen, rows, strict=True)]
    assert summary["validation"]["accuracy"] == pytest.approx(sum(right) / len(rows))
