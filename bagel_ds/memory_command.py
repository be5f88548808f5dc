"""`bagel-ds memory`: the memory planner on the command line.

Guarantees: takes every argument of the trainer under its own name, so that a training command can be planned as it
stands; reads headers and configuration files only, never weights; needs neither a GPU nor DeepSpeed (where it is
installed, it checks the keys of a --ds_config that is not a preset).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from bagel_ds.config import RunConfig, parse_arguments
from bagel_ds.errors import UserError
from bagel_ds.model.config import BagelConfig, VAEConfig
from bagel_ds.zero.config import check_planned_file
from bagel_ds.zero.memory import MemoryOptions, plan_memory
from bagel_ds.zero.memory_report import not_compared, report_lines, suggestion_lines
from bagel_ds.zero.memory_suggest import resolved, suggestions


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the planner alone; the trainer's own come besides (`options.training`)."""
    parser.add_argument("--model", choices=("7b",), help="plan for BAGEL-7B-MoT without its folder")
    parser.add_argument("--world_size", "--world-size", type=_at_least_one, default=1, help="ranks (GPUs) in all")
    parser.add_argument("--ranks_per_host", "--ranks-per-host", type=_at_least_one, help="default: all on one host")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what the ranks compute on")
    parser.add_argument("--gpu_memory", "--gpu-memory", type=float, metavar="GIB", help="memory of one GPU")
    parser.add_argument("--host_memory", "--host-memory", type=float, metavar="GIB", help="RAM of one host")
    parser.add_argument("--nvme", type=float, metavar="GIB", help="free space of one host's NVMe; 0: there is none")
    parser.add_argument(
        "--max_image_size", "--max-image-size", type=_at_least_one, default=1024, metavar="PIXELS",
        help="longest side of an image that is drawn or edited (default 1024)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--table", action="store_true", help="print the table of docs/low_memory.md and nothing else")


def run(options: argparse.Namespace) -> None:
    """Print the plan; `options.training` holds the words that are the trainer's."""
    if options.table:
        from bagel_ds.zero.memory_table import table

        print(table())
        return
    config = parse_arguments(options.training, options.own)
    if options.model is None and "model_path" not in config.explicit:
        raise UserError("bagel-ds memory: pass --model_path with the model's folder, or --model 7b")
    ranks_per_host = options.ranks_per_host or options.world_size
    if options.world_size % ranks_per_host:
        raise UserError(f"--world_size {options.world_size} is not a multiple of --ranks_per_host {ranks_per_host}")
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(ranks_per_host))  # as the launcher sets it: hpZ groups follow it
    model, vae = (_released(config), VAEConfig()) if options.model else _from_folder(config)
    memory = MemoryOptions.of(
        config,
        options.world_size,
        ranks_per_host=ranks_per_host,
        device=options.device,
        image_pixels=options.max_image_size**2,
        vae=vae,
        gpu_memory=options.gpu_memory,
        host_memory=options.host_memory,
        nvme=options.nvme,
    )
    if remark := check_planned_file(config.training.ds_config):
        print(f"bagel-ds: {remark}", file=sys.stderr)
    ds_config = resolved(config.training.ds_config, config, model, options.world_size, options.ranks_per_host)
    plan = plan_memory(model, ds_config, memory)
    better = [] if plan.fits else suggestions(model, config, memory)
    if options.json:
        unknown = {place: round(size, 2) for place, size in not_compared(plan).items()}
        found = plan.to_json() | {"not_compared_gib": unknown, "suggestions": [each.to_json() for each in better]}
        print(json.dumps(found, indent=1))
        return
    for line in report_lines(plan) + ([] if plan.fits else suggestion_lines(better)):
        print(line)


def _released(config: RunConfig) -> BagelConfig:
    """BAGEL-7B-MoT under the run's switches."""
    training = config.training
    return dataclasses.replace(
        BagelConfig(),
        max_latent_size=config.model.max_latent_size or BagelConfig().max_latent_size,
        visual_gen=training.visual_gen,
        visual_und=training.visual_und,
        freeze_und=training.freeze_und,
    )


def _from_folder(config: RunConfig) -> tuple[BagelConfig, VAEConfig]:
    """The network and autoencoder that the trainer would build from --model_path."""
    from bagel_ds.checkpoint.folder import VAE, ModelFolder, vae_config
    from bagel_ds.checkpoint.tensors import TensorFiles
    from bagel_ds.train.inputs import bagel_config

    folder = ModelFolder(Path(config.model.model_path))
    autoencoder = folder.path / VAE
    vae = vae_config(TensorFiles([autoencoder]), autoencoder) if autoencoder.exists() else VAEConfig()
    weights = folder.path if folder.holds_weights else None
    return bagel_config(config, folder, weights, vae), vae


def _at_least_one(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {word}")
    return value
