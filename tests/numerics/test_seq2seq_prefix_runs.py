"""Prefix tuning of encoder-decoders as runs: step for step PEFT's, at every stage, in sweeps, resumed and exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from ptune_dist.base.recompute import DEFAULTS
from ptune_dist.prompts.peft_prefix import for_decoder
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.store import load_prompt
from tests.commands import run_command, run_commands
from tests.conftest import extended_beyond
from tests.numerics.banks import check_banks, write_bank
from tests.numerics.banks import write_rows as write_bank_rows
from tests.numerics.methods import write_run
from tests.numerics.plain import NUM_VIRTUAL, load_plain, peft_method_curve
from tests.numerics.test_curves import curve, train_all, zero_json

pytestmark = pytest.mark.long
PROMPT = {"method": "prefix_tuning"}
DECODER = PROMPT | {"placement": "decoder"}


def start_of(base: Path, num_stacks: int = 1) -> dict[str, torch.Tensor]:
    """Random keys and values of the layers of so many stacks."""
    config = AutoConfig.from_pretrained(base)
    num_heads = config.num_attention_heads
    width = config.hidden_size // num_heads
    shape = (num_stacks * config.num_hidden_layers, NUM_VIRTUAL, num_heads, width)
    draw = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=draw) for name in ("prefix_keys", "prefix_values")}


def peft_curve_of(base: Path) -> list[float]:
    """PEFT's own prefix, with as many layers as let it give each of the decoder's one of its own."""
    from peft import PrefixTuningConfig

    adapter = PrefixTuning.to_peft(start_of(base))
    found = for_decoder(adapter, adapter.settings)
    settings = PrefixTuningConfig(num_virtual_tokens=NUM_VIRTUAL, num_layers=found.settings["num_layers"])
    return peft_method_curve(base, settings, {"embedding.weight": found.prompt_embeddings}, "seq2seq")


@pytest.fixture(scope="module")
def runs(tiny_bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("seq2seq")
    t5 = tiny_bases["t5"]
    int8 = {"model": {"quantization": "int8"}}
    bf16 = {"model": {"dtype": "bfloat16"}}
    sharded = {"deepspeed": zero_json(3)}
    recomputed = {"deepspeed": zero_json(3) | {"activation_checkpointing": DEFAULTS}}
    recomputed |= {"train": {"micro_batch_tokens": 60}}
    specs = [write_run(root, kind, tiny_bases[kind], DECODER, start_of(tiny_bases[kind])) for kind in ("t5", "bart")]
    cached = {"train": {"context_cache_gib": 0.01, "micro_batch_tokens": 60}}
    specs.append(write_run(root, "t5-cached", t5, DECODER, start_of(t5), **sharded, **cached))
    cases = {"0": {}, "recomputed": recomputed, "int8-0": int8, "int8-3": int8 | sharded, "bf16-3": bf16 | sharded}
    both = PROMPT | {"placement": "both"}
    specs += [write_run(root, f"both-{name}", t5, both, start_of(t5, 3), **more) for name, more in cases.items()]
    encoder = PROMPT | {"placement": "encoder"}
    cases = {"0": {}, "3": sharded}
    bart = tiny_bases["bart"]
    specs += [write_run(root, f"encoder-{name}", bart, encoder, start_of(bart), **more) for name, more in cases.items()]
    return train_all(specs, root, num_ranks=2)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_decoders_prefix_trains_as_under_peft(runs, tiny_bases, kind):
    wanted = peft_curve_of(tiny_bases[kind])
    assert wanted[-1] < wanted[0]
    assert curve(runs[kind]) == pytest.approx(wanted, rel=1e-5)
    hashes = json.loads((runs[kind] / "base_hashes.json").read_text())
    assert hashes["after"] == hashes["before"] and hashes["before"]


def test_the_curve_depends_on_no_stage_and_no_way_of_computing(runs):
    assert curve(runs["t5-cached"]) == pytest.approx(curve(runs["t5"]), rel=1e-5)
    wanted = curve(runs["both-0"])
    assert wanted[-1] < wanted[0]
    assert curve(runs["both-recomputed"]) == pytest.approx(wanted, rel=1e-5)
    assert curve(runs["both-int8-3"]) == pytest.approx(curve(runs["both-int8-0"]), rel=1e-5)
    assert curve(runs["both-int8-0"]) == pytest.approx(wanted, rel=0.1)
    assert curve(runs["both-bf16-3"]) == pytest.approx(wanted, rel=0.05)
    assert curve(runs["encoder-3"]) == pytest.approx(curve(runs["encoder-0"]), rel=1e-5)


KEY = {"prompt.method": "prefix_tuning"}
SWEEP = [
    {**KEY, "seed": 1, "prompt.init": "random", "train.learning_rate": 0.02},
    {**KEY, "prompt.init_text": "Upper case", "train.weight_decay": 0.1, "prompt.num_frozen": 2},
    {**KEY, "prompt.reparameterization": "mlp", "prompt.encoder_hidden_size": 5},
    {**KEY, "prompt.train_keys": False, "prompt.init": "zero", "prompt.num_virtual_tokens": 6},
]


@pytest.mark.parametrize("placement", extended_beyond(["decoder"], ["decoder", "both"]))
def test_a_sweep_trains_each_member_as_alone(tiny_bases, tmp_path, placement):
    write_bank_rows(tmp_path)
    cached = {"train": {"context_cache_gib": 0.01}} if placement == "decoder" else {}
    bank = write_bank(tmp_path, "bank", tiny_bases["t5"], SWEEP, placement, deepspeed=zero_json(3), **cached)
    check_banks([bank], tmp_path)


def test_a_run_from_a_text_resumes_bit_for_bit_and_its_prompt_is_a_start(tiny_bases, tmp_path):
    sharded = {"deepspeed": zero_json(3), "checkpoint": {"every": 3, "keep": 9}, "train": {"max_steps": 6}}
    moving = PROMPT | {"init": "text", "init_text": "Write in capitals"}
    cases = {"plain": ("t5", moving), "mlp": ("bart", moving | {"reparameterization": "mlp"})}
    specs = [write_run(tmp_path, n, tiny_bases[kind], prompt, **sharded) for n, (kind, prompt) in cases.items()]
    runs = train_all(specs, tmp_path, num_ranks=2)
    again = []
    for name in cases:
        copy = tmp_path / f"{name}-resumed"
        shutil.copytree(runs[name], copy)
        (copy / "summary.json").unlink()
        shutil.rmtree(copy / "checkpoints" / "step-00000006")
        again.append((str(runs[name] / "config.json"), [f"output_dir={copy}"]))
    stay = sharded | {"train": {"max_steps": 1, "learning_rate": 1e-30}}
    file = {"init": "file", "init_file": str(runs["plain"])}
    again.append(write_run(tmp_path, "from_file", tiny_bases["t5"], PROMPT | file, **stay))
    train_all(again, tmp_path, num_ranks=2)
    for name in cases:
        files = [tmp_path / run / "checkpoints" / "step-00000006" for run in (name, f"{name}-resumed")]
        for found in ("prompt.safetensors", "optimizer.safetensors"):
            assert (files[0] / found).read_bytes() == (files[1] / found).read_bytes(), (name, found)
    ends = [load_prompt(tmp_path / name / "prompt")[0] for name in ("plain", "from_file")]
    assert all(torch.equal(*(end[key] for end in ends)) for key in ("prefix_keys", "prefix_values", "frozen_keys"))
    config = str(runs["plain"] / "config.json")
    new = [f"output_dir={tmp_path / 'no'}", "prompt.init=file", f"prompt.init_file={runs['plain']}"]
    failed = run_command("train", config, *new, "prompt.init_text=null", "prompt.placement=encoder")
    assert failed.returncode == 2 and "is of placement prefix: set prompt.placement=prefix" in failed.stderr


def test_answers_and_an_exported_adapter_are_pefts_and_it_is_a_start(runs, tiny_bases, tmp_path):
    from peft import PeftModel, PrefixTuningConfig, get_peft_model

    commands = []
    for kind in ("t5", "bart"):
        commands.append(["export", str(runs[kind]), "--to", "peft", "--out", str(tmp_path / kind)])
        output = ["--max-new-tokens", "8", "--output", str(tmp_path / f"{kind}.jsonl")]
        commands.append(["generate", str(runs[kind]), "--input", "sample", *output])
    run_commands(commands)
    for kind in ("t5", "bart"):
        fresh = load_plain(tiny_bases[kind], "seq2seq")
        model = PeftModel.from_pretrained(fresh, tmp_path / kind).eval()
        tokenizer = AutoTokenizer.from_pretrained(tiny_bases[kind])
        ids = torch.tensor([tokenizer.encode("sample =")])
        written = [fresh.config.decoder_start_token_id]
        for _ in range(8):
            with torch.no_grad():
                logits = model(input_ids=ids, decoder_input_ids=torch.tensor([written])).logits
            written.append(int(logits[0, -1].argmax()))
            if written[-1] == tokenizer.eos_token_id:
                break
        answer = json.loads((tmp_path / f"{kind}.jsonl").read_text())["generated"]
        assert answer == tokenizer.decode(written[1:], skip_special_tokens=True).strip(), kind
    # PEFT's own adapter, with its own number of layers, of which it reads the first for both layers of the decoder.
    torch.manual_seed(0)
    settings = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=NUM_VIRTUAL)
    theirs = get_peft_model(load_plain(tiny_bases["t5"], "seq2seq"), settings).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    stay = {"train": {"max_steps": 1, "learning_rate": 1e-30}}
    starts = {"again": str(tmp_path / "t5"), "theirs": str(tmp_path / "theirs")}
    specs = [
        write_run(tmp_path, f"from-{name}", tiny_bases["t5"], DECODER | {"init": "file", "init_file": folder}, **stay)
        for name, folder in starts.items()
    ]
    ended = train_all(specs, tmp_path, num_ranks=1)
    found = {name: load_prompt(ended[f"from-{name}"] / "prompt")[0] for name in starts}
    wanted = load_prompt(runs["t5"] / "prompt")[0]
    for key in ("prefix_keys", "prefix_values"):
        assert torch.equal(found["again"][key], wanted[key])
        assert torch.equal(found["theirs"][key][0], found["theirs"][key][1]) and found["theirs"][key].any()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([[20, 21, 22]])}
    adapter = PrefixTuning.to_peft(found["theirs"])
    adapter = for_decoder(adapter, adapter.settings)
    with torch.no_grad():
        spread = get_peft_model(
            load_plain(tiny_bases["t5"], "seq2seq"),
            PrefixTuningConfig(
                task_type="SEQ_2_SEQ_LM", num_virtual_tokens=NUM_VIRTUAL, num_layers=adapter.settings["num_layers"]
            ),
        ).eval()
        spread.prompt_encoder["default"].embedding.weight.copy_(adapter.prompt_embeddings)
        torch.testing.assert_close(spread(**batch).loss, theirs(**batch).loss, rtol=1e-5, atol=0)


def test_what_it_is_not_for_is_refused_in_one_line(runs, tiny_bases, tmp_path):
    config = str(runs["t5"] / "config.json")
    new = [f"output_dir={tmp_path / 'no'}", "prompt.init=random", "prompt.init_file=null"]
    cases = {
        "prompt.placement: infix is for causal bases": ["prompt.placement=infix"],
        "prompt.placement: both is for prefix_tuning": ["prompt.placement=both", "prompt.method=prompt_tuning"],
        "prompt.from_layer is for bases with one stack of layers": ["prompt.from_layer=1"],
    }
    for message, overrides in cases.items():
        failed = run_command("train", config, *new, *overrides)
        assert failed.returncode == 2 and message in failed.stderr and failed.stderr.count("\n") == 1, failed.stderr
    failed = run_command("export", str(runs["both-0"]), "--to", "peft", "--out", str(tmp_path / "e"))
    assert failed.returncode == 2 and "PEFT's prefixes are the decoder's alone" in failed.stderr
