"""Describe the machine of a benchmark: hardware, versions, commit, and the load from other work.

`python -m ptune_dist.bench.machine --result FILE` writes them as JSON. torch is imported only to ask for the GPUs.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "peft", "accelerate")


def describe_machine() -> dict[str, Any]:
    """Hardware, versions and commit, with the keys of a result JSON."""
    return {"code": describe_commit(), "versions": describe_versions(), "hardware": describe_hardware()}


def describe_hardware() -> dict[str, str | int | list[str] | list[int]]:
    """CPU model, cores that this process may use, bytes of memory, names and memory of GPUs, the driver's version."""
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cpu": read_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": num_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(num_gpus)],
        "gpu_memory_bytes": [torch.cuda.get_device_properties(i).total_memory for i in range(num_gpus)],
        "driver": (read_field("/proc/driver/nvidia/version", "NVRM version") or "") if num_gpus else "",
        "system": platform.platform(),
    }


def describe_versions() -> dict[str, str]:
    """Versions of the packages that the figures depend on."""
    from ptune_dist import __version__

    found = {"ptune_dist": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe_commit() -> dict[str, str | bool] | None:
    """The commit of the checkout and whether files have changed since; None outside a checkout.

    PTUNE_COMMIT names the commit of a copy without its history.
    """
    if os.environ.get("PTUNE_COMMIT"):
        return {"commit": os.environ["PTUNE_COMMIT"], "changed": False}

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_field(path: str, name: str) -> str | None:
    """The value of the first line `name : value` of a file such as /proc/cpuinfo, or None."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


@dataclass
class OtherLoad:
    """Measures the CPU time that other work takes on the machine, from `start` to `share`."""

    began: float
    busy_s: float | None
    own_s: float

    @classmethod
    def start(cls) -> "OtherLoad":
        return cls(time.monotonic(), machine_busy_s(), own_cpu_s())

    def share(self) -> float | None:
        """CPU time of processes other than this one and its children, as a share of all cores; None if unknown.

        A child counts as other work until it has ended and has been waited for.
        """
        busy_s = machine_busy_s()
        wall_s = time.monotonic() - self.began
        if busy_s is None or self.busy_s is None or not wall_s:
            return None
        others_s = (busy_s - self.busy_s) - (own_cpu_s() - self.own_s)
        return max(0.0, others_s / (wall_s * (os.cpu_count() or 1)))


def wait_until_quiet(max_s: float, *, share: float = 0.05, sample_s: float = 5.0) -> None:
    """Wait until other work takes less than `share` of the machine, at most `max_s`; returns if that is unknown."""
    ends = time.monotonic() + max_s
    while time.monotonic() < ends:
        other_load = OtherLoad.start()
        time.sleep(sample_s)
        taken = other_load.share()
        if taken is None or taken < share:
            return


def machine_busy_s() -> float | None:
    """CPU seconds of all work since the machine started (proc(5): user, nice, system, irq, softirq, steal)."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args()
    args.result.write_text(json.dumps(describe_machine(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
