#!/usr/bin/env bash
# Run the tests in .venv, which is created if it is missing.
#
# usage: tests/run.sh [--fast | --all] [PYTEST ARGUMENT ...]
# --fast leaves out the long tests and those that need a Slurm cluster, and takes less than 3 minutes on 2 cores.
# --all adds what is too long for CI: whole products of methods, bases, precisions and ranks (CI takes each of them
# once), more faults on Slurm and its time limits, NVMe offload (needs libaio-dev), the clouds' own parsers, and an
# install without a network (needs root).
set -euo pipefail
cd "$(dirname "$0")/.."

arguments=() selection=ci
for argument in "$@"; do
  case $argument in
    --fast) selection=fast ;;
    --all) selection=all ;;
    *) arguments+=("$argument") ;;
  esac
done

bash launch/setup.sh test
if [ "$selection" = fast ]; then
  arguments=(-m "not long and not cluster and not extended" "${arguments[@]}")
else
  bash tests/cluster/install.sh
fi
if [ "$selection" = all ]; then
  export PTUNE_TEST_EXTENDED=1 PTUNE_TEST_DISK=1 PTUNE_TEST_CLOUDS=1 PTUNE_TEST_WHEELHOUSE=1
fi

.venv/bin/ruff check .
.venv/bin/ruff format --check .
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # hundreds of processes would compile the package, each for itself
# Two workers, each with one file at a time: most tests use one core. tests/conftest.py puts the longest files first.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=15 "${arguments[@]}"
