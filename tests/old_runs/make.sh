#!/usr/bin/env bash
# Make the runs in this folder with another version of the package.
#
# usage: tests/old_runs/make.sh TREE      TREE: a checkout of the version; PYTHON: an interpreter with its requirements
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tree=$(cd "$1" && pwd)
python=${PYTHON:-$here/../../.venv/bin/python}
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
cd "$tree"

ptune() { "$python" -m ptune_dist "$@"; }

small=(
  prompt.num_virtual_tokens=4 train.max_steps=60 train.batch_size=16 train.schedule=constant
  evaluate.every=20 evaluate.max_examples=8 evaluate.max_new_tokens=12 evaluate.num_samples=2
  'evaluate.metrics=[exact_match, loss]' evaluate.best_metric=loss checkpoint.every=20 checkpoint.keep=1
)

# train_and_go_on NAME OVERRIDE ...: a finished run of 60 steps, and the losses of a copy resumed up to step 70
train_and_go_on() {
  local name=$1
  shift
  ptune train "$work/config.yaml" output_dir="$work/$name" "${small[@]}" "$@"
  cp -r "$work/$name" "$work/longer"
  ptune train "$work/config.yaml" output_dir="$work/longer" "${small[@]}" "$@" train.max_steps=70
  tail -n 10 "$work/longer/metrics.jsonl" >"$work/$name-went-on.jsonl"
  rm -r "$work/longer"
}

# An encoder with random weights: its head is trained and stored with the prompt.
"$python" - "$work/encoder_base" <<'PYTHON'
import sys

import torch
from transformers import BertConfig, BertForMaskedLM

from ptune_dist.tiny.make import build_tokenizer

torch.manual_seed(0)
shape = BertConfig(
    vocab_size=272, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=80, pad_token_id=1, eos_token_id=0, bos_token_id=0,
)
base = BertForMaskedLM(shape).eval()
with torch.no_grad():  # larger weights, so that its answers depend on what it reads
    for parameter in base.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3.0)
base.save_pretrained(sys.argv[1])
build_tokenizer().save_pretrained(sys.argv[1])
PYTHON
for word in sun moon river stone cloud tree wind rain; do
  echo "{\"text\": \"$word\", \"answer\": \"short\"}"
  echo "{\"text\": \"the $word and the $word again\", \"answer\": \"long\"}"
done >"$work/encoder_rows.jsonl"

cp configs/quickstart.yaml "$work/config.yaml"

# A run that is stopped on request, on 2 ranks under ZeRO-3, and the same run undisturbed.
interrupted=("$work/config.yaml" "${small[@]}" train.max_steps=40 train.schedule=cosine)
two_ranks=("$python" -m torch.distributed.run --nproc-per-node 2 --master-port 29617 -m ptune_dist train)
"${two_ranks[@]}" "${interrupted[@]}" output_dir="$work/undisturbed"
"${two_ranks[@]}" "${interrupted[@]}" output_dir="$work/interrupted" &
until [ "$(wc -l 2>/dev/null <"$work/interrupted/metrics.jsonl" || echo 0)" -ge 25 ]; do sleep 0.02; done
kill -TERM $!
wait $! || echo "torchrun ended with status $?"
cp "$work/undisturbed/metrics.jsonl" "$work/interrupted-undisturbed.jsonl"
cp "$work/undisturbed/summary.json" "$work/interrupted-undisturbed-summary.json"

train_and_go_on sweep 'sweep={train.learning_rate: [0.05, 0.01]}' deepspeed=configs/deepspeed/zero0_fp32.json
for rate in 0.05 0.01; do ptune evaluate "$work/sweep" --member "learning_rate=$rate"; done
ptune export "$work/sweep" --member learning_rate=0.05 --to peft --out "$work/sweep-peft"

train_and_go_on infix prompt.placement=infix
ptune evaluate "$work/infix"
ptune generate "$work/infix" --input pickle --output "$work/infix-generated.jsonl"

cd "$work" # the encoder's base and rows are here
train_and_go_on encoder model.path=encoder_base data.train=encoder_rows.jsonl data.validation=encoder_rows.jsonl \
  'data.template={{ text }}' 'data.target={{ answer }}' 'data.labels=[short, long]' \
  'evaluate.metrics=[accuracy, loss]' train.optimizer=adafactor train.learning_rate=0.3 \
  deepspeed="$tree/configs/deepspeed/zero0_fp32.json"
ptune evaluate encoder
ptune export encoder --to peft --out encoder-peft

# Paths relative to the repository, and nothing that a test does not read.
rm -rf ./config.yaml ./undisturbed ./*/.lock ./*/tensorboard ./*/logs ./*/train.log ./*/members/*/tensorboard
find . \( -name '*.yaml' -o -name '*.json' \) -exec sed -i "s#$tree/##g; s#$work/#tests/old_runs/#g" {} +
for name in ./*; do rm -rf "${here:?}/${name#./}"; done
mv ./* "$here/"
