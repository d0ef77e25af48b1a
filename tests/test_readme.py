"""What the README shows works as it stands."""

import re
import shutil

from ptune_dist.config.deepspeed_json import fill_deepspeed_json
from ptune_dist.config.load import load_config
from tests.commands import run_command
from tests.conftest import TINY
from tests.processes import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_config_that_is_explained_is_accepted(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "readme.yaml").write_text(block, encoding="utf-8")
    config = load_config(tmp_path / "readme.yaml", [f"model.path={TINY}/causal"])
    content = fill_deepspeed_json(config, hidden_size=160)
    assert content["bf16"]["enabled"] and content["zero_optimization"]["stage"] == 3


def test_every_path_that_is_named_exists():
    named = set(re.findall(r"(?:launch|configs|tests|docs|ptune_dist)/[\w./-]*[\w/]", README))
    missing = [name for name in named if not (ROOT / name).exists() and "{" not in name and "zero{" not in name]
    assert not [name for name in missing if not name.startswith("configs/deepspeed/zero")]


def test_prompt_embeds_are_the_virtual_tokens_followed_by_the_tokens_embeddings(tmp_path):
    """The README's script hands these to vLLM; transformers takes the same tensor."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ptune_dist.prompts.store import load_prompt
    from tests.commands import run_commands
    from tests.conftest import write_config

    config = write_config(tmp_path / "config.json", prompt={"num_virtual_tokens": 10}, train={"max_steps": 40})
    done = run_command("train", str(config), "train.batch_size=32")
    assert done.returncode == 0, done.stderr[-2000:]
    run, out = tmp_path / "run", tmp_path / "embeds"
    answers = tmp_path / "answers.jsonl"
    commands = [
        ["export", str(run), "--to", "prompt-embeds", "--out", str(out), "--input", "sample"],
        ["generate", str(run), "--input", "sample", "--output", str(answers)],
    ]
    run_commands(commands)
    tensors = load_file(out / "prompt_embeds.safetensors")
    base = AutoModelForCausalLM.from_pretrained(TINY / "causal", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "causal")
    ids = torch.tensor(tokenizer.encode("sample ="))
    torch.testing.assert_close(tensors["virtual_tokens"], load_prompt(run / "prompt")[0]["virtual_tokens"])
    wanted = torch.cat([tensors["virtual_tokens"], base.get_input_embeddings()(ids).detach()])
    torch.testing.assert_close(tensors["prompt_embeds.0"], wanted)
    new = base.generate(inputs_embeds=tensors["prompt_embeds.0"][None], max_new_tokens=24, do_sample=False)
    assert f'"generated": "{tokenizer.decode(new[0], skip_special_tokens=True)}"' in answers.read_text()
    shutil.rmtree(out)
