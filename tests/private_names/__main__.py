"""Say for each library how many of the names that the package leans on its installed release has.

usage: python -m tests.private_names       Status 1 where any is missing.
"""

import importlib.metadata
import re
import sys
from collections import Counter

from tests.private_names.checks import complaint_about
from tests.private_names.tables import FILES, rows_of
from tests.processes import ROOT


def main() -> int:
    tested = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "launch" / "constraints.txt").read_text(), re.MULTILINE))
    wanted: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    for file in FILES:
        for row in rows_of(file):
            complaint = complaint_about(file, row)
            wanted[row.library] += 1
            missing[row.library] += complaint is not None
            if complaint:
                print(complaint)
    for library, number in sorted(wanted.items()):
        release = importlib.metadata.version(library)
        print(f"{library} {release} (CI tests {tested[library]}): {number - missing[library]} of {number} names found")
    return int(missing.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
