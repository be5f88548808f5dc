"""The training commands of the two guides that users follow, arguments verbatim.

Only the launcher's part is left out (`torchrun ... pretrain_unified_navit`). Shell variables stand as in the guides;
`arguments` fills them.
"""

from __future__ import annotations

import shlex

BAGEL_SINGLE_GPU = r"""
  --num_shard 1 \
  --dataset_config_file ./data/configs/example.yaml \
  --model_path models/BAGEL-7B-MoT \
  --layer_module Qwen2MoTDecoderLayer \
  --max_latent_size 64 \
  --finetune_from_hf True \
  --auto_resume True \
  --resume-model-only True \
  --finetune-from-ema True \
  --log_every 1 \
  --lr 2e-5 \
  --num_worker 1 \
  --expected_num_tokens 10240 \
  --max_num_tokens 11520 \
  --max_num_tokens_per_sample 10240 \
  --results_dir ./results \
  --checkpoint_dir ./results/checkpoints \
  --total_steps 10000 \
  --save_every 1000 \
  --warmup_steps 500
"""

BAGEL_MULTI_GPU = r"""
  --num_shard 8 \
  --dataset_config_file ./data/configs/example.yaml \
  --model_path models/BAGEL-7B-MoT \
  --layer_module Qwen2MoTDecoderLayer \
  --max_latent_size 64 \
  --finetune_from_hf True \
  --auto_resume True \
  --resume-model-only True \
  --finetune-from-ema True \
  --log_every 10 \
  --lr 2e-5 \
  --num_worker 4 \
  --expected_num_tokens 10240 \
  --max_num_tokens 11520 \
  --max_num_tokens_per_sample 10240 \
  --results_dir ./results \
  --checkpoint_dir ./results/checkpoints \
  --total_steps 50000 \
  --save_every 2000 \
  --warmup_steps 2000
"""

BAGEL_MULTI_NODE = r"""
  --dataset_config_file ./data/configs/example.yaml \
  --model_path models/BAGEL-7B-MoT \
  --layer_module Qwen2MoTDecoderLayer \
  --max_latent_size 64 \
  --finetune_from_hf True \
  --auto_resume True \
  --resume-model-only True \
  --finetune-from-ema True \
  --lr 2e-5 \
  --num_worker 8 \
  --expected_num_tokens 10240 \
  --max_num_tokens 11520 \
  --max_num_tokens_per_sample 10240
"""

BLOCKMOVING = r"""
  --dataset_config_file ./data/configs/blockmoving_sft.yaml \
  --results_dir $RESULTS_DIR \
  --checkpoint_dir $CKPT_DIR \
  --model_path $MODEL_PATH \
  --num_shard 4 \
  --layer_module Qwen2MoTDecoderLayer \
  --max_latent_size 64 \
  --timestep_shift 2.0 \
  --use_flex True \
  --finetune_from_hf True \
  --auto_resume True \
  --log_every $LOG_EVERY \
  --save_every $SAVE_EVERY \
  --del_previous_state True \
  --lr 1e-5 \
  --lr_scheduler cosine \
  --min_lr 1e-7 \
  --ce_weight 0.25 \
  --mse_weight 1 \
  --warmup_steps 100 \
  --total_steps $TOTAL_STEPS \
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
  --enable_wandb $WANDB_ENABLE \
  --wandb_name $WANDB_NAME \
  --wandb_runid $WANDB_RUNID
"""

# What the BlockMoving guide's script sets above its command.
BLOCKMOVING_VARIABLES = {
    "MODEL_PATH": "/path/to/models/BAGEL-7B-MoT",
    "WANDB_ENABLE": "False",
    "WANDB_NAME": "blockmoving_sft",
    "WANDB_RUNID": "0",
    "RESULTS_DIR": "/path/to/outputs/blockmoving_sft--0",
    "CKPT_DIR": "/path/to/outputs/blockmoving_sft--0/checkpoints",
    "TOTAL_STEPS": "1530",
    "SAVE_EVERY": "500",
    "LOG_EVERY": "10",
}

WANDB_EXTRA = r"--wandb_project bagel_finetune --wandb_name my_experiment --wandb_offline False"
MODALITY_EXTRAS = ("--visual_und=False", "--visual_gen=False", "--visual_gen=True --visual_und=True")

GUIDE_COMMANDS = {
    "bagel-single-gpu": BAGEL_SINGLE_GPU,
    "bagel-multi-gpu": BAGEL_MULTI_GPU,
    "bagel-multi-node": BAGEL_MULTI_NODE,
    "blockmoving": BLOCKMOVING,
}


def arguments(command: str, **replaced: str) -> list[str]:
    """Words of a guide's command. `replaced` names options, as the guide writes them, whose values are exchanged."""
    text = command.replace("\\\n", " ")
    for name, value in BLOCKMOVING_VARIABLES.items():
        text = text.replace(f"${name}", value)
    words = shlex.split(text)
    for name, value in replaced.items():
        words[words.index(f"--{name}") + 1] = value
    return words
