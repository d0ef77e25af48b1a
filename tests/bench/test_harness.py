"""The harness: sides in turn, their measures, ratios within a pair, and failures in one line."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from ptune_dist.bench.harness import compare_sides, run_matrix, summarize
from ptune_dist.bench.matrix import load_matrix
from ptune_dist.errors import RunFault, UserError
from tests.processes import process_env

PYTHON = f"'{sys.executable}' -c"
# Leaves {speed} + repeat as its speed, and a line in a journal of who ran when.
SIDE = (
    "\"import json, sys; open('{journal}', 'a').write('{side} {repeat}' + chr(10)); "
    "json.dump(dict(samples_per_s={speed} + {repeat}, curve=[{loss}, 0.5]), open('{result}', 'w'))\""
)


def write_matrix(path, *, cases: str, sides: str, extra: str = "") -> str:
    text = f"name: small\n{extra}\nsides:\n{textwrap.indent(sides, '  ')}\ncases:\n{textwrap.indent(cases, '  ')}\n"
    path.write_text(text)
    return str(path)


def side_command(name: str, speed: float, loss: str = "1.0") -> str:
    command = SIDE.replace("{side}", name).replace("{speed}", str(speed)).replace("{loss}", loss)
    return f"{name}: {json.dumps(f'{{python}} -c {command}')}"


@pytest.fixture
def two_sides(tmp_path):
    """A matrix of a fast and a slow side; returns its path and the journal."""
    journal = tmp_path / "journal"
    path = write_matrix(
        tmp_path / "matrix.yaml",
        extra="baseline: slow\nrepeats: 3\nwarm_up: 1",
        sides=side_command("fast", 5) + "\n" + side_command("slow", 1),
        cases=f"- name: one\n  values: {{journal: '{journal}'}}\n  agree: {{measure: curve, tolerance: 1.0e-6}}",
    )
    return path, journal


def read_result(out) -> dict:
    return json.loads((out / "result.json").read_text())


def test_sides_run_in_turn_warm_up_first_and_only_what_follows_counts(two_sides, tmp_path):
    path, journal = two_sides
    assert run_matrix(path, str(tmp_path / "out")) == 0
    order = journal.read_text().split("\n")[:-1]
    assert order == ["fast 0", "slow 0", "fast 0", "slow 0", "fast 1", "slow 1", "fast 2", "slow 2"]
    (case,) = read_result(tmp_path / "out")["cases"]
    assert [(run["side"], run["repeat"]) for run in case["runs"]] == [
        (side, repeat) for repeat in range(3) for side in ("fast", "slow")
    ]


def test_the_result_has_medians_spread_ratios_of_pairs_and_where_it_ran(two_sides, tmp_path):
    path, _ = two_sides
    run_matrix(path, str(tmp_path / "out"))
    content = read_result(tmp_path / "out")
    (case,) = content["cases"]
    assert case["sides"]["fast"]["samples_per_s"] == {"median": 6, "min": 5, "max": 7}
    assert case["ratios"]["fast"]["samples_per_s"] == {"median": 3, "pairs": [5 / 1, 6 / 2, 7 / 3]}
    assert "slow" not in case["ratios"]
    assert content["matrix"] == load_matrix(path).model_dump(mode="json")
    assert content["versions"]["torch"] and content["hardware"]["cores"] >= 1 and content["hardware"]["memory_bytes"]
    assert content["date"].startswith("20")


def test_a_resumed_benchmark_repeats_no_run_that_was_finished(two_sides, tmp_path):
    path, journal = two_sides
    out = tmp_path / "out"
    run_matrix(path, str(out))
    whole = read_result(out)
    lines = (out / "runs.jsonl").read_text().splitlines()
    (out / "runs.jsonl").write_text("\n".join(lines[:5]) + "\n" + lines[5][:40])  # stopped while it wrote the fifth
    journal.unlink()
    run_matrix(path, str(out), resumes=True)
    assert journal.read_text().splitlines() == ["fast 1", "slow 1", "fast 2", "slow 2"]
    assert read_result(out)["cases"][0]["ratios"] == whole["cases"][0]["ratios"]
    (tmp_path / "matrix.yaml").write_text((tmp_path / "matrix.yaml").read_text().replace("repeats: 3", "repeats: 4"))
    with pytest.raises(UserError, match="of another matrix or commit"):
        run_matrix(path, str(out), resumes=True)


def test_a_second_benchmark_in_the_same_folder_measures_again(two_sides, tmp_path):
    path, journal = two_sides
    for _ in range(2):
        run_matrix(path, str(tmp_path / "out"))
    assert len(journal.read_text().splitlines()) == 16


def test_sides_that_must_agree_and_do_not_give_status_1(tmp_path):
    for loss, status in (("1.0000001", 0), ("1.1", 1), ("None", 1)):
        path = write_matrix(
            tmp_path / "matrix.yaml",
            sides=side_command("a", 1) + "\n" + side_command("b", 1, loss),
            cases=f"- name: one\n  repeats: 1\n  values: {{journal: '{tmp_path / 'j'}'}}\n"
            "  agree: {measure: curve, tolerance: 1.0e-4}",
        )
        assert run_matrix(path, str(tmp_path / "out")) == status
        agreement = read_result(tmp_path / "out")["cases"][0]["agreement"]
        assert agreement["agrees"] is (status == 0)
    assert agreement["largest_difference"] is None


def test_a_failing_command_is_one_line_with_the_command_and_its_last_words(tmp_path):
    command = f"{PYTHON} \"print('first'); print('why it failed'); raise SystemExit(3)\""
    path = write_matrix(tmp_path / "m.yaml", sides=f"a: {json.dumps(command)}", cases="- name: one")
    with pytest.raises(RunFault) as caught:
        run_matrix(path, str(tmp_path / "out"))
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in ("why it failed", "exit status 3", sys.executable))


def test_what_torchrun_says_after_its_ranks_does_not_hide_what_they_said(tmp_path):
    said = "print('the reason'); print('E01 torch/distributed/elastic/x.py] failed'); print('==='); raise SystemExit(1)"
    command = json.dumps(f"{PYTHON} {json.dumps(said)}")
    path = write_matrix(tmp_path / "m.yaml", sides=f"a: {command}", cases="- name: one")
    with pytest.raises(RunFault, match="the reason"):
        run_matrix(path, str(tmp_path / "out"))


def test_a_side_without_a_result_is_named(tmp_path):
    path = write_matrix(tmp_path / "m.yaml", sides=f"a: {json.dumps(f'{PYTHON} pass')}", cases="- name: one")
    with pytest.raises(RunFault, match="no result JSON"):
        run_matrix(path, str(tmp_path / "out"))


def test_a_program_that_does_not_exist_is_the_users_mistake(tmp_path):
    path = write_matrix(tmp_path / "m.yaml", sides="a: no-such-program --fast", cases="- name: one")
    with pytest.raises(UserError, match="cannot run no-such-program"):
        run_matrix(path, str(tmp_path / "out"))


def test_a_command_that_hangs_is_ended(tmp_path):
    command = json.dumps(f'{PYTHON} "import time; time.sleep(60)"')
    path = write_matrix(tmp_path / "m.yaml", extra="timeout_s: 1", sides=f"a: {command}", cases="- name: one")
    began = time.monotonic()
    with pytest.raises(RunFault, match="not finished after 1 s"):
        run_matrix(path, str(tmp_path / "out"))
    assert time.monotonic() - began < 30


def test_what_one_result_lacks_is_not_summarized_or_compared():
    assert summarize([{"a": 1, "b": 2, "on": True, "curve": [1]}, {"a": 3}]) == {"a": {"median": 2, "min": 1, "max": 3}}
    runs = [
        {"side": side, "repeat": repeat, "result": result}
        for repeat in (0, 1)
        for side, result in (("x", {"a": 6.0, "zero": 1.0}), ("base", {"a": 2.0 + repeat, "zero": 0.0, "b": 1.0}))
    ]
    assert compare_sides(runs, "base") == {"x": {"a": {"median": 2.5, "pairs": [3.0, 2.0]}}}


def test_an_interrupt_ends_the_side_too(tmp_path):
    pid_file = tmp_path / "pid"
    sleep = f"import os, time; open('{pid_file}', 'w').write(str(os.getpid())); time.sleep(60)"
    side = json.dumps(f'{{python}} -c "{sleep}"')
    path = write_matrix(tmp_path / "matrix.yaml", sides=f"slow: {side}", cases="- name: one")
    process = subprocess.Popen(
        [sys.executable, "-m", "ptune_dist", "bench", path, "--out", str(tmp_path / "out")],
        env=process_env(),
        stderr=subprocess.PIPE,
    )
    give_up_at = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()):
        assert process.poll() is None and time.monotonic() < give_up_at
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"interrupted: nothing to save\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
