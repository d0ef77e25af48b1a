"""What must be equal on all nodes, and what each must have, before any rank is started.

Everything but `gather_facts` is pure. The ranks measure GPUs and the network (`node_check.py`).
"""

import hashlib
import platform
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ptune_dist import __version__
from ptune_dist.cluster.compiler_check import find_compiler_problem
from ptune_dist.cluster.outcome import Outcome
from ptune_dist.config.load import render_config
from ptune_dist.config.schema import Config
from ptune_dist.errors import UserError

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors")
MAX_CLOCK_SKEW_S = 5.0
MIB = 1 << 20
MIN_FREE_BYTES = 16 * MIB  # in output_dir: a prompt, its optimizer state and logs are small
# Facts that must be equal, what they are called, and what to do about a difference.
EQUAL_FACTS = (
    ("num_procs", "number of processes (GPUs)", "use nodes of one kind, or set PTUNE_PROCS"),
    ("config_digest", "config", "start every node with the same command, file and working directory"),
    ("versions", "versions", "install the same packages on every node"),
)


@dataclass(frozen=True)
class NodeFacts:
    """Facts about one node; `mistake` says why its own launcher cannot continue."""

    node: str
    num_procs: int = 0
    num_gpus: int = 0
    config_digest: str = ""
    versions: str = ""
    free_bytes: int = 0
    clock_s: float = 0.0
    mistake: str = ""

    def message(self) -> dict[str, Any]:
        return asdict(self)


def gather_facts(node: str, config: Config, num_procs: int | None, num_gpus: int) -> NodeFacts:
    """The facts about this node. Raises UserError if a package or, with GPUs, what Triton compiles with is missing.

    num_procs: as requested; None stands for one process per GPU, and for one without GPUs.
    """
    folder = Path(config.output_dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    versions = [f"python {platform.python_version()}", f"ptune_dist {__version__}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            raise UserError(f"{package} is not installed") from None
    problem = find_compiler_problem() if num_gpus else ""
    if problem:
        raise UserError(problem)
    return NodeFacts(
        node=node,
        num_procs=num_procs or max(1, num_gpus),
        num_gpus=num_gpus,
        config_digest=hashlib.sha256(render_config(config).encode()).hexdigest()[:16],
        versions=", ".join(versions),
        free_bytes=shutil.disk_usage(existing).free,
        clock_s=time.time(),
    )


def judge_facts(facts: list[NodeFacts], skews_s: list[float], output_dir: str) -> Outcome | None:
    """The first node that is unfit, if any. `skews_s`: each node's clock minus the head's."""
    unfit = find_mistake(facts) or find_difference(facts) or find_full_disk(facts, output_dir)
    return unfit or find_skew(facts, skews_s)


def find_mistake(facts: list[NodeFacts]) -> Outcome | None:
    """A node whose own launcher cannot continue."""
    for fact in facts:
        if fact.mistake:
            text = f"node {fact.node}: {fact.mistake}" if len(facts) > 1 else fact.mistake
            return Outcome("mistake", text, node=fact.node)
    return None


def find_difference(facts: list[NodeFacts]) -> Outcome | None:
    """A node that differs from most others in what must be equal."""
    for key, what, remedy in EQUAL_FACTS:
        usual = statistics.mode(getattr(fact, key) for fact in facts)
        for fact in facts:
            own = getattr(fact, key)
            if own != usual:
                text = f"node {fact.node} differs from the other nodes in its {what}: {own}, not {usual}: {remedy}"
                return Outcome("mistake", text, node=fact.node)
    return None


def find_full_disk(facts: list[NodeFacts], output_dir: str) -> Outcome | None:
    for fact in facts:
        if fact.free_bytes < MIN_FREE_BYTES:
            text = f"node {fact.node}: only {fact.free_bytes / MIB:.1f} MiB are free in output_dir {output_dir}"
            return Outcome("mistake", text, node=fact.node)
    return None


def find_skew(facts: list[NodeFacts], skews_s: list[float]) -> Outcome | None:
    """A node whose clock is off."""
    middle = statistics.median_low(skews_s)  # the mean of two clocks would halve the difference between them
    for fact, skew_s in zip(facts, skews_s, strict=True):
        if abs(skew_s - middle) > MAX_CLOCK_SKEW_S:
            text = f"its clock differs from the other nodes' by {skew_s - middle:+.0f} s: synchronize it"
            return Outcome("mistake", f"node {fact.node}: {text}", node=fact.node)
    return None
