"""launch/gpu_check.sh: parts that run within a time limit, outlive each other's failures, and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptune_dist.bench.check.folder import BEGUN, CUT, DONE, FAILED, CheckFolder, part_status
from ptune_dist.bench.check.page import write_page
from ptune_dist.bench.check.plan import BUILT_IN, Part, load_parts, select_parts
from ptune_dist.bench.check.runner import SECONDS_FOR_REPORT, Runner
from ptune_dist.cluster.processes import is_dead
from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from tests.processes import ROOT, process_env

GPU_CHECK = ROOT / "configs/bench/gpu_check.yaml"
MACHINE = {
    "date": "2030-01-02T03:04:05+00:00",
    "code": {"commit": "0123456789abcdef", "changed": False},
    "versions": {"torch": "9.9"},
    "hardware": {"cpu": "Some CPU", "cores": 2, "memory_bytes": 8 << 30, "gpus": ["Some GPU"]},
}
# Commands of parts: one leaves a result and a line in a journal, one fails, one starts a process and hangs with it.
SCRIPTS = {
    "good": """
import json, sys
result, journal, speed = sys.argv[1:]
open(journal, "a").write("good\\n")
json.dump({"tokens_per_s": float(speed), "loss": 0.5}, open(result, "w"))
""",
    "bad": "import sys; sys.exit('something is wrong')",
    "slow": """
import json, subprocess, sys, time
result, before, journal = sys.argv[1:]
found = json.load(open(before)).get("count", 0) + 1
json.dump({"count": found}, open(result, "w"))
below = subprocess.Popen(["sleep", "600"], start_new_session=True)
open(journal, "a").write(f"slow {found} {below.pid}\\n")
time.sleep(600)
""",
}
PLAN = """
values: {speed: 10, folder: FOLDER}
tiny: {speed: 1}
tiny_minutes: 0.01
parts:
  - {name: slow, about: hangs, minutes: 0.01, command: "{python} {folder}/slow.py {result} {before} {folder}/journal"}
  - {name: bad, about: fails, minutes: 0.01, command: "{python} {folder}/bad.py"}
  - {name: good, about: works, minutes: 0.01, command: "{python} {folder}/good.py {result} {folder}/journal {speed}"}
  - {name: long, about: takes an hour, minutes: 60, command: "{python} {folder}/good.py {result} {folder}/journal 1"}
  - {name: sides, about: two sides, minutes: 0.01, matrix: FOLDER/matrix.yaml, published: {others: 5}}
"""
MATRIX = """
name: m
baseline: peer
prepare: ["{python} -c 'open(\\"{folder}/journal\\", \\"a\\").write(\\"prepared \\")'"]
sides:
  ours: "{python} {folder}/good.py {result} {folder}/journal 20"
  peer: "{python} {folder}/good.py {result} {folder}/journal 5"
cases: [{name: one, about: rows of one length}]
"""


@pytest.fixture
def plan(tmp_path) -> Path:
    for name, script in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(script)
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    (tmp_path / "plan.yaml").write_text(PLAN.replace("FOLDER", str(tmp_path)))
    return tmp_path / "plan.yaml"


def parts_of(plan: Path, names: str | None = None, *, is_tiny: bool = False, num_repeats: int = 1) -> list[Part]:
    return select_parts(load_parts(plan, is_tiny=is_tiny, changes={}, num_repeats=num_repeats), names)


def run(plan: Path, parts: list[Part], *, seconds: float) -> tuple[Runner, dict[str, str]]:
    """Run parts with so much time for their steps; returns the runner and the status of each part."""
    folder = CheckFolder(plan.parent / "out")
    scratch = plan.parent / "scratch"
    runner = Runner(folder, scratch, time.monotonic() + SECONDS_FOR_REPORT + seconds, 1, MACHINE, min_step_s=0.5)
    runner.run(parts)
    return runner, {part.name: part_status(part, folder.records(part)) for part in parts}


def read_part(plan: Path, name: str) -> dict:
    return json.loads((plan.parent / "out" / "parts" / f"{name}.json").read_text())


def read_journal(plan: Path) -> list[str]:
    return (plan.parent / "journal").read_text().splitlines()


def test_a_failure_does_not_stop_the_next_part_and_nothing_that_has_ended_runs_again(plan, capfd):
    parts = parts_of(plan, "bad,good,sides")
    _, status = run(plan, parts, seconds=100)
    assert status == {"bad": FAILED, "good": DONE, "sides": DONE}
    (step,) = read_part(plan, "bad")["steps"]
    assert step["reason"] == "exit status 1: something is wrong"
    (step,) = read_part(plan, "good")["steps"]
    assert step["result"]["tokens_per_s"] == 10 and step["machine"] == MACHINE and step["seconds"] > 0
    assert read_journal(plan) == ["good", "prepared good", "good"]
    capfd.readouterr()
    run(plan, parts, seconds=100)
    assert read_journal(plan) == ["good", "prepared good", "good"]
    said = capfd.readouterr().out
    assert "good: done before" in said and "bad: failed before (bad); --again repeats it" in said


def test_what_does_not_fit_is_left_and_what_is_cut_comes_last_in_the_next_call(plan, capfd):
    parts = parts_of(plan, "slow,good,long")
    runner, status = run(plan, parts, seconds=1.5)
    assert status == {"slow": CUT, "good": "", "long": ""} | {"slow": BEGUN}
    assert set(runner.left) == {"slow", "good", "long"}
    assert "long needs about 60.0 min" in capfd.readouterr().out
    _, count, pid = read_journal(plan)[0].split()
    assert count == "1" and is_dead(int(pid))  # although it had a session of its own
    (step,) = read_part(plan, "slow")["steps"]
    assert (step["status"], step["result"]) == (CUT, {"count": 1})

    runner, status = run(plan, parts, seconds=3.5)
    assert status["good"] == DONE and "long" in runner.left
    assert [line.split()[:2] for line in read_journal(plan)] == [["slow", "1"], ["good"], ["slow", "2"]]


def test_each_repeat_of_a_side_is_a_step_and_more_repeats_continue(plan):
    run(plan, parts_of(plan, "sides"), seconds=100)
    _, status = run(plan, parts_of(plan, "sides", num_repeats=2), seconds=100)
    assert status == {"sides": DONE}
    names = [step["name"] for step in read_part(plan, "sides")["steps"]]
    assert names == ["one-ours-0", "one-peer-0", "one-ours-1", "one-peer-1"]
    assert read_journal(plan) == ["prepared good", "good", "good", "good"]


def test_the_page_shows_every_part_with_ratios_and_what_others_have_published(plan):
    parts = parts_of(plan)
    run(plan, parts_of(plan, "bad,good,sides"), seconds=100)
    folder = CheckFolder(plan.parent / "out")
    write_page(parts, folder, MACHINE)
    page = (plan.parent / "out" / "README.md").read_text()
    assert "Some GPU" in page and "commit 0123456789ab" in page
    assert "Tiny shapes" not in page
    assert "| good | done | 1 of 1 |" in page and "| slow | not begun | 0 of 1 |" in page
    assert "- bad: failed: exit status 1: something is wrong" in page
    assert "| tokens_per_s | 10.000 |" in page
    assert "| ours | 20 |" in page and "| ours / peer | 4.00x |" in page
    assert "- ours: 4.00x the 5 tokens/s of others" in page and "- peer: 1.00x the 5 tokens/s" in page
    assert (plan.parent / "out" / "speeds.png").read_bytes().startswith(b"\x89PNG")
    assert "logs/" in (plan.parent / "out" / ".gitignore").read_text()
    write_page(parts, folder, MACHINE, is_tiny=True)
    assert "**Tiny shapes: the parts were tried, and" in (plan.parent / "out" / "README.md").read_text()


def test_tiny_values_replace_others_and_mistakes_name_what_is_known(plan):
    (part,) = parts_of(plan, "good", is_tiny=True)
    assert part.steps[0].values["speed"] == 1
    with pytest.raises(UserError, match="--parts: no part goood, known: slow, bad, good"):
        parts_of(plan, "goood")
    with pytest.raises(UserError, match="--set sped: not a value of .*known there: speed, folder"):
        load_parts(plan, is_tiny=False, changes={"sped": 1}, num_repeats=1)
    plan.write_text(plan.read_text().replace("matrix.yaml,", "matrix.yaml, cases: [two],"))
    with pytest.raises(UserError, match="part sides: .* has no case two: it has one"):
        parts_of(plan)


@pytest.mark.parametrize("is_tiny", [False, True])
def test_every_command_of_the_shipped_plan_has_a_valid_config(is_tiny, monkeypatch):
    monkeypatch.chdir(ROOT)
    built_in = dict.fromkeys(BUILT_IN, "x") | {"gpus": 1}
    checked = set()
    for part in parts_of(GPU_CHECK, is_tiny=is_tiny):
        for step in part.steps:
            words = step.words(built_in)
            config = [word for word in words if word.startswith("configs/bench/") and word.endswith(".yaml")]
            if config:
                overrides = words[words.index(config[0]) + 1 :]
                load_config(config[0], [word for word in overrides if "=" in word])
                checked.add(f"{part.name} {step.side}")
    assert len(checked) >= 18


@pytest.mark.long
def test_an_interrupt_leaves_a_valid_folder_and_no_process(plan, tmp_path):
    out = tmp_path / "interrupted"
    command = [
        sys.executable,
        "-m",
        "ptune_dist.bench.check",
        "--plan",
        plan,
        "--parts",
        "slow,good",
        "--tiny",
        "--out",
        out,
    ]
    process = subprocess.Popen(
        [*command, "--scratch", tmp_path / "scratch"],
        env=process_env(),
        cwd=ROOT,
    )
    journal = tmp_path / "journal"
    give_up_at = time.monotonic() + 60
    while not (journal.exists() and "slow" in journal.read_text()):
        assert process.poll() is None and time.monotonic() < give_up_at
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert is_dead(int(read_journal(plan)[-1].split()[-1]))
    (part,) = (json.loads(path.read_text()) for path in (out / "parts").iterdir())
    assert (part["name"], part["status"], part["steps"][0]["reason"]) == ("slow", BEGUN, "interrupted")
    assert "| slow | begun |" in (out / "README.md").read_text()


@pytest.mark.long
def test_gpus_that_torch_does_not_see_are_an_error_and_no_reason_for_tiny_shapes(tmp_path):
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n")
    fake.chmod(0o755)
    done = run_check(tmp_path, "--list", path=f"{fake.parent}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "error: nvidia-smi lists 1 GPUs, but torch" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.extended
def test_the_profile_runs_without_a_gpu(tmp_path):
    done = run_check(tmp_path, "--tiny", "--parts", "profile", "--minutes", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    profile = json.loads((tmp_path / "out/parts/profile.json").read_text())["steps"][0]["result"]
    assert profile["device"] == "cpu" and profile["groups_ms"]["products"] > 0 and profile["step_ms"] > 0
    assert (tmp_path / "out/profile.json.gz").stat().st_size > 0


@pytest.mark.long
def test_a_list_forgets_nothing(tmp_path):
    known = tmp_path / "out" / "parts" / "profile.json"
    known.parent.mkdir(parents=True)
    known.write_text(json.dumps({"steps": [{"name": "profile", "status": "failed", "seconds": 1}]}))
    done = run_check(tmp_path, "--tiny", "--again", "--list", "--parts", "profile")
    assert done.returncode == 0 and " failed " in done.stdout and known.exists()


@pytest.mark.extended
def test_every_part_runs_without_a_gpu(tmp_path):
    done = run_check(tmp_path, "--tiny", "--minutes", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = [json.loads(path.read_text()) for path in (tmp_path / "out/parts").iterdir()]
    assert {part["status"] for part in parts} == {DONE} and len(parts) == len(parts_of(GPU_CHECK))


def run_check(folder: Path, *options: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess:
    where = ["--out", str(folder / "out"), "--scratch", str(folder / "scratch")]
    environment = process_env({"PTUNE_PYTHON": sys.executable}) | {"PATH": path}
    command = ["bash", str(ROOT / "launch/gpu_check.sh"), *where, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2000)
