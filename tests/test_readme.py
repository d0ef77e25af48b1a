"""What the README and the docs show works as it stands."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from ptune_dist.config.deepspeed_json import fill_deepspeed_json
from ptune_dist.config.load import load_config
from ptune_dist.run.resolve import resolve
from tests.commands import run_command
from tests.conftest import TINY
from tests.processes import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
YAML = {
    f"{page.name} {number}": block
    for page in PAGES
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL), 1)
}
# What a block of a page leaves out.
REST = {
    "output_dir": "runs/x",
    "model": {"path": "base"},
    "data": {"train": "a.jsonl", "validation": "b.jsonl", "template": "{{ text }}", "target": " {{ label }}"},
}
MOST_LINES = 150
MOST_LINES_OF_CONFIG = 25
# Each figure of the README's table: the row's beginning, the result file, its case and side.
MEASURED = {
    "`prefix`": ("peft_segments_cpu", "long_zero3", "prefix"),
    "`infix`:": ("peft_segments_cpu", "long_zero3", "infix"),
    "`infix` with": ("peft_segments_cpu", "long_zero3", "warm"),
    "a sweep of 8": ("peft_segments_cpu", "long_zero3", "sweep8"),
}


def ratios_of(result: str, case: str, side: str) -> dict[str, float]:
    """Medians of the ratios to the baseline, by measure."""
    content = json.loads((ROOT / "docs" / "benchmarks" / f"{result}.json").read_text())
    (found,) = [found for found in content["cases"] if found["name"] == case]
    return {measure: ratio["median"] for measure, ratio in found["ratios"][side].items()}


def test_the_readme_is_short_and_begins_with_a_small_config():
    assert len(README.splitlines()) <= MOST_LINES
    assert len(YAML["README.md 1"].splitlines()) <= MOST_LINES_OF_CONFIG
    assert "sweep" not in yaml.safe_load(YAML["README.md 1"])


@pytest.mark.parametrize("name", YAML)
def test_a_config_that_is_shown_is_accepted(name, tmp_path):
    content = yaml.safe_load(YAML[name])
    for section, rest in REST.items():
        given = content.get(section, rest)
        content[section] = rest | given if isinstance(rest, dict) else given
    if isinstance(content["data"].get("tasks"), dict):  # each has files of its own
        content["data"] = {key: value for key, value in content["data"].items() if key not in ("train", "validation")}
    if "messages" in content["data"]:  # in place of templates
        content["data"] = {key: value for key, value in content["data"].items() if key not in ("template", "target")}
    if "context_cache" in YAML[name]:
        content.setdefault("prompt", {}).setdefault("placement", "infix")
    (tmp_path / "shown.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    config = load_config(tmp_path / "shown.yaml", resolve=resolve)
    fill_deepspeed_json(config, hidden_size=160)


@pytest.mark.parametrize("row", MEASURED)
def test_a_measured_ratio_is_that_of_the_result_file(row):
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row}")]
    ratios = ratios_of(*MEASURED[row])
    shown = re.findall(r"[\d.]+x", line)
    assert shown == [f"{ratios['samples_per_s']:.1f}x", f"{ratios['extra_memory_bytes']:.2f}x"]


def test_the_ratios_of_loading_are_those_of_the_result_file():
    ratios = ratios_of("base_loading_cpu", "llama_800m_bf16", "ours")
    shown = f"loads in {ratios['load_s']:.2f}x the time and with {ratios['peak_over_base_bytes']:.2f}x the peak"
    assert shown in " ".join(README.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_is_named_exists(page: Path):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/])(?:launch|slurm|configs|tests|docs|ptune_dist)/[\w./-]*[\w/]", text))
    missing = [name for name in named if not (ROOT / name).exists()]
    if page.name == "extending.md":  # the files that the page adds
        missing = [name for name in missing if not name.endswith(("low_rank.py", "containment.py"))]
    assert not [name for name in missing if not name.startswith("configs/deepspeed/zero")]


def test_prompt_embeds_are_the_virtual_tokens_followed_by_the_tokens_embeddings(tmp_path):
    """The script of docs/after_training.md hands these to vLLM; transformers takes the same tensor."""
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
    assert f'"generated": "{tokenizer.decode(new[0], skip_special_tokens=True).strip()}"' in answers.read_text()
    shutil.rmtree(out)
