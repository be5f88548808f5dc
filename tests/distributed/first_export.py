"""Exports what a run holds before and after its first step; started by test_weights.py.

Arguments: a JSON file with a list of cases {name, arguments}. Each case's checkpoint_dir gets a step_0, saved right
after the engine was made, and a step_1.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist

from bagel_ds.arguments.run_config import parse_arguments
from bagel_ds.ranges import MASTER, TensorInfo
from bagel_ds.train.metrics.console import setup_logging
from bagel_ds.train.process.quiet import quiet_warnings
from bagel_ds.train.process.stall import start_watch
from bagel_ds.train.ranks.launcher import read_launch
from bagel_ds.train.ranks.process_group import join_ranks
from bagel_ds.train.trainer import Trainer
from bagel_ds.zero.weights import frozen_pieces
from tests.checkpoint.written import export_tensors


def export(trainer: Trainer, folder: Path) -> None:
    """Weights and average as a checkpoint has them; no whole checkpoint, since Adam has no moments to save yet."""
    engine = trainer.engine
    infos = {name: TensorInfo(torch.float32, shape) for name, shape in engine.shapes.items()}
    for stem, pieces in (("model", engine.partitions.pieces(MASTER)), ("ema", trainer.ema.pieces())):
        path = folder / f"{stem}.safetensors"
        export_tensors(path, infos, chain(pieces, frozen_pieces(engine.module)), engine.device)


def main(cases_file: str) -> None:
    quiet_warnings()
    join_ranks(read_launch(os.environ), stall_timeout=0)
    for case in json.loads(Path(cases_file).read_text()):
        config = parse_arguments(case["arguments"])
        setup_logging(config.training.results_dir, dist.get_rank())
        with closing(start_watch(config)) as watch:
            trainer = Trainer(config, watch)
            folder = Path(config.training.checkpoint_dir, "step_0")
            folder.mkdir(parents=True, exist_ok=True)
            export(trainer, folder)
            trainer.run()


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
