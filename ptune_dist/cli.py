"""The command `ptune-dist`: parse the command line, run a command, turn errors into one line and an exit status.

Under our launcher, which reads a rank's outcome from the file that the rank leaves, an error of ours has status 0:
torchrun takes any other status for a crash and prints a report of its own.
"""

import os
import sys
import time
from typing import NoReturn

from ptune_dist.cluster.processes import leave
from ptune_dist.cluster.rank_files import node_folder
from ptune_dist.command_line.arguments import parse
from ptune_dist.common.files import describe_os_error
from ptune_dist.common.interrupts import INTERRUPTED, end_interrupted, listen
from ptune_dist.errors import RunFault, UserError

USER_MISTAKE = 2
FAULT = 1
SECONDS_FOR_RANK_0 = 2.0


def run() -> NoReturn:
    """The command `ptune-dist`."""
    listen()
    leave(main())


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        parsed = parse(arguments)
        return parsed.run(parsed) or 0
    except UserError as error:
        say_error(error)
        return USER_MISTAKE if node_folder() is None else 0
    except RunFault as error:
        say_error(error)
        return FAULT if node_folder() is None else 0
    except KeyboardInterrupt:
        end_interrupted()
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        line = describe_os_error(error)
        if line is None:
            raise
        say_error(RunFault(line))
        return FAULT if node_folder() is None else 0
    finally:
        leave_process_group()


def say_error(error: Exception) -> None:
    """One line, on rank 0 only: every rank has the same error. Our launcher prints it itself."""
    if node_folder():
        return
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_FOR_RANK_0)  # torchrun ends all ranks when the first has ended


def leave_process_group() -> None:
    """End the process group where one was begun, so that no backend complains at exit."""
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
