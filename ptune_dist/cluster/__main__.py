"""`python -m ptune_dist.cluster`, which `launch/run.sh` runs: handle Ctrl-C first, then import the launcher."""

from typing import NoReturn

from ptune_dist.common.interrupts import listen


def run() -> NoReturn:
    """The command `launch/run.sh`."""
    listen()
    from ptune_dist.cluster.launch import main
    from ptune_dist.cluster.processes import leave

    leave(main())


if __name__ == "__main__":
    run()
