#!/usr/bin/env bash
# Create .venv in the repository's root and install the package with the versions that CI tested
# (launch/constraints.txt). torch is PyTorch's build for this machine's NVIDIA driver.
#
# usage: launch/setup.sh [--dry-run] [EXTRA ...]     such as launch/setup.sh test
# PYTHON=python3.12 selects an interpreter. PTUNE_CUDA=12.6 selects the build of torch, for nodes that are unlike this
# machine (PTUNE_CUDA=cpu: one without CUDA); with neither a driver nor PTUNE_CUDA, the build stays as it is, at first
# the one on PyPI. If the same install has been done before, nothing is done. --dry-run only says what would be done.
set -euo pipefail
cd "$(dirname "$0")/.."

is_dry='' names=()
for word in "$@"; do
  case $word in
    --dry-run) is_dry=1 ;;
    -*) echo "error: $word is unknown: usage: launch/setup.sh [--dry-run] [EXTRA ...]" >&2; exit 2 ;;
    *) names+=("$word") ;;
  esac
done

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

python=.venv/bin/python
if ! "$python" -m pip --version >/dev/null 2>&1; then python=$(find_python); fi

version=$(sed -n 's/^torch==//p' launch/constraints.txt)
chosen=$("$python" -I ptune_dist/cluster/torch_builds.py "$version")
reason=$(sed -n 's/^# //p' <<<"$chosen")
torch=$(sed '/^#/d' <<<"$chosen")
build=.venv/.torch-build # what pip was asked for, which a machine without a driver keeps
before=$(cat "$build" 2>/dev/null || echo torch)
: "${torch:=$before}"

extras=$(IFS=,; echo "${names[*]-}")
stamp=.venv/.installed-${extras:-base}
wanted=$(cat pyproject.toml launch/constraints.txt | sha256sum)
if [ "$torch" != torch ]; then wanted="$wanted $torch"; fi
if [ -z "$extras" ]; then # every install includes the base package
  for found in .venv/.installed-*; do
    if [ "$(cat "$found" 2>/dev/null)" = "$wanted" ]; then stamp=$found; fi
  done
fi
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

if [ -n "$reason" ]; then echo "$reason"; fi
mapfile -t torch_arguments <<<"$torch"
if [ -n "$is_dry" ]; then
  echo "would install ${torch_arguments[*]} and .${extras:+[$extras]} with $("$python" --version)"
  exit 0
fi
if [ "$python" != .venv/bin/python ]; then
  rm -rf .venv # incomplete
  echo "creating .venv with $("$python" --version)"
  "$python" -m venv .venv
fi
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile)
pip+=(--constraint launch/constraints.txt)
echo "installing torch, DeepSpeed, transformers and their dependencies (once, takes a few minutes)"
if [ "$torch" != "$before" ]; then .venv/bin/python -m pip uninstall --quiet --yes torch; fi # pip would keep it
"${pip[@]}" "${torch_arguments[@]}" # first and alone: what follows keeps the build
"${pip[@]}" --editable ".${extras:+[$extras]}"
# Some packages hold files that are no Python 3.
.venv/bin/python -m compileall -qq -j 0 .venv/lib || true # on all cores; pip takes one
echo "$torch" >"$build"
echo "$wanted" >"$stamp"
