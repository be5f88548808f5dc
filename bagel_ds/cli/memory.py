"""`bagel-ds memory`: the memory planner on the command line.

Guarantees: takes every argument of the trainer under its own name, or a whole training command from a script. Reads
only headers and configuration files, never weights. Needs neither a GPU nor DeepSpeed (if DeepSpeed is installed, it
checks the keys of a --ds_config that is not a preset).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from bagel_ds.arguments.run_config import RunConfig, parse_arguments
from bagel_ds.cli.launch_line import LaunchLine, Ranks, launched_ranks, read_launch_line
from bagel_ds.cli.option_values import at_least_one, gibibytes, gibibytes_or_none
from bagel_ds.errors import UserError
from bagel_ds.inputs.files import is_hub_id
from bagel_ds.lora.targets import with_adapters
from bagel_ds.memory.between_steps import SampleShape
from bagel_ds.memory.planner import MemoryOptions, MemoryPlan, plan_memory
from bagel_ds.memory.report import not_compared, report_lines, size_options, suggestion_lines
from bagel_ds.memory.suggestions import resolved, suggestions
from bagel_ds.model.shape.config import BagelConfig, VAEConfig
from bagel_ds.units import GIB, MIB
from bagel_ds.zero.config.check import check_file_if_possible

RELEASED = "BAGEL-7B-MoT"
_RELEASED_NAMES = ("7b", RELEASED.lower(), f"bytedance-seed/{RELEASED.lower()}")
TOO_SMALL = 1  # the exit code of --check


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the planner's own options; `options.training` gets those of the trainer."""
    parser.add_argument("--model", help=f"7b, {RELEASED} or another hub id: plan without the model's folder")
    parser.add_argument("--world_size", "--world-size", type=at_least_one, help="ranks (GPUs) in all (default 1)")
    parser.add_argument("--ranks_per_host", "--ranks-per-host", type=at_least_one, help="default: all on one host")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what the ranks compute on")
    parser.add_argument("--gpu_memory", "--gpu-memory", type=gibibytes, metavar="GIB", help="memory of one GPU")
    parser.add_argument("--host_memory", "--host-memory", type=gibibytes, metavar="GIB", help="RAM of one host")
    parser.add_argument(
        "--nvme", type=gibibytes_or_none, metavar="GIB", help="free space of one host's NVMe; 0: there is none"
    )
    parser.add_argument(
        "--max_image_size", "--max-image-size", type=at_least_one, default=1024, metavar="PIXELS",
        help="longest side of an image that is drawn or edited (default 1024)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--check",
        action="store_true",
        help="for scripts: exit code 0 only if it fits, 1 if not, 2 if a size is missing",
    )
    parser.add_argument("--inference", action="store_true", help="what bagel-ds generate takes with --gpu_memory")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FOLDER", help="with --inference: an adapter beside the model, "
        "as in bagel-ds generate; may be given several times",
    )  # fmt: skip
    parser.add_argument("--table", action="store_true", help="print the table of docs/low_memory.md and nothing else")


def run(options: argparse.Namespace) -> int:
    """Print the plan and return the exit code; `options.training` holds the trainer's words."""
    if options.table:
        from bagel_ds.memory.table import table

        print(table())
        return 0
    line = read_launch_line(options.training)
    config = parse_arguments(line.training, options.own)
    ranks = _ranks(options, line)
    model, vae = _network(options.model, config)
    if options.inference:
        print(_inference(model, vae, options.gpu_memory, options.lora))
        return 0
    if options.lora:
        raise UserError("--lora is for --inference; to plan the training of an adapter, pass --lora_rank")
    memory = MemoryOptions.of(
        config,
        ranks.all,
        ranks_per_host=ranks.per_host,
        device=options.device,
        image_pixels=options.max_image_size**2,
        vae=vae,
        samples=_samples(config, model, vae, ranks.all),
        gpu_memory=options.gpu_memory,
        host_memory=options.host_memory,
        nvme=options.nvme,
    )
    if remark := check_file_if_possible(config.training.ds_config):
        print(f"bagel-ds: {remark}", file=sys.stderr)
    settings = resolved(config.training.ds_config, config, model, ranks.all, ranks.per_host)
    plan = plan_memory(model, settings, memory)
    better = [] if plan.fits else suggestions(model, config, memory)
    if options.json:
        unknown = {place: round(size, 2) for place, size in not_compared(plan).items()}
        found = plan.to_json() | {"not_compared_gib": unknown, "suggestions": [each.to_json() for each in better]}
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(report_lines(plan) + ([] if plan.fits else suggestion_lines(better))))
    return _checked(plan) if options.check else 0


def _inference(model: BagelConfig, vae: VAEConfig, gpu_memory: float | None, lora: list[str]) -> str:
    """Where inference in bf16 keeps the weights on a GPU of `gpu_memory` GiB, and what streaming them costs.

    The adapters of `lora` (as of `open_inferencer`) stay on the GPU. Raises `UserError`.
    """
    import torch

    from bagel_ds.inference.adapters import Adapters
    from bagel_ds.inference.placement import WORK_BYTES, place_weights
    from bagel_ds.memory.table import PCIE
    from bagel_ds.model.vae import AutoEncoder

    with torch.device("meta"):
        vae_bytes = sum(parameter.nbytes for parameter in AutoEncoder(vae).parameters())
    adapters = Adapters(lora).nbytes(torch.bfloat16)
    placement = place_weights(model, 2, None if gpu_memory is None else int(gpu_memory * GIB), vae_bytes + adapters)
    total = (placement.gpu_bytes + WORK_BYTES) / GIB
    found = f"inference in bf16: {total:.1f} GiB on the GPU ({WORK_BYTES / GIB:.0f} GiB of it to work in"
    found += f", {adapters / MIB:,.1f} MiB for adapters)" if adapters else ")"
    if not placement.streamed:
        return f"{found}, no layer is streamed"
    calls = 49  # of the network for an image with num_timesteps 50; guidance branches share a call
    gib, layers = placement.bytes_per_pass / GIB, model.llm.num_hidden_layers
    return (
        f"{found}; {len(placement.streamed)} of {layers} layers are streamed from {gib:.1f} GiB of host memory. "
        f"An image of {calls} steps moves {calls * gib:,.0f} GiB over PCIe: {calls * gib / PCIE:,.0f} s at {PCIE} "
        "GiB/s, minus what overlaps with computation"
    )


def _samples(config: RunConfig, model: BagelConfig, vae: VAEConfig, world_size: int) -> SampleShape | None:
    """What the run's own prompts take. Raises `UserError` for those that it would refuse."""
    if config.training.sample_prompts is None:
        return None
    from bagel_ds.inference.prompts import open_prompts
    from bagel_ds.inputs.data import layout_options

    layout = layout_options(config, model, vae)
    prompts = open_prompts(Path(config.training.sample_prompts), model, layout, config.data.max_num_tokens)
    return prompts.memory(world_size, average=config.training.sample_weights != "model")


def _checked(plan: MemoryPlan) -> int:
    if plan.fits and (missing := size_options(plan)):
        raise UserError(f"--check: nothing to compare with; pass {', '.join(missing)}")
    return 0 if plan.fits else TOO_SMALL


def _ranks(options: argparse.Namespace, line: LaunchLine) -> Ranks:
    """The number of ranks from the options, else from the launcher's line."""
    launched = launched_ranks(line.launcher) if line.launcher and options.world_size is None else None
    if line.launcher and options.world_size is None and launched is None:
        raise UserError(
            f"{' '.join(line.launcher)}: the launcher's words don't say how many GPUs it uses; pass --world_size"
        )
    world_size = options.world_size or (launched.all if launched else 1)
    per_host = options.ranks_per_host or (launched.per_host if launched else world_size)
    if world_size % per_host:
        raise UserError(f"--world_size {world_size} is not a multiple of --ranks_per_host {per_host}")
    return Ranks(world_size, per_host)


def _network(model: str | None, config: RunConfig) -> tuple[BagelConfig, VAEConfig]:
    """The network to plan for: --model, or the one at --model_path."""
    if model is None and "model_path" not in config.explicit:
        raise UserError("pass --model_path with the model's folder or hub id, or --model 7b")
    name = model or config.model.model_path
    if model is None and Path(name).is_dir():
        return _from_folder(config, Path(name))
    if name.lower() in _RELEASED_NAMES:
        return _released(config), VAEConfig()
    if is_hub_id(name):
        from bagel_ds.inputs.network import hub_folder

        return _from_folder(config, hub_folder(name, "--model" if model else "--model_path", ("*config.json",)))
    if model is not None:
        raise UserError(f"--model {model}: expected 7b or the id of a model on the hub; for a folder pass --model_path")
    if Path(name).name.lower() == RELEASED.lower():
        print(f"{name} does not exist: planning for the released {RELEASED}, which has that name", file=sys.stderr)
        return _released(config), VAEConfig()
    return _from_folder(config, Path(name))  # raises that it does not exist


def _released(config: RunConfig) -> BagelConfig:
    """BAGEL-7B-MoT with the run's switches."""
    training = config.training
    network = dataclasses.replace(
        BagelConfig(),
        max_latent_size=config.model.max_latent_size or BagelConfig().max_latent_size,
        visual_gen=training.visual_gen,
        visual_und=training.visual_und,
        freeze_und=training.freeze_und,
    )
    return with_adapters(training, network)


def _from_folder(config: RunConfig, path: Path) -> tuple[BagelConfig, VAEConfig]:
    """The network and autoencoder that the trainer would build from a model folder."""
    from bagel_ds.inputs.network import bagel_config
    from bagel_ds.model_folder.autoencoder import vae_config
    from bagel_ds.model_folder.folder import VAE, ModelFolder
    from bagel_ds.model_folder.tensor_files import TensorFiles

    folder = ModelFolder(path)
    autoencoder = folder.path / VAE
    vae = vae_config(TensorFiles([autoencoder]), autoencoder) if autoencoder.exists() else VAEConfig()
    weights = folder.path if folder.holds_weights else None
    return bagel_config(config, folder, weights, vae), vae
