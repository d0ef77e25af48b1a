"""What happens to members of a bank on the way: resume, numbers that are not finite, patience, halving, commands."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from ptune_dist.run.checkpoint import list_checkpoints
from ptune_dist.run.metrics_log import read_metrics
from tests.conftest import TINY
from tests.numerics.banks import (
    NUM_STEPS,
    assert_ends_as_alone,
    read_json,
    train_all,
    write_alone,
    write_bank,
    write_rows,
)
from tests.numerics.test_curves import zero_json

pytestmark = pytest.mark.long

STEADY = {"schedule": "constant", "learning_rate": 0.05, "context_cache_gib": 0.01}
TWELVE = {"max_steps": 12}
# It grows ten billion times a step, beyond float32 in the fifth at the latest.
WILD = {
    "train.learning_rate": 1.0e10, "train.weight_decay": 1.0, "train.max_grad_norm": 0, "train.optimizer": "sgd",
    "train.schedule": "constant",
}  # fmt: skip
MEMBERS = [{"train.learning_rate": 0.1}, {"seed": 1, "prompt.num_virtual_tokens": 7}, {"train.max_grad_norm": 0.05}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("banks")
    write_rows(made)
    return made


def steady_bank(folder: Path, name: str, base: Path, cache: dict, **overrides) -> Path:
    return write_bank(
        folder, name, base, MEMBERS, train=STEADY | {"max_steps": 12} | cache, checkpoint={"every": 4, "keep": 9},
        deepspeed=zero_json(3), **overrides,
    )  # fmt: skip


def assert_bitwise_equal(one: Path, other: Path) -> None:
    for name in ("prompt.safetensors", "optimizer.safetensors"):
        files = [list_checkpoints(run / "checkpoints")[-1] / name for run in (one, other)]
        assert files[0].parent.name == files[1].parent.name
        assert files[0].read_bytes() == files[1].read_bytes(), name
    for member in (other / "members").iterdir():
        ours, theirs = (
            [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run / "members" / member.name)]
            for run in (one, other)
        )
        assert ours == theirs
        prompts = [run / "members" / member.name / "prompt" / "prompt.safetensors" for run in (one, other)]
        assert prompts[0].read_bytes() == prompts[1].read_bytes()


def test_a_bank_resumed_from_a_checkpoint_is_bitwise_the_undisturbed_one(tiny_bases, folder):
    kept = folder / "contexts"
    caches = {"warm": {}, "disk": {"context_cache_gib": 0, "context_cache_dir": str(kept)}}
    specs = []
    for name, cache in caches.items():
        whole, parts = (steady_bank(folder, f"{name}-{n}", tiny_bases["llama"], cache) for n in ("whole", "parts"))
        # 6 steps: an end between two checkpoints; from an epoch in which every context is warm
        specs += [whole, (parts, ["train.max_steps=6"]), (parts, [])]
    train_all(specs, folder, num_ranks=2)
    for name in caches:
        assert len(read_metrics(folder / f"{name}-parts")) == 12
        assert_bitwise_equal(folder / f"{name}-parts", folder / f"{name}-whole")
    assert any(kept.rglob("*.safetensors"))


def test_a_bank_stopped_by_a_signal_resumes_to_the_same_end_bitwise(tiny_bases, folder, commands):
    long = {"train": STEADY | {"max_steps": 40}}
    whole, stopped = (
        write_bank(folder, name, tiny_bases["gpt2"], MEMBERS, checkpoint={"every": 15}, **long)
        for name in ("whole", "stopped")
    )
    assert commands.run("train", whole).code == 0
    started = commands.start("train", stopped)
    started.wait_for(folder / "stopped" / "metrics.jsonl", 7)
    os.kill(started.pid, signal.SIGTERM)
    assert commands.finish(started).code == 75
    assert 7 <= len(read_metrics(folder / "stopped")) < 40
    assert commands.run("train", stopped).code == 0
    assert_bitwise_equal(folder / "stopped", folder / "whole")
    assert commands.run("train", stopped).code == 0  # nothing is left to do


def test_a_member_that_is_not_finite_stands_still_and_the_others_end_as_alone(tiny_bases, folder):
    kinds = {"infix": ("llama", "infix"), "padded": ("bloom", "infix")}
    kinds |= {"seq2seq": ("t5", "encoder")}
    banks = {
        name: write_bank(folder, f"wild-{name}", tiny_bases[kind], [MEMBERS[0], WILD, MEMBERS[2]], placement)
        for name, (kind, placement) in kinds.items()
    }
    found = {name: write_alone(bank) for name, bank in banks.items()}
    wild = next(name for name in found["infix"] if "sgd" in name)
    for members in found.values():
        del members[wild]
    train_all([one for members in found.values() for one in members.values()] + list(banks.values()), folder)
    for name, bank in banks.items():
        run = folder / bank.stem
        assert_ends_as_alone(run, found[name])
        ranking = read_json(run / "summary.json")["ranking"]
        (ended,) = (line for line in ranking if line["ended"])
        assert len(ranking) == 3 and ended["member"] == wild and 1 < ended["ended_step"] < NUM_STEPS
        assert (
            len(read_metrics(run / "members" / wild)) == ended["ended_step"] - 1
        )  # the step that ended it has no line
        assert f"{wild} is stopped at step {ended['ended_step']}: " in (run / "train.log").read_text()
        for file in run.rglob("*.json*"):
            assert "NaN" not in file.read_text(), file
        assert (run / "members" / wild / "prompt").is_dir()


def test_patience_ends_a_member_where_it_would_have_ended_it_alone(folder):
    judged = {"data": {"validation": str(folder / "held_out.jsonl")}}
    judged["evaluate"] = {"every": 2, "patience": 2, "num_samples": 1}
    hasty = {"train.learning_rate": 50.0, "train.schedule": "constant", "train.max_grad_norm": 0}
    bank = write_bank(folder, "patience", TINY / "causal", [MEMBERS[0], hasty, MEMBERS[2]], train=TWELVE, **judged)
    alone = write_alone(bank)
    train_all([*alone.values(), bank], folder)
    assert_ends_as_alone(folder / "patience", alone)
    steps = {name: len(read_metrics(folder / "patience" / "members" / name)) for name in alone}
    assert min(steps.values()) < 12 == max(steps.values()), steps
    ranking = {line["member"]: line for line in read_json(folder / "patience" / "summary.json")["ranking"]}
    for name, count in steps.items():
        assert ranking[name]["ended"] == ("no better in 2 evaluations" if count < 12 else None)


def test_halving_drops_the_weaker_half_and_leaves_the_rest_as_alone(tiny_bases, folder):
    judged = {"data": {"validation": str(folder / "held_out.jsonl")}, "evaluate": {"every": 4, "num_samples": 0}}
    sweep = {"train.learning_rate": [0.001, 0.01, 0.05, 0.1]}
    halving = {"sweep_halving": {"every": 4, "keep": 0.5}}
    bank = write_bank(folder, "halving", tiny_bases["llama"], sweep, train=TWELVE, **judged, **halving)
    alone = write_alone(bank)
    train_all([*alone.values(), bank], folder)
    evaluated = {name: evaluations(config.parent / "train.log") for name, config in alone.items()}
    live, ended = list(alone), {}
    for step in (4, 8):
        live.sort(key=lambda name: evaluated[name][step])
        half = len(live) // 2
        ended |= dict.fromkeys(live[half:], step)
        live = live[:half]
    ranking = read_json(folder / "halving" / "summary.json")["ranking"]
    assert {line["member"]: line["ended_step"] for line in ranking if line["ended"]} == ended
    assert {line["ended"] for line in ranking} == {None, "worse on validation than the members that continue"}
    assert_ends_as_alone(folder / "halving", {name: alone[name] for name in live})
    for name, step in ended.items():
        found = [
            [line["loss"] for line in read_metrics(run)]
            for run in (folder / "halving" / "members" / name, alone[name].parent)
        ]
        assert found[0] == pytest.approx(found[1][:step], rel=1e-5)
    assert [line["num_members"] for line in read_metrics(folder / "halving")] == [4] * 4 + [2] * 4 + [1] * 4


def evaluations(log: Path) -> dict[int, float]:
    return {
        int(step): float(loss) for step, loss in re.findall(r"step (\d+)  validation  loss ([\d.]+)", log.read_text())
    }


@pytest.fixture(scope="module")
def swept(tiny_bases, folder, commands) -> Path:
    """A finished sweep's folder."""
    validation = str(folder / "held_out.jsonl")
    bank = write_bank(folder, "swept", tiny_bases["llama"], MEMBERS, "prefix", data={"validation": validation})
    assert commands.run("train", bank).code == 0
    return folder / "swept"


def test_commands_take_the_best_member_a_named_one_or_a_members_own_folder(swept, commands, tmp_path):
    ranking = read_json(swept / "summary.json")["ranking"]
    best, last = ranking[0], ranking[-1]
    ways = [([swept], best), ([swept, "--member", last["member"]], last), ([swept / "members" / last["member"]], last)]
    for number, (which, line) in enumerate(ways):
        member = swept / "members" / line["member"]
        done = commands.run("evaluate", *which)
        assert done.code == 0, done.err
        assert read_json(member / "evaluation.json")["loss"] == pytest.approx(line["validation"]["loss"], rel=1e-5)
        assert (f"member: {best['member']}" in done.err) == (number == 0)
        out = tmp_path / str(number)
        assert commands.run("export", *which, "--to", "peft", "--out", out).code == 0
        virtual = read_json(out / "adapter_config.json")["num_virtual_tokens"]
        assert virtual == (7 if "num_virtual_tokens=7" in line["member"] else 4)
        done = commands.run("generate", *which, "--input", "word", "--max-new-tokens", "4")
        assert done.code == 0 and json.loads(done.out.splitlines()[-1])["word"] == "word"
    adapters = [(tmp_path / str(number) / "adapter_model.safetensors").read_bytes() for number in range(3)]
    assert adapters[0] != adapters[1] == adapters[2]


def test_a_member_that_is_not_there_is_said_in_one_line(swept, commands, folder):
    (line,) = commands.run("evaluate", swept, "--member", "nobody").errors
    assert line.startswith("error: --member: nobody is none of learning_rate=0.1, ")
    own = swept / "members" / "learning_rate=0.1"
    (line,) = commands.run("export", own, "--member", "x", "--to", "peft", "--out", folder / "x").errors
    assert line == f"error: --member: {own} is not a sweep: omit it"
    unended = folder / "unended"
    shutil.copytree(swept, unended)
    (unended / "summary.json").unlink()
    (line,) = commands.run("generate", unended, "--input", "word").errors
    assert line == f"error: {unended}: an unfinished sweep has no best member: name one with --member"
    assert math.isfinite(read_json(own / "summary.json")["validation"]["loss"])


def test_a_bank_in_which_no_member_is_finite_ends_in_one_line(tiny_bases, folder, commands):
    others = [WILD, WILD | {"seed": 1}]
    bank = write_bank(folder, "all-wild", tiny_bases["gpt2"], others, "prefix")
    done = commands.run("train", bank)
    assert done.code not in (0, 2, 75) and len(done.errors) == 1, (done.code, done.err)
