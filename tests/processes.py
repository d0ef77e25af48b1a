"""The command lines and the environment of processes that tests start."""

import os
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command_line(module: str, *arguments: str, num_ranks: int = 1) -> list[str]:
    """Run a module or a script (a path ending in .py), under torchrun if there are several ranks."""
    target = [module] if module.endswith(".py") else ["-m", module]
    if num_ranks == 1:
        return [sys.executable, *target, *map(str, arguments)]
    rendezvous = ["--nproc-per-node", str(num_ranks), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous, *target, *map(str, arguments)]


def python_path(*folders: Path | str) -> str:
    """PYTHONPATH: `folders`, then our own except this repository: a machine may have its packages there."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([*map(str, folders), *(path for path in inherited if path not in ("", str(ROOT)))])


def process_env(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a process: one thread per rank, no network, and no GPU unless `extra` asks for one."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return kept | ours | (extra or {})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
