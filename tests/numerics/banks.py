"""Banks to train and the runs that their members would have had alone: what the tests of a sweep share."""

import json
from pathlib import Path

import pytest
import torch

from ptune_dist.config.load import load_config, render_config
from ptune_dist.config.sweep import expand_sweep
from ptune_dist.prompts.store import load_prompt
from ptune_dist.run.metrics_log import read_metrics
from tests.commands import run_module
from tests.conftest import write_config
from tests.numerics.plain import read_rows
from tests.numerics.test_curves import SCRIPT, curve, zero_json

NUM_STEPS = 6
FEW_STEPS = 4  # one of them in the second epoch
NUM_ROWS, NUM_HELD_OUT = 24, 6  # three steps of 8 are an epoch


def write_rows(folder: Path) -> None:
    """train.jsonl and held_out.jsonl, and other.jsonl with columns of its own."""
    rows = read_rows()
    some = {
        "train": rows[:NUM_ROWS],
        "held_out": rows[NUM_ROWS : NUM_ROWS + NUM_HELD_OUT],
        "other": [{"noun": row["word"], "size": str(len(row["word"]))} for row in rows[40:57]],
    }
    for name, kept in some.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def write_bank(folder: Path, name: str, base: Path, sweep, placement: str = "infix", **overrides) -> Path:
    """A bank's config NAME.json, whose run is folder/NAME."""
    sections = {
        "model": {"path": str(base)},
        "prompt": {"num_virtual_tokens": 4, "placement": placement},
        "data": {"train": str(folder / "train.jsonl"), "template": "Write in capitals: {{ word }} ="},
        "train": {"max_steps": NUM_STEPS, "micro_batch_tokens": 160},
        "sweep": sweep,
    }
    for key, value in overrides.items():
        sections[key] = {**sections[key], **value} if isinstance(sections.get(key), dict) else value
    return write_config(folder / f"{name}.json", output_dir=str(folder / name), **sections)


def write_alone(bank: Path) -> dict[str, Path]:
    """By member, the config that it would have alone, whose run is BANK-alone/MEMBER."""
    found = {}
    for name, config in expand_sweep(load_config(bank)).items():
        run = bank.with_name(f"{bank.stem}-alone") / name
        run.mkdir(parents=True)
        found[name] = run / "alone.yaml"
        found[name].write_text(render_config(config.model_copy(update={"output_dir": str(run)})))
    return found


def train_all(configs: list[Path | tuple[Path, list[str]]], folder: Path, num_ranks: int = 1, script=SCRIPT) -> None:
    """Train every config, one after another, in one launch."""
    specs = [[str(one), []] if isinstance(one, Path) else [str(one[0]), one[1]] for one in configs]
    file = folder / f"specs-{len(list(folder.glob('specs-*')))}.json"
    file.write_text(json.dumps(specs))
    done = run_module(str(script), str(file), num_ranks=num_ranks, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def check_members(folder: Path, base: Path, members, placement: str = "prefix", **sections) -> dict[str, Path]:
    """Members of a sweep under ZeRO 3 on two ranks have the losses that each has alone on one rank under ZeRO 0.

    Returns the configs of the latter by member; the sweep's run is FOLDER/mixed.
    """
    write_rows(folder)
    train = {"max_steps": FEW_STEPS} | sections.pop("train", {})
    bank = write_bank(folder, "mixed", base, members, placement, deepspeed=zero_json(3), train=train, **sections)
    alone = write_alone(bank)
    train_all([bank], folder, num_ranks=2)
    train_all([(path, ["deepspeed=null"]) for path in alone.values()], folder)
    for name, config in alone.items():
        ours, theirs = (curve(run) for run in (folder / "mixed" / "members" / name, config.parent))
        assert ours == pytest.approx(theirs, rel=1e-5), name
    return alone


def check_banks(banks: list[Path], folder: Path) -> None:
    """Train sweeps and each of their members alone, on two ranks in one launch: the curves are the same."""
    alone = {bank: write_alone(bank) for bank in banks}
    paths = [*banks, *(path for some in alone.values() for path in some.values())]
    train_all(paths, folder, num_ranks=2)
    for bank, members in alone.items():
        for name, path in members.items():
            found = curve(folder / bank.stem / "members" / name)
            assert found == pytest.approx(curve(path.parent), rel=1e-5), (bank.stem, name)


def assert_ends_as_alone(bank_run: Path, alone: dict[str, Path], rel: float = 1e-5) -> None:
    """Every member's curve, prompt and standing are those of its run alone."""
    for name, config in alone.items():
        member, run = bank_run / "members" / name, config.parent
        ours, theirs = read_metrics(member), read_metrics(run)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs], name
        for key in ("loss", "learning_rate", "grad_norm"):
            bound = rel if key == "loss" else 1e-4  # a norm sums the rounding of a whole gradient
            assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=bound), (name, key)
        assert_same_prompt(member, run, name)
        summaries = [read_json(folder / "summary.json") for folder in (member, run)]
        for key in ("steps", "stopped_early", "best_step", "evaluations_since_best"):
            assert summaries[0][key] == summaries[1][key], (name, key)
        for key in ("validation", "before"):
            assert summaries[0][key] == pytest.approx(summaries[1][key], rel=1e-5), (name, key)


def assert_same_prompt(one: Path, other: Path, name: str, rel: float = 1e-5) -> None:
    (ours, facts), (theirs, of_other) = (load_prompt(folder / "prompt") for folder in (one, other))
    assert facts["step"] == of_other["step"] and ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        bound = rel * tensor.abs().max().item() if tensor.numel() else 0.0
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=bound, msg=lambda m, k=key: f"{name} {k}: {m}")


def read_json(path: Path):
    return json.loads(path.read_text())
