"""A base that does not fit is refused before any weights are read, with its size and the remedies."""

import json
import math
import re
import struct
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoConfig

from ptune_dist.base import memory_check as module
from ptune_dist.base import open as open_module
from ptune_dist.base.memory_check import GIB, check_memory, free_host_bytes
from tests.base.bases import error_of, load, open_only

CPU = torch.device("cpu")
HUGE = {
    "vocab_size": 272,
    "hidden_size": 16384,
    "intermediate_size": 65536,
    "num_hidden_layers": 20,
    "num_attention_heads": 64,
    "tie_word_embeddings": False,
}


def write_sparse(folder: Path, kind: str, **changes) -> Path:
    """A checkpoint of hundreds of GiB that takes a few KiB of disk: a valid header in a sparse file."""
    folder.mkdir()
    AutoConfig.for_model(kind, **HUGE | changes).save_pretrained(folder)
    shapes = open_only(folder, random_init=True).weights.shapes
    header = {}
    end = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        stored = name.replace("lm_head", "embed_out") if kind == "gpt_neox" else name
        header[stored] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as opened:
        opened.write(struct.pack("<Q", len(content)) + content)
        opened.truncate(8 + len(content) + end)
    return folder


@pytest.fixture(scope="module")
def huge(tmp_path_factory) -> Path:
    return write_sparse(tmp_path_factory.mktemp("sparse") / "huge", "llama")


def whole_gib(opened) -> float:
    return sum(p.numel() * p.element_size() for p in opened.model.parameters()) / GIB


def gib_of(message: str) -> float:
    """The GiB needed according to the message."""
    assert "GiB are free" in message
    return float(re.search(r"needs ([\d.]+) GiB", message)[1])


def refusal(opened, path: Path, world_size: int = 1, **zero) -> str:
    return error_of(check_memory, opened.model, {"zero_optimization": zero}, str(path), world_size, CPU)


# Memory


def test_a_base_too_large_for_memory_is_refused_in_seconds_before_it_is_read(huge):
    began = time.perf_counter()
    opened = open_only(huge)
    message = refusal(opened, huge, stage=0)
    assert time.perf_counter() - began < 5
    assert opened.weights.bytes_read == 0 and (huge / "model.safetensors").stat().st_blocks < 1000
    assert str(huge) in message and "this host's memory" in message
    assert all(remedy in message for remedy in ("ZeRO-3", "model.quantization=int8", "offload_param"))
    assert gib_of(message) == pytest.approx(whole_gib(opened), abs=0.1)


def test_a_tensor_larger_than_memory_is_refused_too(tmp_path):
    wide = {"hidden_size": 1 << 18, "intermediate_size": 1 << 20, "num_hidden_layers": 1}
    base = write_sparse(tmp_path / "wide", "llama", **wide)
    assert "this host's memory" in refusal(open_only(base), base, stage=0)


def test_a_base_that_fits_is_not_refused(llama):
    for stage in (0, 3):
        check_memory(open_only(llama).model, {"zero_optimization": {"stage": stage}}, str(llama), 2, CPU)


def test_int8_takes_a_quarter_and_bfloat16_half(huge):
    whole = gib_of(refusal(open_only(huge), huge, stage=0))
    assert gib_of(refusal(open_only(huge, dtype=torch.bfloat16), huge, stage=0)) == pytest.approx(whole / 2, rel=0.01)
    int8 = open_only(huge, int8={"include": [], "threshold": None})
    assert gib_of(refusal(int8, huge, stage=0)) == pytest.approx(whole / 4, rel=0.01)


def test_ranks_of_one_host_share_a_base_under_zero3_and_copy_it_below(huge):
    opened = open_only(huge)
    whole = whole_gib(opened)
    assert gib_of(refusal(opened, huge, 4, stage=2)) == pytest.approx(4 * whole, rel=0.01)
    assert gib_of(refusal(opened, huge, 4, stage=3)) == pytest.approx(whole, rel=0.01)
    message = refusal(opened, huge, 4, stage=3, zero_hpz_partition_size=2)  # each pair of ranks has another copy
    assert gib_of(message) == pytest.approx(3 * whole, rel=0.01) and "for 4 ranks" in message


def test_many_hosts_hold_what_one_cannot(huge, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    opened = open_only(huge)
    assert gib_of(refusal(opened, huge, 4, stage=3)) == pytest.approx(whole_gib(opened) / 2, rel=0.01)
    check_memory(opened.model, {"zero_optimization": {"stage": 3}}, str(huge), 10_000, CPU)


def test_a_base_that_transformers_loads_must_fit_whole_on_every_rank(tmp_path, monkeypatch):
    base = write_sparse(tmp_path / "neox", "gpt_neox")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(open_module, "convert_names", lambda model, files: None)  # as for what transformers transposes
    began = time.perf_counter()
    message = error_of(load, base)
    assert time.perf_counter() - began < 5
    assert "whole on every rank" in message
    assert gib_of(message) == pytest.approx(2 * whole_gib(open_only(base, random_init=True)), rel=0.01)


# The disk


def test_a_disk_too_small_for_the_base_is_refused_by_its_folder(huge, tmp_path):
    message = refusal(open_only(huge), huge, 2, stage=3, offload_param={"device": "nvme", "nvme_path": str(tmp_path)})
    assert f"on the disk of {tmp_path}" in message
    assert gib_of(message) == pytest.approx(whole_gib(open_only(huge)), rel=0.01)


def test_a_base_on_disk_need_not_fit_in_memory(llama, tmp_path, monkeypatch):
    opened = open_only(llama)
    layers = sum(p.nbytes for p in opened.model.model.layers.parameters())
    others = sum(p.nbytes for p in opened.model.parameters()) - layers  # embeddings and head stay in memory
    monkeypatch.setattr(module, "free_host_bytes", lambda: others + 100)
    offload = {"device": "nvme", "nvme_path": str(tmp_path)}
    check_memory(opened.model, {"zero_optimization": {"stage": 3, "offload_param": offload}}, str(llama), 2, CPU)
    assert "memory" in refusal(opened, llama, 2, stage=3, offload_param={"device": "cpu"})


# Free memory


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A fake cgroup of this process; returns a function that writes its files."""
    own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    folder = tmp_path / own.strip("/")
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(module, "CGROUP", tmp_path)

    def write(limit: str, used: int = 0, cached: int = 0) -> None:
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\n")

    return write


def test_what_a_container_or_a_slurm_job_may_have_is_all_that_is_free(group):
    group("1000000", used=300_000)
    assert free_host_bytes() == 700_000
    group("1000000", used=300_000, cached=100_000)  # the page cache can be reclaimed
    assert free_host_bytes() == 800_000


def test_a_group_without_a_limit_has_what_the_host_has(group):
    group("max")
    assert free_host_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    group(str(1 << 60))
    assert free_host_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
