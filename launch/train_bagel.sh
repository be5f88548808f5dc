#!/usr/bin/env bash
# The first guide's fine-tuning of BAGEL-7B-MoT, with its settings. Set the paths, then:
#   bash launch/train_bagel.sh                                    4 GPUs (the guide's 4.2)
#   GPUS=1 DS_CONFIG=zero2_cpu.json bash launch/train_bagel.sh    one GPU (4.1)
#   HOSTFILE=hostfile bash launch/train_bagel.sh                  several hosts (4.3), as launch/hostfile.example says
# Words behind it are added to the arguments and win over those here: `bash launch/train_bagel.sh --ema_dtype bf16` fits
# 4 GPUs of 80 GB. docs/migration.md lists which DS_CONFIG fits which machine; `bagel-ds memory` answers for any other.
set -euo pipefail

# ------------------------------------------------------------------------------------------------------- set these
MODEL_PATH=${MODEL_PATH:-models/BAGEL-7B-MoT}                  # bagel-ds download
DATASET_CONFIG=${DATASET_CONFIG:-data/configs/example.yaml}    # its dataset_info names the folders of the data
RESULTS_DIR=${RESULTS_DIR:-results}
CHECKPOINT_DIR=${CHECKPOINT_DIR:-$RESULTS_DIR/checkpoints}     # on several hosts: on a file system that all share
GPUS=${GPUS:-4}                                                # on this host; HOSTFILE has its own numbers
HOSTFILE=${HOSTFILE:-}
DS_CONFIG=${DS_CONFIG:-zero3.json}
MASTER_PORT=${MASTER_PORT:-29500}
# ------------------------------------------------------------------------------------------------------------------

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ -n "$HOSTFILE" ]; then
    where=(--hostfile "$HOSTFILE")
    settings=(--num_worker 8) # the guide leaves steps, saves and warmup to the defaults here
elif [ "$GPUS" = 1 ]; then
    where=(--num_gpus 1)
    settings=(--num_shard 1 --log_every 1 --num_worker 1 --total_steps 10000 --save_every 1000 --warmup_steps 500)
else
    where=(--num_gpus "$GPUS")
    settings=(--num_shard 8 --log_every 10 --num_worker 4 --total_steps 50000 --save_every 2000 --warmup_steps 2000)
fi

deepspeed "${where[@]}" --master_port "$MASTER_PORT" "$repo/launch/train.py" \
    --ds_config "$DS_CONFIG" \
    --dataset_config_file "$DATASET_CONFIG" \
    --model_path "$MODEL_PATH" \
    --results_dir "$RESULTS_DIR" \
    --checkpoint_dir "$CHECKPOINT_DIR" \
    --layer_module Qwen2MoTDecoderLayer \
    --max_latent_size 64 \
    --finetune_from_hf True \
    --auto_resume True \
    --resume-model-only True \
    --finetune-from-ema True \
    --lr 2e-5 \
    --expected_num_tokens 10240 \
    --max_num_tokens 11520 \
    --max_num_tokens_per_sample 10240 \
    "${settings[@]}" \
    "$@"
