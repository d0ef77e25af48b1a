"""Runs whose prompts enter at a later layer: the curve of a plain loop with hooks, at each stage, cached or not."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ptune_dist.data.batches import Batch
from ptune_dist.families import FAMILIES
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.late_prompt import LatePrompt
from ptune_dist.run.checkpoint import list_checkpoints
from ptune_dist.run.metrics_log import read_metrics
from tests.commands import run_command, run_commands
from tests.conftest import build_tiny_base
from tests.numerics.banks import assert_ends_as_alone, check_members, write_alone, write_bank
from tests.numerics.banks import write_rows as write_bank_rows
from tests.numerics.late import plain_late_logits
from tests.numerics.methods import FEW, RECOMPUTED, WAYS, check_ways, pick, write_run, write_ways
from tests.numerics.plain import NUM_VIRTUAL, load_plain, padded_batches, run_loop
from tests.numerics.test_curves import curve, train_all, zero_json
from tests.processes import ROOT

pytestmark = pytest.mark.long
START = 2
LATE = {"method": "late_prompt", "start_layer": START}
CACHED = {"context_cache_gib": 0.01}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return build_tiny_base("llama", tmp_path_factory.mktemp("deep") / "llama", num_hidden_layers=4)


def start_of() -> dict[str, torch.Tensor]:
    return {"late_tokens": torch.randn(NUM_VIRTUAL, 32, generator=torch.Generator().manual_seed(4))}


GENERATED = LATE | {"generator": "pooled", "generator_hidden_size": 8}


def generated_start() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    shapes = {"down": (32, 8), "down_bias": (8,), "up": (8, 32)}
    return start_of() | {f"generator.{name}": torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def plain_curve(base_dir: Path, prompt: dict[str, torch.Tensor]) -> list[float]:
    """Losses of a plain loop, each row alone."""
    model = load_plain(base_dir)
    trained = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in prompt.items()}

    def loss_of(ids, mask, labels):
        losses = []
        for row, length, wanted in zip(ids, mask.sum(dim=1).tolist(), labels, strict=True):
            target = wanted[wanted != -100]
            parts = row[: length - len(target)].numpy(), target.numpy()
            logits = plain_late_logits(model, START, trained, parts[0][:0], *parts)
            losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        return torch.stack(losses).sum() / (labels != -100).sum()

    batches = padded_batches(AutoTokenizer.from_pretrained(base_dir))
    return run_loop(list(trained.values()), loss_of, batches, num_steps=FEW)


def test_a_deeper_base_does_not_move_a_prompt_to_its_own_middle(tiny_bases, base, tmp_path):
    config, _ = write_run(tmp_path, "first", tiny_bases["llama"], {"method": "late_prompt"}, train={"max_steps": 1})
    train_all([(config, [])], tmp_path, num_ranks=1)
    further = {"method": "late_prompt", "init": "file", "init_file": str(tmp_path / "first")}
    config, _ = write_run(tmp_path, "further", base, further)
    failed = run_command("train", config)
    assert failed.returncode == 2, failed.stderr
    assert "that prompt enters at layer 1, this one at layer 2: set prompt.start_layer=1" in failed.stderr


def test_the_curve_depends_on_no_stage_no_cache_and_no_way_of_computing(base, tmp_path):
    small = {"train": {"micro_batch_tokens": 60}}
    ways = pick("stage0", "small", "int8-0", "int8-3") | {
        "stage2": WAYS["stage2"] | small,
        "cached": RECOMPUTED | {"train": CACHED | small["train"]},
    }
    specs = {"late": write_ways(tmp_path, base, LATE, start_of(), ways)}
    wanted = {"late": plain_curve(base, start_of()), "generated": plain_curve(base, generated_start())}
    ways = {"cached": ways["cached"]}
    specs["generated"] = write_ways(tmp_path / "generated", base, GENERATED, generated_start(), ways)
    check_ways(tmp_path, wanted, specs)
    check_exported_vectors(base, tmp_path / "stage0", tmp_path / "vectors")


def check_exported_vectors(base: Path, run: Path, out: Path) -> None:
    """The script of docs/after_training.md gives the logits of a pass of ours."""
    run_commands([["export", str(run), "--to", "vectors", "--out", str(out)]])
    page = (ROOT / "docs" / "after_training.md").read_text().partition("## Export a late prompt")[2]
    script = page.partition("```python\n")[2].partition("```")[0]
    found: dict = {}
    exec(script.replace('"vectors/', f'"{out}/').replace('"gpt2"', f'"{base}"'), found)
    prompt = LatePrompt(load_file(run / "prompt" / "prompt.safetensors")["late_tokens"], START)
    model = FAMILIES["causal"].model_class(load_plain(base), [prompt], CrossEntropy(), "prefix").eval()
    ids = found["ids"][0].numpy()
    targets = np.append(ids[1:], 0)
    batch = Batch([ids[:0]], [ids[:1]], [targets], [(0, 0)], 0)
    with torch.no_grad():
        wanted = model.head.logits(model.supervise(model.read_below(batch)))
    torch.testing.assert_close(found["logits"][0], wanted, rtol=1e-5, atol=1e-5)


TEXT = {"prompt.init": "text", "prompt.init_text": "Upper case"}
KEYS = {"prompt.method": "prefix_tuning", "prompt.from_layer": 3}
MEMBERS = [
    {"prompt.method": "late_prompt", "prompt.start_layer": 1},
    {"prompt.method": "late_prompt", "prompt.start_layer": 3, **TEXT},
    {**KEYS, **TEXT},
    {**KEYS, **TEXT, "seed": 1},
    {**KEYS, "prompt.lower_layers": "none", "prompt.num_virtual_tokens": 6},
    {"prompt.method": "late_prompt", "prompt.start_layer": 3, "prompt.generator": "pooled"},
]


@pytest.mark.extended
def test_each_member_of_a_mixed_sweep_ends_as_alone(base, tmp_path):
    alone = check_members(tmp_path, base, [*MEMBERS, {"prompt.method": "prompt_tuning"}])
    assert_ends_as_alone(tmp_path / "mixed", alone)


@pytest.mark.extended
def test_a_sweep_with_a_cache_ends_as_its_runs_alone_which_resume_bitwise(base, tmp_path):
    write_bank_rows(tmp_path)
    more = [{"prompt.method": "late_prompt", "train.learning_rate": 0.01}, {**KEYS, "prompt.init": "random"}]
    nine = [*MEMBERS, *more, {**KEYS, **TEXT, "prompt.from_layer": 1}]
    cached = write_bank(tmp_path, "cached", base, nine, "prefix", train=CACHED, deepspeed=zero_json(3))
    infix = write_bank(tmp_path, "infix", base, [*MEMBERS[:4], {"prompt.method": "prompt_tuning"}], "infix")
    alone = {"cached": write_alone(cached), "infix": write_alone(infix)}
    configs = [cached, infix, *(path for members in alone.values() for path in members.values())]
    train_all([(str(path), []) for path in configs], tmp_path, num_ranks=2)
    for name, members in alone.items():
        assert_ends_as_alone(tmp_path / name, members)
    rates = [line["context_hit_rate"] for line in read_metrics(tmp_path / "cached")]
    # Three steps are an epoch; a row that moves to the other rank is missed once more.
    assert rates[0] < 0.3 and min(rates[3:]) > 0.6, rates
    first_late, _, first_keys, _, _, generated, *_ = alone["cached"].items()
    check_resumed(tmp_path, [first_late, first_keys, generated])


def check_resumed(folder: Path, alone: list[tuple[str, Path]]) -> None:
    """Runs that are continued from their first checkpoint end as they ended."""
    specs = []
    for name, config in alone:
        run = folder / "again" / name / "run"
        run.parent.mkdir(parents=True)
        specs.append((str(config), [f"output_dir={run}", "checkpoint.every=3", "checkpoint.keep=9"]))
    train_all(specs, folder / "again", num_ranks=1)
    kept = {}
    for _, overrides in specs:
        run = Path(overrides[0].partition("=")[2])
        kept[run] = (curve(run), last_prompt(run))
        (run / "summary.json").unlink()
        for checkpoint in list_checkpoints(run / "checkpoints")[1:]:
            shutil.rmtree(checkpoint)
    train_all(specs, folder / "again", num_ranks=1)
    for run, (losses, prompt) in kept.items():
        assert curve(run) == losses
        assert all(torch.equal(tensor, prompt[name]) for name, tensor in last_prompt(run).items())


def last_prompt(run: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run / "checkpoints")[-1] / "prompt.safetensors")
