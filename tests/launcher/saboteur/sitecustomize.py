"""Makes its own process fail on USR1. Python imports this module automatically if it is on PYTHONPATH.

PTUNE_TEST_FAULT names a file with the kind of failure.
"""

import ctypes
import os
import signal
import time
from pathlib import Path
from types import FrameType


def fail(_number: int, _frame: FrameType | None) -> None:
    fault = Path(os.environ["PTUNE_TEST_FAULT"]).read_text()
    if fault == "crash":
        ctypes.string_at(0)
    elif fault == "hang":
        time.sleep(10_000)
    raise ZeroDivisionError(fault)


if "LOCAL_RANK" in os.environ:
    signal.signal(signal.SIGUSR1, fail)
