"""Every option of a training run, under the original trainer's name: type, default and one line of help.

Guarantees: three frozen dataclasses hold all options and nothing else; no name occurs twice. `parse.py` reads options
from a command line or a YAML file, `run_config.py` says which are refused or explained, and `page.py` makes
docs/arguments.md of this file. Options that the original trainers don't have say "(ours)".
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bagel_ds.model.attention.backends import CHOICES


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with its one-line help and, for strings, the values it can take."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class ModelArguments:
    """Which network is built, and from which files."""

    model_path: str = option("hf/BAGEL-7B-MoT", "folder laid out like BAGEL-7B-MoT, or its hub id when online")
    llm_path: str = option(
        "hf/Qwen2.5-0.5B-Instruct/",
        "language model (a folder) to start from when neither finetune_from_hf nor resume_from is given",
    )
    vit_path: str = option(
        "hf/siglip-so400m-14-980-flash-attn2-navit/", "SigLIP ViT (a folder) to start from, likewise"
    )
    vae_path: str = option("flux/vae/ae.safetensors", "autoencoder file to start from, likewise")
    llm_qk_norm: bool = option(True, "RMSNorm on queries and keys, per head")
    tie_word_embeddings: bool = option(False, "one matrix for embedding and output head; BAGEL has two")
    layer_module: str = option("Qwen2MoTDecoderLayer", "decoder layer; BAGEL-7B-MoT is Qwen2MoTDecoderLayer")
    max_latent_size: int | None = option(
        None, "side of the latent position table (64 in BAGEL-7B-MoT); None takes what the checkpoint holds"
    )
    latent_patch_size: int = option(2, "side of a latent token in VAE cells")
    vit_patch_size: int = option(14, "side of a ViT patch in pixels")
    vit_max_num_patch_per_side: int = option(70, "side of the ViT position table in patches")
    connector_act: str = option("gelu_pytorch_tanh", "activation between the two linear layers of the connector")
    interpolate_pos: bool = option(False, "scale position ids of an image to the whole table")
    vit_select_layer: int = option(-2, "ViT layer whose output is used, counted from the end")
    vit_rope: bool = option(False, "rotary positions in the ViT; BAGEL learns a table instead")
    text_cond_dropout_prob: float = option(0.1, "chance to drop a conditioning text")
    vae_cond_dropout_prob: float = option(0.3, "chance to drop a conditioning VAE image")
    vit_cond_dropout_prob: float = option(0.3, "chance to drop a conditioning ViT image")


@dataclass(frozen=True)
class DataArguments:
    """What is trained on, and how much of it fits one sequence."""

    dataset_config_file: str = option(
        "data/configs/example.yaml", "YAML that names groups of datasets and their weights"
    )
    dataset_info: str | None = option(
        None,
        "(ours) where datasets lie; None looks for dataset_info.{yaml,json,py} beside the config, above it, in data/",
    )
    index_cache: str | None = option(
        None, "(ours) folder that keeps the index of the data; None keeps it beside them, or in ~/.cache/bagel_ds"
    )
    prefetch_factor: int = option(2, "packs each data worker prepares ahead")
    num_workers: int = option(
        4, "data workers (processes that read and decode) per rank; 0 reads in the training process"
    )
    max_num_tokens_per_sample: int = option(16384, "longer samples are skipped, counted and reported")
    expected_num_tokens: int = option(32768, "the least a pack should hold")
    max_num_tokens: int = option(36864, "hard limit of a pack; what a step holds in memory grows with it")
    prefer_buffer_before: int = option(16384, "the original packer's buffer rule; packs are planned ahead here")
    max_buffer_size: int = option(50, "the original packer's buffer size; packs are planned ahead here")
    data_seed: int = option(42, "seed of the order of samples and of all random choices in them")


@dataclass(frozen=True)
class TrainingArguments:
    """What is optimised, how, and what a run leaves behind."""

    visual_gen: bool = option(True, "train image generation")
    visual_und: bool = option(True, "train image understanding")

    results_dir: str = option("results", "folder of log.txt, metrics.jsonl, TensorBoard files and samples")
    checkpoint_dir: str = option("results/checkpoints", "folder of the step_N checkpoints")

    enable_wandb: bool | None = option(
        None, "Weights & Biases: True or False decides; None means on when wandb_project or wandb_name is given"
    )
    wandb_project: str = option("bagel", "W&B project")
    wandb_name: str = option("run", "W&B run name")
    wandb_runid: str = option("0", "W&B run id suffix, to continue a run")
    wandb_resume: str = option("allow", "W&B resume mode", choices=("allow", "must", "never", "auto"))
    wandb_offline: bool = option(False, "log W&B locally, without a key")

    global_seed: int = option(4396, "seed of newly initialized weights")
    auto_resume: bool = option(False, "continue from the newest complete checkpoint in checkpoint_dir, if there is one")
    start_anew: bool = option(
        False, "(ours) where checkpoint_dir holds an earlier run, move it aside to earlier_N and start again at step 0"
    )
    resume_from: str | None = option(None, "checkpoint or model folder to continue from when auto_resume finds none")
    resume_model_only: bool = option(False, "take only the weights of resume_from, not its optimizer and data state")
    finetune_from_ema: bool = option(False, "start from ema.safetensors rather than model.safetensors")
    finetune_from_hf: bool = option(False, "start from the weights of model_path")

    log_every: int = option(10, "optimizer steps between log lines")
    profile: int = option(0, "(ours) write a profile of so many steps into results_dir/profile; 0 for none")
    save_every: int = option(2000, "optimizer steps between checkpoints; the last step is always saved")
    total_steps: int = option(500_000, "optimizer steps of the whole run")
    del_previous_state: bool = option(False, "after a save, delete older optimizer states and keep the weights")
    keep_last: int = option(0, "(ours) after a save, delete all but the N newest checkpoints; 0 keeps all")
    debug_batches: int = option(0, "show the first N packs before training")

    val_config: str | None = option(None, "(ours) dataset YAML of a held-out split to evaluate on during training")
    val_every: int = option(500, "(ours) optimizer steps between evaluations; the last step is always evaluated")
    val_max_batches: int = option(
        0, "(ours) evaluate at most so many packs over all ranks, spread over the split; 0 takes all"
    )

    sample_prompts: str | None = option(
        None, "(ours) JSONL or parquet of prompts, as for `bagel-ds generate`, to draw and answer during training"
    )
    sample_every: int = option(500, "(ours) optimizer steps between samples; the last step always gives samples")
    sample_weights: str = option(
        "model",
        "(ours) what the samples come from, named as the files: the weights (model), their EMA (ema), or both",
        choices=("model", "ema", "both"),
    )

    stop_after: str | None = option(
        None, "(ours) save and stop after this long, such as 3h50m: before a time limit of the cluster"
    )
    stall_timeout: float = option(
        3600.0,
        "(ours) seconds after which a step, a save or a part of the start that does not go on prints where every rank "
        "is and ends; 0 waits on",
    )
    max_nonfinite: int = option(
        10, "(ours) so many updates with a gradient that is not finite are skipped, then it is an error"
    )

    warmup_steps: int = option(2000, "steps over which the learning rate rises from 0")
    lr_scheduler: str = option("constant", "schedule after the warm-up", choices=("constant", "cosine"))
    lr: float = option(1e-4, "peak learning rate; fine-tuning usually takes 1e-5 to 2e-5")
    min_lr: float = option(1e-7, "where the cosine schedule ends")
    beta1: float = option(0.9, "AdamW's decay of the mean of gradients")
    beta2: float = option(0.95, "AdamW's decay of the mean of squared gradients")
    eps: float = option(1e-15, "AdamW's epsilon")
    weight_decay: float = option(0.0, "(ours) AdamW's weight decay; 0 as in the original")
    ema: float = option(0.9999, "decay of the EMA (moving average) of the weights; 0 turns it off")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 turns clipping off")
    timestep_shift: float = option(1.0, "shifts flow timesteps towards noise")
    mse_weight: float = option(1.0, "weight of the generation loss")
    ce_weight: float = option(1.0, "weight of the text loss")
    ce_loss_reweighting: bool = option(False, "weigh every text by 1/sqrt(length) rather than by its length")
    gradient_accumulation_steps: int = option(1, "packs per rank and optimizer step")
    peak_device_tflops: float = option(0.0, "peak of one GPU in TFLOPS, for MFU; 0 detects it")

    freeze_llm: bool = option(False, "don't train the language model (both experts)")
    freeze_vit: bool = option(False, "don't train the ViT")
    freeze_vae: bool = option(True, "don't train the VAE; it never is")
    freeze_und: bool = option(False, "no gradient through understanding tokens: only the generation side learns")
    copy_init_moe: bool = option(True, "generation expert starts as a copy where the checkpoint lacks it")
    use_flex: bool = option(False, "attn flex where it works, else attn sdpa; attn takes precedence")

    lora_rank: int = option(0, "(ours) train low-rank adapters (LoRA) of this rank, and nothing else; 0 for none")
    lora_alpha: float | None = option(
        None, "(ours) adapters are scaled by lora_alpha / lora_rank; default: twice the rank"
    )
    lora_dropout: float = option(0.0, "(ours) share of an adapter's inputs that is set to 0 at random")
    lora_targets: str = option(
        "both",
        "(ours) which linear layers get an adapter: gen or und (the language model's, of that expert), both, or a "
        "regular expression that matches whole names such as connector\\.fc[12]",
    )
    base_precision: str = option(
        "full",
        "(ours) with lora_rank: keep the language model's own weights in 4 bits (nf4) or 8 (int8); full: as precision",
        choices=("full", "int8", "nf4"),
    )

    num_replicate: int = option(1, "FSDP only: see sharding_strategy")
    num_shard: int = option(8, "FSDP only: GPUs of one sharding group; as many as there are, or more, means all")
    sharding_strategy: str = option(
        "HYBRID_SHARD",
        "FSDP only: fills the ZeRO stage where given and ds_config leaves it open",
        choices=("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"),
    )
    backward_prefetch: str = option(
        "BACKWARD_PRE", "FSDP only: no meaning here", choices=("BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH")
    )
    cpu_offload: bool = option(False, "optimizer states and parameters in CPU memory, where ds_config leaves it open")

    ds_config: str = option("zero3.json", "(ours) DeepSpeed configuration: a path, or a name in ds_configs/")
    nvme_path: str | None = option(
        None, "(ours) folder on a local SSD for ds_configs that swap to NVMe; its files are removed at the end"
    )
    ignore_memory_plan: bool = option(False, "(ours) start although the memory plan says that the run can't fit")
    ema_every: int = option(1, "(ours) update the EMA at every k-th step, with its decay to the power k")
    ema_dtype: str = option(
        "fp32",
        "(ours) number format the EMA is kept in; bf16 rounds stochastically",
        choices=("fp32", "bf16"),
    )
    attn: str = option(
        "auto",
        "(ours) attention kernels; the result is the same. auto takes the fastest that works and logs which; flash is "
        "flash-attn or torch's varlen_attn, flex FlexAttention, sdpa torch's scaled_dot_product_attention",
        choices=CHOICES,
    )
    fused_kernels: bool | None = option(
        None,
        "(ours) norms, rotary embeddings and SwiGLU in fused kernels, which torch compiles at the start; None means on "
        "a GPU, if they give the values of torch's own kernels there",
    )
    precision: str = option(
        "bf16", "(ours) bf16 with fp32 master weights, or fp32 throughout (for tests)", choices=("bf16", "fp32")
    )
    activation_checkpointing: str = option(
        "full",
        "(ours) recompute every layer in backward; selective keeps the results of matrix products and attention in as "
        "many layers as the GPU has room for, offload also keeps a layer's input in CPU memory, none keeps all",
        choices=("full", "selective", "offload", "none"),
    )
    save_dtype: str = option(
        "auto",
        "(ours) number format of exported weights; auto is the run's precision",
        choices=("auto", "bf16", "fp32"),
    )


SECTIONS: dict[str, type] = {"model": ModelArguments, "data": DataArguments, "training": TrainingArguments}


def all_options() -> dict[str, dataclasses.Field[Any]]:
    """Every option by name, in the order of this file."""
    return {field.name: field for section in SECTIONS.values() for field in dataclasses.fields(section)}


def type_name(field: dataclasses.Field[Any]) -> str:
    """ "int", "float", "bool" or "str"; annotations are strings in this file."""
    return str(field.type).removesuffix(" | None")


def is_optional(field: dataclasses.Field[Any]) -> bool:
    return str(field.type).endswith(" | None")
