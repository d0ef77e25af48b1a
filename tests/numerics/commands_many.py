"""Run several ptune-dist commands one after another in one process: a start costs seconds, a tiny command less.

usage: commands_many.py COMMANDS.json, a list of lists of arguments.
"""

import json
import sys
from pathlib import Path

from ptune_dist.cli import build_parser

if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        parsed = build_parser().parse_args(arguments)
        parsed.run(parsed)
