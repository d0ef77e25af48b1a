"""Run functions in a process that believes it has a GPU."""

import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import ROOT, python_path

HERE = Path(__file__).parent
LIBRARIES = ("accelerator", "guard")


def run_faked(work: str, calls: list[dict[str, Any]], gpu: str = "sm_90", timeout_s: float = 280) -> list[Any]:
    """Call "module:function" once with each of the keyword arguments `calls`; what it returned, through JSON.

    Starting the process takes about 6 seconds. An exception there fails the test that called, with its output.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("the fake GPU needs Linux on x86-64")
    with tempfile.TemporaryDirectory(prefix="ptune-fake-cuda-") as folder:
        env = os.environ | {
            "PTUNE_FAKE_CUDA_LIBRARIES": str(build_libraries()),
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "PYTHONPATH": python_path(ROOT),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            # Inductor's workers know nothing of the fake GPU; its settings do not reach the thread of a backward pass.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.gpu_offline.child", work, gpu, f"{folder}/answers.json"]
        done = subprocess.run(
            command, input=json.dumps(calls), capture_output=True, text=True, env=env, cwd=ROOT, timeout=timeout_s
        )
        assert done.returncode == 0, f"{work} on a fake {gpu}:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        return json.loads(Path(folder, "answers.json").read_text())


@cache
def build_libraries() -> Path:
    """The folder with the compiled C++ files; compiled once for a release of torch and a version of the sources."""
    sources = [HERE / f"{name}.cpp" for name in LIBRARIES]
    known = hashlib.sha256(torch.__version__.encode() + b"".join(source.read_bytes() for source in sources))
    folder = Path(tempfile.gettempdir(), f"ptune-fake-cuda-{os.getuid()}-{known.hexdigest()[:16]}")
    if folder.exists():
        return folder
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch_folder = Path(found.origin).parent
    with tempfile.TemporaryDirectory(dir=tempfile.gettempdir()) as made:
        for source in sources:
            compile_library(source, Path(made, f"{source.stem}.so"), torch_folder)
        try:
            os.rename(made, folder)
        except OSError:  # another process was faster
            assert folder.exists()
        os.makedirs(made, exist_ok=True)  # for the end of the `with`
    return folder


def compile_library(source: Path, library: Path, torch_folder: Path) -> None:
    command = [
        "g++",
        "-O1",
        "-fPIC",
        "-shared",
        "-std=c++20",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    command += [f"-I{torch_folder / 'include'}", str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
