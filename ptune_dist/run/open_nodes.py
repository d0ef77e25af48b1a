"""How a run's nodes train together: as one world, or as replicas with a group that this node enters."""

import os
import queue
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ptune_dist.cluster.rank_files import NODE_NAME
from ptune_dist.cluster.secret import read_variable
from ptune_dist.common.files import fault_on_failed_write, make_folder, write_once
from ptune_dist.config.nodes import with_nodes
from ptune_dist.config.schema import MOST_BLOCKS, Config, TrainConfig
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World, from_main, together
from ptune_dist.errors import UserError
from ptune_dist.nodes.group import NodeGroup
from ptune_dist.nodes.settings import ADDRESS, GroupSettings, Limits, split_address
from ptune_dist.optim.local_steps import count_state
from ptune_dist.run.job import Job
from ptune_dist.run.one_world import OneWorld
from ptune_dist.run.replicas import Lines, Replicas
from ptune_dist.run.run_facts import build_facts
from ptune_dist.run.watch import Watch

RENDEZVOUS = "PTUNE_RENDEZVOUS"  # a folder that all nodes share, or host:port
FOLDER = "nodes"  # of the run's folder
EXPECTED_NODES = "PTUNE_EXPECTED_NODES"  # the nodes that a scheduler has started together, set by our launcher
FEW_NODES = 4  # expected where nothing tells their number
LARGE_BYTES = 64 << 20


def is_over_several_nodes(world: World) -> bool:
    return world.size > int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def settle_nodes(config: Config, world: World) -> Config:
    """`train.nodes: auto` as what it is here. Raises UserError where one world of several nodes is to be replicas."""
    if config.train.nodes == "replicas" and is_over_several_nodes(world):
        raise UserError("train.nodes: replicas needs a world of its own on each node, and this one is over several")
    return with_nodes(config, "one_world" if is_over_several_nodes(world) else "replicas")


def open_nodes(
    job: Job, rows: TrainingRows, row_digests: Mapping[str, str], watch: Watch, world: World
) -> OneWorld | Replicas:
    """What gives the sums of steps, as `train.nodes` has it. Collective. Raises UserError and RunFault.

    row_digests: of all rows that are read, which must be those of the other nodes, by a name for people.
    """
    if job.config.train.nodes != "replicas":
        return OneWorld(job, world, watch)
    num_blocks = from_main(world, lambda: settle(job, "num_blocks", lambda: choose_num_blocks(job, rows, world)))
    of_worker = 1
    if job.config.train.sync_every > 1:
        num_workers = from_main(world, lambda: settle(job, "num_workers", lambda: choose_num_workers(job.config.train)))
        of_worker = max(1, num_blocks // num_workers)
        num_blocks = num_workers
    lines: Lines = queue.SimpleQueue()
    settings = from_main(world, lambda: build_settings(job, row_digests, of_worker))
    group = together(world, lambda: NodeGroup(settings, lines.put).__enter__() if world.is_main else None)
    return Replicas(job, world, watch, group, num_blocks, lines, of_worker)


def build_settings(job: Job, row_digests: Mapping[str, str], blocks_of_worker: int) -> GroupSettings:
    """For rank 0. Raises RunFault where the run's folder cannot be written, UserError for a wrong variable."""
    train = job.config.train
    address, listen = read_address()
    folder = Path(job.config.output_dir) / FOLDER
    with fault_on_failed_write(folder):
        make_folder(folder)
        secret = read_variable() or write_once(folder / "secret", secrets.token_hex(32))
        identity = write_once(folder / "folder", secrets.token_hex(8))
    return GroupSettings(
        name=os.environ.get(NODE_NAME) or socket.gethostname(),
        rendezvous=read_rendezvous(folder),
        secret=secret,
        run={**build_facts(job, row_digests), "the blocks of a worker, of train.num_blocks,": blocks_of_worker},
        blocks_key="train.num_workers" if train.sync_every > 1 else "train.num_blocks",
        folder=identity,
        listen=listen,
        advertise=address,
        min_nodes=train.min_nodes,
        max_nodes=train.max_nodes or GroupSettings.max_nodes,
        limits=Limits(stall_s=train.stall_timeout_s, first_stall_s=Limits.first_stall_s * train.sync_every),
    )


def read_address() -> tuple[str, str]:
    """Where the others reach this node, "" for what it finds itself, and where it listens. Raises UserError."""
    address = os.environ.get(ADDRESS, "").strip()
    if not address:
        return "", GroupSettings.listen
    try:
        _, port = split_address(address)
    except ValueError as error:
        raise UserError(f"{ADDRESS} is {address!r}: {error}") from None
    return address, f"0.0.0.0:{port}"


def read_rendezvous(default: Path) -> Path | str:
    """A folder, or HOST:PORT. Raises UserError."""
    value = os.environ.get(RENDEZVOUS, "").strip()
    if not value:
        return default
    if ("/" in value and "://" not in value) or Path(value).is_dir():
        return Path(value).expanduser()
    try:
        split_address(value)
    except ValueError as error:
        why = error if ":" in value else "no such folder"
        raise UserError(f"{RENDEZVOUS} is {value!r}: {why}: write HOST:PORT, or a path with a slash") from None
    return value


def settle(job: Job, key: str, choose: Callable[[], int]) -> int:
    """A key of `train` as a number; that of `auto` is what it was when the run began. For rank 0. Raises RunFault."""
    asked = getattr(job.config.train, key)
    if asked != "auto":
        return asked
    file = Path(job.config.output_dir) / FOLDER / key
    with fault_on_failed_write(file):
        make_folder(file.parent)
        return int(write_once(file, str(choose())))


def choose_num_blocks(job: Job, rows: TrainingRows, world: World) -> int:
    """As many blocks as micro-batches that a step fills, but one for each rank that is expected, and no empty ones."""
    engine = job.engine
    units = rows.units(rows.of_step(1, engine.members), engine.members)
    filled = engine.model.count_positions(units, rows.examples) // engine.cap_positions(job.micro_batch.tokens)
    num_ranks = world.size * count_expected_nodes(job.config.train)
    wanted = max(power_of_two_from(num_ranks), power_of_two_to(max(1, filled)))
    return min(wanted, power_of_two_to(len(units)), MOST_BLOCKS)


def choose_num_workers(train: TrainConfig) -> int:
    """A worker for each node that is expected, each with rows in every step."""
    return min(power_of_two_from(count_expected_nodes(train)), power_of_two_to(train.batch_size))


def count_expected_nodes(train: TrainConfig) -> int:
    value = os.environ.get(EXPECTED_NODES, "")
    return train.max_nodes or max(train.min_nodes, int(value) if value.isdecimal() else FEW_NODES)


def power_of_two_to(number: int) -> int:
    return 1 << number.bit_length() - 1


def power_of_two_from(number: int) -> int:
    return 1 << (number - 1).bit_length()


def describe_traffic(job: Job, names: Sequence[str]) -> list[str]:
    """A line where what nodes send each other in a step is not small."""
    num_bytes = 4 * job.engine.count_sums(names)
    often = "in each step"
    if job.config.train.sync_every > 1:
        num_bytes = 4 * sum(count_state(job.engine.prompts.members[name]) for name in names)
        often = f"once in {job.config.train.sync_every} steps"
    if job.config.train.nodes != "replicas" or num_bytes < LARGE_BYTES:
        return []
    return [
        f"train.nodes: replicas: {often} each node sends {num_bytes / (1 << 20):,.0f} MiB or more to every other "
        "one, since so many numbers are trained"
    ]
