#!/usr/bin/env bash
# Collect what nodes without a network need in DIR: the wheels of every package (DIR/wheels), models and data sets from
# the hub (DIR/hub, for use as HF_HOME), and local models (DIR/bases). Run it on a machine with a network that is
# otherwise like the nodes: the wheels are for the Python and the platform of .venv, which is created if missing, and
# torch is the build for this machine's NVIDIA driver, or for PTUNE_CUDA=12.6 (launch/setup.sh).
#
# usage: launch/wheelhouse.sh [--extra EXTRA] [--base HUB_NAME_OR_FOLDER] [--data HUB_DATASET] DIR
# Each option may be repeated. PTUNE_PYTHON=... replaces the interpreter of .venv.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "error: $*" >&2
  exit 2
}

extras=() folders=() from_hub=() dir=
while [ $# -gt 0 ]; do
  case $1 in
    --extra | --base | --data)
      [ -n "${2:-}" ] || fail "$1 needs a value"
      case $1 in
        --extra) extras+=("$2") ;;
        --base) if [ -d "$2" ]; then folders+=("$(realpath "$2")"); else from_hub+=("$1=$2"); fi ;;
        --data) from_hub+=("$1=$2") ;;
      esac
      shift 2
      ;;
    -*) fail "unknown option $1: use --extra, --base or --data" ;;
    *)
      [ -z "$dir" ] || fail "expected one directory, not two: $dir, $1"
      dir=$(realpath --canonicalize-missing "$1")
      shift
      ;;
  esac
done
[ -n "$dir" ] || fail "usage: launch/wheelhouse.sh [--extra EXTRA] [--base HUB_NAME_OR_FOLDER] [--data HUB_DATASET] DIR"
[[ $dir != *[[:space:]]* ]] || fail "$dir: pip does not accept a directory with a space in its name"
for folder in "${folders[@]}"; do
  [ -f "$folder/config.json" ] || fail "--base $folder: not a model: it has no config.json"
done

cd "$root"
python=${PTUNE_PYTHON:-.venv/bin/python}
if [ -z "${PTUNE_PYTHON:-}" ]; then bash launch/setup.sh; fi
needed=$("$python" - "${extras[@]}" <<'PYTHON'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    content = tomllib.load(file)
extras = content["project"]["optional-dependencies"]
needed = [*content["build-system"]["requires"], "pip", "wheel", *content["project"]["dependencies"]]
for name in sys.argv[1:]:
    if name not in extras:
        print(f"error: --extra {name}: pyproject.toml has {', '.join(extras)}", file=sys.stderr)
        sys.exit(2)
    needed += extras[name]
print("\n".join(needed))
PYTHON
)
mapfile -t needed <<<"$needed"
chosen=$("$python" -I ptune_dist/cluster/torch_builds.py "$(sed -n 's/^torch==//p' launch/constraints.txt)")
chosen=$(sed '/^#/d' <<<"$chosen")
mapfile -t torch <<<"${chosen:-torch}" # the requirement and, if the build is not on PyPI, the option for its index
needed+=("${torch[0]}")

# Downloaded exactly as training would, so that training finds it.
if [ ${#from_hub[@]} -gt 0 ]; then
  mkdir -p "$dir/hub"
  env --unset HF_HUB_CACHE --unset HF_DATASETS_CACHE HF_HOME="$dir/hub" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" \
    "$python" - "${from_hub[@]}" <<'PYTHON'
import sys

from huggingface_hub import constants, snapshot_download

from ptune_dist.data.sources import load_rows
from ptune_dist.errors import UserError
from ptune_dist.common.hub import hub_answers

OTHER_FORMATS = ["*.bin", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.ot", "*.pt", "*.pth", "*.tflite"]
for word in sys.argv[1:]:
    option, _, name = word.partition("=")
    print(f"collecting {option} {name}", flush=True)
    try:
        if not hub_answers():
            raise UserError(f"{constants.ENDPOINT} cannot be reached (HF_ENDPOINT names another hub)")
        if option == "--base":
            snapshot_download(name, ignore_patterns=OTHER_FORMATS)
        else:
            load_rows(name, key=option, default_split="train")
    except Exception as error:  # a wrong name, a gated model, a broken connection
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"error: {option} {name}: {lines[0]}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
PYTHON
fi

for folder in "${folders[@]}"; do
  echo "collecting --base $folder"
  mkdir -p "$dir/bases"
  cp --recursive --dereference "$folder" "$dir/bases/"
done

echo "collecting wheels"
mkdir -p "$dir/wheels"
pip=("$python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" wheel --constraint launch/constraints.txt --wheel-dir "$dir/wheels" "${torch[@]:1}" "${needed[@]}"
export PIP_NO_INDEX=1 PIP_FIND_LINKS=$dir/wheels
"${pip[@]}" install --dry-run --ignore-installed --constraint launch/constraints.txt "${needed[@]}" # checks that none is missing

cat <<TEXT

$(du --summarize --human-readable "$dir" | cut --fields=1) in $dir, for $("$python" --version) on $(uname --machine).
Copy it and this repository to the nodes, and run in the repository's directory there:

export PIP_NO_INDEX=1 PIP_FIND_LINKS=$dir/wheels
export HF_HOME=$dir/hub HF_HUB_OFFLINE=1
bash launch/setup.sh${extras:+ ${extras[*]}}
TEXT
