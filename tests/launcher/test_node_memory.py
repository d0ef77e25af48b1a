"""`train.nodes: auto` before any rank is started."""

from pathlib import Path

import psutil
import pytest
import torch

from ptune_dist.cluster import node_memory
from ptune_dist.cluster.launch import main, parse, read_node
from ptune_dist.cluster.node_memory import choose_nodes, count_numbers
from ptune_dist.cluster.topology import Topology
from ptune_dist.config.load import load_config
from ptune_dist.distributed.world import World
from ptune_dist.run.open_nodes import settle_nodes
from tests.conftest import write_config


def choose(folder: Path, num_gpus: int = 0, **sections: object) -> str:
    return choose_nodes(load_config(write_config(folder / "c.json", **sections)), num_gpus)[0]


def test_numbers_are_counted_in_the_headers_of_the_weights(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.int8)}, tmp_path / "1.safetensors", {"x": "y"})
    save_file({"c": torch.zeros(())}, tmp_path / "2.safetensors")
    assert count_numbers(str(tmp_path)) == 15 + 7 + 1
    (tmp_path / "3.safetensors").write_bytes(b"\0" * 5)
    assert count_numbers(str(tmp_path)) is None
    assert count_numbers(str(tmp_path / "none")) is None and count_numbers("nobody/none") is None


def test_replicas_where_a_node_holds_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = load_config(write_config(tmp_path / "c.json"))
    num_bytes = 4 * count_numbers(config.model.path)
    assert num_bytes > 100_000
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": num_bytes}))
    assert choose(tmp_path) == "one_world"
    assert choose(tmp_path, model={"dtype": "bfloat16"}) == "replicas"
    assert choose(tmp_path, model={"quantization": "int8"}) == "replicas"
    nvme = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}
    assert choose(tmp_path, deepspeed={"zero_optimization": nvme}) == "replicas"
    monkeypatch.setattr(node_memory, "ask_nvidia_smi", lambda _: f"{num_bytes >> 20} MiB\n81559 MiB\n")
    assert choose(tmp_path, num_gpus=1) == "one_world" and choose(tmp_path, num_gpus=2) == "replicas"
    monkeypatch.setattr(node_memory, "ask_nvidia_smi", lambda _: "")
    assert choose(tmp_path, num_gpus=2) == "one_world"
    assert choose_nodes(config.model_copy(update={"model": config.model.model_copy(update={"path": "x/y"})}), 0) == (
        "one_world",
        "how large x/y is cannot be told from its files",
    )


def test_auto_is_settled_by_the_launcher_as_the_ranks_do_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    file = str(write_config(tmp_path / "c.json", train={"max_steps": 3, "nodes": "auto"}))
    for num_nodes, why in ((2, "the base takes 0.00"), (1, "this node is alone")):
        names = tuple("ab"[:num_nodes])
        config, _ = read_node(parse([file]), Topology("variables", "7", num_nodes, 0, "127.0.0.1", 1, names, 1, 0))
        assert config is not None
        assert config.train.nodes == settle_nodes(load_config(file), World(0, 1, torch.device("cpu"))).train.nodes
        assert f"launcher: train.nodes=auto is replicas: {why}" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert main(["--show-nodes", file]) == 0 and capsys.readouterr().out == "replicas\n"
    assert main(["--show-nodes", file, "train.nodes=one_world"]) == 0 and capsys.readouterr().out == "one_world\n"
