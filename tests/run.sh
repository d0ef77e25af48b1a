#!/usr/bin/env bash
# The whole suite in .venv, which is made where it is missing. `tests/run.sh --fast` leaves the tests over 20 s out;
# other arguments go to pytest. Slow ones are on request: PTUNE_TEST_DISK=1 (NVMe offload; needs libaio-dev),
# PTUNE_TEST_CLUSTER=all (more faults on Slurm, time limits), PTUNE_TEST_CLOUDS=1 (the clouds' own parsers),
# PTUNE_TEST_WHEELHOUSE=1 (an install without a network; needs root).
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh test
if [[ " $* " != *" --fast "* ]]; then bash tests/cluster/install.sh; fi

arguments=()
for argument in "$@"; do
  if [ "$argument" = --fast ]; then arguments+=(-m "not long"); else arguments+=("$argument"); fi
done
.venv/bin/ruff check .
.venv/bin/ruff format --check .
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
# Two files of tests at a time: most tests use one core.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=15 "${arguments[@]}"
