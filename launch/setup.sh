#!/usr/bin/env bash
# Create .venv in the repository's root and install the package with the versions that CI tested
# (launch/constraints.txt).
#
# usage: launch/setup.sh [EXTRA ...]     such as launch/setup.sh test
# PYTHON=python3.12 selects an interpreter. If the same install has been done before, nothing is done.
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
if [ -z "$extras" ]; then # every install includes the base package
  for found in .venv/.installed-*; do
    if [ "$(cat "$found" 2>/dev/null)" = "$wanted" ]; then stamp=$found; fi
  done
fi
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

python=$(find_python)
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  rm -rf .venv # incomplete
  echo "creating .venv with $("$python" --version)"
  "$python" -m venv .venv
fi
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint launch/constraints.txt)
echo "installing torch, DeepSpeed, transformers and their dependencies (once, takes a few minutes)"
"${pip[@]}" torch  # first and alone, so that pip selects the build for this machine
"${pip[@]}" --editable ".${extras:+[$extras]}"
echo "$wanted" >"$stamp"
