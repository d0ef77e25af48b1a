"""The entry point of `ptune-dist` and `python -m ptune_dist`: handle Ctrl-C first, then import the command."""

from typing import NoReturn

from ptune_dist.common.interrupts import listen


def run() -> NoReturn:
    """The command `ptune-dist`."""
    listen()
    from ptune_dist.cli import run as run_command

    run_command()


if __name__ == "__main__":
    run()
