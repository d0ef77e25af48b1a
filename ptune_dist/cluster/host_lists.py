"""Lists of host names as schedulers and Open MPI write them."""

import itertools
import re

from ptune_dist.errors import UserError

MAX_HOSTS_IN_RANGE = 65536  # Slurm's own limit


def expand_hostlist(hostlist: str, variable: str = "hostlist") -> list[str]:
    """The names of a Slurm hostlist such as `n[0-2,5],gpu-[001-003]-ib[0-1],login`, as `scontrol show hostnames`.

    The last bracket of a name changes fastest; leading zeros are kept. Raises UserError, which names `variable`.
    """
    if not re.fullmatch(r"([^\[\]]|\[[^\[\]]+\])*", hostlist):
        raise UserError(f"{variable} (slurm): the brackets of {hostlist!r} do not match")
    names = []
    for pattern in re.findall(r"(?:[^,\[\]]|\[[^\[\]]+\])+", hostlist):
        parts = re.split(r"\[([^\]]+)\]", pattern)  # text, ranges, text, ranges, ..., text
        choices = [expand_ranges(part, variable) if i % 2 else [part] for i, part in enumerate(parts)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return names


def expand_ranges(ranges: str, variable: str) -> list[str]:
    """The numbers of `001-003,7`, with their leading zeros. Raises UserError."""
    numbers = []
    for part in ranges.split(","):
        found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        first = int(found[1]) if found else 0
        last = int(found[2] or found[1]) if found else -1
        if found is None or not 0 <= last - first < MAX_HOSTS_IN_RANGE:
            raise UserError(f"{variable} (slurm): {part!r} is not a range of nodes")
        width = len(found[1])
        numbers += [f"{number:0{width}d}" for number in range(first, last + 1)]
    return numbers


def first_host(hostfile: str) -> str | None:
    """The first host of an Open MPI hostfile."""
    return next(iter(list_hosts(hostfile)), None)


def list_hosts(hostfile: str) -> list[str]:
    """The hosts that begin the lines of a file, each once, as in `HOST slots=N`; comments begin with #."""
    lines = [line.partition("#")[0].split() for line in hostfile.splitlines()]
    return unique_hosts([words[0] for words in lines if words])


def unique_hosts(names: list[str]) -> list[str]:
    """Each host once, in order of its first place: lists repeat a host for each of its slots."""
    return list(dict.fromkeys(names))


def is_same_host(first: str, second: str) -> bool:
    """Whether two names are of one host; one of them may lack the domain."""
    first = first.lower().rstrip(".")
    second = second.lower().rstrip(".")
    if "." in first and "." in second:
        return first == second
    return first.partition(".")[0] == second.partition(".")[0]
