"""Faster imports of large packages."""

import contextlib
import gc
from collections.abc import Iterator

from ptune_dist.common.progress_line import BusyLine

LONG_S = 15.0  # the command has said that it imports


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Import torch, DeepSpeed and transformers in the body: collections would find nothing, and take 1 of 6 seconds.

    What is imported stays for good, so later collections need not look at it either: each would take 0.1 s.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with BusyLine("still importing torch", first_s=LONG_S):
            yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
