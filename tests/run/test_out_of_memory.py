"""Where the micro-batches that `auto` chose do not fit, all ranks continue with half, and the curve is the same."""

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from ptune_dist import loop as training_loop
from ptune_dist.evaluation.answer_plan import Decoding
from ptune_dist.run.metrics_log import read_metrics
from ptune_dist.run.micro_batch import FILE, MicroBatchSize, describe_shortage, is_out_of_memory, read_stored
from ptune_dist.run.watch import describe_error
from ptune_dist.tiny.make import build_tokenizer
from tests.commands import run_module
from tests.conftest import write_config
from tests.processes import ROOT

SCRIPT = str(ROOT / "tests" / "run" / "halve_many.py")
ENOUGH_FOR_HALF_MIB = 235  # a whole step of a rank takes more
TOO_LITTLE_MIB = 100
NUM_ROWS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose activations are much larger than it is, and rows for it."""
    folder = tmp_path_factory.mktemp("memory")
    shape = AutoConfig.for_model(
        "llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, vocab_size=272,
        eos_token_id=0, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    shape.save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    draw = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in draw.integers(0, 26, draw.integers(90, 110))) for _ in range(NUM_ROWS)]
    rows = [json.dumps({"word": word, "answer": word[:8]}) for word in words]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder


def train(folder, name: str, room_mib: int, **sections):
    """A run on two ranks, rank 1 of which may have so many MiB more than it has when it begins; 0: no limit."""
    config = write_config(
        folder / f"{name}.json",
        output_dir=str(folder / name),
        model={"path": str(folder / "base"), "random_init": True},
        data={"train": str(folder / "rows.jsonl"), "max_length": 200},
        **{"train": {"max_steps": 3, "batch_size": 48, "micro_batch_tokens": "auto"}} | sections,
    )
    return run_module(SCRIPT, str(config), str(room_mib), num_ranks=2, timeout=120)


def curve(run) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


@pytest.fixture(scope="module")
def halved(folder):
    """A run whose first step does not fit."""
    done = train(folder, "halved", ENOUGH_FOR_HALF_MIB)
    assert done.returncode == 0, done.stderr[-4000:]
    return done, folder / "halved"


@pytest.mark.extended  # what a process maps beside tensors varies on a busy machine
def test_all_ranks_continue_with_half_where_one_runs_out_of_memory(halved):
    done, run = halved
    size = read_stored(run)
    assert not size.may_halve and 1 < size.tokens < 2000  # half of what a rank has of a step, about 2,700 positions
    assert f"did not fit in memory at step 1, with train.micro_batch_tokens 8192: continuing with {size.tokens}" in (
        done.stdout
    )
    assert json.loads((run / "summary.json").read_text())["steps"] == 3


@pytest.mark.extended  # what a process maps beside tensors varies on a busy machine
def test_under_zero3_the_same_command_continues_with_half_and_the_curve_is_the_same(halved, folder):
    sections = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    failed = train(folder, "sharded", TOO_LITTLE_MIB, **sections)
    assert failed.returncode == 1
    assert "with train.micro_batch_tokens 8192: the next start takes half of it" in failed.stderr
    stored = (folder / "sharded" / FILE).read_text()
    assert stored == (halved[1] / FILE).read_text()
    done = train(folder, "sharded", 0, **sections)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (folder / "sharded" / FILE).read_text() == stored
    assert curve(folder / "sharded") == pytest.approx(curve(halved[1]), rel=1e-5)


@pytest.mark.extended  # what a process maps beside tensors varies on a busy machine
def test_what_the_user_chose_is_not_halved(folder):
    sections = {"train": {"max_steps": 3, "batch_size": 48, "micro_batch_tokens": 8192}}
    failed = train(folder, "chosen", TOO_LITTLE_MIB, **sections)
    assert failed.returncode == 1 and not (folder / "chosen" / FILE).exists()
    assert "did not fit in memory at step 1, with train.micro_batch_tokens 8192: set a smaller one" in failed.stderr


def test_errors_that_mean_too_little_memory_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_launcher_starts_a_job_again_that_has_stored_the_half():
    shortage = describe_shortage(MicroBatchSize(8192, may_halve=True), 1)
    assert describe_error(RuntimeError(f"{shortage}: the next start takes half of it")).kind == "error"


def test_ranks_that_run_out_of_memory_together_can_all_store_the_half(tmp_path):
    size = MicroBatchSize(640)
    with ThreadPoolExecutor(8) as ranks:
        list(ranks.map(lambda rank: [size.store(tmp_path, rank) for _ in range(10)], range(8)))
    assert read_stored(tmp_path) == size
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_an_evaluation_takes_the_half_too(monkeypatch):
    evaluator = SimpleNamespace(decoding=Decoding(5, 8192))
    job = SimpleNamespace(micro_batch=MicroBatchSize(640))
    rest = dict.fromkeys(("progress", "metrics", "watch", "world"))
    monkeypatch.setattr(training_loop, "evaluate_members", lambda *_: None)
    training_loop.evaluate(SimpleNamespace(job=job, evaluators={"one": evaluator}, **rest))
    assert evaluator.decoding == Decoding(5, 640)


def test_what_is_stored_is_read_again_and_a_damaged_file_is_none(tmp_path):
    MicroBatchSize(640, may_halve=True).store(tmp_path)
    assert read_stored(tmp_path) == MicroBatchSize(640, may_halve=True)
    assert MicroBatchSize(8192, may_halve=True).halved(2000) == MicroBatchSize(1000)
    assert MicroBatchSize(500, may_halve=True).halved(2000) == MicroBatchSize(250)
    (tmp_path / FILE).write_text("{")
    assert read_stored(tmp_path) is None
