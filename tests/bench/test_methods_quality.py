"""The benchmark of methods: its plan, its runs on the shipped base, what is not run again, and its tables."""

import json
from pathlib import Path

import pytest
import yaml

from ptune_dist.bench.methods_plan import Builder, load_plan
from ptune_dist.bench.methods_quality import PLAN, main, read_curve
from ptune_dist.bench.methods_table import render_blocks
from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from ptune_dist.run.resolve import resolve
from tests.processes import ROOT

BASE = ROOT / "configs/tiny/causal"
ROWS = ROOT / "configs/tiny/data"
DOCUMENT = "# M\n" + "".join(
    f"<!-- {mark} quality -->\nold\n<!-- end {mark} quality -->\n" for mark in ("methods", "layers", "others")
)
PLAN_TEXT = """
run:
  prompt: {num_virtual_tokens: 2}
  data: {cache_dir: "off"}
  train: {max_steps: 2, batch_size: 4, schedule: constant}
  evaluate: {every: 1, num_samples: 0, max_examples: 4, max_new_tokens: 4}
  checkpoint: {every: 1, keep: 1}
tasks:
  upper:
    metric: exact_match
    instruction: "In capitals"
    data: {template: "{{ word }} =", target: " {{ answer }}"}
methods:
  prompt_tuning: {prompt.method: prompt_tuning, prompt.init_text: "{instruction}", train.learning_rate: 0.05}
  prefix_tuning: {prompt.method: prefix_tuning, prompt.init_text: "{instruction}", train.learning_rate: 0.01}
  upper half: {prompt.method: prefix_tuning, prompt.from_layer: {of_layers: 0.5}, train.learning_rate: 0.01}
  norms_only: {prompt.method: norms_only, prompt.num_virtual_tokens: 0}
parts:
  first: {tasks: [upper], methods: [prompt_tuning, prefix_tuning]}
  bare: {kind: bare, tasks: [upper]}
  partial: {tasks: [upper], methods: [norms_only]}
  layers_time: {kind: time, tasks: [upper], methods: [prefix_tuning, upper half], cached: true}
  others: {tasks: [upper], methods: [prefix_tuning], seeds: [1]}
  equal_time: {kind: equal_time, tasks: [upper], methods: [prompt_tuning, prefix_tuning], seeds: [3]}
"""
CELLS = {f"upper/{name}" for name in ("prompt_tuning/0", "prefix_tuning/0", "bare/0", "hard prompt/0", "norms_only/0")}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the benchmark over the shipped base with the plan above; returns the exit status and the results."""
    monkeypatch.chdir(tmp_path)
    for which in ("train", "validation"):
        lines = (ROWS / f"{which}.jsonl").read_text().splitlines(keepends=True)
        Path(f"upper_{which}.jsonl").write_text("".join(lines[:64]))
    Path("plan.yaml").write_text(PLAN_TEXT)
    Path("doc.md").write_text(DOCUMENT)
    files = ["--data", ".", "--out", "out.json", "--document", "doc.md", "--plan", "plan.yaml", "--work", "work"]

    def run(*more: str):
        status = main(["--base", str(BASE), *files, *more])
        return status, json.loads(Path("out.json").read_text()) if Path("out.json").exists() else None

    return run


def test_each_cell_is_a_real_run_whose_result_is_kept(command):
    assert command("--minutes", "0") == (75, None)
    parts = [word for part in ("first", "bare", "partial", "others") for word in ("--part", part)]
    status, content = command(*parts)
    assert status == 0 and set(content["cells"]) == CELLS | {"upper/prefix_tuning/1"}
    assert [at["step"] for at in content["cells"]["upper/prefix_tuning/0"]["curve"]] == [0, 1, 2]
    assert all("exact_match" in at and "loss" in at for cell in content["cells"].values() for at in cell["curve"])
    assert not list(Path("work").iterdir()) and "old" not in Path("doc.md").read_text()
    written = Path("out.json").stat().st_mtime_ns
    assert command(*parts, "--minutes", "0")[0] == 0  # nothing is missing
    assert Path("out.json").stat().st_mtime_ns == written
    plan = yaml.safe_load(PLAN_TEXT)
    plan["methods"]["norms_only"]["train.learning_rate"] = 0.1
    Path("plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    assert command(*parts, "--minutes", "0")[0] == 75  # one cell's config has changed
    changed = command(*parts)[1]["cells"]
    assert {name for name in changed if changed[name] != content["cells"][name]} == {"upper/norms_only/0"}


def test_equal_time_is_a_run_of_the_steps_that_fit_into_the_seconds_of_the_fastest(command, capsys):
    assert command("--part", "equal_time")[0] == 2
    assert "equal time is not known yet: a step of upper has not been timed with" in capsys.readouterr().err
    times = {
        f"upper/{name}": {"cpu_s": cpu_s, "peak_memory_bytes": 1}
        for name, cpu_s in (("prompt_tuning", 3.0), ("prefix_tuning", 2.0))
    }
    Path("out.json").write_text(json.dumps({"cells": {}, "times": times}))
    status, content = command("--part", "equal_time")
    assert status == 0 and set(content["cells"]) == {"upper/prompt_tuning at equal time/3", "upper/bare/0"}
    assert [at["step"] for at in content["cells"]["upper/prompt_tuning at equal time/3"]["curve"]] == [0, 1]


@pytest.mark.extended
def test_seconds_and_memory_are_those_of_a_process_of_its_own(command):
    status, content = command("--part", "layers_time")
    assert status == 0 and set(content["times"]) == {
        "upper/prefix_tuning",
        "upper/upper half",
        "upper/upper half, cached",
    }
    assert all(
        time["step_s"] > 0 and time["cpu_s"] > 0 and time["peak_memory_bytes"] > 1 << 20
        for time in content["times"].values()
    )


def curve(*scores: float) -> list[dict[str, float]]:
    return [{"step": step, "exact_match": score} for step, score in enumerate(scores)]


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN_TEXT)
    return load_plan(tmp_path / "plan.yaml")


def test_at_equal_time_a_slower_method_has_had_fewer_steps(plan):
    cells = {
        "upper/prompt_tuning/0": {"curve": curve(0.1, 0.2, 0.3)},
        "upper/prompt_tuning/1": {"curve": curve(0.1, 0.4, 0.5)},
        "upper/prompt_tuning at equal time/0": {"curve": curve(0.1, 0.2)},
        "upper/prompt_tuning at equal time/1": {"curve": curve(0.1, 0.4)},
        "upper/prefix_tuning/0": {"curve": curve(0.2, 0.5, 0.6)},
        "upper/bare/0": {"curve": curve(0.05)},
    }
    seconds = {"prompt_tuning": 3.0, "prefix_tuning": 2.0}
    times = {f"upper/{name}": {"cpu_s": value, "peak_memory_bytes": 1 << 20} for name, value in seconds.items()}
    content = {"cells": cells, "times": times}
    lines = render_blocks(content, plan)["methods quality"].splitlines()
    assert "| `prefix_tuning` | 0.600 | 0.600, 2 steps | 2.00 | 1 |" in lines
    assert "| `prompt_tuning` | 0.400 (0.300-0.500) | 0.300 (0.200-0.400), 1 steps | 3.00 | 2 |" in lines
    assert "| the base with the template alone | 0.050 |  |  |  |" in lines
    assert not any("norms_only" in line for line in lines)  # not measured
    del content["times"]["upper/prefix_tuning"]  # without all times there is no common budget
    assert "0.400 (0.300-0.500) | - | 3.00" in render_blocks(content, plan)["methods quality"]


def test_a_run_that_was_stopped_is_marked(plan):
    cells = {"upper/prefix_tuning/0": {"config": None, "curve": curve(0.2, 0.5)}}
    blocks = render_blocks({"cells": cells, "times": {}}, plan)
    assert "| `prefix_tuning` | 0.500 (unfinished, step 1) | - | - | 1 |" in blocks["methods quality"]
    assert "| `prefix_tuning` | 0.500 (unfinished, step 1) | -" in blocks["layers quality"]
    assert "| `prefix_tuning` | 0.500 (unfinished, step 1) |" in blocks["others quality"]
    assert render_blocks({"cells": {}, "times": {}}, plan)["others quality"] == "Not measured yet."


def test_a_curve_is_read_from_the_log_of_a_run_that_was_resumed(tmp_path):
    (tmp_path / "train.log").write_text(
        "2026-01-01 00:00:00  step 0  validation  loss 2.0000  bleu 1.5000  method=a\n"
        "2026-01-01 00:00:00  step 0  validation  loss 3.0000  bleu 2.5000  method=b\n"
        "2026-01-01 00:00:00  step 2/4  mean loss 4.3432  314 tokens/s\n"
        "2026-01-01 00:00:00  step 4  validation  loss 1.0000  bleu 7.5000  method=a\n"
        "2026-01-01 00:00:00  step 4  validation  loss 1.0000  bleu 8.5000  method=a\n"
    )
    found = read_curve(tmp_path, "method=a")
    assert found == [{"step": 0, "loss": 2.0, "bleu": 1.5}, {"step": 4, "loss": 1.0, "bleu": 8.5}]


def test_a_plan_that_names_what_it_lacks_is_refused_in_one_line(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN_TEXT.replace("methods: [norms_only]", "methods: [norms]"))
    with pytest.raises(UserError, match=r"plan.yaml: parts.partial.methods: norms is none of prompt_tuning"):
        load_plan(tmp_path / "plan.yaml")


def test_the_configs_of_the_shipped_plan_are_valid(tmp_path):
    plan = load_plan(ROOT / PLAN)
    builder = Builder(plan, str(BASE), tmp_path)
    for task in plan.tasks:
        for which in ("train", "validation"):
            (tmp_path / f"{task}_{which}.jsonl").write_text("{}\n")
    for part in plan.parts.values():
        for unit in builder.units(part, lambda task, method: 7):
            data = {
                key: f"{tmp_path}/{value}"
                for key, value in unit.config["data"].items()
                if key in ("train", "validation")
            }
            config = unit.config | {"output_dir": str(tmp_path / "run"), "data": unit.config["data"] | data}
            (tmp_path / "config.json").write_text(json.dumps(config))
            load_config(tmp_path / "config.json", resolve=resolve)
