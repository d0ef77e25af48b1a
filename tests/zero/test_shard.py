"""A base that every rank fills its own part of is, put together, the whole base."""

import json

import pytest
import torch

from ptune_dist.zero.shard import ALIGNMENT, fill_part, pin_together
from tests.base.mixtures import save_mixture
from tests.commands import run_module
from tests.processes import ROOT

pytestmark = pytest.mark.long

KINDS = ["llama", "gpt2", "t5", "bert"]
MIXTURES = ["mixtral", "gpt_oss"]
NUM_RANKS = 3  # divides next to nothing


@pytest.fixture(scope="module")
def ranks(tiny_bases, tmp_path_factory) -> list[dict]:
    """What each of three ranks found."""
    out = tmp_path_factory.mktemp("shards")
    bases = [f"{kind}={tiny_bases[kind]}" for kind in KINDS]
    bases += [f"{kind}={save_mixture(kind, tmp_path_factory.mktemp(kind))}" for kind in MIXTURES]
    script = str(ROOT / "tests" / "zero" / "shard_many.py")
    done = run_module(script, str(out), *bases, num_ranks=NUM_RANKS)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("how", ["", " int8", " pinned", " random"])
@pytest.mark.parametrize("kind", KINDS + MIXTURES)
def test_the_parts_of_all_ranks_are_the_base(ranks, kind, how):
    assert [rank[kind + how]["different"] for rank in ranks] == [[]] * NUM_RANKS


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("how", ["", " int8"])
def test_a_rank_reads_its_share_of_the_file(ranks, tiny_bases, kind, how):
    size = (tiny_bases[kind] / "model.safetensors").stat().st_size
    assert all(rank[kind + how]["bytes_read"] <= 1.15 * size / NUM_RANKS for rank in ranks)
    if not how:
        assert sum(rank[kind]["bytes_read"] for rank in ranks) <= size


@pytest.mark.parametrize("how", ["", " int8", " random"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", *MIXTURES])  # BERT's head is whole
def test_a_rank_holds_its_share_of_every_tensor(ranks, kind, how):
    for rank in ranks:
        frozen = rank[kind + how]["frozen"]
        buffers = 200  # a tiny base's rotary frequencies
        assert rank[kind + how]["bytes_held"] <= sum(size for _, size in frozen) / NUM_RANKS + 8 * len(frozen) + buffers


def test_gathers_and_their_bytes_are_counted(ranks):
    for rank in ranks:
        for facts in rank.values():
            gathers, whole = facts["gathers"], sum(size for _, size in facts["frozen"])
            assert gathers["num"] >= 1
            received = whole * (NUM_RANKS - 1) / NUM_RANKS
            assert received - 16 * len(facts["frozen"]) <= gathers["num_bytes"] <= received + 16 * len(facts["frozen"])
            assert gathers["num_bytes_between_nodes"] == 0  # one node


@pytest.mark.parametrize("start", [0, 3, 7, 8, 9, 20])
def test_what_reaches_beyond_a_tensor_is_zeros(start):
    numbers = torch.arange(1.0, 9.0)  # eight elements
    part = torch.full((5,), torch.nan)
    asked = []

    def fill(first: int, out: torch.Tensor) -> None:
        asked.append((first, len(out)))
        out.copy_(numbers[first : first + len(out)])

    fill_part(part, start, len(numbers), fill)
    assert part.tolist() == [*numbers[start : start + 5], *[0.0] * (5 - len(numbers[start : start + 5]))]
    assert asked == ([(start, min(5, 8 - start))] if start < 8 else [])


def test_pinned_parts_share_one_block_and_no_memory(monkeypatch):
    pinned: list[tuple[int, int]] = []

    class Runtime:
        @staticmethod
        def cudaHostRegister(address: int, num_bytes: int, _flags: int) -> int:  # noqa: N802 -- CUDA's name
            pinned.append((address, num_bytes))
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda error: None)
    dtypes = [torch.int8, torch.float32, torch.bfloat16, torch.float32]
    sizes = [1001, 3, 700, 0]
    parts = [torch.empty(0, dtype=dtype) for dtype in dtypes]
    pin_together(list(zip(parts, sizes, strict=True)))
    for number, part in enumerate(parts):
        part.fill_(number)
    assert [part.tolist() for part in parts] == [[number] * size for number, size in enumerate(sizes)]
    ((address, num_bytes),) = pinned
    needed = sum(part.nbytes for part in parts)
    assert needed <= num_bytes < needed + len(parts) * ALIGNMENT
    assert all(address <= part.data_ptr() <= address + num_bytes - part.nbytes for part in parts[:3])
