#!/usr/bin/env bash
# The first hour on a GPU: tests, a profile, recompilations, ZeRO-3 over all GPUs, faults, benchmarks, the largest base.
# Runs as many parts as fit the time; the same command continues with what is left (docs/gpu.md).
#
# usage: launch/gpu_check.sh [--minutes 8] [--parts LIST] [--out DIR] [--repeats N] [--set KEY=VALUE] [--again] [--list]
# Python is $PTUNE_PYTHON, else .venv's, else python3 with the packages on its path. Without a GPU the shapes are tiny.
# Exit status: 0 done; 1 a part has failed; 75 parts are left for the next call; 2 your mistake; 130 interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "${PTUNE_PYTHON:-}" ]; then
  python=$(command -v "$PTUNE_PYTHON") || { echo "error: PTUNE_PYTHON: $PTUNE_PYTHON is not an executable" >&2; exit 2; }
elif ! python=$(command -v .venv/bin/python || command -v python3); then
  echo "error: no Python: run launch/setup.sh bench test, or set PTUNE_PYTHON" >&2
  exit 2
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} PYTHONUNBUFFERED=1
exec "$python" -m ptune_dist.bench.check "$@"
