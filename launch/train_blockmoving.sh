#!/usr/bin/env bash
# The BlockMoving guide's fine-tuning, with its settings. Set the paths, then:
#   bash launch/train_blockmoving.sh
# Words behind it are added to the arguments and win over those here: `bash launch/train_blockmoving.sh --ema_dtype bf16`
# fits 4 GPUs of 80 GB. docs/migration.md lists which DS_CONFIG fits which machine, 24 GB cards included.
set -euo pipefail

# ------------------------------------------------------------------------------------------------------- set these
MODEL_PATH=${MODEL_PATH:-models/BAGEL-7B-MoT}                          # bagel-ds download
DATASET_CONFIG=${DATASET_CONFIG:-data/configs/blockmoving_sft.yaml}    # its dataset_info names the folder of the data
WANDB_ENABLE=${WANDB_ENABLE:-False}                                    # True needs WANDB_API_KEY
WANDB_NAME=${WANDB_NAME:-blockmoving_sft}
WANDB_RUNID=${WANDB_RUNID:-0}
RESULTS_DIR=${RESULTS_DIR:-outputs/${WANDB_NAME}--${WANDB_RUNID}}
CKPT_DIR=${CKPT_DIR:-$RESULTS_DIR/checkpoints}
TOTAL_STEPS=${TOTAL_STEPS:-1530}
SAVE_EVERY=${SAVE_EVERY:-500}
LOG_EVERY=${LOG_EVERY:-10}
GPUS=${GPUS:-4}
DS_CONFIG=${DS_CONFIG:-zero3.json}
MASTER_PORT=${MASTER_PORT:-29501}
# ------------------------------------------------------------------------------------------------------------------

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

deepspeed --num_gpus "$GPUS" --master_port "$MASTER_PORT" "$repo/launch/train.py" \
    --ds_config "$DS_CONFIG" \
    --dataset_config_file "$DATASET_CONFIG" \
    --results_dir "$RESULTS_DIR" \
    --checkpoint_dir "$CKPT_DIR" \
    --model_path "$MODEL_PATH" \
    --num_shard 4 \
    --layer_module Qwen2MoTDecoderLayer \
    --max_latent_size 64 \
    --timestep_shift 2.0 \
    --use_flex True \
    --finetune_from_hf True \
    --auto_resume True \
    --log_every "$LOG_EVERY" \
    --save_every "$SAVE_EVERY" \
    --del_previous_state True \
    --lr 1e-5 \
    --lr_scheduler cosine \
    --min_lr 1e-7 \
    --ce_weight 0.25 \
    --mse_weight 1 \
    --warmup_steps 100 \
    --total_steps "$TOTAL_STEPS" \
    --ema 0.9999 \
    --cpu_offload False \
    --num_workers 4 \
    --expected_num_tokens 8192 \
    --max_num_tokens 8192 \
    --max_num_tokens_per_sample 8192 \
    --prefer_buffer_before 8192 \
    --text_cond_dropout_prob 0.1 \
    --vit_cond_dropout_prob 0.1 \
    --vae_cond_dropout_prob 0.1 \
    --debug_batches 3 \
    --enable_wandb "$WANDB_ENABLE" \
    --wandb_name "$WANDB_NAME" \
    --wandb_runid "$WANDB_RUNID" \
    "$@"
