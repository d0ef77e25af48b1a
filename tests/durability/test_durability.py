"""What survives a power failure, from a trace of what the code asks of the kernel: the order of its writes."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.durability.trace import Call, Trace, build_preloaded, find_risks
from tests.processes import ROOT, process_env


@pytest.fixture
def work(tmp_path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def run_traced(script: str, trace: Trace, *arguments: Path) -> list[Call]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=process_env(trace.env), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return trace.calls()


def operations(calls: list[Call], root: Path) -> list[str]:
    """The calls as `fsync a/b`, without repeated writes."""
    lines = []
    for call in calls:
        to = f" -> {call.to.relative_to(root)}" if call.to else ""
        line = f"{call.operation} {call.path.relative_to(root)}{to}"
        if not lines or lines[-1] != line:
            lines.append(line)
    return lines


def test_replacing_a_file_flushes_it_renames_it_and_flushes_the_folder(tmp_path, work):
    root = tmp_path / "run"
    root.mkdir()
    script = """
import sys
from pathlib import Path
from ptune_dist.common.files import replace_file
replace_file(Path(sys.argv[1]) / "a.json", b"new" * 100000)
"""
    calls = run_traced(script, Trace(root, work), root)
    assert operations(calls, root) == [
        "write .writing-a.json",
        "fsync .writing-a.json",
        "rename .writing-a.json -> a.json",
        "fsync .",
    ]
    assert not find_risks(calls)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_disk_that_cannot_flush_folders_is_used_all_the_same_but_one_that_fails_is_not(tmp_path, work, number):
    script = """
import sys
from pathlib import Path
from ptune_dist.common.files import replace_file
replace_file(Path(sys.argv[1]), b"new")
"""
    env = {"LD_PRELOAD": str(build_preloaded("disk", work)), "FOLDER_FSYNC_ERRNO": str(number)}
    command = [sys.executable, "-c", script, str(tmp_path / "a.json")]
    done = subprocess.run(command, env=process_env(env), capture_output=True, text=True, timeout=60)
    assert (tmp_path / "a.json").read_bytes() == b"new"
    if number == errno.EIO:
        assert done.returncode == 1 and "Input/output error" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


def test_folders_may_be_made_by_several_at_once_below_one_that_cannot_be_read(tmp_path):
    script = """
import os, sys
from pathlib import Path
from ptune_dist.common.files import make_folder
if os.getuid() == 0:
    os.setuid(65534)
print("ready", flush=True)
sys.stdin.readline()
for number in range(300):
    make_folder(Path(sys.argv[1]) / str(number) / "a" / "b")
assert len(os.listdir("/proc/self/fd")) < 20
"""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o333)
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o111)
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(shared)],
            env=process_env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for maker in makers:
        assert maker.stdout and maker.stdout.readline() == "ready\n"
    results = [maker.communicate("go\n", timeout=60) for maker in makers[::-1]]
    assert all(maker.returncode == 0 for maker in makers), results
    shared.chmod(0o700)


def test_a_checkpoint_is_flushed_as_a_whole_before_it_gets_its_name_and_before_an_older_one_goes(tmp_path, work):
    root = tmp_path / "data"
    root.mkdir()
    script = """
import sys
from pathlib import Path
import torch
from ptune_dist.run.checkpoint import Snapshot, save_checkpoint
folder = Path(sys.argv[1]) / "run" / "checkpoints"
for step in (1, 2):
    save_checkpoint(folder, Snapshot(step, {"p": torch.ones(3)}, {"m": torch.ones(3)}), keep=1)
"""
    calls = run_traced(script, Trace(root, work), root)
    assert not find_risks(calls)
    lines = [line.replace("checkpoints", "c") for line in operations(calls, root)]
    folder = "run/c/.writing-step-00000001"
    files = ("prompt.safetensors", "optimizer.safetensors", "state.json")
    written = [f"{what} {folder}/{name}" for name in files for what in ("write", "fsync")]
    first = lines[: lines.index("fsync run/c") + 1]
    assert first == [
        "mkdir run",
        "fsync .",
        "mkdir run/c",
        "fsync run",
        f"mkdir {folder}",
        *written,
        f"fsync {folder}",
        f"rename {folder} -> run/c/step-00000001",
        "fsync run/c",
    ]
    second = lines[len(first) :]
    assert second.index("fsync run/c") < second.index("rename run/c/step-00000001 -> run/c/.old-step-00000001")


@pytest.mark.long
def test_a_whole_training_keeps_what_it_has_announced(tmp_path, work):
    data = tmp_path / "data"
    data.mkdir()
    trace = Trace(data, work)
    options = ["train.max_steps=4", "checkpoint.every=2", "checkpoint.keep=1", "evaluate.every=2"]
    command = [sys.executable, "-m", "ptune_dist", "train", "configs/quickstart.yaml", f"output_dir={data}/new/run"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=process_env(trace.env), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    calls = trace.calls()
    assert not find_risks(calls)
    names = {str(call.to.relative_to(data)) for call in calls if call.operation == "rename"}
    expected = ["config.yaml", "status.json", "summary.json", "checkpoints/step-00000004", "prompt/prompt.safetensors"]
    assert names >= {f"new/run/{name}" for name in expected}


def call(operation: str, path: str, to: str | None = None) -> Call:
    return Call(1, operation, Path(os.path.normpath(f"/r/{path}")), Path("/r") / to if to else None)


SOUND = [
    call("write", ".writing-a/x"),
    call("fsync", ".writing-a/x"),
    call("fsync", ".writing-a"),
    call("rename", ".writing-a", "a"),
    call("fsync", ""),
    call("remove", "old"),
]


@pytest.mark.parametrize(
    "calls, risk",
    [
        (SOUND, None),
        (SOUND[:1] + SOUND[2:], "/r/.writing-a/x was not flushed before /r/a got its name"),
        ([SOUND[1], SOUND[0], *SOUND[2:]], "/r/.writing-a/x was not flushed before /r/a got its name"),
        (
            [call("mkdir", ".writing-a/y"), *SOUND[:2], *SOUND[3:]],
            "/r/.writing-a/y was not flushed before /r/a got its",
        ),
        ([call("mkdir", ""), *SOUND], "/r, where /r/a got its name, may be lost itself"),
        ([call("mkdir", ""), call("fsync", ".."), *SOUND], None),
        (SOUND[:4], "the name of /r/a was never flushed"),
        ([*SOUND[:4], SOUND[5], SOUND[4]], "/r/old was removed before the name of /r/a was flushed"),
    ],
)
def test_each_kind_of_risk_is_found(calls: list[Call], risk: str | None):
    found = find_risks(calls)
    assert not found if risk is None else any(text.startswith(risk) for text in found), found
