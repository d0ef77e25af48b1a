"""The entry of `launch/run.sh`: one launcher per node. Floor 7."""

import argparse
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

from ptune_dist.cli import Parser
from ptune_dist.cluster.head import Head, Limits, say
from ptune_dist.cluster.link import free_port, listen
from ptune_dist.cluster.node import Node, Requests
from ptune_dist.cluster.node_facts import NodeFacts, count_procs, gather_facts
from ptune_dist.cluster.requeue import may_requeue
from ptune_dist.cluster.signs import End
from ptune_dist.cluster.topology import Topology, find_topology
from ptune_dist.config.load import load_config
from ptune_dist.config.schema import Config
from ptune_dist.errors import UserError

LEAST_SILENCE_S, MOST_SILENCE_S = 3.0, 30.0  # a beat comes every second
SECONDS_FOR_HEAD = 45.0


def main(arguments: list[str] | None = None) -> int:
    """Returns the job's exit status."""
    try:
        parsed = parse(arguments)
        if parsed.may_requeue is not None:
            config = load_config(parsed.config, parsed.overrides)
            limits = {
                "num_requeues": number("SLURM_RESTART_COUNT", 0), "max_requeues": number("PTUNE_MAX_REQUEUES", 100),
                "max_idle": number("PTUNE_MAX_IDLE_STARTS", 3),
            }  # fmt: skip
            job_id = os.environ.get("SLURM_JOB_ID", "")
            return may_requeue(Path(config.output_dir), parsed.may_requeue, job_id, **limits)
        return launch(parsed)
    except UserError as error:
        say_mistake(str(error))
        return 2


def launch(parsed: argparse.Namespace) -> int:
    """This node's part of the job. Raises UserError."""
    requests = Requests()
    requests.listen()
    topology = name_after_host(find_topology(os.environ))
    command = ["check" if parsed.check else "train", parsed.config, *parsed.overrides]
    config, facts = read_node(parsed, topology)
    if config is None and topology.num_nodes == 1:
        raise UserError(facts.mistake)
    if config is None and topology.node_rank == 0:
        say_mistake(facts.mistake)  # now; the others may be long in coming
    run_dir = Path(config.output_dir if config else ".")
    hang_timeout_s = config.train.hang_timeout_s if config else 0.0
    number("PTUNE_LOAD_TIMEOUT_S", 3600)  # the ranks read it
    limits = Limits(
        start_timeout_s=float(number("PTUNE_START_TIMEOUT_S", 600)),
        silence_s=max(LEAST_SILENCE_S, min(MOST_SILENCE_S, hang_timeout_s / 2 or MOST_SILENCE_S)),
        # train.resume=never refuses to go on, in place too
        max_restarts=0 if config and config.train.resume == "never" else parsed.max_restarts,
    )
    port, head = topology.port or free_port(), None
    if topology.node_rank == 0:
        ear = listen(port, "" if topology.num_nodes > 1 else "127.0.0.1")
        head = Head(ear, topology, config, limits, is_check=parsed.check)
        head.start()
    node = Node(
        topology, facts, command, run_dir, limits, requests, port=port,
        ends_with_parent=topology.source == "slurm",
    )  # fmt: skip
    end = node.run()
    if head:
        head.join(SECONDS_FOR_HEAD)
    if head and config:
        say_end(end, run_dir, is_check=parsed.check)
    return end.status


def name_after_host(topology: Topology) -> Topology:
    """This node's own name where its environment gives it only a number: messages should lead to a machine."""
    names, rank, host = list(topology.node_names), topology.node_rank, socket.gethostname()
    if names[rank] == str(rank + 1):
        names[rank] = host if topology.num_nodes == 1 else f"{rank + 1} ({host})"
    return replace(topology, node_names=tuple(names))


def read_node(parsed: argparse.Namespace, topology: Topology) -> tuple[Config | None, NodeFacts]:
    """The config and what must be equal on all nodes; a mistake is told to the head, which tells all."""
    name = topology.node_name
    try:
        config = load_config(parsed.config, parsed.overrides)
        return config, gather_facts(name, config, count_procs(topology.num_procs))
    except UserError as error:
        return None, NodeFacts(name, mistake=str(error))


def say_end(end: End, run_dir: Path, *, is_check: bool) -> None:
    """One line of the head's."""
    if end.kind == "mistake":
        say_mistake(end.reason)
    elif end.reason:
        say(f"{end.kind}: {end.reason}" + ("" if is_check else f" (see {run_dir / 'status.json'})"))


def say_mistake(text: str) -> None:
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises UserError."""
    parser = Parser(prog="launch/run.sh", description="Start this node's part of a training job.")
    parser.add_argument("--check", action="store_true", help="test the nodes and end")
    restarts = number("PTUNE_MAX_RESTARTS", 3)
    parser.add_argument("--max-restarts", type=int, default=restarts, metavar="N", help="in place, after a fault")
    parser.add_argument("--may-requeue", type=int, metavar="STATUS", help="end with 75 where the scheduler may go on")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.max_restarts < 0:
        parser.error(f"argument --max-restarts: {parsed.max_restarts} is less than 0")
    for word in parsed.overrides:
        if "=" not in word:
            parser.error(f"unrecognized arguments: {word}")
    return parsed


def number(name: str, default: int) -> int:
    """A setting from the environment. Raises UserError."""
    value = os.environ.get(name) or str(default)
    if not (value.isascii() and value.isdecimal()):
        raise UserError(f"{name} must be a whole number, not {value!r}")
    return int(value)


if __name__ == "__main__":
    sys.exit(main())
