"""A job of replicas that has lost the node of its batch script is queued again."""

from pathlib import Path

import pytest

from ptune_dist.cluster.slurm_job import find_lost_host, requeue_orphaned_job

FACTS = "JobId=1 JobState=RUNNING NodeList={nodes} ReqNodeList=(null) BatchHost={host} NumNodes=2 StdErr=/x"


@pytest.mark.parametrize(
    "facts, host",
    [
        (FACTS.format(nodes="n[1-2]", host="n0"), "n0"),
        (FACTS.format(nodes="n[0,2]", host="n0"), ""),
        (FACTS.format(nodes="n0", host="n0"), ""),
        (FACTS.format(nodes="n[1-", host="n0"), ""),
        ("slurm_load_jobs error: Invalid job id specified", ""),
        ("", ""),
    ],
)
def test_the_batch_script_is_lost_with_its_node(facts: str, host: str):
    assert find_lost_host(facts) == host


@pytest.mark.parametrize("nodes, is_queued", [("n[1-2]", True), ("n[0-2]", False)])
def test_only_such_a_job_is_queued_again(nodes: str, is_queued: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scontrol = tmp_path / "scontrol"
    facts = FACTS.format(nodes=nodes, host="n0")
    scontrol.write_text(f'#!/bin/sh\n[ "$1" = requeue ] && echo "$@" >{tmp_path}/asked || echo "{facts}"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    said: list[str] = []
    requeue_orphaned_job({"SLURM_JOB_ID": "7"}, said.append)
    assert (tmp_path / "asked").exists() == is_queued == bool(said)
    if is_queued:
        assert (tmp_path / "asked").read_text() == "requeue 7\n"
        assert said == ["node n0, on which the batch script ran, is lost: queueing job 7 again"]


def test_without_slurm_nothing_is_queued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    said: list[str] = []
    requeue_orphaned_job({"SLURM_JOB_ID": "7"}, said.append)
    assert not said
