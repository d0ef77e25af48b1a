"""Are these nodes fit to train on? GPUs and their memory, a matrix product, the network between nodes.

Floor 2. A first step of each job that `launch/run.sh` starts, and the command `check`. What needs no GPU (versions,
config, clocks, disk) the launchers compare before any rank is started.
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

from ptune_dist.cluster.signs import NODE_NAME
from ptune_dist.distributed.world import World, gather_from_ranks, init_distributed
from ptune_dist.errors import NodeFault

GIB = 1 << 30
PRODUCT_SIZE = {"cuda": 4096, "cpu": 384}
SENT_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
SLOW_PRODUCT = 3.0  # times the median of all ranks
SLOW_LINK = 0.2  # of a usual link
FREE_SHARE = 0.5  # of a GPU's memory: less is another process's work


@dataclass(frozen=True)
class RankFacts:
    """What a rank found out about its own device."""

    rank: int
    node: str
    device: str
    memory_bytes: int  # of the GPU, 0 without one
    free_bytes: int
    product_is_right: bool
    product_s: float


def check_nodes(world: World) -> list[dict[str, Any]]:
    """Measure, compare, and return a line of facts for each rank. Collective. Raises NodeFault on every rank."""
    facts = gather_from_ranks(measure_rank(world), world)
    complaint = judge_ranks(facts)
    if complaint:
        raise complaint
    links = measure_links([fact.node for fact in facts], world)
    complaint = judge_links(links)
    if complaint:
        raise complaint
    lines = [asdict(fact) for fact in facts]
    for (one, other), bandwidth in links.items():
        for line in lines:
            if line["node"] in (one, other):
                line["bytes_per_s"] = min(bandwidth, line.get("bytes_per_s", bandwidth))
    return lines


def check_and_show() -> int:
    """The command `check`: a table on rank 0. Collective. Raises NodeFault."""
    world = init_distributed()
    lines = check_nodes(world)
    if world.is_main:
        table = Table("rank", "node", "device", "memory", "product", "slowest link")
        for line in lines:
            memory = f"{line['free_bytes'] / GIB:.0f} of {line['memory_bytes'] / GIB:.0f} GiB free"
            link = f"{line['bytes_per_s'] / 1e9:.2f} GB/s" if "bytes_per_s" in line else "-"
            table.add_row(
                str(line["rank"]), line["node"], line["device"], memory if line["memory_bytes"] else "-",
                f"{line['product_s'] * 1e3:.2f} ms", link,
            )  # fmt: skip
        Console().print(table)
        print(f"checked: {world.size} ranks, all fit", flush=True)
    return 0


def measure_rank(world: World) -> RankFacts:
    """A product of small whole numbers is exact in float32 on a sound device, in whatever order it is summed."""
    free, memory = torch.cuda.mem_get_info(world.device) if world.device.type == "cuda" else (0, 0)
    size = PRODUCT_SIZE[world.device.type]
    numbers = torch.arange(size * size, device=world.device).view(size, size)
    left, right = (numbers % 5 - 2).float(), (numbers % 7 - 3).float()
    seconds = []
    for _ in range(3):
        synchronize(world)
        began = time.perf_counter()
        product = left @ right
        synchronize(world)
        seconds.append(time.perf_counter() - began)
    # the sum of all entries, known from the sums of the left's columns and the right's rows
    wanted = (left.double().sum(0) * right.double().sum(1)).sum()
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    return RankFacts(
        world.rank, os.environ.get(NODE_NAME) or f"of rank {world.rank}", name, memory, free,
        bool(product.double().sum() == wanted), min(seconds),
    )  # fmt: skip


def synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def judge_ranks(facts: list[RankFacts]) -> NodeFault | None:
    """What is wrong with a rank's device, if anything; the same on every rank."""
    usual_device = statistics.mode((fact.device, fact.memory_bytes) for fact in facts)
    usual_s = statistics.median(fact.product_s for fact in facts)
    for fact in facts:
        what = f"rank {fact.rank} on node {fact.node}"
        if not fact.product_is_right:
            return NodeFault(f"{what} computes a matrix product wrongly: take the node out", fact.node)
        if (fact.device, fact.memory_bytes) != usual_device:
            return NodeFault(
                f"{what} has {fact.device} of {fact.memory_bytes / GIB:.0f} GiB, most ranks have {usual_device[0]} of "
                f"{usual_device[1] / GIB:.0f} GiB: take nodes of one kind", fact.node,
            )  # fmt: skip
        if fact.free_bytes < FREE_SHARE * fact.memory_bytes:
            free, memory = fact.free_bytes / GIB, fact.memory_bytes / GIB
            return NodeFault(
                f"{what}: only {free:.0f} of {memory:.0f} GiB of the GPU are free: another process holds it", fact.node
            )
        if fact.memory_bytes and fact.product_s > SLOW_PRODUCT * usual_s:  # a CPU's ranks disturb each other
            times = fact.product_s / usual_s
            return NodeFault(f"{what} takes {times:.1f} times as long as the others for a matrix product", fact.node)
    return None


def measure_links(nodes: list[str], world: World) -> dict[tuple[str, str], float]:
    """Bytes per second between neighbouring nodes, by the names of both. Collective.

    `nodes` are the names by rank. A node's first rank stands for it. First the pairs (0, 1), (2, 3), ... send to and
    fro, then (1, 2), (3, 4), ..., then the last and the first: each node is in two links; a slow one makes both slow.
    """
    first = sorted({node: nodes.index(node) for node in nodes}.values())
    pairs = list(zip(first, first[1:], strict=False))
    around = [(first[-1], first[0])] if len(first) > 2 else []
    data = torch.ones(SENT_BYTES[world.device.type], dtype=torch.uint8, device=world.device)
    mine: dict[tuple[str, str], float] = {}
    for at_once in (pairs[::2], pairs[1::2], around):
        for left, right in at_once:
            if world.rank in (left, right):
                seconds = send_to_and_fro(data, left, right, world)
                if world.rank == left:
                    mine[nodes[left], nodes[right]] = 2 * data.numel() / seconds
        dist.barrier()
    return {pair: speed for links in gather_from_ranks(mine, world) for pair, speed in links.items()}


def send_to_and_fro(data: torch.Tensor, left: int, right: int, world: World) -> float:
    """Seconds; a first small message makes the connection, and of two the faster counts: a host may be busy."""
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
    """The node that slow links have in common, if there are any."""
    if len(links) < 2:
        return None
    # one slow node makes two links slow, which of three is most of them: the upper quartile is still a sound one's
    usual = sorted(links.values())[-1 - len(links) // 4]
    slow = [pair for pair, speed in links.items() if speed < SLOW_LINK * usual]
    if not slow:
        return None
    names = [name for pair in slow for name in pair]
    worst = max(names, key=names.count)
    speeds = ", ".join(f"{one} and {other} {links[one, other] / 1e9:.3g} GB/s" for one, other in slow)
    return NodeFault(f"slow network at node {worst}: {speeds}, usual is {usual / 1e9:.3g}", worst)
