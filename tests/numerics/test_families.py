"""Invariants 3 and 8 beyond causal bases: a seq2seq base's and an encoder's curve is that of a plain loop and of PEFT,
their answers are each row's own, and an exported adapter gives PEFT our logits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedModel

from ptune_dist.base.load import fill_whole
from ptune_dist.families import FAMILIES
from ptune_dist.families.find import open_any
from ptune_dist.prompts.export import export_peft
from ptune_dist.prompts.store import load_prompt
from ptune_dist.run.metrics_log import read_metrics
from tests.commands import run_commands
from tests.conftest import ENCODERS, LABELS, SEQ2SEQ, TINY, write_config
from tests.numerics.plain import (
    NUM_VIRTUAL,
    encode_row,
    load_plain,
    peft_curve,
    plain_curve,
    read_rows,
    with_prompt,
    write_initial_prompt,
)
from tests.numerics.test_curves import curve, train_all

pytestmark = pytest.mark.long
KINDS = SEQ2SEQ + ENCODERS
# How the real tokenizers start and end a text; roberta's here adds nothing.
SPECIALS = {"t5": "$A <eos>", "bart": "<cls> $A <eos>", "bert": "<cls> $A <sep>"}
# Layers so much larger that random bases answer one row unlike another, yet rounding is not amplified.
SCALES = {"t5": 1.0, "bart": 4.0, "bert": 4.0, "roberta": 6.0}
NUM_NEW = 6
HELD_OUT = read_rows(TINY / "data" / "validation.jsonl")[:20]


def family_of(kind: str) -> str:
    return "seq2seq" if kind in SEQ2SEQ else "encoder"


@pytest.fixture(scope="module")
def bases(tiny_bases, tmp_path_factory) -> dict[str, Path]:
    """The tiny bases with larger layers, and with tokenizers that start and end a text."""
    root = tmp_path_factory.mktemp("ended")
    for kind in KINDS:
        shutil.copytree(tiny_bases[kind], root / kind)
        enlarge_layers(root / kind / "model.safetensors", SCALES[kind])
        if kind in SPECIALS:
            tokenizer = AutoTokenizer.from_pretrained(root / kind)
            tokenizer.add_special_tokens({"cls_token": "<cls>", "sep_token": "<sep>"})
            ids = [(word, tokenizer.convert_tokens_to_ids(word)) for word in SPECIALS[kind].split() if word != "$A"]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=SPECIALS[kind], special_tokens=ids)
            tokenizer.save_pretrained(root / kind)
            assert len(AutoTokenizer.from_pretrained(root / kind).encode("a")) == len(SPECIALS[kind].split())
    return {kind: root / kind for kind in KINDS}


def enlarge_layers(file: Path, scale: float) -> None:
    """Multiply every matrix but the embeddings."""
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.dim() > 1 and "embed" not in name and "shared" not in name:
            tensor.mul_(scale)
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory) -> dict[str, Path]:
    """A run on each base, in one launch."""
    root = tmp_path_factory.mktemp("runs")
    write_rows(root / "train.jsonl", read_rows())
    write_rows(root / "held_out.jsonl", HELD_OUT)
    specs = []
    for kind in KINDS:
        (root / kind).mkdir()
        initial = write_initial_prompt(32, root / kind / "initial.safetensors")
        config = write_config(
            root / kind / "config.json", output_dir=str(root / kind), model={"path": str(bases[kind])},
            prompt={"num_virtual_tokens": NUM_VIRTUAL, "init": "file", "init_file": str(initial)},
            data={"train": str(root / "train.jsonl"), "validation": str(root / "held_out.jsonl"),
                  "labels": LABELS if family_of(kind) == "encoder" else None,
                  "target": " {{ answer }}" if family_of(kind) == "seq2seq" else "{{ label }}"},
            evaluate={"metrics": ["exact_match"] + (["accuracy"] if family_of(kind) == "encoder" else []),
                      "max_new_tokens": NUM_NEW},
        )  # fmt: skip
        specs.append((str(config), []))
    return train_all(specs, root, num_ranks=1)


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def starting_head(base: Path, kind: str) -> dict[str, torch.Tensor] | None:
    """The numbers that our encoder's head starts from, by name; everything else is the base's own."""
    if kind in SEQ2SEQ:
        return None
    started = fill_whole(open_any(str(base), labels=LABELS, dtype=torch.float32, seed=0))
    return {name: p.detach().clone() for name, p in started.named_parameters() if p.requires_grad}


def load_trained(base: Path, kind: str, run: Path) -> tuple[PreTrainedModel, torch.Tensor]:
    """transformers' own base, with the run's head if it has one, and the run's virtual tokens."""
    tensors = load_prompt(run / "prompt")[0]
    head = {name.removeprefix("head."): t for name, t in tensors.items() if name.startswith("head.")}
    return load_plain(base, family_of(kind), head), tensors["virtual_tokens"]


def encoder_inputs(base, prompt: torch.Tensor, tokenizer, word: str) -> dict[str, torch.Tensor]:
    """One row alone, without padding."""
    ids = torch.tensor([tokenizer.encode(f"{word} =")])
    return with_prompt(base, prompt, ids, torch.ones_like(ids))


@torch.no_grad()
def plain_answer(base, prompt: torch.Tensor, tokenizer, word: str, kind: str) -> str:
    """The likeliest label, or the likeliest token after token, all computed anew for each."""
    inputs = encoder_inputs(base, prompt, tokenizer, word)
    if kind in ENCODERS:
        return LABELS[base(**inputs).logits[0].argmax()]
    answer = [base.config.decoder_start_token_id]
    while len(answer) <= NUM_NEW and (len(answer) == 1 or answer[-1] != tokenizer.eos_token_id):
        logits = base(**inputs, decoder_input_ids=torch.tensor([answer]), use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
    return tokenizer.decode(answer[1:], skip_special_tokens=True).strip()


@torch.no_grad()
def plain_loss(base, prompt: torch.Tensor, tokenizer, rows: list[dict[str, str]]) -> float:
    """Loss per supervised token of a seq2seq base, row after row."""
    total, count = 0.0, 0
    for row in rows:
        _, target = encode_row(tokenizer, row, "seq2seq")
        inputs = encoder_inputs(base, prompt, tokenizer, row["word"])
        total += base(**inputs, labels=torch.tensor([target])).loss.item() * len(target)
        count += len(target)
    return total / count


def test_every_family_trains_as_a_plain_loop_and_as_peft_does(runs, bases):
    for kind in KINDS:
        ours, head = curve(runs[kind]), starting_head(bases[kind], kind)
        assert min(line["grad_norm"] for line in read_metrics(runs[kind])) > 1e-3, kind
        assert ours == pytest.approx(plain_curve(bases[kind], family=family_of(kind), head=head), rel=1e-5), kind
        assert ours == pytest.approx(peft_curve(bases[kind], family_of(kind), head), rel=1e-5), kind
        hashes = read_json(runs[kind] / "base_hashes.json")
        assert hashes["after"] == hashes["before"] and hashes["before"], kind


def test_an_encoders_head_is_trained_and_stored_with_its_prompt(runs, bases):
    for kind in ENCODERS:
        tensors, facts = load_prompt(runs[kind] / "prompt")
        head = starting_head(bases[kind], kind)
        assert set(tensors) == {"virtual_tokens"} | {f"head.{name}" for name in head}
        assert all(not torch.equal(tensors[f"head.{name}"], start) for name, start in head.items())
        assert facts["labels"] == LABELS and facts["base"]["family"] == "encoder"
    assert {"bert.pooler.dense.weight", "classifier.weight"} < set(starting_head(bases["bert"], "bert"))


def test_answers_and_metrics_are_those_of_each_row_alone(runs, bases, tmp_path):
    commands, wanted, judged, embedded = [], {}, {}, {}
    for kind in KINDS:
        base, prompt = load_trained(bases[kind], kind, runs[kind])
        tokenizer = AutoTokenizer.from_pretrained(bases[kind])
        wanted[kind] = [plain_answer(base, prompt, tokenizer, row["word"], kind) for row in HELD_OUT]
        run, rows, out = str(runs[kind]), runs[kind].parent / "held_out.jsonl", tmp_path / kind
        commands.append(["generate", run, "--input-file", str(rows), "--output", f"{out}.jsonl"])
        if kind in ENCODERS:
            right = [answer == row["label"] for answer, row in zip(wanted[kind], HELD_OUT, strict=True)]
            judged[kind] = {"exact_match": sum(right) / len(right), "accuracy": sum(right) / len(right)}
            continue
        # every other row wants just what it gets, where that is a text
        hits = [i % 2 == 1 and answer.strip() != "" for i, answer in enumerate(wanted[kind])]
        told = [answer if hit else "else" for answer, hit in zip(wanted[kind], hits, strict=True)]
        rows = [row | {"answer": answer} for row, answer in zip(HELD_OUT, told, strict=True)]
        judged[kind] = {"exact_match": sum(hits) / len(hits), "loss": plain_loss(base, prompt, tokenizer, rows)}
        embedded[kind] = encoder_inputs(base, prompt, tokenizer, "held")["inputs_embeds"][0].detach()
        commands.append(["evaluate", run, f"data.validation={write_rows(tmp_path / f'{kind}-told.jsonl', rows)}"])
        commands.append(["export", run, "--to", "prompt-embeds", "--input", "held", "--out", str(out)])
    run_commands(commands)
    for kind in KINDS:
        answers = [json.loads(line)["generated"] for line in (tmp_path / f"{kind}.jsonl").read_text().splitlines()]
        assert answers == wanted[kind], kind
        assert len(set(answers)) > 1, kind  # the comparison means something
        found = read_json(runs[kind] / "summary.json")["validation"]
        if kind in SEQ2SEQ:
            found = read_json(runs[kind] / "evaluation.json")
            exported = load_file(tmp_path / kind / "prompt_embeds.safetensors")["prompt_embeds.0"]
            assert torch.equal(exported, embedded[kind]), kind
        for metric, value in judged[kind].items():
            assert found[metric] == pytest.approx(value, rel=1e-5), (kind, metric)


def test_an_exported_adapter_gives_peft_equal_logits(runs, bases, tmp_path):
    from peft import PeftModel

    for kind in KINDS:
        export_peft(*load_prompt(runs[kind] / "prompt"), FAMILIES[family_of(kind)].peft_task, tmp_path / kind)
        tokenizer = AutoTokenizer.from_pretrained(bases[kind])
        words = [row["word"] for row in HELD_OUT]
        batch = tokenizer(words, return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False)
        base, prompt = load_trained(bases[kind], kind, runs[kind])
        more = {"decoder_input_ids": batch["input_ids"]} if kind in SEQ2SEQ else {}
        with torch.no_grad():
            ours = base(**with_prompt(base, prompt, batch["input_ids"], batch["attention_mask"]), **more).logits
            fresh = load_plain(bases[kind], family_of(kind), {})
            theirs = PeftModel.from_pretrained(fresh, tmp_path / kind).eval()(**batch, **more).logits
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5, msg=lambda m, k=kind: f"{k}: {m}")
