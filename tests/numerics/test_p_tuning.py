"""P-tuning: step for step PEFT's, at every stage and with every way of computing, beside other methods in one sweep."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ptune_dist.config.load import load_config
from ptune_dist.prompts.p_tuning import PTuning, PTuningOptions
from ptune_dist.prompts.store import load_prompt
from tests.commands import run_command, run_commands
from tests.conftest import TINY
from tests.numerics.banks import check_members
from tests.numerics.methods import FEW, check_ways, labelled, pick, write_run, write_ways
from tests.numerics.plain import NUM_VIRTUAL, peft_method_curve, read_rows
from tests.numerics.test_curves import curve, train_all
from tests.numerics.test_families import starting_head, write_rows

pytestmark = pytest.mark.long
HIDDEN = 12
OPTIONS = {
    "MLP": {"encoder_hidden_size": HIDDEN},
    "LSTM": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": HIDDEN},
}
WIDTH = 32
P_TUNING = {"method": "p_tuning"}
RESIDUAL = {"prompt.reparameterization": "residual_mlp", "prompt.reparameterization_hidden_size": 8}


def start_of(encoder: str) -> dict[str, torch.Tensor]:
    prompt = PTuning(NUM_VIRTUAL, WIDTH, PTuningOptions(**OPTIONS[encoder]), seed=5)
    return {name: parameter.detach() for name, parameter in prompt.named_parameters()}


def peft_settings(encoder: str):
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(num_virtual_tokens=NUM_VIRTUAL, token_dim=WIDTH, **OPTIONS[encoder])


@pytest.fixture(scope="module")
def runs(tiny_bases, tmp_path_factory):
    """Every family with an MLP, causal bases with an LSTM too, on one rank."""
    root = tmp_path_factory.mktemp("one")
    rows = write_rows(root / "rows.jsonl", read_rows())
    specs = []
    for encoder in OPTIONS:
        for kind in ("gpt2", "llama", "bloom"):
            specs.append(
                write_run(root, f"{kind}-{encoder}", tiny_bases[kind], P_TUNING | OPTIONS[encoder], start_of(encoder))
            )
    mlp = P_TUNING | OPTIONS["MLP"]
    specs.append(write_run(root, "t5-MLP", tiny_bases["t5"], mlp, start_of("MLP")))
    specs.append(write_run(root, "bert-MLP", tiny_bases["bert"], mlp, start_of("MLP"), data=labelled(rows)))
    infix = {"placement": "infix"}
    specs.append(write_run(root, "infix", tiny_bases["llama"], mlp | infix, start_of("MLP")))
    folded = PTuning(NUM_VIRTUAL, WIDTH, PTuningOptions(**OPTIONS["MLP"]), seed=5).plain()
    specs.append(write_run(root, "infix-plain", tiny_bases["llama"], infix, folded))
    return train_all(specs, root, num_ranks=1)


@pytest.mark.parametrize("encoder", OPTIONS)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom"])
def test_a_causal_base_trains_as_under_peft(runs, tiny_bases, kind, encoder):
    ours = curve(runs[f"{kind}-{encoder}"])
    assert ours == pytest.approx(
        peft_method_curve(tiny_bases[kind], peft_settings(encoder), start_of(encoder)), rel=1e-5
    )


def test_other_families_train_as_under_peft(runs, tiny_bases):
    start = start_of("MLP")
    found = peft_method_curve(tiny_bases["t5"], peft_settings("MLP"), start, "seq2seq")
    assert curve(runs["t5-MLP"]) == pytest.approx(found, rel=1e-5)
    settings = peft_settings("MLP")
    settings.modules_to_save = ["pooler", "classifier"]
    found = peft_method_curve(tiny_bases["bert"], settings, start, "encoder", starting_head(tiny_bases["bert"], "bert"))
    assert curve(runs["bert-MLP"]) == pytest.approx(found, rel=1e-5)


def test_the_folded_vectors_stand_where_plain_ones_do(runs):
    """The first loss is that of a plain prompt of the same vectors; from then on the two methods differ."""
    ours, plain = curve(runs["infix"]), curve(runs["infix-plain"])
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    assert ours[5] != pytest.approx(plain[5], rel=1e-3)


def test_the_curve_depends_on_no_stage_and_no_way_of_computing(tiny_bases, tmp_path):
    base, start = tiny_bases["llama"], start_of("LSTM")
    ways = pick("stage2", "small", "recomputed", "int8-0", "int8-3", "bf16-3")
    specs = {"LSTM": write_ways(tmp_path, base, P_TUNING | OPTIONS["LSTM"], start, ways)}
    check_ways(tmp_path, {"LSTM": peft_method_curve(base, peft_settings("LSTM"), start, num_steps=FEW)}, specs)


def test_a_sweep_mixes_it_with_prompt_tuning_and_each_member_ends_as_alone(tiny_bases, tmp_path):
    sweep = [
        {"prompt.method": "prompt_tuning"},
        {"prompt.method": "p_tuning", "prompt.encoder_hidden_size": HIDDEN},
        {"prompt.method": "prompt_tuning", **RESIDUAL},
        {"prompt.method": "p_tuning", **RESIDUAL, "prompt.reparameterization_per_token": True},
        {"prompt.method": "p_tuning", "prompt.encoder_reparameterization_type": "LSTM", "prompt.num_virtual_tokens": 6},
    ]
    check_members(tmp_path, tiny_bases["llama"], sweep)


def test_it_resumes_with_its_encoder_and_is_exported_folded(tiny_bases, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    prompt = P_TUNING | OPTIONS["LSTM"] | {"encoder_dropout": 0.3}
    whole = write_run(tmp_path, "whole", tiny_bases["llama"], prompt)
    parts = write_run(tmp_path, "parts", tiny_bases["llama"], prompt, checkpoint={"every": 10})
    first = (parts[0], ["train.max_steps=10", "train.schedule=constant"])
    second = (parts[0], ["train.schedule=constant"])
    train_all([(whole[0], ["train.schedule=constant"]), first, second], tmp_path, num_ranks=1)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    tensors, facts = load_prompt(tmp_path / "whole" / "prompt")
    assert facts["options"]["encoder_reparameterization_type"] == "LSTM" and "lstm_head.weight_ih_l0" in tensors
    prompt_again = PTuning(NUM_VIRTUAL, WIDTH, PTuningOptions(**OPTIONS["LSTM"]), seed=1)
    prompt_again.load_state_dict({key: tensor for key, tensor in tensors.items() if key != "virtual_tokens"})
    torch.testing.assert_close(prompt_again.plain()["virtual_tokens"], tensors["virtual_tokens"])

    answers = tmp_path / "answers.jsonl"
    run = str(tmp_path / "whole")
    run_commands(
        [
            ["export", run, "--to", "peft", "--out", str(tmp_path / "adapter")],
            ["generate", run, "--input", "sample", "--max-new-tokens", "8", "--output", str(answers)],
        ]
    )
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(adapter["prompt_embeddings"], tensors["virtual_tokens"])
    fresh = AutoModelForCausalLM.from_pretrained(tiny_bases["llama"], dtype=torch.float32)
    model = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bases["llama"])
    ids = torch.tensor([tokenizer.encode("sample =")])
    with torch.no_grad():
        new = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    answer = json.loads(answers.read_text())["generated"]
    assert answer == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_pefts_adapters_are_starts_and_folded_ones_go_on_as_plain_vectors(tiny_bases, tmp_path):
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny_bases["llama"]
    first_losses = {}
    configs = {
        "p_tuning": peft_settings("MLP"),
        "prompt_tuning": PromptTuningConfig(num_virtual_tokens=NUM_VIRTUAL, token_dim=WIDTH),
    }
    specs = []
    for name, settings in configs.items():
        settings.task_type = "CAUSAL_LM"
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
        model.save_pretrained(tmp_path / f"{name}-adapter")
        first_losses[name] = load_file(tmp_path / f"{name}-adapter" / "adapter_model.safetensors")["prompt_embeddings"]
        prompt = {"init": "file", "init_file": str(tmp_path / f"{name}-adapter")}
        specs.append((write_run(tmp_path, name, base, prompt)[0], ["train.max_steps=1", "train.learning_rate=1e-9"]))
    train_all(specs, tmp_path, num_ranks=1)
    for name, vectors in first_losses.items():
        torch.testing.assert_close(
            load_prompt(tmp_path / name / "prompt")[0]["virtual_tokens"], vectors, atol=1e-6, rtol=0
        )
    failed = run_command("train", specs[0][0], "prompt.method=p_tuning", f"output_dir={tmp_path / 'no'}")
    assert failed.returncode == 2
    assert "holds no embedding.weight" in failed.stderr and "prompt.method=prompt_tuning can" in failed.stderr


def test_options_are_checked_against_the_method():
    from ptune_dist.errors import UserError
    from ptune_dist.run.resolve import resolve

    def error_of(*overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            load_config(TINY.parent / "quickstart.yaml", list(overrides), resolve=resolve)
        return str(caught.value)

    assert error_of("prompt.encoder_hidden_size=8") == (
        "command line: prompt.encoder_hidden_size is for p_tuning and prefix_tuning, this is prompt_tuning"
    )
    assert "did you mean prompt.encoder_hidden_size?" in error_of(
        "prompt.method=p_tuning", "prompt.encoder_hiden_size=8"
    )
    assert "prompt.encoder_num_layers: " in error_of("prompt.method=p_tuning", "prompt.encoder_num_layers=0")
    assert "prompt.encoder_hidden_size: " in error_of("prompt.method=p_tuning", "prompt.encoder_hidden_size=true")
    assert "model.family: decoder is none of auto, " in error_of("model.family=decoder")
    assert "prompt.init: vocab is not for p_tuning" in error_of("prompt.method=p_tuning", "prompt.init=vocab")
    assert "prompt.method: lora is none of prompt_tuning" in error_of("prompt.method=lora")
