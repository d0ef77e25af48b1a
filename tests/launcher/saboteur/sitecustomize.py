"""Hurts its own process when USR1 comes: Python imports this by itself where it is on PYTHONPATH.

PTUNE_TEST_FAULT names a file that says how.
"""

import ctypes
import os
import signal
import time
from pathlib import Path


def hurt(_number: int, _frame: object) -> None:
    fault = Path(os.environ["PTUNE_TEST_FAULT"]).read_text()
    if fault == "crash":
        ctypes.string_at(0)
    elif fault == "hang":
        time.sleep(10_000)
    raise ZeroDivisionError(fault)


if "LOCAL_RANK" in os.environ:
    signal.signal(signal.SIGUSR1, hurt)
