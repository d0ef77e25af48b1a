"""Context-aware prompt tuning: step for step PEFT's, packed and padded, at any stage, resumed exactly."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptune_dist.prompts.store import load_prompt
from tests.commands import run_commands
from tests.numerics.banks import check_members
from tests.numerics.methods import FEW, check_ways, pick, write_run, write_ways
from tests.numerics.plain import NUM_STEPS, ROWS, load_plain, padded_batches, read_rows, run_loop
from tests.numerics.test_curves import curve, train_all

pytestmark = pytest.mark.long
IDS = [40, 41, 7, 9, 52, 11, 80, 81, 40, 41, 17, 19, 52, 90, 91, 92]
KINDS = [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 8, 0]
DECAY = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}
RADII = {"opt_projection_epsilon": 2.0, "opt_projection_format_epsilon": 0.4}
EXAMPLES = {"method": "cpt", "num_virtual_tokens": len(IDS), "cpt_token_ids": IDS, "cpt_tokens_type_mask": KINDS}
PROMPT = EXAMPLES | DECAY | RADII


def peft_curve(base_dir, num_steps: int = NUM_STEPS, **options) -> list[float]:
    """Losses of PEFT's class in a plain loop; its default kinds of a row's tokens are those of targets."""
    from peft import CPTConfig, get_peft_model

    settings = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=IDS, cpt_tokens_type_mask=KINDS, **options)
    model = get_peft_model(load_plain(base_dir), settings).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [tuple(parameter.shape) for parameter in trained] == [(len(IDS), 32)]

    def loss_of(ids, mask, labels):
        return model(input_ids=ids, attention_mask=mask, labels=labels.clone()).loss

    batches = padded_batches(AutoTokenizer.from_pretrained(base_dir))
    return run_loop(trained, loss_of, batches, num_steps=num_steps)


@pytest.fixture(scope="module")
def runs(tiny_bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    specs = [write_run(root, kind, tiny_bases[kind], PROMPT) for kind in ("llama", "bloom")]
    specs.append(write_run(root, "even", tiny_bases["llama"], EXAMPLES))
    rows = {"method": "cpt", "num_virtual_tokens": 30}
    specs.append((write_run(root, "rows", tiny_bases["llama"], rows)[0], ["train.max_steps=2"]))
    return train_all(specs, root, num_ranks=1)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_it_trains_as_under_peft(runs, tiny_bases, kind):
    assert curve(runs[kind]) == pytest.approx(peft_curve(tiny_bases[kind], **DECAY, **RADII), rel=1e-5)
    hashes = json.loads((runs[kind] / "base_hashes.json").read_text())
    assert hashes["after"] == hashes["before"] and hashes["before"]


def test_pefts_defaults_weigh_all_targets_alike(runs, tiny_bases):
    assert curve(runs["even"]) == pytest.approx(peft_curve(tiny_bases["llama"]), rel=1e-5)


def test_no_token_leaves_its_radius_and_those_of_targets_stay(runs):
    tensors, facts = load_prompt(runs["llama"] / "prompt")
    moved = (tensors["virtual_tokens"] - tensors["embedding"]).norm(dim=1)
    unit = (32 / 2048) ** 0.5
    radii = torch.tensor([{1: 0.4, 2: 2.0, 3: 0.4}.get(kind % 4, 0.0) * unit if kind else 0.0 for kind in KINDS])
    assert (moved <= radii * (1 + 1e-5) + 1e-6).all() and (moved[radii > 0] > 0).all()
    assert tensors["example_ids"].tolist() == IDS and facts["options"]["cpt_token_ids"] == IDS


def test_the_examples_are_the_first_rows(runs, tiny_bases):
    tensors = load_prompt(runs["rows"] / "prompt")[0]
    tokenizer = AutoTokenizer.from_pretrained(tiny_bases["llama"])
    text = "".join(f"{row['word']} = {row['answer']}" for row in read_rows(ROWS)[:4])
    found = tokenizer.decode(tensors["example_ids"], skip_special_tokens=True)
    assert len(found) > 20 and found in text
    kinds = tensors["example_kinds"].tolist()
    assert kinds == sorted(kinds) and {kind % 4 for kind in kinds} >= {0, 2, 3}


def test_the_curve_depends_on_no_stage_and_no_way_of_computing(tiny_bases, tmp_path):
    base = tiny_bases["llama"]
    ways = pick("stage0", "small", "recomputed", "int8-0", "int8-3", "bf16-3")
    specs = {"cpt": write_ways(tmp_path, base, PROMPT, None, ways)}
    check_ways(tmp_path, {"cpt": peft_curve(base, FEW, **DECAY, **RADII)}, specs)


def test_it_resumes_exactly(tiny_bases, tmp_path):
    whole, parts = (write_run(tmp_path, name, tiny_bases["llama"], PROMPT)[0] for name in ("whole", "parts"))
    constant = ["train.schedule=constant", "train.max_steps=6"]
    first = (parts, [constant[0], "train.max_steps=3"])
    train_all([(whole, constant), first, (parts, constant)], tmp_path, num_ranks=1)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_beside_other_members_it_trains_as_alone(tiny_bases, tmp_path):
    given = {f"prompt.{name}": value for name, value in PROMPT.items()}
    sweep = [{"prompt.method": "prompt_tuning"}, given, given | {"prompt.opt_loss_decay_factor": 0.9, "seed": 1}]
    check_members(tmp_path, tiny_bases["llama"], sweep, data={"train": str(ROWS)})


def test_pefts_adapter_is_a_start_and_ours_answers_the_same_in_peft(runs, tiny_bases, tmp_path):
    from peft import CPTConfig, PeftModel, get_peft_model

    from ptune_dist.prompts.cpt import Cpt, CptOptions
    from ptune_dist.prompts.method import BaseFacts
    from ptune_dist.prompts.start import Start

    base = AutoModelForCausalLM.from_pretrained(tiny_bases["llama"], dtype=torch.float32)
    settings = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=IDS, cpt_tokens_type_mask=KINDS)
    model = get_peft_model(base, settings)
    with torch.no_grad():
        model.prompt_encoder["default"].delta_embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "theirs")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bases["llama"])
    embeddings = base.get_input_embeddings().weight.detach()
    start = Start("file", 0, tokenizer, lambda ids: embeddings[torch.tensor(ids)], file=str(tmp_path / "theirs"))
    prompt = Cpt.build(CptOptions(), len(IDS), BaseFacts(32), start)
    with torch.no_grad():
        wanted = model.prompt_encoder["default"](torch.arange(len(IDS)))
    torch.testing.assert_close(prompt.plain()["virtual_tokens"], wanted)
    assert prompt.example_kinds.tolist() == KINDS

    run = str(runs["llama"])
    output = ["--max-new-tokens", "8", "--output", str(tmp_path / "answer.jsonl")]
    run_commands(
        [
            ["export", run, "--to", "peft", "--out", str(tmp_path / "ours")],
            ["generate", run, "--input", "sample", *output],
        ]
    )
    fresh = AutoModelForCausalLM.from_pretrained(tiny_bases["llama"], dtype=torch.float32)
    answering = PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    ids = torch.tensor([tokenizer.encode("sample =")])
    with torch.no_grad():
        new = answering.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    answer = json.loads((tmp_path / "answer.jsonl").read_text())["generated"]
    assert answer == tokenizer.decode(new, skip_special_tokens=True).strip()
