#!/usr/bin/env bash
# Make .venv in the repository's root and install the package with what CI tested (launch/constraints.txt).
#
# usage: launch/setup.sh [EXTRA ...]     e.g. launch/setup.sh test
# PYTHON=python3.12 picks an interpreter. Nothing is done where the same install has been done before.
set -euo pipefail
cd "$(dirname "$0")/.."

find_python() {
  for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11, 3.12 or 3.13 with venv and pip found: install one, or name it with PYTHON=..." >&2
  exit 2
}

extras=$(IFS=,; echo "$*")
stamp=.venv/.installed-${extras:-base}
wanted=$(cat pyproject.toml launch/constraints.txt | sha256sum)
if [ -z "$extras" ]; then # any install has the base
  for found in .venv/.installed-*; do
    if [ "$(cat "$found" 2>/dev/null)" = "$wanted" ]; then stamp=$found; fi
  done
fi
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

python=$(find_python)
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  rm -rf .venv # half made
  echo "making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint launch/constraints.txt)
echo "installing torch, DeepSpeed, transformers and what they need (once, a few minutes)"
"${pip[@]}" torch  # first and alone: pip then picks the build of this machine, CUDA's where there is a GPU
"${pip[@]}" --editable ".${extras:+[$extras]}"
echo "$wanted" >"$stamp"
