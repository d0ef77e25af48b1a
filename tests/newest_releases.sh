#!/usr/bin/env bash
# Try the newest releases of torch, transformers and DeepSpeed, whatever pyproject.toml allows: are the private names that
# the package leans on still there, and are the numbers still the same? The environment is a new one in another folder.
#
# usage: tests/newest_releases.sh [TORCH [FOLDER]]
#   TORCH   what pip installs as torch, for example 'torch==2.14.1'. Plain `torch` takes the build that PyPI has for this
#           machine, which may be one for CUDA of several gigabytes; for the CPU build set
#           PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu or name its wheel.
#   FOLDER  where the environment is made, and reused if it is there; a temporary one, removed at the end, if left out
# PYTHON=python3.12 picks an interpreter. Status 1: something is missing or different.
set -euo pipefail
torch=${1:-torch}
cd "$(dirname "$0")/.."
folder=${2:-}
if [ -z "$folder" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
core=(
  tests/numerics/test_segments.py
  "tests/numerics/test_curves.py::test_every_architecture_trains_as_a_plain_loop_and_as_peft_does"
  "tests/numerics/test_curves.py::test_sharded_training_of_every_architecture_is_the_plain_loop"
  tests/zero/test_shard.py
  tests/test_old_runs.py
)

# The other dependencies and what the tests below need, without the caps of transformers and DeepSpeed.
read_dependencies() {
  "$python" - <<'PYTHON'
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for_tests = [line for line in project["optional-dependencies"]["test"] if re.match("pytest|peft", line)]
for line in [*project["dependencies"], *for_tests]:
    name = re.match(r"[\w-]+", line)[0]
    if name != "torch":
        print(name if name in ("deepspeed", "transformers") else line)
PYTHON
}

installed() { "$python" -c "from importlib.metadata import version; print(version('$1'))"; }

newest() { "$python" -m pip index versions "$1" 2>/dev/null | sed -n '1s/.*(\(.*\))/\1/p'; }

python=$folder/bin/python
if [ ! -x "$python" ]; then
  "${PYTHON:-python3}" -m venv "$folder"
fi
pip=("$python" -m pip install --quiet --disable-pip-version-check --upgrade)
"${pip[@]}" "$torch" # first and alone: what follows keeps it
echo "torch==$(installed torch)" >"$folder/torch.txt"
read_dependencies >"$folder/dependencies.txt"
"${pip[@]}" --constraint "$folder/torch.txt" --requirement "$folder/dependencies.txt"

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
status=0
"$python" -m tests.private_names || status=1
if "$python" -m pytest --quiet -p no:cacheprovider --numprocesses 2 --dist loadfile "${core[@]}"; then
  echo "numerics: the same"
else
  echo "numerics: different, see above"
  status=1
fi
for name in torch transformers deepspeed; do
  echo "$name: installed $(installed $name), newest $(newest $name || true)"
done
exit $status
