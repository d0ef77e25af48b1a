"""`python -m ptune_dist` is the command `ptune-dist`."""

import sys

from ptune_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
