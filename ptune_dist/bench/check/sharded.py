"""ZeRO-3 over all GPUs, and what NCCL says about the links between them.

    python -m ptune_dist.bench.check.sharded CONFIG [key.path=value ...] --ranks N --result FILE

The result is that of our side, with `nccl_version`, `nccl_links` (transport -> number of channels) and
`nccl_warnings`. The whole log of NCCL is in the part's log.
"""

import re
import sys
from collections import Counter
from typing import Any

from ptune_dist.bench.check.side import run_side

ENVIRONMENT = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,GRAPH,ENV,NET"}
VERSION = re.compile(r"NCCL version (\S+)")
CHANNEL = re.compile(r"NCCL INFO Channel \S+ : .* via (?P<link>\S+)")
WARNING = re.compile(r"NCCL WARN (?P<text>.*)")
NUM_WARNINGS = 5


def read_nccl(lines: list[str]) -> dict[str, Any]:
    """The figures in a log of NCCL with NCCL_DEBUG=INFO; without NCCL all are empty."""
    versions = [match[1] for line in lines if (match := VERSION.search(line))]
    links = Counter(match["link"] for line in lines if (match := CHANNEL.search(line)))
    warnings = [match["text"] for line in lines if (match := WARNING.search(line))]
    return {
        "nccl_version": versions[0] if versions else "",
        "nccl_links": dict(links.most_common()),
        "nccl_warnings": warnings[:NUM_WARNINGS],
    }


if __name__ == "__main__":
    sys.exit(run_side(__doc__, ENVIRONMENT, read_nccl))
