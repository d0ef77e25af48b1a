"""What a soak test of replicas has found: the run beside an undisturbed one, and what each event cost."""

import json
import os
import statistics
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.numpy import load

from ptune_dist.bench.machine import describe_machine
from ptune_dist.bench.quality import fill_block, render_rows
from ptune_dist.run.checkpoint import list_checkpoints
from tests.cluster.start_times import spread
from tests.replicas.nodes import Cluster
from tests.replicas.step_times import StepTimes

KINDS = {
    "kill": "killed",
    "leave": "asked to stop",
    "short cut": "network cut for up to 3 s",
    "long cut": "network cut for 5 to 10 s",
    "cut of a pair": "two nodes cut from each other",
    "stall": "a rank frozen for 5 to 9 s",
    "slow": "slowed down to a tenth or a fifth of a core",
    "join": "started",
}
ALLOWED_STEPS, ALLOWED_S = 2, 10.0  # of a pause


@dataclass
class Event:
    kind: str
    nodes: list[str]
    at: float
    step: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Ended:
    """A node that has ended, as it should."""

    name: str
    codes: set[int]
    output: str

    @property
    def num_loads(self) -> int:
        return self.output.count("loaded in")

    @property
    def num_entered(self) -> int:
        return self.output.count(f"node {self.name} has joined in view") + self.num_begun

    @property
    def num_begun(self) -> int:
        """How often it has begun a group from what was saved."""
        return self.output.count(f"node {self.name} begins")


def compare(cluster: Cluster, alone: Cluster, ended: list[Ended]) -> dict[str, Any]:
    """Raises AssertionError where the run is not that of the undisturbed node."""
    assert cluster.steps() == alone.steps(), "every step once"
    found, wanted = (load(run.final()[0]) for run in (cluster, alone))
    difference = max(float(abs(found[name] - wanted[name]).max()) for name in wanted)
    assert cluster.losses() == alone.losses() and cluster.final() == alone.final(), f"prompts differ by {difference}"
    assert evaluations(cluster) == evaluations(alone)
    names = [[path.name for path in list_checkpoints(run.run / "checkpoints")] for run in (cluster, alone)]
    assert names[0] == names[1]
    assert cluster.status()["state"] == "done"
    assert all(node.num_loads == 1 for node in ended), [(node.name, node.num_loads) for node in ended]
    return {"is_bitwise": True, "largest_difference_of_prompts": difference, "num_steps": len(alone.steps())}


def evaluations(cluster: Cluster) -> dict[int, dict[str, Any]]:
    """By their steps: one that was repeated has two lines."""
    lines = (cluster.run / "evaluations.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def add_costs(events: list[Event], times: StepTimes, cluster: Cluster) -> None:
    """The pause of the run after each event, and the blocks that slow nodes got."""
    ends = [event.at for event in events[1:]] + [times.last_at]
    history = cluster.history()
    for event, end in zip(events, ends, strict=True):
        event.details["pause_s"] = round(times.longest(event.at, end), 2)
        if event.kind == "slow":
            last = event.details.get("healed_step", times.step)
            during = [num_blocks(history, step, event.nodes[0]) for step in range(event.step, last + 1)]
            event.details |= {"blocks_before": during[0], "blocks_least": min(during)}


def num_blocks(history: list[dict[str, Any]], step: int, name: str) -> int:
    """That a node has computed in a step."""
    found = next(found for found in reversed(history) if found["step"] <= step)
    return sum(hi - lo for lo, hi in found["blocks"].get(name, []))


def describe(
    events: list[Event], ended: list[Ended], times: StepTimes, agreement: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """The result, in the format of the other benchmarks, with every event. The first event's step ends the calm."""
    usual = times.median(events[0].step - settings["num_calm_steps"], events[0].step)
    longest = max(times.gaps(), key=lambda gap: gap.seconds)
    sides = {}
    for kind in KINDS:
        some = [event for event in events if event.kind == kind]
        if some:
            side = {"seconds": spread([event.details["pause_s"] for event in some])}
            back = [event.details["back_s"] for event in some if "back_s" in event.details]
            sides[f"{kind} ({len(some)})"] = side | ({"back_s": spread(back)} if back else {})
    about = (
        f"{len(events)} random events (seed {settings['seed']}) in a run of {agreement['num_steps']} steps on "
        f"{settings['num_nodes']} nodes that share the cores of one machine, over the included base under ZeRO-3; "
        "seconds is the longest time between two steps from the event to the next one; the loss curve, the final "
        "prompt and the optimizer are bitwise those of one undisturbed node"
    )
    case = {"name": "node_soak", "about": about, "sides": sides, "ratios": {}, "agreement": None, "runs": []}
    return {
        "name": "node_soak",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe_machine(),
        "matrix": {"baseline": None},
        **settings,
        **agreement,
        "usual_step_s": round(usual, 3),
        "longest_pause_s": round(longest.seconds, 2),
        "longest_pause_step": longest.step,
        "allowed_pause_s": round(ALLOWED_STEPS * usual + ALLOWED_S, 2),
        "num_processes": len(ended),
        "num_loads": [node.num_loads for node in ended],
        "num_groups_begun": sum(node.num_begun for node in ended),
        "num_came_back": sum(node.num_entered - 1 for node in ended),
        "load_average_of_15_min": round(os.getloadavg()[2], 1),
        "cases": [case],
        "events": [{"kind": event.kind, "nodes": event.nodes, "step": event.step, **event.details} for event in events],
        "nodes": [
            {
                "name": node.name,
                "exit_statuses": sorted(node.codes),
                "num_loads": node.num_loads,
                "num_entered": node.num_entered,
            }
            for node in ended
        ],
    }


def render(content: dict[str, Any]) -> str:
    """What the documentation has of it."""
    (case,) = content["cases"]
    facts = (
        f"{len(content['events'])} random events disturbed a run of {content['num_steps']} steps on "
        f"{content['num_nodes']} nodes, several of them at once. The loss curve, the final prompt and the optimizer "
        f"are bitwise those of one undisturbed node. {content['num_processes']} nodes were started, and each loaded "
        f"the base once: those that were left behind came back {content['num_came_back']} times without loading it "
        f"again. The longest time between two steps was {content['longest_pause_s']:.1f} s, where "
        f"{content['usual_step_s']:.2f} s are usual."
    )
    if slow := [event for event in content["events"] if event["kind"] == "slow"]:
        least, before = (statistics.median(event[key] for event in slow) for key in ("blocks_least", "blocks_before"))
        facts += f" A slow node had {least:g} of {content['num_blocks']} blocks instead of {before:g} (medians)."
    rows = [["a node is ...", "times", "longest time between two steps, s", "until it trains with the others, s"]]
    for side, figures in case["sides"].items():
        kind, _, number = side.partition(" (")
        cells = [show(figures[key]) if key in figures else "" for key in ("seconds", "back_s")]
        rows.append([KINDS[kind], number.rstrip(")"), *cells])
    return f"{facts}\n\n{render_rows(rows)}"


def show(figure: dict[str, float]) -> str:
    return f"{figure['median']:.1f} ({figure['min']:.1f}-{figure['max']:.1f})"


def write(content: dict[str, Any], out: Path | None, document: Path | None) -> None:
    if out:
        out.write_text(json.dumps(content, indent=1) + "\n")
    if document:
        fill_block(document, "node soak", render(content))
