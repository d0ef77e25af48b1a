#!/usr/bin/env bash
# Start this node's part of a job. Run it once on each node, with or without a scheduler.
#
# usage: launch/run.sh [--check] [--max-restarts N] CONFIG [key.path=value ...]
# The nodes, this node's rank and the head's address come from the environment (ptune_dist/cluster/topology.py), and
# settings of the site from launch/site.sh. Exit status: 0 done; 2 your mistake; 75 stopped on request (the same command
# resumes).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

site=${PTUNE_SITE:-$root/launch/site.sh}
[ -r "$site" ] || { echo "error: PTUNE_SITE: cannot read $site" >&2; exit 2; }
set -a
# shellcheck source=launch/site.sh
source "$site"
set +a

python=${PTUNE_PYTHON:-$root/.venv/bin/python}
if [ -n "${PTUNE_PYTHON:-}" ] && ! [ -x "$PTUNE_PYTHON" ]; then
  echo "error: PTUNE_PYTHON: $PTUNE_PYTHON is not an executable" >&2
  exit 2
fi
if ! [ -x "$python" ]; then
  python=$(command -v python3) || { echo "error: no Python: run launch/setup.sh, or set PTUNE_PYTHON" >&2; exit 2; }
  if ! "$python" -c 'import pydantic, yaml' 2>/dev/null; then
    echo "error: ptune_dist is not installed: run launch/setup.sh, or set PTUNE_PYTHON" >&2
    exit 2
  fi
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # this copy of the code, in any working directory
exec "$python" -m ptune_dist.cluster "$@"
