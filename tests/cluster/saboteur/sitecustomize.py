"""Kills its own process inside the save of a checkpoint: Python imports this by itself where it is on PYTHONPATH.

PTUNE_TEST_KILL names a file, {"event": n, "half": false}: at the n-th change to the file system from the beginning of
the next save on the process is killed, before that change; with "half" the file that is opened there gets its first
bytes and no more. The file is gone then, and FILE.log has a line for each change that came.
"""

import json
import os
import resource
import signal
import sys
import threading

HALF_BYTES = 200
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def watch_saves(plan_file: str) -> None:
    plan, count, is_busy = None, 0, False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal plan, count, is_busy
        if event not in CHANGES or is_busy or threading.current_thread() is not threading.main_thread():
            return
        is_busy = True
        name = os.path.basename(str(arguments[0]))
        if event == "os.mkdir" and name.startswith(".writing-step-"):
            plan, count = read_plan(), 0
        if plan:
            count += 1
            with open(f"{plan_file}.log", "a") as log:
                log.write(f"{event} {name}\n")
            if count == plan["event"]:
                os.unlink(plan_file)
                end_here(is_half=plan["half"])
        is_busy = False

    def read_plan() -> dict | None:
        try:
            with open(plan_file) as file:
                return json.load(file)
        except OSError:
            return None

    sys.addaudithook(hook)


def end_here(*, is_half: bool) -> None:
    """Now, or where the kernel ends a process whose file grows beyond its limit."""
    if not is_half:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF_BYTES, HALF_BYTES))


if os.environ.get("PTUNE_TEST_KILL"):
    watch_saves(os.environ["PTUNE_TEST_KILL"])
