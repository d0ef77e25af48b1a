"""Prefix tuning: step for step PEFT's, at every stage and with every way of computing, beside other methods."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ptune_dist.prompts.method import Contribution
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.store import load_prompt
from tests.commands import run_command, run_commands
from tests.numerics.banks import check_banks, check_members, write_bank
from tests.numerics.banks import write_rows as write_bank_rows
from tests.numerics.methods import FEW, check_ways, pick, write_run, write_ways
from tests.numerics.plain import NUM_VIRTUAL, ROWS, load_plain, padded_batches, peft_method_curve, run_loop
from tests.numerics.prefixes import plain_prefix_logits
from tests.numerics.test_bank import MARKERS
from tests.numerics.test_curves import curve, train_all, zero_json

pytestmark = pytest.mark.long
KINDS = ["gpt2", "llama", "qwen2", "opt", "gpt_neox", "bloom"]  # the last one's attention is its own
PROMPT = {"method": "prefix_tuning"}
EXPORTED = {  # run: its base, and what it is exported to
    "gpt2": ("gpt2", "peft"),
    "llama": ("llama", "peft"),
    "mlp": ("gpt2", "peft"),
    "cartridge": ("llama", "cartridge"),
}


def shape_of(base: Path) -> tuple[int, int, int, int]:
    """[L, P, G, Dh]."""
    config = AutoConfig.from_pretrained(base)
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, NUM_VIRTUAL, num_heads, config.hidden_size // config.num_attention_heads


def start_of(base: Path) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape_of(base), generator=draw) for name in ("prefix_keys", "prefix_values")}


def peft_curve_of(base: Path, **loop) -> list[float]:
    from peft import PrefixTuningConfig

    start = {"embedding.weight": PrefixTuning.to_peft(start_of(base)).prompt_embeddings}
    return peft_method_curve(base, PrefixTuningConfig(num_virtual_tokens=NUM_VIRTUAL), start, **loop)


def infix_curve_of(base_dir: Path) -> list[float]:
    """A plain loop's losses where keys and values stand between the input, but for its last token, and the target."""
    base = load_plain(base_dir)
    keys, values = (nn.Parameter(tensor.clone()) for tensor in start_of(base_dir).values())

    def loss_of(ids, mask, labels):
        found = []
        for text, own, wanted in zip(ids, mask, labels, strict=True):
            tokens = text[own.bool()].numpy()
            num_target = int((wanted[own.bool()] != -100).sum())
            parts = np.split(tokens, [len(tokens) - num_target - 1, len(tokens) - num_target])
            logits = plain_prefix_logits(base, Contribution(keys=keys, values=values), *parts)
            found.append(nn.functional.cross_entropy(logits, torch.from_numpy(parts[2]), reduction="sum"))
        return sum(found) / (labels != -100).sum()

    batches = padded_batches(AutoTokenizer.from_pretrained(base_dir))
    return run_loop([keys, values], loss_of, batches, num_steps=FEW)


def mlp_start_of(base: Path) -> dict[str, torch.Tensor]:
    """PEFT's parameters of a projection over 4 heads of 8 (gpt2) with a hidden size of 5."""
    num_layers, _, num_heads, width = shape_of(base)
    own = num_heads * width
    draw = torch.Generator().manual_seed(5)
    shapes = {
        "embedding.weight": (NUM_VIRTUAL, own),
        "transform.0.weight": (5, own),
        "transform.0.bias": (5,),
        "transform.2.weight": (num_layers * 2 * own, 5),
        "transform.2.bias": (num_layers * 2 * own,),
    }
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def runs(tiny_bases, tmp_path_factory):
    """Of every kind; and on gpt2 and llama under PEFT's projection, and from its cartridge."""
    root = tmp_path_factory.mktemp("one")
    specs = [write_run(root, kind, tiny_bases[kind], PROMPT, start_of(tiny_bases[kind])) for kind in KINDS]
    mlp = PROMPT | {"reparameterization": "mlp", "encoder_hidden_size": 5}
    zeros = torch.zeros(shape_of(tiny_bases["gpt2"]))
    nothing = {name: zeros for name in ("prefix_keys", "prefix_values", "start_keys", "start_values")}
    nothing |= {name: zeros[:, :0] for name in ("frozen_keys", "frozen_values")}
    specs.append(write_run(root, "mlp", tiny_bases["gpt2"], mlp, mlp_start_of(tiny_bases["gpt2"]) | nothing))
    adapter = write_cartridge(tiny_bases["llama"], root / "adapter")
    start = {"init": "file", "init_file": str(adapter), "num_frozen": 1}
    specs.append(write_run(root, "cartridge", tiny_bases["llama"], PROMPT | start))
    return train_all(specs, root, num_ranks=1)


def write_cartridge(base_dir: Path, folder: Path) -> Path:
    """PEFT's own adapter with the numbers of `start_of`."""
    from peft import CartridgeConfig, get_peft_model

    settings = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL, num_frozen_tokens=1)
    model = get_peft_model(load_plain(base_dir), settings)
    model.prompt_encoder["default"].load_prompt_embeddings(PrefixTuning.to_peft(start_of(base_dir)).prompt_embeddings)
    model.save_pretrained(folder)
    return folder


def test_an_mlp_and_a_cartridge_train_as_under_peft(runs, tiny_bases):
    from peft import CartridgeConfig, PrefixTuningConfig

    projected = PrefixTuningConfig(num_virtual_tokens=NUM_VIRTUAL, prefix_projection=True, encoder_hidden_size=5)
    gpt2 = tiny_bases["gpt2"]
    assert curve(runs["mlp"]) == pytest.approx(peft_method_curve(gpt2, projected, mlp_start_of(gpt2)), rel=1e-5)
    whole = PrefixTuning.to_peft(start_of(tiny_bases["llama"])).prompt_embeddings
    start = {"frozen_embedding": whole[:1], "trainable_embedding": whole[1:]}
    settings = CartridgeConfig(num_virtual_tokens=NUM_VIRTUAL, num_frozen_tokens=1)
    wanted = peft_method_curve(tiny_bases["llama"], settings, start)
    assert curve(runs["cartridge"]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_under_peft(runs, tiny_bases, kind):
    assert curve(runs[kind]) == pytest.approx(peft_curve_of(tiny_bases[kind]), rel=1e-5)
    hashes = json.loads((runs[kind] / "base_hashes.json").read_text())
    assert hashes["after"] == hashes["before"] and hashes["before"]


def test_the_curve_depends_on_no_stage_and_no_way_of_computing(tiny_bases, tmp_path):
    base = tiny_bases["llama"]
    start = start_of(base)
    infix = PROMPT | {"placement": "infix"}
    of_infix = pick("stage0", "small", "cached", "recomputed")
    ways = pick("stage2", "small", "recomputed", "int8-0", "int8-3", "bf16-3")
    specs = {
        "prefix": write_ways(tmp_path / "prefix", base, PROMPT, start, ways),
        "infix": write_ways(tmp_path / "infix", base, infix, start, of_infix),
    }
    wanted = {"prefix": peft_curve_of(base, num_steps=FEW), "infix": infix_curve_of(base)}
    check_ways(tmp_path, wanted, specs)


# Of eight members, most are prefixes that differ in all that makes one.
SWEEP = [
    {"prompt.method": "prompt_tuning"},
    {"prompt.method": "prefix_tuning"},
    {"prompt.method": "prefix_tuning", "prompt.num_virtual_tokens": 6, "seed": 1, "prompt.init": "random"},
    {"prompt.method": "prefix_tuning", "prompt.init_text": "Upper case", "train.weight_decay": 0.1},
    {"prompt.method": "prefix_tuning", "prompt.train_keys": False, "prompt.init": "zero"},
    {"prompt.method": "prefix_tuning", "prompt.reparameterization": "mlp", "prompt.encoder_hidden_size": 5},
    {"prompt.method": "prefix_tuning", "prompt.init": "rows", "prompt.init_rows": 1, "prompt.num_frozen": 2},
    {"prompt.method": "prefix_tuning", "train.learning_rate": 0.02},
]


@pytest.mark.parametrize(
    ("kind", "placement"), [("llama", "infix"), pytest.param("bloom", "prefix", marks=pytest.mark.extended)]
)
def test_a_sweep_of_several_methods_trains_each_member_as_alone(tiny_bases, tmp_path, kind, placement):
    cached = {"train": {"context_cache_gib": 0.01}} if placement == "infix" else {}
    check_members(tmp_path, tiny_bases[kind], SWEEP, placement, **cached)


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_beside_rows_without_contexts_and_tasks_of_another_member_each_trains_as_alone(tiny_bases, tmp_path, kind):
    write_bank_rows(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    named = [row | {"task": "odd" if len(row["word"]) % 2 else "even"} for row in rows]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    prefix = {"prompt.method": "prefix_tuning"}
    markers = [MARKERS[0], *({**one, **prefix} for one in MARKERS[:3])]  # the last one has empty inputs
    of_tasks = [{"prompt.method": "multitask_prompt_tuning"}, prefix, {**prefix, "seed": 1}]
    data = {"train": str(tmp_path / "tasks.jsonl"), "task": "task", "tasks": ["odd", "even"]}
    sections = {"deepspeed": zero_json(3)}
    few = {"batch_size": 2, "micro_batch_tokens": 30}  # so that a rank has rows without contexts, or none at all
    template = {"template": MARKERS[0]["data.template"]}
    banks = [
        write_bank(tmp_path, "markers", tiny_bases[kind], markers, "template", train=few, data=template, **sections),
        write_bank(tmp_path, "tasks", tiny_bases[kind], of_tasks, "infix", data=data, **sections),
    ]
    check_banks(banks, tmp_path)


TEXT = "Write in capitals"
LAST = f"step-{FEW:08d}"


def test_the_start_is_what_the_base_computes_of_a_text_or_of_rows_and_a_run_resumes_from_it(tiny_bases, tmp_path):
    sharded = {"deepspeed": zero_json(3), "checkpoint": {"every": 3, "keep": 9}, "train": {"max_steps": FEW}}
    still = sharded | {"train": {"max_steps": 1, "learning_rate": 1e-30}}
    moving = PROMPT | {"init": "text", "init_text": TEXT}
    int8 = {"model": {"quantization": "int8"}}
    cases = {
        "cut": ("llama", moving, still),
        "repeated": ("gpt2", moving | {"num_virtual_tokens": 40}, still),
        "rows": ("bloom", PROMPT | {"num_virtual_tokens": 30}, still),
        "one_row": ("llama", PROMPT | {"init": "rows", "init_rows": 1, "num_virtual_tokens": 30}, still),
        "int8-0": ("llama", moving, still | int8 | {"deepspeed": zero_json(0)}),
        "int8-3": ("llama", moving, still | int8),
        "plain": ("llama", moving, sharded),
        "mlp": ("llama", moving | {"reparameterization": "mlp", "placement": "infix"}, sharded),
    }
    specs = [write_run(tmp_path, n, tiny_bases[kind], prompt, **more) for n, (kind, prompt, more) in cases.items()]
    runs = train_all(specs, tmp_path, num_ranks=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bases["llama"])
    begin = [] if tokenizer.bos_token_id is None else tokenizer.encode("")
    rows = [json.loads(line) for line in (ROWS).read_text().splitlines()[:9]]
    texts = [tokenizer.encode(f"{row['word']} =") + tokenizer.encode(f" {row['answer']}") for row in rows]
    joined = sum(([*ids, tokenizer.eos_token_id] for ids in texts), [])
    wanted = {
        "cut": (begin + tokenizer.encode(TEXT))[:NUM_VIRTUAL],
        "repeated": (begin + tokenizer.encode(TEXT) * 9)[:40],
        "rows": joined[:30],
        "one_row": ([*texts[0], tokenizer.eos_token_id] * 9)[:30],
    }
    for name, ids in wanted.items():
        kind = cases[name][0]
        found = load_prompt(runs[name] / "prompt")[0]
        base = AutoModelForCausalLM.from_pretrained(tiny_bases[kind], dtype=torch.float32).eval()
        cache = base(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
        for number, layer in enumerate(cache.layers):
            for key, tensor in (("prefix_keys", layer.keys), ("prefix_values", layer.values)):
                own = tensor[0].transpose(0, 1)
                bound = 1e-5 * own.abs().max().item()
                torch.testing.assert_close(found[key][number], own, rtol=0, atol=bound, msg=lambda m, n=name: n + m)
    of_int8 = [load_prompt(runs[f"int8-{stage}"] / "prompt")[0]["prefix_keys"] for stage in (0, 3)]
    torch.testing.assert_close(*of_int8, rtol=1e-5, atol=1e-5)
    check_what_stays(runs, NUM_VIRTUAL)
    resumed = []
    for name in ("plain", "mlp"):
        copy = tmp_path / f"{name}-resumed"
        shutil.copytree(runs[name], copy)
        (copy / "summary.json").unlink()
        shutil.rmtree(copy / "checkpoints" / LAST)
        resumed.append((str(runs[name] / "config.json"), [f"output_dir={copy}"]))
    again = tmp_path / "again"
    again.mkdir()
    train_all(resumed, again, num_ranks=2)
    for name in ("plain", "mlp"):
        files = [tmp_path / run / "checkpoints" / LAST for run in (name, f"{name}-resumed")]
        for file in ("prompt.safetensors", "optimizer.safetensors"):
            assert (files[0] / file).read_bytes() == (files[1] / file).read_bytes(), (name, file)


def check_what_stays(runs: dict[str, Path], num_positions: int) -> None:
    """Of a prompt that started from a text, the first position alone."""
    before = load_prompt(runs["cut"] / "prompt")[0]
    after = load_prompt(runs["plain"] / "prompt")[0]
    for key in ("prefix_keys", "prefix_values"):
        moved = [not torch.equal(before[key][:, i], after[key][:, i]) for i in range(num_positions)]
        assert moved == [False, *[True] * (num_positions - 1)], key


def test_answers_and_an_exported_adapter_are_pefts(runs, tiny_bases, tmp_path):
    from peft import PeftModel

    commands = []
    for kind, (_, to) in EXPORTED.items():
        run = str(runs[kind])
        commands.append(["export", run, "--to", to, "--out", str(tmp_path / kind)])
        output = ["--max-new-tokens", "8", "--output", str(tmp_path / f"{kind}.jsonl")]
        commands.append(["generate", run, "--input", "sample", *output])
    run_commands(commands)
    for kind, (base, to) in EXPORTED.items():
        fresh = AutoModelForCausalLM.from_pretrained(tiny_bases[base], dtype=torch.float32)
        model = PeftModel.from_pretrained(fresh, tmp_path / kind).eval()
        assert model.peft_config["default"].peft_type == ("CARTRIDGE" if to == "cartridge" else "PREFIX_TUNING")
        tokenizer = AutoTokenizer.from_pretrained(tiny_bases[base])
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
        tokens = np.array(tokenizer.encode("sample ="))
        found = load_prompt(runs[kind] / "prompt")[0]
        prompt = Contribution(keys=found["prefix_keys"], values=found["prefix_values"])
        with torch.no_grad():
            theirs = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0, :-1]
            plain = load_plain(tiny_bases[base])
            ours = plain_prefix_logits(plain, prompt, tokens[:0], tokens[:1], tokens[1:])
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "cartridge" / "adapter_config.json").read_text())["num_frozen_tokens"] == 1
    stored = load_file(tmp_path / "llama" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(stored, PrefixTuning.to_peft(load_prompt(runs["llama"] / "prompt")[0]).prompt_embeddings)


def test_what_it_is_not_for_is_refused_in_one_line(runs, tiny_bases, tmp_path):
    config = str(runs["llama"] / "config.json")
    new = f"output_dir={tmp_path / 'no'}"
    cases = {
        "prompt.placement: encoder is for seq2seq bases": ["prompt.placement=encoder"],
        "prompt.placement: both is for seq2seq bases": ["prompt.placement=both"],
        "needs an input before the target": ["data.train=some.txt", "data.template=null", "data.target=null"],
        "the input is empty, but prefix_tuning needs": ["data.template='{% if false %}{{ word }}{% endif %}'"],
    }
    for message, overrides in cases.items():
        failed = run_command("train", config, new, *overrides)
        assert failed.returncode == 2 and message in failed.stderr and failed.stderr.count("\n") == 1, failed.stderr
    failed = run_command("export", str(runs["llama"]), "--to", "prompt-embeds", "--out", str(tmp_path / "e"))
    assert failed.returncode == 2 and "keys and values of every layer" in failed.stderr
