"""Writes into a run's folder, as functions that one process calls."""

from collections.abc import Callable

Write = Callable[[], None]


def write_now(function: Write) -> None:
    function()
