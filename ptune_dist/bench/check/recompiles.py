"""Count what torch.compile compiles again over random batches, from torch's own log.

    python -m ptune_dist.bench.check.recompiles CONFIG [key.path=value ...] --result FILE

Each step of the run is a random batch. The result is that of our side, with `recompiles`, `recompiles_of` (function ->
number) and `limit_hits`: how often a function was compiled so often that torch fell back to running it without
compiling.
"""

import re
import sys
from collections import Counter
from typing import Any

from ptune_dist.bench.check.side import run_side

ENVIRONMENT = {"TORCH_LOGS": "recompiles"}
AGAIN = re.compile(r"\[__recompiles\] Recompiling function (?P<name>\S+) in (?P<file>\S+)")
LIMIT = re.compile(r"hit (?:config\.)?\w*recompile_limit")


def read_recompiles(lines: list[str]) -> dict[str, Any]:
    """The figures in a log of torch with TORCH_LOGS=recompiles."""
    found = Counter(match["name"] for line in lines if (match := AGAIN.search(line)))
    return {
        "recompiles": found.total(),
        "recompiles_of": dict(found.most_common()),
        "limit_hits": sum(bool(LIMIT.search(line)) for line in lines),
    }


if __name__ == "__main__":
    sys.exit(run_side(__doc__, ENVIRONMENT, read_recompiles))
