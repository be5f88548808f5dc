#!/usr/bin/env bash
# Writes the demo model and data, trains on them for 60 steps with ZeRO-3 and shows what came out.
# Run by `make demo`, inside the virtual environment; works from any folder. Uses up to two GPUs, else two CPU processes
# (DS_ACCELERATOR=cpu asks for those); MASTER_PORT names another port than 29500.
# usage: launch/demo.sh [OUT_DIR] [more arguments of launch/train.py]
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-demo}
shift || true

source "$repo/launch/demo_ranks.sh"
bagel-ds demo --out "$out"

echo "Training with $ranks $kind process(es); DeepSpeed may take a minute or two to compile its parts the first time."
deepspeed "${where[@]}" --master_port "$port" "$repo/launch/train.py" \
    --ds_config zero3.json \
    --dataset_config_file "$out/example.yaml" \
    --model_path "$out/model" \
    --results_dir "$out/results" \
    --checkpoint_dir "$out/results/checkpoints" \
    --max_latent_size 64 \
    --finetune_from_hf True \
    --finetune_from_ema True \
    --total_steps 60 \
    --save_every 30 \
    --log_every 1 \
    --warmup_steps 5 \
    --lr 2e-3 \
    --ema 0.95 \
    --num_workers 1 \
    --expected_num_tokens 896 \
    --max_num_tokens 1024 \
    --max_num_tokens_per_sample 896 \
    --start_anew True \
    "$@"

echo
echo "The demo run is done."
python -m bagel_ds.demo.summary "$out/results" "$out/results/checkpoints"
python -m bagel_ds.demo.gallery "$out" "$out/results/checkpoints" "$out/results/drawn.png"
