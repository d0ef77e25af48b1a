"""The GPUs that this node promises, counted without torch, and why torch may not see them."""

import os
import subprocess

from ptune_dist.cluster.torch_builds import (
    SECONDS_FOR_NVIDIA_SMI,
    NoBuildError,
    choose_build,
    find_build,
    find_driver,
    name_driver,
)

NUM_GPUS = "PTUNE_NUM_GPUS"  # in a rank's environment: how many GPUs its launcher has counted on the node


def count_gpus() -> int:
    """The GPUs that processes of this node may use, as CUDA_VISIBLE_DEVICES or else nvidia-smi says."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return len([name for name in names if name not in ("", "-1")])
    return count_listed_gpus()


def count_listed_gpus() -> int:
    """The GPUs of this node that nvidia-smi lists, hidden ones included; 0 without it."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=SECONDS_FOR_NVIDIA_SMI
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def count_promised_gpus() -> int:
    """As the launcher has counted them; without a launcher, counted here."""
    promised = os.environ.get(NUM_GPUS)
    return int(promised) if promised else count_gpus()


def describe_missing_gpus(num_gpus: int, torch_version: str, torch_cuda: str | None) -> str:
    """Why torch sees none of the node's GPUs, and what to do about it.

    torch_cuda: the CUDA version that torch is built for, None for a build without CUDA.
    """
    driver = find_driver()
    build = find_build(torch_cuda)
    with_driver = f"NVIDIA driver {driver.version}" if driver else "an unknown NVIDIA driver"
    if torch_cuda is None:
        cause = f"torch {torch_version} is built without CUDA (the node has {with_driver})"
    elif build and driver and driver.number < build.min_driver:
        cause = (
            f"{with_driver} is too old for torch {torch_version}, which is built for CUDA {torch_cuda} and needs "
            f"{name_driver(build)} or newer"
        )
    else:
        cause = f"torch {torch_version}, which is built for CUDA {torch_cuda}, sees none of them with {with_driver}"
    try:
        fitting = choose_build(driver).cuda if driver else "12.6"
        remedy = f"run launch/setup.sh on such a node, or PTUNE_CUDA={fitting} bash launch/setup.sh anywhere"
    except NoBuildError:
        remedy = "update the driver"
    return f"{num_gpus} GPUs, but {cause}: {remedy} (CUDA_VISIBLE_DEVICES= trains on the CPU)"
