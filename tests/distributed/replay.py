"""Runs recorded trajectories through our engine; started by test_trajectories.py.

Arguments: a JSON file with a list of cases {name, variant, ds_config, accumulation} and a folder for the results
(<name>.json, <name>.model.safetensors, <name>.ema.safetensors).
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

from bagel_ds.arguments.run_config import make_config
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.losses.normalization import LossOptions
from bagel_ds.model.recompute import recompute_mode
from bagel_ds.model.shape.parts import Freezing, part_of, trainable_parts
from bagel_ds.ranges import MASTER, TensorInfo
from bagel_ds.train.schedule import learning_rate
from bagel_ds.train.step import accumulate, update
from bagel_ds.zero.config.nvme import fit_buffers
from bagel_ds.zero.config.resolve import resolve_ds_config
from bagel_ds.zero.ema import EMAOptions
from bagel_ds.zero.engine import AdamOptions, ZeroEngine
from bagel_ds.zero.weights import frozen_pieces
from tests.checkpoint.written import export_tensors
from tests.distributed.engines import many_engines
from tests.recordings import bagel_config, read_json, recorded_batch, reference, tensors, weights_of


def main(cases_file: str, results: str) -> None:
    deepspeed.init_distributed()
    with many_engines():
        for case in json.loads(Path(cases_file).read_text()):
            replay(case, Path(results))
            dist.barrier()


def replay(case: dict, results: Path) -> None:
    recording = read_json(f"train/{case['variant']}")
    arguments, optimizer = recording["args"], recording["optimizer"]
    accumulation, world, rank = case["accumulation"], dist.get_world_size(), dist.get_rank()
    assert world * accumulation == arguments.get("world", 1), "as many batches per step as the recording"
    run = make_config(
        {
            "precision": "fp32",
            "lr": optimizer["lr"],
            "beta1": optimizer["betas"][0],
            "beta2": optimizer["betas"][1],
            "eps": optimizer["eps"],
            "max_grad_norm": optimizer["max_grad_norm"],
            "gradient_accumulation_steps": accumulation,
            "nvme_path": str(results / "nvme"),
        }
    )
    ds_config, _ = resolve_ds_config(case["ds_config"], run, world)
    folder = reference() / "model"
    config = bagel_config(
        folder, timestep_shift=arguments.get("shift", 1.0), freeze_und=arguments.get("freeze_und", False)
    )
    weights = weights_of(folder, config)
    fit_buffers(ds_config, max(weights.info(name).numel for name in weights.names), world)
    trains = trainable_parts(config, Freezing())
    engine = ZeroEngine(lambda: Bagel(config, recompute_mode("full")), lambda name: part_of(name) in trains, ds_config)
    engine.start(weights, AdamOptions(tuple(optimizer["betas"]), optimizer["eps"]))
    ema = engine.start_ema(EMAOptions(optimizer["ema_decay"]), weights)
    options = LossOptions(optimizer["ce_weight"], optimizer["mse_weight"], arguments.get("reweight", False))

    count = len(list((reference() / "train").glob("batch_*.json")))
    noises = tensors(f"train/{case['variant']}_noise")
    steps = []
    for step in range(arguments["steps"]):
        window, latents = [], []
        for micro in range(accumulation):
            source = micro * world + rank
            index = (step * world * accumulation + source) % count
            noise = noises[f"noise.step.{step}.micro.0.rank.{source}"]
            name = f"train/batch_{index}"
            batch, tokens = recorded_batch(tensors(name), read_json(name), config, noise)
            window.append(batch)
            latents.append(tokens)
        encode = iter(latents)
        rate = learning_rate(
            step,
            lr=optimizer["lr"],
            min_lr=0.0,
            warmup_steps=optimizer["warmup_steps"],
            total_steps=arguments["steps"],
            schedule="constant",
        )
        result = update(engine, accumulate(engine, lambda _, encode=encode: next(encode), window, options), rate)
        losses = result.read()
        steps.append({"ce": losses.ce, "mse": losses.mse, "grad_norm": float(result.grad_norm), "lr": rate})

    infos = {name: TensorInfo(torch.float32, shape) for name, shape in engine.shapes.items()}
    for kind, pieces in (("model", engine.partitions.pieces(MASTER)), ("ema", ema.pieces())):
        path = results / f"{case['name']}.{kind}.safetensors"
        export_tensors(path, infos, chain(pieces, frozen_pieces(engine.module)), engine.device)
    if rank == 0:
        (results / f"{case['name']}.json").write_text(json.dumps(steps))
    engine.close()
    shutil.rmtree(results / "nvme", ignore_errors=True)


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
