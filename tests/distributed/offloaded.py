"""Trains random tables under several presets and writes what each left; started by test_offload_equality.py.

Arguments: a JSON file with a list of cases (fields of `Case`, as written by the test) and a folder for the results:
<name>.json with the gradient norms and, for each rank, <name>.rank<r>.safetensors with its masters, moments, average
and weights. Before that the network computes with the average for once. Every element of every table has a gradient
that is different in each step and on each rank.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from bagel_ds import ranges
from bagel_ds.arguments.run_config import make_config
from bagel_ds.machine.device import uses_cuda
from bagel_ds.ranges import MASTER
from bagel_ds.zero import ema
from bagel_ds.zero.config.nvme import fit_buffers
from bagel_ds.zero.config.resolve import resolve_ds_config
from bagel_ds.zero.ema import EMAOptions, ShardedEMA
from bagel_ds.zero.engine import AdamOptions, ZeroEngine
from bagel_ds.zero.partitions import MOMENTS
from bagel_ds.zero.split import update as split_update
from bagel_ds.zero.weights import held_weight
from bench.random_tables import RandomSource, Tables
from tests.distributed.adam import held_weights
from tests.distributed.engines import many_engines

LEARNING_RATE = 1e-3


def configuration(case: dict[str, Any], results: Path) -> dict[str, Any]:
    """The case's preset with its changes to the ZeRO section, for this number of ranks."""
    run = make_config(
        {
            "precision": case["precision"],
            "gradient_accumulation_steps": case["accumulation"],
            "max_grad_norm": 1.0,
            "nvme_path": str(results / "nvme"),
        }
    )
    ds_config, _ = resolve_ds_config(case["preset"], run, dist.get_world_size())
    ds_config["zero_optimization"].update(case["zero"])
    fit_buffers(ds_config, max(case["sizes"]), dist.get_world_size())
    return ds_config


def train(case: dict[str, Any], results: Path) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes, ds_config = case["sizes"], configuration(case, results)
    source = RandomSource(sizes)
    engine = ZeroEngine(lambda: Tables(sizes), lambda name: True, ds_config)
    engine.start(source, AdamOptions())
    average = engine.start_ema(EMAOptions(0.9), source)
    norms = []
    for step in range(case["steps"]):
        for micro in range(case["accumulation"]):
            if micro:
                engine.next_micro_batch()
            loss = engine.forward(1000 * step + 100 * micro + 10 * rank)
            engine.backward(loss / case["accumulation"])
        norms.append(float(engine.update(LEARNING_RATE)[1]))
    check_average_in_place(engine, average)
    held: dict[str, Tensor] = {}
    for key in (MASTER, *MOMENTS):
        for piece in engine.partitions.pieces(key):
            held.update({f"{key}.{place.name}.{place.start}": values[:].clone() for place, values in piece.ranges})
    for piece in average.pieces():
        held.update({f"ema.{place.name}.{place.start}": values.clone() for place, values in piece.ranges})
    for name, parameter in engine.module.named_parameters():
        with held_weight(name, parameter) as (place, values):
            held[f"weight.{name}.{place.start}"] = values[: place.numel].float().clone()
    save_file(held, results / f"{case['name']}.rank{rank}.safetensors")
    if rank == 0:
        folder = results / "nvme"
        swapped = sum(path.stat().st_size for path in folder.rglob("*_gradient_*.swp")) if folder.exists() else 0
        described = {"norms": norms, "gradient_bytes": swapped, "groups": len(engine.partitions.groups), "world": world}
        (results / f"{case['name']}.json").write_text(json.dumps(described))
    dist.barrier()
    engine.close()
    shutil.rmtree(results / "nvme", ignore_errors=True)
    dist.barrier()


def check_average_in_place(engine: ZeroEngine, average: ShardedEMA) -> None:
    """The network computes with the average, and with the very weights of before afterwards."""
    before, seed = held_weights(engine), 77
    with engine.forward_only():
        value = engine.forward(seed).item()
    with engine.average_in_place(average), engine.forward_only():
        inside, found = held_weights(engine), engine.forward(seed).item()
    # What the network computes with, from the shards of the average on all ranks.
    expected = torch.zeros(1, dtype=torch.float64, device=engine.device)
    dtype = next(engine.module.parameters()).dtype
    for piece in average.pieces():
        for place, values in piece.ranges:
            number = int(place.name.split(".")[1])
            positions = torch.arange(place.start, place.start + place.numel, dtype=torch.float32)
            target = torch.sin(positions * 0.37 + seed + 7 * number).to(dtype)
            expected += (values.cpu().to(dtype) - target).double().square().sum().to(engine.device)
            held = inside[place.name][0 if engine.stage == 3 else place.start :]  # this rank's share, or everything
            assert torch.equal(held[: place.numel], values.cpu().to(dtype)), place
    dist.all_reduce(expected)
    assert abs(found / expected.item() - 1) < (1e-5 if dtype == torch.float32 else 1e-2), (found, expected)
    assert found != value
    after = held_weights(engine)
    assert all(torch.equal(after[name], before[name]) for name in before), "not the weights of before"
    with engine.forward_only():
        assert engine.forward(seed).item() == value, "what was gathered is not of the weights of before"


def main(cases_file: str, results: str) -> None:
    if uses_cuda():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    with many_engines():
        for case in json.loads(Path(cases_file).read_text()):
            piece = case["piece"]
            with (
                mock.patch.object(ranges, "COPIED_ELEMENTS", piece or ranges.COPIED_ELEMENTS),
                mock.patch.object(ema, "_CHUNK", piece or ema._CHUNK),
                mock.patch.object(split_update, "_CHUNK", piece or split_update._CHUNK),
            ):
                train(case, Path(results))


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
