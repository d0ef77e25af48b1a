#!/usr/bin/env bash
# Install on a bare machine, then train a soft prompt for the included tiny base on two ranks under DeepSpeed ZeRO-3.
# After the install no network is needed. Arguments are config overrides: key.path=value.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
run=runs/quickstart-$(date +%Y%m%d-%H%M%S)
# NCCL allows one rank per GPU
ranks=$(.venv/bin/python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')
.venv/bin/python -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
  -m ptune_dist train configs/quickstart.yaml "output_dir=$run" "$@"
.venv/bin/python -m ptune_dist export "$run" --to peft --out "$run/adapter"

cat <<TEXT

run:          $run
TensorBoard:  .venv/bin/tensorboard --logdir $run/tensorboard
PEFT adapter: $run/adapter
generate:     .venv/bin/ptune-dist generate $run --input hello
TEXT
