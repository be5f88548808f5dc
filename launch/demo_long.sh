#!/usr/bin/env bash
# Trains the demo model on one-move puzzles until it solves boards that it never saw, and fails if it doesn't.
# Run by `make demo-long`, inside the virtual environment; works from any folder. Devices are chosen as in demo.sh.
# usage: launch/demo_long.sh [OUT_DIR] [more arguments of launch/train.py]
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-demo-long}
shift || true
results=$out/results

source "$repo/launch/demo_ranks.sh"
bagel-ds demo --out "$out"
python -m bagel_ds.demo.one_move "$out"
mkdir -p "$results"

budgets=(--expected_num_tokens 480 --max_num_tokens 512 --max_num_tokens_per_sample 128)
exact_answers() {  # of a folder's "ema" or "model" weights on the test rows
    bagel-ds evaluate "$1" --weights "$2" --val_config "$out/one_move/test.yaml" "${budgets[@]}" \
        --metric "$out/exact_answer.py:exact_answer" --max_think_token_n 4 --batch_size 50 --json
}

exact_answers "$out/model" ema > "$results/before.json"
echo "Training with $ranks $kind process(es); DeepSpeed may take a minute or two to compile its parts the first time."
# Only what reads pictures and writes text learns. No EMA: it would lag behind in so few steps.
deepspeed "${where[@]}" --master_port "$port" "$repo/launch/train.py" \
    --ds_config zero2.json \
    --dataset_config_file "$out/one_move/train.yaml" \
    --model_path "$out/model" \
    --results_dir "$results" \
    --checkpoint_dir "$results/checkpoints" \
    --max_latent_size 64 \
    --finetune_from_hf True \
    --finetune_from_ema True \
    --visual_gen False \
    --activation_checkpointing none \
    --total_steps 800 \
    --save_every 800 \
    --log_every 10 \
    --warmup_steps 20 \
    --lr 2e-3 \
    --lr_scheduler cosine \
    --min_lr 1e-5 \
    --ema 0 \
    --num_workers 1 \
    "${budgets[@]}" \
    --start_anew True \
    "$@"

exact_answers "$results/checkpoints/step_final" model > "$results/after.json"
echo
python -m bagel_ds.demo.learned "$out" "$results"
