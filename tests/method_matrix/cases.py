"""The rows of the table and the runs of each: every method of the registry, and the options that change its pass."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptune_dist.base.recompute import DEFAULTS
from ptune_dist.config.load import load_config, render_config
from ptune_dist.config.sweep import expand_sweep
from ptune_dist.families import FAMILIES
from ptune_dist.prompts import METHODS
from ptune_dist.run.resolve import resolve
from tests.conftest import LABELS, write_config
from tests.numerics.plain import read_rows
from tests.numerics.test_curves import zero_json

NUM_STEPS, NUM_ROWS, BATCH, NUM_VIRTUAL = 6, 8, 4, 4  # three epochs, so that a cache is read from
STEADY_RATE = 0.3  # of SGD, whose gradients are cut to a norm of 1
# Losses are to change at every step: gradients may be small, and cpt soon ends at a radius.
STEADY_RATES = {"prefix_tuning": 10.0, "late_prompt": 3.0, "adaption_prompt": 100.0, "cpt": 0.01}
BASES = {"causal": "llama", "seq2seq": "t5", "encoder": "bert"}
OTHER_BASES = {("causal", "bias_only"): "gpt2", ("seq2seq", "bias_only"): "bart"}  # the usual ones have no biases
NEEDED: dict[str, dict[str, Any]] = {  # without these a method does not run, or trains nothing of so few positions
    "trainable_tokens": {"tokens": ["e", "a"]},
    "cpt": {"num_virtual_tokens": 24},
}
# Options that make another pass of a method, beside the options it has by default.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "prompt_tuning": [{"reparameterization": "residual_mlp"}],
    "p_tuning": [{"encoder_reparameterization_type": "LSTM"}, {"reparameterization": "residual_mlp"}],
    "prefix_tuning": [{"reparameterization": "mlp"}, {"from_layer": 1}, {"train_keys": False}],
}
TEXT = "Write in capitals: {{ word }} ="
TEMPLATES = {"template": "Write in capitals:{{ prompt }} {{ word }} ="}  # by placement
ZERO3 = {"deepspeed": zero_json(3)}
INT8 = {"model": {"quantization": "int8"}}
BF16 = {"model": {"dtype": "bfloat16"}}
CACHED = {"train": {"context_cache_gib": 0.01}}
ON_ONE: dict[str, dict[str, Any]] = {  # sections that differ from the plain run
    "micro": {"train": {"micro_batch_tokens": 60}},
    "recomputed": {"deepspeed": zero_json(0) | {"activation_checkpointing": DEFAULTS}},
    "int8": INT8,
    "bf16": BF16,
}
ON_TWO: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"deepspeed": zero_json(stage)} for stage in range(4)},
    "recomputed3": {"deepspeed": zero_json(3) | {"activation_checkpointing": DEFAULTS}},
    "int8-3": INT8 | ZERO3,
    "bf16-3": BF16 | ZERO3,
}


@dataclass(frozen=True)
class Row:
    """A method with some options on bases of one family."""

    family: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "-".join([self.family, self.method, *(f"{key}={value}" for key, value in self.options.items())])

    @property
    def base(self) -> str:
        return OTHER_BASES.get((self.family, self.method), BASES[self.family])

    @property
    def prompt(self) -> dict[str, Any]:
        """Without a number of virtual tokens where there are none."""
        number = {"num_virtual_tokens": NUM_VIRTUAL} if METHODS[self.method].takes_positions else {}
        return {"method": self.method} | number | NEEDED.get(self.method, {}) | self.options

    @property
    def learning_rate(self) -> float:
        return 0.002 if METHODS[self.method].trains_base else 0.05


@dataclass(frozen=True)
class Action:
    """Something that a process does for a row. Its outcome is stored in its folder.

    do: train CONFIG; export the run SOURCE to PEFT; generate answers of it in micro-batches of some tokens.
    """

    do: str
    folder: Path
    config: Path
    overrides: list[str] = field(default_factory=list)


def list_rows() -> list[Row]:
    """Every method of the registry for every family of the registry, as by default and with its variants."""
    return [
        Row(family, method, options)
        for family in reversed(FAMILIES)
        for method in METHODS
        for options in ({}, *VARIANTS.get(method, []))
    ]


def write_rows(folder: Path) -> None:
    """rows.jsonl, which all runs train on."""
    rows = read_rows()[:NUM_ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Plan:
    """The runs of one row, each in ROOT/ROW/NAME, over bases in ROOT/bases."""

    def __init__(self, root: Path, row: Row):
        self.row = row
        self.root = root
        self.folder = root / row.name
        self.placements = FAMILIES[row.family].placements

    def write(self, name: str, placement: str = "prefix", **sections: Any) -> Action:
        """The action that trains a run, of sections that differ from those of the plain one."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        target = "{{ label }}" if self.row.family == "encoder" else " {{ answer }}"
        data = {"train": str(self.root / "rows.jsonl"), "template": TEMPLATES.get(placement, TEXT), "target": target}
        if self.row.family == "encoder":
            data |= {"labels": LABELS}
        if METHODS[self.row.method].has_tasks:
            data |= {"task": "label", "tasks": LABELS}
        train = {
            "max_steps": NUM_STEPS, "batch_size": BATCH, "learning_rate": self.row.learning_rate, "schedule": "constant"
        }  # fmt: skip
        content = {
            "output_dir": str(folder),
            "model": {"path": str(self.root / "bases" / self.row.base)},
            "prompt": self.row.prompt | {"placement": placement},
            "data": data,
            "train": train,
            "deepspeed": zero_json(0),
        }
        for key, value in sections.items():
            content[key] = value if key in ("deepspeed", "prompt", "sweep") else {**content.get(key, {}), **value}
        content["prompt"].setdefault("num_virtual_tokens", 0)  # in place of that of `write_config`
        return Action("train", folder, write_config(folder / "config.json", **content))

    def on_one(self) -> Iterator[Action]:
        """What one process does: the plain run first."""
        plain = self.write("plain")
        yield plain
        for name, sections in ON_ONE.items():
            yield self.write(name, **sections)
        yield from self.resume()
        yield from self.use(plain)
        yield from self.continue_from_file()
        for placement in self.placements:
            yield self.write(placement, placement)
        bank = self.write_sweep("sweep", {})
        yield bank
        for name, config in expand_sweep(load_config(str(bank.config)), resolve).items():
            alone = self.folder / "alone" / name
            alone.mkdir(parents=True, exist_ok=True)
            file = alone / "alone.yaml"
            file.write_text(render_config(config.model_copy(update={"output_dir": str(alone)})))
            yield Action("train", alone, file)

    def on_two(self) -> Iterator[Action]:
        """What two ranks do."""
        for name, sections in ON_TWO.items():
            yield self.write(name, **sections)
        for placement in self.placements:
            yield self.write(f"{placement}3", placement, **ZERO3)
            yield self.write(f"{placement}-cached", placement, **CACHED | ZERO3)
        yield self.write_sweep("sweep3", ZERO3)

    def resume(self) -> Iterator[Action]:
        run = self.write("resumed")
        yield Action("train", self.folder / "begun", run.config, [f"train.max_steps={NUM_STEPS // 2}"])
        yield run

    def use(self, plain: Action) -> Iterator[Action]:
        """Answers of the plain run; its adapter; and runs that train the run and the adapter further."""
        for tokens in (4096, 1):
            yield Action("generate", self.folder / f"answers{tokens}", plain.config, [str(tokens)])
        yield Action("export", self.folder / "adapter", plain.config)
        for name, source in (("from_run", "plain"), ("from_adapter", "adapter")):
            yield self.write(name, prompt=self.start_from(source), train={"max_steps": 2})

    def continue_from_file(self) -> Iterator[Action]:
        """A run of all steps, and one of half of them whose prompt another one trains further.

        SGD has no state and every step reads all rows, so the two are to be one run cut in halves.
        """
        rate = STEADY_RATES.get(self.row.method, STEADY_RATE)
        steady = {"optimizer": "sgd", "batch_size": NUM_ROWS, "learning_rate": rate}
        for name, steps in (("steady", NUM_STEPS), ("steady_half", NUM_STEPS // 2)):
            yield self.write(name, train=steady | {"max_steps": steps})
        rest = steady | {"max_steps": NUM_STEPS - NUM_STEPS // 2}
        yield self.write("steady_further", prompt=self.start_from("steady_half"), train=rest)

    def start_from(self, source: str) -> dict[str, Any]:
        """The row's prompt, started from a run or an adapter of the row."""
        same_tasks = {"source_tasks": "same"} if METHODS[self.row.method].has_tasks else {}
        return self.row.prompt | same_tasks | {"init": "file", "init_file": str(self.folder / source)}

    def write_sweep(self, name: str, sections: dict[str, Any]) -> Action:
        """This prompt, the same with another seed, and one of another method."""
        other = "p_tuning" if self.row.method == "prompt_tuning" else "prompt_tuning"
        members = [
            {f"prompt.{key}": value for key, value in self.row.prompt.items()},
            {f"prompt.{key}": value for key, value in self.row.prompt.items()} | {"seed": 1},
            {"prompt.method": other, "prompt.num_virtual_tokens": 3, "train.learning_rate": 0.02},
        ]
        return self.write(name, **sections, prompt={"num_virtual_tokens": NUM_VIRTUAL}, sweep=members)
