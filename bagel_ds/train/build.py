"""The engine of a run, built and loaded.

Guarantees: every loaded weight and average is finite and of the network's shape, on all ranks, or the run ends with one
message. A resumed run gets the masters, moments and average that were saved.
"""

from __future__ import annotations

import logging
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.recompute import recompute_mode
from bagel_ds.model.shape.activations import arena_bytes
from bagel_ds.model.vae import encode_batch
from bagel_ds.model_folder.finite import CheckedWeights
from bagel_ds.train.prepare import Prepared, trainable
from bagel_ds.train.ranks.agreement import together
from bagel_ds.train.saves.restore import restore_moments
from bagel_ds.zero.ema import EMAOptions, ShardedEMA
from bagel_ds.zero.engine import AdamOptions, ZeroEngine

logger = logging.getLogger("bagel_ds")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_engine(config: RunConfig, prepared: Prepared) -> ZeroEngine:
    """The network in an engine, without weights."""
    model, training = prepared.model, config.training
    # No pack has more tokens, so this is the most that layer inputs take in host memory ("offload").
    arena = arena_bytes(model, config.data.max_num_tokens, DTYPES[training.precision].itemsize)
    recompute = recompute_mode(
        training.activation_checkpointing,
        arena,
        draws=training.lora_dropout > 0,
        layers=prepared.memory.selective_layers,
    )
    return ZeroEngine(lambda: Bagel(model, recompute), trainable(config, model), prepared.ds_config)


def load(engine: ZeroEngine, config: RunConfig, prepared: Prepared, updates_done: int) -> ShardedEMA | None:
    """Load weights, average and moments from where the run starts; the average, or None with --ema 0."""
    opened, training = prepared.weights, config.training
    for line in opened.description:
        logger.info(line)
    weights = CheckedWeights(opened.weights, str(prepared.start.folder))
    adam = AdamOptions((training.beta1, training.beta2), training.eps, training.weight_decay)
    engine.start(weights, adam, loaded=lambda: together(weights.check))
    ema = None if training.ema == 0 else _load_average(engine, config, prepared, updates_done)
    if opened.state is not None:
        restore_moments(engine, opened.state, updates_done)
    return ema


def _load_average(engine: ZeroEngine, config: RunConfig, prepared: Prepared, updates_done: int) -> ShardedEMA:
    training, averages = config.training, prepared.weights.averages
    options = EMAOptions(
        decay=training.ema,
        every=training.ema_every,
        dtype=DTYPES[training.ema_dtype],
        folder=prepared.zero.average_folder(dist.get_rank()),
        updates_done=updates_done,
    )
    if averages is None:
        return together(lambda: engine.start_ema(options, None))
    checked = CheckedWeights(averages, f"{prepared.start.folder} (EMA)")
    ema = together(lambda: engine.start_ema(options, checked))
    together(checked.check)
    return ema


def image_encoder(config: RunConfig, prepared: Prepared, device: torch.device) -> Callable[[PackedBatch], Tensor]:
    """The autoencoder's encoder on `device`, in the run's precision: a pack's images as clean latent tokens [G, F]."""
    prepared.vae.encoder.to(device)
    vae, patch, bf16 = prepared.vae, prepared.model.latent_patch_size, config.training.precision == "bf16"

    def encode(batch: PackedBatch) -> Tensor:
        return encode_batch(vae, batch, patch, bf16)

    return encode
