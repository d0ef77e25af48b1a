"""Which of PyTorch's builds fits this machine's driver. launch/setup.sh and launch/wheelhouse.sh run this file.

It imports nothing of ours and needs no installed package, since it runs before anything is installed:

    python torch_builds.py VERSION     such as 2.13.0

prints why, after a #, and pip's arguments, one a line: `torch==2.13.0+cu126` and `--extra-index-url=...`, or `torch`
for the build on PyPI. Without a driver and without PTUNE_CUDA it prints nothing: any build will do.

The table below is that of torch 2.13: https://github.com/pytorch/pytorch/blob/main/RELEASE.md.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

INDEX = "https://download.pytorch.org/whl"
CPU = "cpu"
SECONDS_FOR_NVIDIA_SMI = 60
FIX_DRIVER = "update the driver, or set PTUNE_CUDA to a build of your choice (PTUNE_CUDA=cpu trains without a GPU)"


@dataclass(frozen=True)
class Build:
    """A CUDA version that PyTorch is built for, and what it supports."""

    cuda: str
    min_driver: tuple[int, int]  # a driver serves every minor version of its major CUDA version
    min_capability: tuple[int, int]
    max_capability: tuple[int, int]

    @property
    def tag(self) -> str:
        """As in the names of wheels and indexes: cu126."""
        return "cu" + self.cuda.replace(".", "")


ANY = (99, 0)
# In the order of preference. 13.2 is experimental in torch 2.13, so it is only taken if PTUNE_CUDA names it.
BUILDS = (
    Build("13.0", min_driver=(580, 65), min_capability=(7, 5), max_capability=ANY),
    Build("12.6", min_driver=(525, 60), min_capability=(5, 0), max_capability=(9, 0)),
)
NAMED_ONLY = (Build("13.2", min_driver=(580, 65), min_capability=(7, 5), max_capability=ANY),)


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver on this machine, and its GPUs."""

    version: str
    capabilities: tuple[tuple[int, int], ...]  # the distinct ones; empty if an old nvidia-smi cannot tell

    @property
    def number(self) -> tuple[int, int]:
        major, minor = (self.version.split(".") + ["0"])[:2]
        return int(major), int(minor)


class NoBuildError(Exception):
    """No build fits, or PTUNE_CUDA names none. The message is one line."""


def find_driver() -> Driver | None:
    """The driver, as nvidia-smi reports it; None without one."""
    listed = ask_nvidia_smi("driver_version,compute_cap") or ask_nvidia_smi("driver_version")
    return parse_driver(listed)


def ask_nvidia_smi(fields: str) -> str:
    """The fields of each GPU, one GPU a line; "" if nvidia-smi is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_NVIDIA_SMI)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def parse_driver(listed: str) -> Driver | None:
    """`listed`: what nvidia-smi prints, such as "550.54.15, 9.0". None if it names no version."""
    rows = re.findall(r"^(\d+\.\d+[.\d]*)(?:, *(\d+)\.(\d+))?", listed, re.MULTILINE)
    if not rows:
        return None
    capabilities = {(int(major), int(minor)) for _, major, minor in rows if major}
    return Driver(rows[0][0], tuple(sorted(capabilities)))


def choose_build(driver: Driver) -> Build:
    """The preferred build that the driver and every GPU can run. Raises NoBuildError."""
    fitting = [build for build in BUILDS if driver.number >= build.min_driver]
    if not fitting:
        oldest = BUILDS[-1]
        raise NoBuildError(
            f"NVIDIA driver {driver.version} is too old for every build of PyTorch: that for CUDA {oldest.cuda} needs "
            f"{name_driver(oldest)} or newer: {FIX_DRIVER}"
        )
    for build in fitting:
        if all(build.min_capability <= found <= build.max_capability for found in driver.capabilities):
            return build
    gpus = ", ".join(f"{major}.{minor}" for major, minor in driver.capabilities)
    raise NoBuildError(
        f"no build of PyTorch for NVIDIA driver {driver.version} supports compute capability {gpus}: {FIX_DRIVER}"
    )


def name_driver(build: Build) -> str:
    major, minor = build.min_driver
    return f"{major}.{minor}"


def find_build(cuda: str | None) -> Build | None:
    """The build for a CUDA version; None if there is none."""
    return next((build for build in (*BUILDS, *NAMED_ONLY) if build.cuda == cuda), None)


def choose_arguments(version: str, env: Mapping[str, str]) -> tuple[list[str], str]:
    """pip's arguments and the reason for the choice. Raises NoBuildError."""
    named = env.get("PTUNE_CUDA", "").strip()
    if named == CPU:
        return render_arguments(version, CPU), "PTUNE_CUDA=cpu: PyTorch without CUDA"
    if named:
        build = find_build(named)
        if build is None:
            known = ", ".join(sorted(each.cuda for each in (*BUILDS, *NAMED_ONLY)))
            raise NoBuildError(f"PTUNE_CUDA={named}: PyTorch {version} is built for CUDA {known}, or cpu")
        return render_arguments(version, build.tag), f"PTUNE_CUDA={named}: PyTorch for CUDA {named}"
    if env.get("PIP_NO_INDEX"):
        return [], ""  # the wheelhouse has one build
    driver = find_driver()
    if driver is None:
        return [], ""
    build = choose_build(driver)
    arguments = render_arguments(version, build.tag)
    gpus = ", ".join(f"{major}.{minor}" for major, minor in driver.capabilities)
    for_gpus = f" and GPUs of compute capability {gpus}" if gpus else ""
    return arguments, f"PyTorch for CUDA {build.cuda}, which fits NVIDIA driver {driver.version}{for_gpus}"


def render_arguments(version: str, tag: str) -> list[str]:
    """pip's arguments for a build. PyTorch's own index has it; its dependencies come from PyPI as usual."""
    if tag == "cu130" and platform.machine() == "x86_64":
        return ["torch"]  # PyPI has this build, though not for other processors
    return [f"torch=={version}+{tag}", f"--extra-index-url={INDEX}/{tag}"]


def main(arguments: list[str]) -> int:
    try:
        chosen, reason = choose_arguments(arguments[0], os.environ)
    except NoBuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in [f"# {reason}", *chosen] if chosen else []:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
