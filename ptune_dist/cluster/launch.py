"""The command line of `launch/run.sh`: one launcher per node."""

import argparse
import os
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptune_dist.cluster.devices import count_gpus
from ptune_dist.cluster.head import Head, Limits, announce
from ptune_dist.cluster.link import free_port, listen
from ptune_dist.cluster.node import Node, NodeJob
from ptune_dist.cluster.node_facts import NodeFacts, gather_facts
from ptune_dist.cluster.node_memory import choose_nodes
from ptune_dist.cluster.outcome import Outcome
from ptune_dist.cluster.rank_files import NODE_NAME
from ptune_dist.cluster.record import claim_name
from ptune_dist.cluster.requeue import RequeueLimits, may_requeue
from ptune_dist.cluster.secret import create_secret, find_secret, random_text, read_variable, remove_secret
from ptune_dist.cluster.slurm_job import requeue_orphaned_job
from ptune_dist.cluster.stop_requests import StopRequests
from ptune_dist.cluster.topology import Topology, describe_unknown_scheduler, find_topology, stand_alone
from ptune_dist.command_line.arguments import Parser
from ptune_dist.common.locks import Lock
from ptune_dist.config.load import load_config
from ptune_dist.config.messages import text_keys
from ptune_dist.config.nodes import with_nodes
from ptune_dist.config.schema import Config
from ptune_dist.config.yaml_file import apply_override, read_yaml
from ptune_dist.errors import UserError

# The head and the nodes send each other a heartbeat every second.
MIN_SILENCE_S = 3.0
MAX_SILENCE_S = 30.0
SECONDS_FOR_HEAD = 45.0


@dataclass(frozen=True)
class Place:
    """This launcher's node in the job. `config` is None where it has a mistake; `num_replicas` is as in NodeJob."""

    topology: Topology
    config: Config | None
    facts: NodeFacts
    num_replicas: int
    name_lock: Lock | None = None  # of a replica's name, for as long as the launcher runs


def main(arguments: list[str] | None = None) -> int:
    """Returns the job's exit status."""
    try:
        parsed = parse(arguments)
        if parsed.may_requeue is not None:
            return answer_requeue(parsed)
        if parsed.show_nodes:
            num_nodes = read_setting("PTUNE_NUM_NODES", read_setting("SLURM_JOB_NUM_NODES", 1))
            print(load_settled(parsed, num_nodes, count_gpus()).train.nodes)
            return 0
        return launch(parsed)
    except UserError as error:
        print_mistake(str(error))
        return 2


def answer_requeue(parsed: argparse.Namespace) -> int:
    """Whether the batch script should requeue the job, as its exit status. Raises UserError."""
    config = load_config(parsed.config, parsed.overrides)
    limits = RequeueLimits(
        num_requeues=read_setting("SLURM_RESTART_COUNT", 0),
        max_requeues=read_setting("PTUNE_MAX_REQUEUES", 100),
        max_idle_starts=read_setting("PTUNE_MAX_IDLE_STARTS", 3),
    )
    return may_requeue(Path(config.output_dir), parsed.may_requeue, os.environ.get("SLURM_JOB_ID", ""), limits)


def launch(parsed: argparse.Namespace) -> int:
    """Run this node's part of the job; returns the exit status. Raises UserError."""
    requests = StopRequests()
    requests.listen()
    place = find_place(parsed)
    topology = place.topology
    config = place.config
    facts = place.facts
    run_dir = Path(config.output_dir) if config else find_run_dir(parsed)
    if run_dir is None:
        raise UserError(facts.mistake)  # without the secret in the run's folder no other node can be told
    limits = build_limits(parsed, config)
    port = topology.port or free_port()
    is_new = not run_dir.exists()
    head: Head | None = None
    secret = ""
    if topology.node_rank == 0:
        secret = create_secret(run_dir) if topology.num_nodes > 1 else random_text()
        listener = listen(port, "" if topology.num_nodes > 1 else "127.0.0.1")
        head = Head(listener, topology, config, limits, secret=secret, is_check=parsed.check)
        head.start()
    job = NodeJob(
        topology=topology,
        facts=facts,
        command=["check" if parsed.check else "train", parsed.config, *parsed.overrides],
        run_dir=run_dir,
        limits=limits,
        port=port,
        find_secret=lambda: secret or find_secret(run_dir),
        ends_with_parent=topology.source == "slurm",
        num_replicas=place.num_replicas,
    )
    outcome = Node(job, requests).run()
    if head:
        head.join(SECONDS_FOR_HEAD)
        if is_new and (parsed.check or not config):  # there is no run
            remove_secret(run_dir)
        if config:
            print_outcome(outcome, run_dir, is_check=parsed.check)
        if place.num_replicas > 1 and topology.source == "slurm" and head.record.is_last:
            requeue_orphaned_job(os.environ, announce)
    return outcome.exit_status


def find_place(parsed: argparse.Namespace) -> Place:
    """Also prints the first line. Raises UserError."""
    topology = add_host_name(find_topology(os.environ, host_name=socket.gethostname()))
    unknown = describe_unknown_scheduler(os.environ) if topology.source == "one node" else ""
    if unknown:
        announce(f"warning: {unknown}")
    config, facts = read_node(parsed, topology)
    num_replicas = count_replicas(parsed, config, topology)
    if num_replicas:
        read_variable()  # a mistake in the secret, which the ranks read, should show now
        name = os.environ.get(NODE_NAME, "").strip()
        topology = stand_alone(topology, os.environ.get("SLURM_ARRAY_TASK_ID", ""), name)
    if config is None and topology.num_nodes == 1:
        raise UserError(facts.mistake)
    if config is None and topology.node_rank == 0:
        print_mistake(facts.mistake)  # immediately, as the other nodes may take long to join
    lock = None
    if config and num_replicas and not parsed.check:
        name, lock = claim_name(Path(config.output_dir), topology.node_name)
        if name != topology.node_name:
            announce(f"this node is called {name}: another launcher of the run is {topology.node_name}")
        topology = replace(topology, node_names=(name,))
    if config and topology.node_rank == 0:
        announce(describe_start(parsed, topology, num_replicas))
    return Place(topology, config, facts, num_replicas, lock)


def describe_start(parsed: argparse.Namespace, topology: Topology, num_replicas: int) -> str:
    """The first line: the ranks' own come after torchrun and they have imported torch."""
    what = "check" if parsed.check else "train"
    nodes = "1 node" if topology.num_nodes == 1 else f"{topology.num_nodes} nodes"
    if num_replicas:
        nodes = f"node {topology.node_name}, one of the run's replicas"
    return f"{what} {parsed.config} on {nodes}, importing torch ..."


def count_replicas(parsed: argparse.Namespace, config: Config | None, topology: Topology) -> int:
    """The nodes that were started together, if each trains in a world of its own; 0 if they are one world.

    As replicas, each node's launcher is a head: what it does not know of the others the ranks find out.
    """
    asked = config.train.nodes if config else read_raw(parsed, "train.nodes")
    if asked != "replicas":
        return 0
    if topology.num_nodes > 1:
        return topology.num_nodes
    return read_setting("SLURM_ARRAY_TASK_COUNT", 1)  # each job of an array is a node


def find_run_dir(parsed: argparse.Namespace) -> Path | None:
    """The folder of a run whose config has a mistake; None if it cannot be read at all."""
    found = read_raw(parsed, "output_dir")
    return Path(found).expanduser() if isinstance(found, str) and found else None


def read_raw(parsed: argparse.Namespace, key: str) -> object:
    """A key of a config that has a mistake; None if it cannot be read."""
    try:
        found: Any = read_yaml(parsed.config, text_keys())
        for override in parsed.overrides:
            if override.startswith(f"{key}="):
                apply_override(found, override, text_keys())
        for name in key.split("."):
            found = found.get(name)
    except (UserError, AttributeError):
        return None
    return found


def build_limits(parsed: argparse.Namespace, config: Config | None) -> Limits:
    """The limits of the job, from the environment and the config. Raises UserError."""
    read_setting("PTUNE_LOAD_TIMEOUT_S", 3600)  # used by the ranks, but a mistake should show now
    hang_timeout_s = config.train.hang_timeout_s if config else 0.0
    silence_s = hang_timeout_s / 2 or MAX_SILENCE_S
    may_resume = config is None or config.train.resume != "never"  # train.resume=never also rules out restarts in place
    return Limits(
        start_timeout_s=float(read_setting("PTUNE_START_TIMEOUT_S", 600)),
        silence_s=max(MIN_SILENCE_S, min(MAX_SILENCE_S, silence_s)),
        max_restarts=parsed.max_restarts if may_resume else 0,
    )


def add_host_name(topology: Topology) -> Topology:
    """Add this host's name if the environment only numbers the nodes: messages should lead to a machine."""
    names = list(topology.node_names)
    rank = topology.node_rank
    if names[rank] == str(rank + 1):
        host = socket.gethostname()
        names[rank] = host if topology.num_nodes == 1 else f"{rank + 1} ({host})"
    return replace(topology, node_names=tuple(names))


def read_node(parsed: argparse.Namespace, topology: Topology) -> tuple[Config | None, NodeFacts]:
    """The config, and the facts that the head compares between nodes. A mistake is such a fact."""
    name = topology.node_name
    try:
        num_gpus = count_gpus()
        config = load_settled(parsed, topology.num_nodes, num_gpus)
        return config, gather_facts(name, config, topology.num_procs, num_gpus)
    except UserError as error:
        return None, NodeFacts(name, mistake=str(error))


def load_settled(parsed: argparse.Namespace, num_nodes: int, num_gpus: int) -> Config:
    """The config, with `train.nodes: auto` settled. Raises UserError.

    The ranks come to the same by themselves: where their world is over several nodes they are one world.
    """
    config = load_config(parsed.config, parsed.overrides)
    if config.train.nodes != "auto":
        return config
    nodes, why = "replicas", "this node is alone or one of several that are started by themselves"
    if num_nodes > 1:
        nodes, why = choose_nodes(config, num_gpus)
    if not parsed.show_nodes:
        announce(f"train.nodes=auto is {nodes}: {why}")
    return with_nodes(config, nodes)


def print_outcome(outcome: Outcome, run_dir: Path, *, is_check: bool) -> None:
    """One line, from the head node only."""
    if outcome.kind == "mistake":
        print_mistake(outcome.reason)
    elif outcome.reason:
        where = "" if is_check else f" (see {run_dir / 'status.json'})"
        announce(f"{outcome.kind}: {outcome.reason}{where}")


def print_mistake(text: str) -> None:
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises UserError."""
    parser = Parser(prog="launch/run.sh", description="Start this node's part of a training job.")
    parser.add_argument("--check", action="store_true", help="test the nodes and exit")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=read_setting("PTUNE_MAX_RESTARTS", 3),
        metavar="N",
        help="restarts in place after a fault",
    )
    parser.add_argument(
        "--may-requeue",
        type=int,
        metavar="STATUS",
        help="given srun's exit status, exit with 75 if the job should be requeued",
    )
    parser.add_argument("--show-nodes", action="store_true", help="print train.nodes and exit")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.max_restarts < 0:
        parser.error(f"argument --max-restarts: {parsed.max_restarts} is less than 0")
    for word in parsed.overrides:
        if "=" not in word:
            parser.error(f"unrecognized arguments: {word}")
    return parsed


def read_setting(name: str, default: int) -> int:
    """A number from the environment. Raises UserError."""
    value = os.environ.get(name) or str(default)
    if not (value.isascii() and value.isdecimal()):
        raise UserError(f"{name} must be a whole number, not {value!r}")
    return int(value)
