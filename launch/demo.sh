#!/usr/bin/env bash
# Writes the demo model and data, trains on them for 60 steps with ZeRO-3 and shows what came out.
# Run by `make demo`, inside the virtual environment; works from any folder. Uses up to two GPUs, else two CPU processes
# (DS_ACCELERATOR=cpu asks for those); MASTER_PORT names another port than 29500.
# usage: launch/demo.sh [OUT_DIR] [more arguments of launch/train.py]
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-demo}
shift || true

gpus=$(python -m bagel_ds.demo.devices)  # ends here, with the reason, where there is a GPU that torch can't use
bagel-ds demo --out "$out"

if [ "$gpus" -gt 0 ]; then
    kind=GPU
    ranks=$((gpus < 2 ? gpus : 2))
else
    kind=CPU
    ranks=2
    export DS_ACCELERATOR=cpu
    # The processes share the cores; without this each would start one thread per core.
    cores=$(getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 2 * ranks ? 1 : cores / ranks))}
fi
where=(--num_gpus "$ranks")
if [[ $kind = GPU && ${CUDA_VISIBLE_DEVICES:-} =~ ^[0-9]+(,[0-9]+)*$ ]]; then  # --num_gpus would drop it
    where=(--include "localhost:$(cut -d, -f "1-$ranks" <<< "$CUDA_VISIBLE_DEVICES")")
fi
port=${MASTER_PORT:-29500}
# DeepSpeed leaves its shared memory on the CPU behind, 66 MiB per process.
trap 'rm -f /dev/shm/deepspeed_allreduce_buffer_0_*_"$port"_* 2> /dev/null || true' EXIT
export BAGEL_DS_PROGRESS=${BAGEL_DS_PROGRESS:-1}  # a bar also where the output is not a terminal

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
