"""Trains on hand-made batches; started by test_modalities.py and test_offload_equality.py.

Arguments: a model folder, a JSON file with {steps, cases: [{name, ds_config, mixed, recompute}]} and a folder for the
results (<name>.json with losses and gradient norms, <name>.safetensors with the final weights). Unless `mixed`, on two
ranks one has only text and the other only images to generate, swapped halfway; one rank takes both as two
micro-batches. Mixed batches hold text, an image to read and an image to generate.
"""

from __future__ import annotations

import json
import shutil
import sys
from itertools import chain
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from bagel_ds.arguments.run_config import make_config
from bagel_ds.data.batches.layout import Loaded, layout
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.sample import TEXT, VAE, VIT
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.losses.breakdown import LossBreakdown
from bagel_ds.model.losses.normalization import LossOptions
from bagel_ds.model.recompute import recompute_mode
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.parts import Freezing, part_of, trainable_parts
from bagel_ds.model_folder.tokenizer import load_tokenizer
from bagel_ds.ranges import MASTER, TensorInfo
from bagel_ds.train.ranks.agreement import everyone
from bagel_ds.train.step import accumulate, update
from bagel_ds.zero.config.nvme import fit_buffers
from bagel_ds.zero.config.resolve import resolve_ds_config
from bagel_ds.zero.engine import AdamOptions, ZeroEngine
from bagel_ds.zero.weights import frozen_pieces
from tests.checkpoint.written import export_tensors
from tests.distributed.engines import many_engines
from tests.recordings import bagel_config, weights_of

SIDES = ((4, 6), (5, 3))  # latent tokens of a batch's images: rows, columns
MIXED = "mixed"
DATASETS = ("first", "second")  # of the two samples of every batch


def batch_of(kind: str, step: int, folder: Path, config: BagelConfig) -> tuple[PackedBatch, Tensor]:
    """The step's batch of one kind, and its clean latent tokens; equal wherever it is made."""
    special, options = load_tokenizer(folder).special, LayoutOptions(max_latent_size=config.max_latent_size)
    generator = torch.Generator().manual_seed(1000 * step + len(kind))
    read = []
    if kind == MIXED:
        pixels = torch.randint(0, 256, (3, 14 * (5 + step % 3), 14 * 9), dtype=torch.uint8, generator=generator)
        ids = torch.randint(0, 500, (30 + step,), generator=generator).tolist()
        read = [Loaded(VIT, image=pixels), Loaded(TEXT, ids=ids, loss=True)]
    if kind == TEXT:
        lengths = [40 + step % 7, 25]
        ids = [torch.randint(0, 500, (length,), generator=generator).tolist() for length in lengths]
        texts = [[Loaded(TEXT, ids=text, loss=True)] for text in ids]
        return layout(texts, special, options, datasets=DATASETS), torch.zeros(0, config.latent_features)
    samples = []
    for rows, columns in SIDES:
        noise = torch.randn(rows * columns, config.latent_features, generator=generator)
        image = torch.zeros(3, rows * options.latent_stride, columns * options.latent_stride, dtype=torch.uint8)
        timestep = float(torch.randn((), generator=generator))
        samples.append([*read, Loaded(VAE, image=image, loss=True, timestep=timestep, noise=noise)])
    tokens = sum(rows * columns for rows, columns in SIDES)
    return layout(samples, special, options, datasets=DATASETS), torch.randn(
        tokens, config.latent_features, generator=generator
    )


def kinds(step: int, steps: int) -> tuple[str, str]:
    """What rank 0 and rank 1 hold in this step."""
    return (TEXT, VAE) if step < steps // 2 else (VAE, TEXT)


def train(case: dict, steps: int, folder: Path, results: Path) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    accumulation = 2 // world
    nvme = str(results / "nvme")
    run = make_config({"precision": "fp32", "gradient_accumulation_steps": accumulation, "nvme_path": nvme})
    ds_config, _ = resolve_ds_config(case["ds_config"], run, world)
    config = bagel_config(folder)
    weights = weights_of(folder, config)
    fit_buffers(ds_config, max(weights.info(name).numel for name in weights.names), world)
    trains = trainable_parts(config, Freezing())
    recompute = recompute_mode(case.get("recompute", "full"))
    engine = ZeroEngine(lambda: Bagel(config, recompute), lambda name: part_of(name) in trains, ds_config)
    # An epsilon above rounding: what is compared is the gradient, not Adam's magnification of its last bits.
    engine.start(weights, AdamOptions(eps=1e-8))
    parts = LossBreakdown(DATASETS, config.timestep_shift, LossOptions())
    values, by_part = [], []
    for step in range(steps):
        both = (MIXED, MIXED) if case.get("mixed") else kinds(step, steps)
        mine = both if world == 1 else (both[rank],)
        made = [batch_of(kind, step, folder, config) for kind in mine]
        latents = iter([tokens for _, tokens in made])
        window = [batch for batch, _ in made]
        losses = accumulate(engine, lambda _, latents=latents: next(latents), window, LossOptions(), parts)
        result = update(engine, losses, 1e-4)
        means = result.read()
        values.append([means.ce, means.mse, float(result.grad_norm)])
        by_part.append(parts.means(everyone(losses.breakdown.tolist())))
    infos = {name: TensorInfo(torch.float32, shape) for name, shape in engine.shapes.items()}
    final = chain(engine.partitions.pieces(MASTER), frozen_pieces(engine.module))
    export_tensors(results / f"{case['name']}.safetensors", infos, final, engine.device)
    if rank == 0:
        (results / f"{case['name']}.json").write_text(json.dumps(values))
        (results / f"{case['name']}.parts.json").write_text(json.dumps(by_part))
    engine.close()
    shutil.rmtree(nvme, ignore_errors=True)


def main(model: str, cases_file: str, results: str) -> None:
    deepspeed.init_distributed()
    asked = json.loads(Path(cases_file).read_text())
    with many_engines():
        for case in asked["cases"]:
            train(case, asked["steps"], Path(model), Path(results))
            dist.barrier()


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
