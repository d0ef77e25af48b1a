"""Do the actions of a file one after another in one process group, and store the outcome of each.

usage: worker.py ACTIONS.json, a list of [do, folder, config, overrides]. The first one is what the others build on:
where it does not work, they are left out.
"""

import json
import os
import sys
from pathlib import Path

from ptune_dist.commands import GenerateRequest, export_runs, generate_for_run
from ptune_dist.config.load import load_config
from ptune_dist.export.runs import ExportRequest
from ptune_dist.loop import train
from tests.architectures.checks import Differs, outcome_of


def train_in(folder: Path, config: str, overrides: list[str]) -> str:
    status = train(load_config(config, overrides))
    if status != 0:
        raise Differs(f"training ended with status {status}")
    return ""


def export(folder: Path, config: str, overrides: list[str]) -> str:
    run = Path(config).parent
    export_runs([(load_config(str(run / "config.yaml"), []), run)], ExportRequest("peft", folder))
    return ""


def generate(folder: Path, config: str, overrides: list[str]) -> str:
    run = Path(config).parent
    read = load_config(str(run / "config.yaml"), [f"train.micro_batch_tokens={overrides[0]}"])
    rows = str(read.data.train)
    generate_for_run(read, run, GenerateRequest(None, rows, folder / "answers.jsonl", most_tokens=6))
    return ""


DO = {"train": train_in, "export": export, "generate": generate}


def main() -> None:
    is_main = os.environ.get("RANK", "0") == "0"
    for do, where, config, overrides in json.loads(Path(sys.argv[1]).read_text()):
        folder = Path(where)
        folder.mkdir(parents=True, exist_ok=True)
        outcome = outcome_of(DO[do], folder, config, overrides)
        if is_main:
            (folder / "outcome.json").write_text(json.dumps(outcome))
        if folder.name == "plain" and outcome["result"] != "works":
            return


if __name__ == "__main__":
    main()
