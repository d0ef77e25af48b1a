"""What must be equal on all nodes, and what each must have, before any rank is started.

Floor 6. Pure but for `gather_facts`. Devices and network are the ranks' own to measure (`node_check.py`).
"""

import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ptune_dist import __version__
from ptune_dist.cluster.signs import End
from ptune_dist.config.load import render_config
from ptune_dist.config.schema import Config
from ptune_dist.errors import UserError

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors")
MOST_CLOCK_SKEW_S = 5.0
LEAST_FREE_BYTES = 16 << 20  # in output_dir: a prompt, its optimizer and logs are small
MIB = 1 << 20


@dataclass(frozen=True)
class NodeFacts:
    """Of one node; `mistake` where its own launcher cannot go on."""

    node: str
    num_procs: int = 0
    config_digest: str = ""
    versions: str = ""
    free_bytes: int = 0
    clock_s: float = 0.0
    mistake: str = ""

    def message(self) -> dict:
        return asdict(self)


def gather_facts(node: str, config: Config, num_procs: int) -> NodeFacts:
    """Of this node."""
    folder = Path(config.output_dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    versions = [f"python {platform.python_version()}", f"ptune_dist {__version__}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            raise UserError(f"{package} is not installed") from None
    digest = hashlib.sha256(render_config(config).encode()).hexdigest()[:16]
    return NodeFacts(node, num_procs, digest, ", ".join(versions), shutil.disk_usage(existing).free, time.time())


def judge_facts(found: list[NodeFacts], skews_s: list[float], output_dir: str) -> End | None:
    """What is wrong with a node, if anything. `skews_s`: each node's clock less the head's."""
    for fact in found:
        if fact.mistake:
            return End(
                "mistake", f"node {fact.node}: {fact.mistake}" if len(found) > 1 else fact.mistake, node=fact.node
            )
    for key, what, mend in (
        ("num_procs", "processes (GPUs)", "take nodes of one kind, or set PTUNE_PROCS"),
        ("config_digest", "config", "start every node with the same command, file and working folder"),
        ("versions", "versions", "install the same on every node"),
    ):
        usual = statistics.mode(getattr(fact, key) for fact in found)
        for fact in found:
            if getattr(fact, key) != usual:
                text = f"node {fact.node} has other {what} than most: {getattr(fact, key)}, not {usual}: {mend}"
                return End("mistake", text, node=fact.node)
    for fact in found:
        if fact.free_bytes < LEAST_FREE_BYTES:
            text = f"node {fact.node}: only {fact.free_bytes / MIB:.1f} MiB are free in output_dir {output_dir}"
            return End("mistake", text, node=fact.node)
    middle = statistics.median_low(skews_s)  # the mean of two would halve what they are apart
    for fact, skew in zip(found, skews_s, strict=True):
        if abs(skew - middle) > MOST_CLOCK_SKEW_S:
            text = f"node {fact.node}: its clock is {skew - middle:+.0f} s off the others': synchronize it"
            return End("mistake", text, node=fact.node)
    return None


def count_procs(asked: int | None) -> int:
    """Processes of this node: what the environment asks for, else one per GPU, else one. No torch."""
    if asked:
        return asked
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"]))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 1
    return max(1, sum(line.startswith("GPU ") for line in listed.splitlines()))
