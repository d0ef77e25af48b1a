"""What is tried on a base through the commands themselves: training, resuming, exporting and answering."""

import contextlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ptune_dist.commands import GenerateRequest, evaluate_run, export_runs, generate_for_run
from ptune_dist.config.load import load_config
from ptune_dist.evaluation.validate import validate
from ptune_dist.export.runs import ExportRequest
from ptune_dist.loop import train
from ptune_dist.run.metrics_log import read_metrics
from tests.architectures.bases import LABELS
from tests.architectures.checks import Differs

TEXTS = ["abc", "a film", "words and", "no", "a text of many more words"]
ROWS = [{"text": text, "label": LABELS[number % 3]} for number, text in enumerate(TEXTS)]


def run_of(base: Path, name: str) -> Path:
    """The folder of a run, beside its base's."""
    return base.with_name(f"{base.name}_{name}")


def write_run(folder: Path, family: str, name: str, **sections: Any) -> Path:
    """The config of a run of two steps under ZeRO-3."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"train": str(rows), "template": "{{ text }} =", "target": " {{ label }}", "max_length": 32}
    if family == "encoder":
        data |= {"labels": LABELS, "target": "{{ label }}"}
    content: dict[str, Any] = {
        "output_dir": str(run_of(folder, name)),
        "model": {"path": str(folder)},
        "prompt": {"num_virtual_tokens": 4},
        "data": data,
        "train": {"max_steps": 2, "batch_size": 2, "learning_rate": 0.05, "schedule": "constant"},
        "checkpoint": {"every": 1},
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }
    for key, value in sections.items():
        content[key] = content[key] | value
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(content))
    return file


def train_in(folder: Path, family: str, name: str, overrides: list[str], **sections: Any) -> Path:
    status = train(load_config(str(write_run(folder, family, name, **sections)), overrides))
    if status != 0:
        raise Differs(f"training ended with status {status}")
    return run_of(folder, name)


def check_float32(folder: Path, family: str) -> str:
    """Two steps, whose losses are finite and whose prompt moves."""
    losses = [line["loss"] for line in read_metrics(train_in(folder, family, "float32", []))]
    if len(losses) != 2 or not all(0 < loss < 1e4 for loss in losses):
        raise Differs(f"losses {losses}")
    return ""


def check_int8(folder: Path, family: str) -> str:
    """Two steps over int8 weights, whose first loss is close to that of float32."""
    plain = [line["loss"] for line in read_metrics(run_of(folder, "float32"))]
    losses = [
        line["loss"] for line in read_metrics(train_in(folder, family, "int8", [], model={"quantization": "int8"}))
    ]
    if abs(losses[0] - plain[0]) > 0.02 * plain[0]:
        raise Differs(f"first loss {losses[0]}, float32 {plain[0]}")
    return ""


def check_validate(folder: Path, family: str) -> str:
    """The report on the config is printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        validate(load_config(str(write_run(folder, family, "validated")), []))
    if "examples" not in output.getvalue():
        raise Differs("no examples")
    return ""


def check_evaluate(folder: Path, family: str) -> str:
    """The prompt has a finite loss on rows that are scored one by one and together."""
    losses = []
    for tokens in (4096, 1):
        overrides = [f"data.validation={folder / 'rows.jsonl'}", f"train.micro_batch_tokens={tokens}"]
        config = load_config(str(run_of(folder, "float32") / "config.yaml"), overrides)
        evaluate_run(config, run_of(folder, "float32"))
        losses.append(json.loads((run_of(folder, "float32") / "evaluation.json").read_text())["loss"])
    if not math.isclose(*losses, rel_tol=1e-4):
        raise Differs(f"loss {losses[0]} together, {losses[1]} alone")
    return ""


def check_contexts(folder: Path, family: str) -> str:
    """A step with virtual tokens after the input, over what the base keeps of it."""
    return train_one_step(folder, family, "contexts", placement="infix" if family == "causal" else "decoder")


def check_prefix_tuning(folder: Path, family: str) -> str:
    """A step of a prompt of keys and values."""
    return train_one_step(folder, family, "keys", method="prefix_tuning")


def train_one_step(folder: Path, family: str, name: str, **prompt: Any) -> str:
    run = train_in(folder, family, name, ["train.max_steps=1"], prompt=prompt)
    losses = [line["loss"] for line in read_metrics(run)]
    if not all(0 < loss < 1e4 for loss in losses):
        raise Differs(f"losses {losses}")
    return ""


def check_resume(folder: Path, family: str) -> str:
    """A run that is stopped after one step and resumed stores the prompt of one that is not."""
    train_in(folder, family, "resumed", ["train.max_steps=1"])
    train_in(folder, family, "resumed", [])
    whole, resumed = [next((run_of(folder, name) / "prompt").glob("*.safetensors")) for name in ("float32", "resumed")]
    theirs = load_file(resumed)
    if any(not torch.equal(tensor, theirs[name]) for name, tensor in load_file(whole).items()):
        raise Differs("the prompt of a resumed run is another")
    return ""


def check_export(folder: Path, family: str) -> str:
    """A PEFT adapter is written, with the names of the labels that an encoder tells apart."""
    config = load_config(str(run_of(folder, "float32") / "config.yaml"), [])
    export_runs([(config, run_of(folder, "float32"))], ExportRequest("peft", folder / "adapter"))
    if not (folder / "adapter" / "adapter_config.json").exists():
        raise Differs("no adapter")
    if family == "encoder":
        names = json.loads((folder / "adapter" / "config.json").read_text())["id2label"]
        if list(names.values()) != LABELS:
            raise Differs(f"labels {names}")
    return ""


def check_generate(folder: Path, family: str) -> str:
    """Every row is answered, and the answers are the same in one batch and one by one."""
    answers = {}
    for name, tokens in (("together", 4096), ("alone", 1)):
        config = load_config(str(run_of(folder, "float32") / "config.yaml"), [f"train.micro_batch_tokens={tokens}"])
        out = run_of(folder, "float32") / f"{name}.jsonl"
        request = GenerateRequest(None, str(folder / "rows.jsonl"), out, most_tokens=8)
        generate_for_run(config, run_of(folder, "float32"), request)
        answers[name] = [json.loads(line)["generated"] for line in out.read_text().splitlines()]
    if answers["together"] != answers["alone"] or len(answers["alone"]) != len(ROWS):
        raise Differs(f"answers {answers}")
    return ""


CHECKS = {
    "validate": check_validate,
    "float32": check_float32,
    "int8": check_int8,
    "resume": check_resume,
    "export": check_export,
    "evaluate": check_evaluate,
    "generate": check_generate,
    "contexts": check_contexts,
    "prefix_tuning": check_prefix_tuning,
}
NOT_OF = {"encoder": ("contexts",)}  # checks that a family is without


def checks_of(family: str) -> dict[str, Callable[[Path, str], str]]:
    """The checks that a family has, in their order: most use the run of `float32`."""
    return {name: check for name, check in CHECKS.items() if name not in NOT_OF.get(family, ())}
