"""Answer the rows of a file with several runs one after another in one process group.

usage: answer_many.py SPECS.json ROWS.jsonl OUT.json. SPECS: a list of {"run", "overrides", "alone"}; with `alone` every
row is answered by itself, by its number, and else all together. OUT: for each spec the answers by kind of decoding.
"""

import json
import sys
from pathlib import Path

from ptune_dist.data.build import build_inputs
from ptune_dist.data.sources import load_rows
from ptune_dist.distributed.world import World, init_distributed
from ptune_dist.evaluation.answer_plan import Decoding
from ptune_dist.evaluation.generate import generate_texts
from ptune_dist.run.folder import read_run_config
from ptune_dist.run.reading import build_reading
from ptune_dist.run.resolve import resolve
from ptune_dist.run.stored_prompt import build_trained_job

NUM_NEW = 6
SAMPLINGS = {"greedy": None, "sampled": {"temperature": 1.3, "top_k": 100, "top_p": 0.95}}


def answer(spec: dict, file: str, world: World) -> dict[str, list[str]]:
    """A run's answers to all rows, in their order, for each of SAMPLINGS."""
    run = Path(spec["run"])
    config = read_run_config(run, spec["overrides"], resolve=resolve)
    reading = build_reading(config)
    rows = load_rows(file, key="rows", default_split="test")
    inputs = build_inputs(config.data, rows, reading.encoding(config))
    job = build_trained_job(reading, run, world)
    found = {}
    for name, sampling in SAMPLINGS.items():
        decoding = Decoding(NUM_NEW, config.train.micro_batch_tokens, sampling, seed=3)
        parts = [[i] for i in range(len(inputs))] if spec["alone"] else [list(range(len(inputs)))]
        answers: dict[int, str] = {}
        for part in parts:
            some = [inputs[i] for i in part]
            answers |= dict(generate_texts(job.engine, job.tokenizer, some, decoding, numbers=part))
        found[name] = [answers[i] for i in range(len(inputs))]
    return found


def main() -> None:
    specs, rows, out = sys.argv[1:]
    world = init_distributed()
    found = [answer(spec, rows, world) for spec in json.loads(Path(specs).read_text())]
    if world.is_main:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
