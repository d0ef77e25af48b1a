"""The page that a finished run writes into its own folder."""

import sys
from pathlib import Path

from ptune_dist.reports.page import write_page
from ptune_dist.reports.results import read_results
from ptune_dist.reports.scores import list_values

REPORT = "report.html"


def write_run_report(run_dir: Path) -> None:
    """Write report.html: of a sweep, with all of its members. What goes wrong is a warning: the run is finished."""
    try:
        results = read_results([run_dir])
        write_page(run_dir / REPORT, results, list_values(results))
    except Exception as error:  # of any kind
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"warning: {run_dir / REPORT} was not written: {reason}", file=sys.stderr, flush=True)
