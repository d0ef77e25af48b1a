"""The arithmetic of failures against a simulation of them, and its table."""

import json
import random
from pathlib import Path

import pytest

from ptune_dist.bench.useful_share import (
    CHECKPOINT_S,
    FAILURES_PER_GPU_S,
    GPUS_PER_NODE,
    Times,
    main,
    share_of_one_world,
    share_of_replicas,
)

TIMES = Times(detection=2.0, restart=20.0, silence=5.0, start=20.0, load_per_gb=1.0)


def simulate_one_world(num_nodes: int, base_gb: float) -> float:
    """Between two failures all train; each one costs a restart and what was done since the last checkpoint."""
    draw = random.Random(0)
    rate = num_nodes * GPUS_PER_NODE * FAILURES_PER_GPU_S
    useful = total = 0.0
    for _ in range(20_000):
        trained = draw.expovariate(rate)
        useful += trained
        down = TIMES.detection + TIMES.restart + TIMES.load_per_gb * base_gb
        total += trained + down + draw.uniform(0, CHECKPOINT_S)
    return useful / total


@pytest.mark.parametrize("num_nodes", [64, 1024])
def test_a_world_that_is_restarted_agrees_with_a_simulation(num_nodes: int) -> None:
    assert share_of_one_world(num_nodes, TIMES, 16) == pytest.approx(simulate_one_world(num_nodes, 16), abs=0.003)


def test_replicas_lose_a_pause_of_all_and_the_absence_of_one() -> None:
    rate = GPUS_PER_NODE * FAILURES_PER_GPU_S
    share = share_of_replicas(1024, TIMES, 70)
    assert share == pytest.approx(1 - 1024 * rate * (5.0 + 5.0) - rate * 90, abs=1e-3)
    assert share > share_of_one_world(1024, TIMES, 70)
    assert share_of_replicas(1, TIMES, 70) == share_of_one_world(1, TIMES, 70)


def test_the_table_is_filled_from_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "doc.md"
    document.write_text("<!-- useful share -->\nold\n<!-- end useful share -->\n")
    arguments = ["--results", str(tmp_path), "--document", str(document)]
    assert main(arguments) == 2
    assert "start_times.json: No such file or directory" in capsys.readouterr().err

    def write(name: str, case: str, sides: dict[str, dict[str, float]]) -> None:
        found = {side: {key: {"median": value} for key, value in values.items()} for side, values in sides.items()}
        (tmp_path / name).write_text(json.dumps({"cases": [{"name": case, "sides": found}]}))

    kill = "kill -9 of a rank to"
    write(
        "start_times.json",
        "start_times",
        {f"{kill} all ranks ended": {"seconds": 2}, f"{kill} the next step": {"seconds": 22}},
    )
    frozen, again = "frozen: pause of the others", "started again: until it computes"
    write("node_pauses.json", "node_pauses", {frozen: {"seconds": 5}, again: {"seconds": 20}})
    write("base_loading_cpu.json", "same_base", {"ours": {"load_s": 2, "base_bytes": 2e9}})
    assert main(arguments) == 0
    share = f"{100 * share_of_one_world(64, TIMES, 16):.2f}% | {100 * share_of_replicas(64, TIMES, 16):.2f}%"
    assert f"| 8B in bfloat16 | 64 | 4.1 | {share} |" in document.read_text()
    assert "20.0 s from there to the next step" in document.read_text()
