"""Prefix tuning: step for step PEFT's, at every stage and with every way of computing, beside other methods."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ptune_dist.base.recompute import DEFAULTS
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.store import load_prompt
from tests.commands import run_command, run_commands
from tests.numerics.banks import write_alone, write_bank
from tests.numerics.banks import write_rows as write_bank_rows
from tests.numerics.methods import write_run
from tests.numerics.plain import NUM_VIRTUAL, peft_method_curve
from tests.numerics.test_curves import curve, train_all, zero_json

pytestmark = pytest.mark.long
KINDS = ["gpt2", "llama", "qwen2", "opt", "gpt_neox", "bloom"]  # the last one's attention is its own
PROMPT = {"method": "prefix_tuning"}


def shape_of(base: Path) -> tuple[int, int, int, int]:
    """[L, P, G, Dh]."""
    config = AutoConfig.from_pretrained(base)
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, NUM_VIRTUAL, num_heads, config.hidden_size // config.num_attention_heads


def start_of(base: Path) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape_of(base), generator=draw) for name in ("prefix_keys", "prefix_values")}


def peft_curve_of(base: Path) -> list[float]:
    from peft import PrefixTuningConfig

    start = {"embedding.weight": PrefixTuning.to_peft(start_of(base)).prompt_embeddings}
    return peft_method_curve(base, PrefixTuningConfig(num_virtual_tokens=NUM_VIRTUAL), start)


@pytest.fixture(scope="module")
def runs(tiny_bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    specs = [write_run(root, kind, tiny_bases[kind], PROMPT, start_of(tiny_bases[kind])) for kind in KINDS]
    return train_all(specs, root, num_ranks=1)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_under_peft(runs, tiny_bases, kind):
    assert curve(runs[kind]) == pytest.approx(peft_curve_of(tiny_bases[kind]), rel=1e-5)
    hashes = json.loads((runs[kind] / "base_hashes.json").read_text())
    assert hashes["after"] == hashes["before"] and hashes["before"]


def test_the_curve_depends_on_no_stage_and_no_way_of_computing(tiny_bases, tmp_path):
    base = tiny_bases["llama"]
    start = start_of(base)
    int8 = {"model": {"quantization": "int8"}}
    bf16 = {"model": {"dtype": "bfloat16"}}
    cases = {f"stage{stage}": {"deepspeed": zero_json(stage)} for stage in range(4)}
    cases |= {
        "recomputed": {"deepspeed": zero_json(3) | {"activation_checkpointing": DEFAULTS}},
        "small": {"train": {"micro_batch_tokens": 60}},
        "int8-0": int8,
        "int8-3": int8 | {"deepspeed": zero_json(3)},
        "bf16-0": bf16,
        "bf16-3": bf16 | {"deepspeed": zero_json(3)},
    }
    specs = [write_run(tmp_path, name, base, PROMPT, start, **sections) for name, sections in cases.items()]
    runs = train_all(specs, tmp_path, num_ranks=2)
    wanted = peft_curve_of(base)
    for name in ("stage0", "stage1", "stage2", "stage3", "recomputed", "small"):
        assert curve(runs[name]) == pytest.approx(wanted, rel=1e-5), name
    assert curve(runs["int8-3"]) == pytest.approx(curve(runs["int8-0"]), rel=1e-5)
    assert curve(runs["int8-0"]) == pytest.approx(wanted, rel=0.1)
    assert curve(runs["bf16-3"]) == pytest.approx(curve(runs["bf16-0"]), rel=0.02)
    assert curve(runs["bf16-0"]) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_sweep_of_several_methods_trains_each_member_as_alone(tiny_bases, tmp_path, kind):
    write_bank_rows(tmp_path)
    sweep = [
        {"prompt.method": "prompt_tuning"},
        {"prompt.method": "prefix_tuning"},
        {"prompt.method": "prefix_tuning", "prompt.num_virtual_tokens": 6, "seed": 1},
    ]
    bank = write_bank(tmp_path, "mixed", tiny_bases[kind], sweep, "prefix", deepspeed=zero_json(3))
    alone = write_alone(bank)
    train_all([(str(bank), [])] + [(str(path), []) for path in alone.values()], tmp_path, num_ranks=2)
    for name, path in alone.items():
        assert curve(tmp_path / "mixed" / "members" / name) == pytest.approx(curve(path.parent), rel=1e-5), name


def test_answers_and_an_exported_adapter_are_pefts(runs, tiny_bases, tmp_path):
    from peft import PeftModel

    commands = []
    for kind in ("gpt2", "llama"):
        run = str(runs[kind])
        commands.append(["export", run, "--to", "peft", "--out", str(tmp_path / kind)])
        output = ["--max-new-tokens", "8", "--output", str(tmp_path / f"{kind}.jsonl")]
        commands.append(["generate", run, "--input", "sample", *output])
    run_commands(commands)
    for kind in ("gpt2", "llama"):
        fresh = AutoModelForCausalLM.from_pretrained(tiny_bases[kind], dtype=torch.float32)
        model = PeftModel.from_pretrained(fresh, tmp_path / kind).eval()
        tokenizer = AutoTokenizer.from_pretrained(tiny_bases[kind])
        ids = torch.tensor([tokenizer.encode("sample =")])
        with torch.no_grad():
            for _ in range(8):
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
                if ids[0, -1] == tokenizer.eos_token_id:
                    break
        new = ids[0, len(tokenizer.encode("sample =")) :]
        answer = json.loads((tmp_path / f"{kind}.jsonl").read_text())["generated"]
        assert answer == tokenizer.decode(new, skip_special_tokens=True).strip(), kind
    stored = load_file(tmp_path / "llama" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(stored, PrefixTuning.to_peft(load_prompt(runs["llama"] / "prompt")[0]).prompt_embeddings)


def test_what_it_is_not_for_is_refused_in_one_line(runs, tiny_bases, tmp_path):
    config = str(runs["llama"] / "config.json")
    new = f"output_dir={tmp_path / 'no'}"
    cases = {
        "prompt.placement: prefix_tuning is for placement prefix": ["prompt.placement=infix"],
        "prompt.method: prefix_tuning is for causal bases": [f"model.path={tiny_bases['t5']}"],
        "needs an input before the target": ["data.train=some.txt", "data.template=null", "data.target=null"],
        "the input is empty, but prefix_tuning needs": ["data.template='{% if false %}{{ word }}{% endif %}'"],
    }
    for message, overrides in cases.items():
        failed = run_command("train", config, new, *overrides)
        assert failed.returncode == 2 and message in failed.stderr and failed.stderr.count("\n") == 1, failed.stderr
    failed = run_command("export", str(runs["llama"]), "--to", "prompt-embeds", "--out", str(tmp_path / "e"))
    assert failed.returncode == 2 and "keys and values of every layer" in failed.stderr
