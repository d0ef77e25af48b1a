"""Are these nodes fit to train on? Checks each GPU and its memory, a matrix product, and the network between the nodes.

Runs in the ranks: as the first step of each job that `launch/run.sh` starts, and as the command `check`. What needs no
GPU (versions, config, clocks, disks) the launchers compare before any rank is started (`node_facts.py`).
"""

import os
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from ptune_dist.cluster.rank_files import NODE_NAME
from ptune_dist.distributed.world import World, gather_from_ranks, init_distributed
from ptune_dist.errors import NodeFault

GIB = 1 << 30
PRODUCT_SIZE = {"cuda": 4096, "cpu": 384}
SENT_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
SLOW_PRODUCT = 3.0  # times the median of all ranks
SLOW_LINK = 0.2  # of a usual link
MIN_FREE_SHARE = 0.5  # of a GPU's memory: with less, another process is using it


@dataclass(frozen=True)
class RankFacts:
    """What a rank has measured on its own device."""

    rank: int
    node: str
    device: str
    memory_bytes: int  # of the GPU, 0 without one
    free_bytes: int
    product_is_right: bool
    product_s: float


def check_nodes(world: World) -> list[dict[str, Any]]:
    """Measure and compare; returns the facts about each rank. Collective. Raises NodeFault on every rank."""
    facts = gather_from_ranks(measure_rank(world), world)
    fault = judge_ranks(facts)
    if fault:
        raise fault
    links = measure_links([fact.node for fact in facts], world)
    fault = judge_links(links)
    if fault:
        raise fault
    lines = [asdict(fact) for fact in facts]
    for pair, bandwidth in links.items():
        for line in lines:
            if line["node"] in pair:
                line["bytes_per_s"] = min(bandwidth, line.get("bytes_per_s", bandwidth))
    return lines


def check_and_show() -> int:
    """The command `check`: prints a table on rank 0 and returns the exit status. Collective. Raises NodeFault."""
    world = init_distributed()
    lines = check_nodes(world)
    if world.is_main:
        Console().print(build_table(lines))
        print(f"checked: {world.size} ranks, all fit", flush=True)
    return 0


def build_table(lines: list[dict[str, Any]]) -> Table:
    table = Table("rank", "node", "device", "memory", "product", "slowest link")
    for line in lines:
        memory = f"{line['free_bytes'] / GIB:.0f} of {line['memory_bytes'] / GIB:.0f} GiB free"
        table.add_row(
            str(line["rank"]),
            line["node"],
            line["device"],
            memory if line["memory_bytes"] else "-",
            f"{line['product_s'] * 1e3:.2f} ms",
            f"{line['bytes_per_s'] / 1e9:.2f} GB/s" if "bytes_per_s" in line else "-",
        )
    return table


def measure_rank(world: World) -> RankFacts:
    """Check this rank's device. A product of small integers is exact in float32, in any order of summation."""
    has_gpu = world.device.type == "cuda"
    free, memory = torch.cuda.mem_get_info(world.device) if has_gpu else (0, 0)
    size = PRODUCT_SIZE[world.device.type]
    numbers = torch.arange(size * size, device=world.device).view(size, size)
    left = (numbers % 5 - 2).float()
    right = (numbers % 7 - 3).float()
    seconds = []
    for _ in range(3):
        synchronize(world)
        began = time.perf_counter()
        product = left @ right
        synchronize(world)
        seconds.append(time.perf_counter() - began)
    # The sum of all entries follows from the sums of the left's columns and of the right's rows.
    expected = (left.double().sum(0) * right.double().sum(1)).sum()
    return RankFacts(
        rank=world.rank,
        node=os.environ.get(NODE_NAME) or f"of rank {world.rank}",
        device=torch.cuda.get_device_name(world.device) if has_gpu else "CPU",
        memory_bytes=memory,
        free_bytes=free,
        product_is_right=bool(product.double().sum() == expected),
        product_s=min(seconds),
    )


def synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def judge_ranks(facts: list[RankFacts]) -> NodeFault | None:
    """What is wrong with the device of a rank, if anything; the same on every rank."""
    usual_device, usual_memory = statistics.mode((fact.device, fact.memory_bytes) for fact in facts)
    usual_s = statistics.median(fact.product_s for fact in facts)
    for fact in facts:
        where = f"rank {fact.rank} on node {fact.node}"
        memory_gib = fact.memory_bytes / GIB
        if not fact.product_is_right:
            return NodeFault(f"{where} computes a matrix product wrongly: take the node out of service", fact.node)
        if (fact.device, fact.memory_bytes) != (usual_device, usual_memory):
            text = (
                f"{where} has {fact.device} of {memory_gib:.0f} GiB, most ranks have {usual_device} of "
                f"{usual_memory / GIB:.0f} GiB: use nodes of one kind"
            )
            return NodeFault(text, fact.node)
        if fact.free_bytes < MIN_FREE_SHARE * fact.memory_bytes:
            free = f"only {fact.free_bytes / GIB:.0f} of {memory_gib:.0f} GiB of the GPU are free"
            return NodeFault(f"{where}: {free}: another process is using it", fact.node)
        if fact.memory_bytes and fact.product_s > SLOW_PRODUCT * usual_s:  # ranks on a CPU slow each other down
            ratio = fact.product_s / usual_s
            return NodeFault(f"{where} takes {ratio:.1f} times as long as the others for a matrix product", fact.node)
    return None


def measure_links(nodes: list[str], world: World) -> dict[tuple[str, str], float]:
    """Bytes per second between neighboring nodes, by the names of both. Collective.

    `nodes` are the names by rank; the first rank of a node stands for it. First the pairs (0, 1), (2, 3), ... send back
    and forth, then (1, 2), (3, 4), ..., then the last node and the first. So each node is part of two links, and a slow
    node makes both of them slow.
    """
    first_ranks = sorted({node: nodes.index(node) for node in nodes}.values())
    pairs = list(zip(first_ranks, first_ranks[1:], strict=False))
    closing = [(first_ranks[-1], first_ranks[0])] if len(first_ranks) > 2 else []
    data = torch.ones(SENT_BYTES[world.device.type], dtype=torch.uint8, device=world.device)
    own: dict[tuple[str, str], float] = {}
    for simultaneous in (pairs[::2], pairs[1::2], closing):
        for left, right in simultaneous:
            if world.rank in (left, right):
                seconds = send_back_and_forth(data, left, right, world)
                if world.rank == left:
                    own[nodes[left], nodes[right]] = 2 * data.numel() / seconds
        dist.barrier()
    return {pair: speed for links in gather_from_ranks(own, world) for pair, speed in links.items()}


def send_back_and_forth(data: torch.Tensor, left: int, right: int, world: World) -> float:
    """Seconds for the faster of two attempts, since a host may be busy; a small message connects them first."""
    seconds = []
    for part in (data[:8], data, data):
        synchronize(world)
        began = time.perf_counter()
        for sender in (left, right):
            if world.rank == sender:
                dist.send(part, left + right - sender)
            else:
                dist.recv(part, sender)
        synchronize(world)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def judge_links(links: dict[tuple[str, str], float]) -> NodeFault | None:
    """The node that the slow links have in common, if there are any."""
    if len(links) < 2:
        return None
    # One slow node makes two links slow, which can be most of them. The upper quartile is still that of a healthy link.
    usual = sorted(links.values())[-1 - len(links) // 4]
    slow = [pair for pair, speed in links.items() if speed < SLOW_LINK * usual]
    if not slow:
        return None
    names = [name for pair in slow for name in pair]
    worst = max(names, key=names.count)
    speeds = ", ".join(f"{one} and {other} {links[one, other] / 1e9:.3g} GB/s" for one, other in slow)
    return NodeFault(f"slow network at node {worst}: {speeds}, usual is {usual / 1e9:.3g}", worst)
