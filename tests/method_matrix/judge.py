"""From the runs of a row to its cells: works, refused with the line, or fails with what differs."""

import itertools
import json
import math
import re

import torch
from safetensors.torch import load_file

from ptune_dist.run.metrics_log import read_metrics
from tests.method_matrix.cases import Plan

Cell = dict[str, str]  # result, line
WORKS: Cell = {"result": "works", "line": ""}
REL = 1e-5
REL_INT8 = 0.1  # of the float32 base's losses
REL_BF16 = 0.05
REL_BF16_SHARDED = 0.02  # of the unsharded base's, in other orders of sums


class Judge:
    """The cells of one row."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.folder = plan.folder

    def outcome(self, name: str) -> Cell:
        file = self.folder / name / "outcome.json"
        if not file.exists():
            return {"result": "fails", "line": f"{name}: the process ended before it, or hung"}
        found = json.loads(file.read_text())
        line = re.sub(r"\S+/bases/\w+", "BASE", found["line"])
        line = re.sub(r"\S+/adapter/adapter_model.safetensors", "ADAPTER", line)
        return found | {"line": line.replace(str(self.folder / name), "RUN")}

    def curve(self, name: str) -> list[float]:
        return [line["loss"] for line in read_metrics(self.folder / name)]

    def equal(self, name: str, wanted: str, rel: float = REL) -> Cell:
        """Whether a run worked and its losses are those of another one."""
        for run in (name, wanted):
            if self.outcome(run)["result"] != "works":
                return self.outcome(run)
        ours, theirs = self.curve(name), self.curve(wanted)
        return compare(name, ours, theirs, rel)

    def plain(self) -> Cell:
        """Losses that are finite and differ."""
        found = self.outcome("plain")
        if found["result"] != "works":
            return found
        losses = self.curve("plain")
        if not all(math.isfinite(loss) for loss in losses) or losses[0] == losses[-1]:
            return fails(f"losses {losses}")
        return WORKS

    def sweep(self, name: str) -> Cell:
        """Whether all members end as they do alone."""
        found = self.outcome(name)
        if found["result"] != "works":
            return found
        members = sorted(path.name for path in (self.folder / name / "members").iterdir())
        cells = [self.equal_member(name, member) for member in members]
        return first_bad(cells) if len(cells) == 3 else fails(f"members {members}")

    def equal_member(self, name: str, member: str) -> Cell:
        alone = self.outcome(f"alone/{member}")
        if alone["result"] != "works":
            return alone
        return compare(member, self.curve(f"{name}/members/{member}"), self.curve(f"alone/{member}"), REL)

    def resume(self) -> Cell:
        """Bitwise, losses and prompt."""
        for run in ("begun", "resumed"):
            if self.outcome(run)["result"] != "works":
                return self.outcome(run)
        if self.curve("resumed") != self.curve("plain"):
            return fails(f"losses {self.curve('resumed')}, undisturbed {self.curve('plain')}")
        ours, theirs = self.stored("resumed"), self.stored("plain")
        if ours.keys() != theirs.keys() or any(not torch.equal(tensor, theirs[key]) for key, tensor in ours.items()):
            return fails("the prompt of a resumed run is another")
        return WORKS

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(next((self.folder / name / "prompt").glob("*.safetensors")))

    def adapter(self) -> Cell:
        """Whether training continues from PEFT's adapter where it continues from the run."""
        for run in ("from_run", "from_adapter"):
            if self.outcome(run)["result"] != "works":
                return self.outcome(run)
        ours, theirs = self.curve("from_adapter"), self.curve("from_run")
        if len(ours) != 2 or ours[0] == ours[1]:
            return fails(f"training from the adapter has losses {ours}")
        return compare("from_adapter", ours[:1], theirs[:1], REL)

    def further(self) -> Cell:
        """Whether a run that starts from a finished one has the losses of one run over all their steps."""
        for run in ("steady", "steady_half", "steady_further"):
            if self.outcome(run)["result"] != "works":
                return self.outcome(run)
        ours, whole = self.curve("steady_further"), self.curve("steady")
        if any(math.isclose(before, after, rel_tol=10 * REL) for before, after in itertools.pairwise(whole)):
            return fails(f"nothing is learned: losses {whole}")
        return compare("steady_further", ours, whole[-len(ours) :], REL)

    def answers(self) -> Cell:
        for name in ("answers4096", "answers1"):
            if self.outcome(name)["result"] != "works":
                return self.outcome(name)
        together, alone = [(self.folder / name / "answers.jsonl").read_text() for name in ("answers4096", "answers1")]
        return WORKS if together == alone else fails(f"together {together}, alone {alone}")

    def cells(self) -> dict[str, Cell]:
        found = {"plain": self.plain()}
        if found["plain"]["result"] != "works":
            return found
        placements = self.plan.placements
        for placement in placements:
            found[f"placement {placement}"] = self.equal(f"{placement}3", placement)
        for stage in range(4):
            found[f"ZeRO {stage}"] = self.equal(f"zero{stage}", "plain")
        int8 = [self.equal("int8", "plain", REL_INT8), self.equal("int8-3", "int8")]
        bf16 = [self.equal("bf16", "plain", REL_BF16), self.equal("bf16-3", "bf16", REL_BF16_SHARDED)]
        recomputed = [self.equal(name, "plain") for name in ("recomputed", "recomputed3")]
        found |= {"int8": first_bad(int8), "bf16": first_bad(bf16), "recomputation": first_bad(recomputed)}
        found["micro-batches"] = self.equal("micro", "plain")
        found["sweep"] = first_bad([self.sweep(name) for name in ("sweep", "sweep3")])
        for placement in placements:
            if found[f"placement {placement}"]["result"] == "works":
                found[f"cache {placement}"] = self.equal(f"{placement}-cached", placement)
        found |= {"resume": self.resume(), "answers": self.answers(), "further": self.further()}
        found["export"] = self.outcome("adapter")
        if found["export"]["result"] == "works":
            found["adapter"] = self.adapter()
        return found


def compare(name: str, ours: list[float], theirs: list[float], rel: float) -> Cell:
    if len(ours) == len(theirs) and all(
        math.isclose(a, b, rel_tol=rel, abs_tol=rel) for a, b in zip(ours, theirs, strict=True)
    ):
        return WORKS
    return fails(f"{name}: losses {ours}, wanted {theirs}")


def fails(line: str) -> Cell:
    return {"result": "fails", "line": line}


def first_bad(cells: list[Cell]) -> Cell:
    return next((cell for cell in cells if cell["result"] != "works"), WORKS)
