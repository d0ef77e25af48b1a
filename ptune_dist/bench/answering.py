"""Measure an evaluation: accuracy over many labels, or the generation of answers, without loading.

    python -m ptune_dist.bench.answering prepare --out DIR [--before COMMIT]
    torchrun --nproc-per-node 2 .../answering.py labels|generate CONFIG [key.path=value ...] --result FILE

`prepare` makes rows, a base whose greedy answers end after 1 to 60 tokens, and the package as it was at a commit, so
that the same file measures both: it imports nothing that the package did not have then.
"""

import argparse
import io
import json
import random
import statistics
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ptune_dist.bench.arguments import side_parser
from ptune_dist.bench.probe import write_result
from ptune_dist.bench.shapes import write_shape, write_weights
from ptune_dist.config.load import load_config
from ptune_dist.data.build import build_inputs, build_split
from ptune_dist.distributed.world import World, init_distributed, sum_over_ranks
from ptune_dist.evaluation.answer_plan import Decoding
from ptune_dist.evaluation.evaluator import build_evaluator
from ptune_dist.evaluation.generate import generate_texts
from ptune_dist.run.job import Job, build_job
from ptune_dist.run.reading import build_reading
from ptune_dist.tiny.text import collect_words, read_docstrings

RUN = Path("configs/bench/evaluation_run.yaml")
SHAPE = Path("configs/shapes/smollm2_135m.json")
NUM_LABELS = 77
LABEL_TOKENS = (3, 6)  # with the end of a text
NUM_FIRST_WORDS = 25  # labels begin with one of so many words
ROWS = {"short": (8, 15, 25), "long": (2, 150, 250), "answers": (256, 10, 300)}  # rows, fewest and most tokens
MOST_NEW_TOKENS = 60
# Of a random base's layers, so that its answers do not repeat themselves, and of the end token's embedding, so that
# they end after some 30 tokens, at 60 at the latest.
LAYER_SCALE = 4.0
END_SCALE = 2.2


def write_data(out: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Rows from docstrings, and the run's config with labels of their words.

    Lengths are spread evenly, those of `answers` on a logarithmic scale.
    """
    draw = random.Random(seed)
    docstrings = read_docstrings()
    ids = tokenizer(" ".join(docstrings), add_special_tokens=False)["input_ids"]
    labels = draw_labels(draw, collect_words(docstrings), tokenizer)
    run = yaml.safe_load(RUN.read_text())
    run["model"]["path"] = str(out / "base")
    run["data"] |= {"train": str(out / "short.jsonl"), "validation": str(out / "short.jsonl"), "labels": labels}
    (out / "run.yaml").write_text(yaml.safe_dump(run))
    for name, (count, least, most) in ROWS.items():
        lines = []
        for number in range(count):
            share = number / (count - 1)
            length = round(least * (most / least) ** share if name == "answers" else least + (most - least) * share)
            start = draw.randrange(len(ids) - length)
            text = tokenizer.decode(ids[start : start + length])
            lines.append(json.dumps({"text": text, "label": labels[number % len(labels)]}) + "\n")
        draw.shuffle(lines)
        (out / f"{name}.jsonl").write_text("".join(lines))


def draw_labels(draw: random.Random, words: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Distinct labels of 3 to 6 tokens, each of which begins with one of a few words."""
    firsts = draw.sample(words, NUM_FIRST_WORDS)
    found: list[str] = []
    while len(found) < NUM_LABELS:
        label = " ".join([draw.choice(firsts), *draw.sample(words, draw.randint(0, 2))])
        num_tokens = len(tokenizer(f" {label}", add_special_tokens=False)["input_ids"]) + 1
        if LABEL_TOKENS[0] <= num_tokens <= LABEL_TOKENS[1] and label not in found:
            found.append(label)
    return found


def write_base(out: Path) -> None:
    """Random weights, under which a greedy answer ends after some tokens."""
    write_shape(SHAPE, out)
    write_weights(out, "float32", seed=0)
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.dim() > 1:
            tensor *= LAYER_SCALE
    tensors["model.embed_tokens.weight"][json.loads(SHAPE.read_text())["eos_token_id"]] *= END_SCALE
    save_file(tensors, file, {"format": "pt"})


def extract_commit(commit: str, out: Path) -> None:
    """The package as it was."""
    packed = subprocess.run(["git", "archive", commit, "ptune_dist"], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(out, filter="data")


def prepare(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="prepare")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", help="the commit to compare with")
    args = parser.parse_args(words)
    args.out.mkdir(parents=True, exist_ok=True)
    write_base(args.out / "base")
    write_data(args.out, AutoTokenizer.from_pretrained(args.out / "base"), seed=0)
    if args.before:
        extract_commit(args.before, args.out / "before")
    return 0


def measure_labels(job: Job) -> dict[str, Any]:
    """An evaluation with accuracy over all labels."""
    split = build_split(job.config.data, job.reading.encoding(job.config), which="validation")
    assert split is not None
    evaluator = build_evaluator(job.config, split, job.reading)
    found, times = timed(lambda: evaluator(job.engine, job.engine.members), job.engine.world)
    ((metrics, *_),) = found.values()
    num_inputs = split.examples.lengths - split.examples.num_targets
    return {
        "rows": len(split.examples),
        "labels": len(job.config.data.labels or []),
        "median_input_tokens": statistics.median(num_inputs.tolist()),
        **times,
        "loss": metrics["loss"],
        "accuracy": metrics["accuracy"],
    }


def measure_generation(job: Job) -> dict[str, Any]:
    """Greedy answers to all rows."""
    split = build_split(job.config.data, job.reading.encoding(job.config), which="validation")
    assert split is not None
    inputs = build_inputs(job.config.data, split.rows, job.reading.encoding(job.config))
    tokens = job.config.train.micro_batch_tokens
    assert isinstance(tokens, int)
    decoding = Decoding(MOST_NEW_TOKENS, tokens)
    decode = job.tokenizer.batch_decode

    def count_and_decode(ids: Any, **options: Any) -> list[str]:
        """The tokens of an answer, before its end or padding, as its text: this base writes more than has a text."""
        rows = [row.tolist() if isinstance(row, torch.Tensor) else list(row) for row in ids]
        end = job.tokenizer.eos_token_id
        return [" ".join(map(str, row[: row.index(end)] if end in row else row)) for row in rows]

    cast(Any, job.tokenizer).batch_decode = count_and_decode
    answers, times = timed(lambda: dict(generate_texts(job.engine, job.tokenizer, inputs, decoding)), job.engine.world)
    cast(Any, job.tokenizer).batch_decode = decode
    lengths = [len(answers[i].split()) + 1 for i in range(len(inputs))]
    return {
        "rows": len(inputs),
        "median_input_tokens": statistics.median(len(rest) for _, rest in inputs),
        "median_answer_tokens": statistics.median(lengths),
        "shortest_answer": min(lengths),
        "longest_answer": min(max(lengths), MOST_NEW_TOKENS),
        **times,
        "answers": [zlib.crc32(answers[i].encode()) for i in range(len(inputs))],
    }


def timed(work: Callable[[], Any], world: World) -> tuple[Any, dict[str, float]]:
    """What `work` returns; the seconds until all ranks have done it, and their CPU seconds together."""
    dist.barrier()
    began = time.perf_counter()
    cpu_began = time.process_time()
    found = work()
    cpu_s = sum_over_ranks([time.process_time() - cpu_began], world)[0]
    return found, {"seconds": time.perf_counter() - began, "cpu_seconds": cpu_s}


MEASURES = {"labels": measure_labels, "generate": measure_generation}


def main() -> int:
    if sys.argv[1] == "prepare":
        return prepare(sys.argv[2:])
    measure = MEASURES[sys.argv.pop(1)]
    args = side_parser(__doc__).parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    world = init_distributed()
    found = measure(build_job(build_reading(config), world))
    if world.is_main:
        write_result(args.result, found)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
