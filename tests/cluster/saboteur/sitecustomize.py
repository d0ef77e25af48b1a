"""Kills its own process during the save of a checkpoint. Python imports this module if it is on PYTHONPATH.

PTUNE_TEST_KILL names a file with the moment: a change to the file system such as "os.rename .writing-step", before
which the next save is killed, or "half of state.json", after which only the first bytes of that file are written. The
plan file is removed at that moment. FILE.log lists the changes until then, without the numbers of steps.
"""

import os
import re
import resource
import signal
import sys
import threading

HALF_BYTES = 200
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
NAMES = (".writing-step-", "step-", ".old-step-", "checkpoints", "prompt.safe", "optimizer.safe", "state.json")


def watch_saves(plan_file: str) -> None:
    plan = ""
    is_busy = False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal plan, is_busy
        if event not in CHANGES or is_busy or threading.current_thread() is not threading.main_thread():
            return
        name = os.path.basename(str(arguments[0]))
        if not name.startswith(NAMES):
            return
        is_busy = True  # what follows opens files as well
        if event == "os.mkdir" and name.startswith(".writing-step"):
            plan = read_plan(plan_file)
        if plan:
            change = f"{event} {re.sub('-[0-9]+$', '', name)}"
            with open(f"{plan_file}.log", "a") as log:
                log.write(f"{change}\n")
            is_half = change.startswith("open") and plan == f"half of {name}"
            if change == plan or is_half:
                os.unlink(plan_file)
                end_here(is_half=is_half)
        is_busy = False

    sys.addaudithook(hook)


def read_plan(plan_file: str) -> str:
    try:
        with open(plan_file) as file:
            return file.read()
    except OSError:
        return ""


def end_here(*, is_half: bool) -> None:
    """Die now, or when a file exceeds the size limit, at which the kernel ends the process."""
    if not is_half:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF_BYTES, HALF_BYTES))


if os.environ.get("PTUNE_TEST_KILL"):
    watch_saves(os.environ["PTUNE_TEST_KILL"])
