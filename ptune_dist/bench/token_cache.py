"""Measure the cache of token ids: build it, restart with several ranks, and compare with the tokenizer alone.

    python -m ptune_dist.bench.token_cache --rows 5000000 --out docs/benchmarks/token_cache_cpu.json

Rows are short lines of the standard library's docstrings, each with its number, in a JSON-lines file that is removed
afterward. The builder's speed is given per second of a core's time, so that other work on the machine changes it
little; the tokenizer alone is `encode_batch` of `tokenizers` over the same inputs, with one thread.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ptune_dist.bench.data import SHAPE
from ptune_dist.bench.machine import OtherLoad, describe_machine, own_cpu_s
from ptune_dist.bench.probe import write_result
from ptune_dist.config.schema import DataConfig
from ptune_dist.data.batches import step_examples
from ptune_dist.data.build import Split, build_split
from ptune_dist.data.encode import Encoding
from ptune_dist.data.framing import Framing, TextTargets
from ptune_dist.tiny.text import read_docstrings

CONTEXT = multiprocessing.get_context("spawn")
LABELS = ("negative", "positive")
LENGTHS = (20, 60)  # least and most characters of a line
NUM_ALONE = 100_000  # rows for the tokenizer alone
BATCH_ROWS = 1_000
NUM_STEPS = 200
STEP_ROWS = 64
NUM_RANKS = 2
SAMPLE_S = 0.5


def write_rows(path: Path, num_rows: int) -> None:
    """Short lines of docstrings, again and again."""
    found = (line.strip() for text in read_docstrings() for line in text.splitlines())
    lines = [json.dumps(line)[1:-1] for line in found if LENGTHS[0] <= len(line) <= LENGTHS[1]]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(num_rows):
            file.write(f'{{"text": "{i} {lines[i % len(lines)]}", "label": "{LABELS[i % 2]}"}}\n')


def load_encoding(tokenizer: str) -> Encoding:
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return Encoding(loaded, Framing(ends_input=False), TextTargets(loaded), max_length=512)


def open_split(folder: Path, encoding: Encoding) -> Split:
    data = DataConfig(
        train=str(folder / "rows.jsonl"),
        template="{{ text }}\nSentiment:",
        target=" {{ label }}",
        cache_dir=str(folder / "cache"),
    )
    split = build_split(data, encoding, which="train")
    assert split is not None, "data.train is given"
    return split


def measure_alone(folder: Path, tokenizer: str, num_rows: int) -> dict[str, float]:
    """The tokenizer without anything else, in one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    backend = cast(PreTrainedTokenizerFast, load_encoding(tokenizer).tokenizer).backend_tokenizer
    with open(folder / "rows.jsonl", encoding="utf-8") as file:
        texts = [f"{json.loads(next(file))['text']}\nSentiment:" for _ in range(min(num_rows, NUM_ALONE))]
    began = time.process_time()
    for first in range(0, len(texts), BATCH_ROWS):
        for found in backend.encode_batch(texts[first : first + BATCH_ROWS], add_special_tokens=False):
            assert found.ids
    return {"rows_per_cpu_s": len(texts) / (time.process_time() - began)}


def measure_build(folder: Path, tokenizer: str, num_rows: int) -> dict[str, float]:
    """The first start: reading, tokenizing and writing. Memory is that of this process and of those that it starts."""
    encoding = load_encoding(tokenizer)
    cpu_began = own_cpu_s()
    began = time.perf_counter()
    with watch_memory() as memory:
        split = open_split(folder, encoding)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "rows_per_s": num_rows / seconds,
        "rows_per_cpu_s": num_rows / (own_cpu_s() - cpu_began),
        "peak_over_base_bytes": max(memory) - memory[0],
        "tokens": len(split.examples.ids),
    }


@contextlib.contextmanager
def watch_memory() -> Iterator[list[int]]:
    """Sampled while the body runs: bytes of this process and its children, pages that they share counted once."""
    samples = [tree_bytes()]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_S):
            samples.append(tree_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def tree_bytes() -> int:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0
    for pid in ["self", *children]:
        with contextlib.suppress(OSError):  # it has ended
            total += memory_of(pid)["Pss_Anon"]
    return total


def memory_of(pid: str) -> dict[str, int]:
    """The sums of a process's mappings in bytes (proc(5), `smaps_rollup`)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}


def measure_rank(folder: Path, tokenizer: str, num_rows: int, barrier: Barrier) -> dict[str, float]:
    """A later start of one rank of several: seconds until it has the examples, and memory after some steps."""
    encoding = load_encoding(tokenizer)
    barrier.wait()
    before = memory_of("self")
    began = time.perf_counter()
    split = open_split(folder, encoding)
    seconds = time.perf_counter() - began
    for step in range(1, NUM_STEPS + 1):
        for i in step_examples(step, batch_size=STEP_ROWS, num_examples=num_rows, seed=0):
            assert len(split.examples.target_ids(i))
    barrier.wait()  # all ranks have the pages now
    after = memory_of("self")
    private = after["Private_Dirty"] - before["Private_Dirty"]
    unique = private + after["Private_Clean"] - before["Private_Clean"]
    barrier.wait()
    return {
        "seconds": seconds,
        "private_bytes_per_row": private / num_rows,
        "unique_bytes": unique,
    }


def call_and_send(function: Any, arguments: tuple, results: Any) -> None:
    results.put(function(*arguments))


def in_processes(function: Any, all_arguments: list[tuple]) -> list[dict[str, float]]:
    """What a function returns in new processes, one for each tuple of arguments."""
    results = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=call_and_send, args=(function, arguments, results)) for arguments in all_arguments
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def summarize(results: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum of each measure; the median of two is the larger."""
    columns = {name: sorted(result[name] for result in results) for name in results[0]}
    return {
        name: {"median": column[len(column) // 2], "min": column[0], "max": column[-1]}
        for name, column in columns.items()
    }


def describe(num_rows: int, sides: dict[str, dict[str, dict[str, float]]], others: float | None) -> dict[str, Any]:
    """The content of a result JSON. `others`: the share of the machine that other work took."""
    num_tokens = sides["build"]["tokens"]["median"] / num_rows
    about = (
        f"{num_rows:,} rows of {num_tokens:.0f} tokens on average; rows per second of one core's time; memory that "
        "processes have for themselves beyond what they had before, without the pages of mapped files"
    )
    case = {
        "name": "token_cache",
        "about": about,
        "sides": sides,
        "ratios": {},
        "agreement": None,
        "runs": [{"others_cpu_share": others}],
    }
    return {
        "name": "token_cache",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe_machine(),
        "matrix": {"baseline": None},
        "cases": [case],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tokenizer", default=str(SHAPE))
    parser.add_argument("--work", type=Path, help="where the rows and the cache are written; default: TMPDIR")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.work))
    other_load = OtherLoad.start()
    try:
        write_rows(folder / "rows.jsonl", args.rows)
        arguments = (folder, args.tokenizer, args.rows)
        alone = in_processes(measure_alone, [arguments])
        build = in_processes(measure_build, [arguments])
        barrier = CONTEXT.Barrier(NUM_RANKS)
        ranks = in_processes(measure_rank, [(*arguments, barrier)] * NUM_RANKS)
    finally:
        shutil.rmtree(folder)
    shares = {"tokenizer alone": alone, "build": build, f"restart, each of {NUM_RANKS} ranks": ranks}
    build[0]["of_tokenizer"] = build[0]["rows_per_cpu_s"] / alone[0]["rows_per_cpu_s"]
    content = describe(args.rows, {side: summarize(results) for side, results in shares.items()}, other_load.share())
    write_result(str(args.out), content)
    print(json.dumps(content["cases"][0]["sides"], indent=1))


if __name__ == "__main__":
    main()
