"""What a node reports of its state and its kind, by which nodes notice that one of them has another state."""

import platform
import zlib
from collections.abc import Callable, Mapping

import torch

from ptune_dist.nodes.agreement import Agreed, OwnReport
from ptune_dist.run.job import Job
from ptune_dist.run.progress import Progress


def describe_kind(device: torch.device) -> str:
    """Equal on nodes that round alike."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        what = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    else:  # sums over many numbers depend on the number of threads
        threads = torch.get_num_threads()
        what = f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    return f"{what}, torch {torch.__version__}"


class StateReports:
    """What this node reports of its state before each step, and whether nodes of other kinds train with it."""

    def __init__(self, job: Job, device: torch.device, say: Callable[[str], None]):
        self._job = job
        self._say = say
        self._kind = describe_kind(device)
        self._has_several_kinds = False  # in the last step

    def report(self, progress: Progress) -> OwnReport:
        return report_state(self._job, progress, self._kind, has_marks=self._has_several_kinds)

    def note_kinds(self, agreed: Agreed) -> None:
        """A step is complete. The first time that its members are of several kinds, a line is logged."""
        kinds = find_kinds(agreed)
        has_several = len(set(kinds.values())) > 1
        if has_several and not self._has_several_kinds:
            self._say(describe_kinds(kinds))
        self._has_several_kinds = has_several


def report_state(job: Job, progress: Progress, kind: str, *, has_marks: bool) -> OwnReport:
    """Of before a step. has_marks: there are nodes of different kinds."""
    standings = progress.members.values()
    digest = zlib.crc32(repr([(each.ended, each.best_step, each.num_worse) for each in standings]).encode())
    decisions = repr([(bool(each.ended), each.ended_step, each.best_step, each.num_worse) for each in standings])
    marks = []
    for member in job.engine.prompts.members.values():
        trained = [parameter.detach().cpu() for parameter in member.parameters]
        for tensor in trained:
            digest = zlib.crc32(tensor.numpy().tobytes(), digest)
        if has_marks:
            marks.append(mark(torch.cat([tensor.double().flatten() for tensor in trained])))
    return OwnReport(digest=f"{digest:08x}", kind=kind, decisions=decisions, marks=tuple(marks))


def mark(numbers: torch.Tensor) -> tuple[float, float]:
    """The norm of a vector, and its product with a fixed one: by it a turn is seen that keeps the norm."""
    fixed = torch.arange(len(numbers), dtype=torch.float64).cos()
    return numbers.norm().item(), (numbers @ fixed).item()


def find_kinds(agreed: Agreed) -> Mapping[str, str]:
    """The kinds of the members that have computed a step, by their names."""
    return {member.name: agreed.reports[member.id].kind for member in agreed.members if agreed.reports[member.id].kind}


def describe_kinds(kinds: Mapping[str, str]) -> str:
    found = "; ".join(
        f"{', '.join(name for name, own in kinds.items() if own == kind)}: {kind}"
        for kind in dict.fromkeys(kinds.values())
    )
    return f"nodes are of different kinds ({found}), so their prompts are equal to rounding, not bitwise"
