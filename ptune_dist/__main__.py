"""`python -m ptune_dist` is the command `ptune-dist`."""

from ptune_dist.cli import run

if __name__ == "__main__":
    run()
