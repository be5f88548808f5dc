"""`bagel-ds stop` and `bagel-ds export`: commands for a run and its checkpoints."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from bagel_ds.errors import UserError
from bagel_ds.machine.output import log_to_stderr

_HEADER_BYTES = 2**20  # the most a safetensors header takes; --max_shard_size counts tensors


def add_commands(commands: Any) -> None:
    """Add both to the subcommands of `bagel-ds`."""
    stop = commands.add_parser("stop", help="ask a running training to save and end after its current step")
    stop.add_argument("folder", type=Path, help="its results_dir or checkpoint_dir")
    stop.set_defaults(run=_stop)

    export = commands.add_parser("export", help="write a model folder from a training checkpoint, without GPUs")
    export.add_argument("checkpoint", type=Path, help="a checkpoint folder, such as results/checkpoints/step_1000")
    export.add_argument("--out", type=Path, required=True, help="model folder to write")
    export.add_argument("--save_dtype", choices=("bf16", "fp32"), default="bf16", help="number format (default bf16)")
    export.add_argument(
        "--max_shard_size", default=None, help="split the weights into files of at most this size, such as 5GB"
    )
    export.add_argument(
        "--for",
        dest="program",
        metavar="PROGRAM",
        help="original, comfyui or vllm-omni: write the layout that this program serves from",
    )
    export.add_argument(
        "--serve",
        metavar="WHICH",
        help="with --for: ema, model or auto, the default: ema.safetensors holds the EMA, but the weights where the "
        "half-life of the EMA exceeds the run",
    )
    export.add_argument(
        "--merge", action="store_true", help="the checkpoint is an adapter (LoRA): add it to its base model's weights"
    )
    export.add_argument(
        "--model_path", type=Path, default=None, help="with --merge: the base model (default: where the adapter says)"
    )
    export.add_argument("--json", action="store_true", help="print what was written as JSON")
    export.set_defaults(run=_export)


def _stop(options: argparse.Namespace) -> None:
    from bagel_ds.train.process.stop import write_stop_file
    from bagel_ds.train.saves.lock import RunFound, find_run

    found = find_run(options.folder) if options.folder.is_dir() else RunFound(False, "not a folder")
    if found is None:
        raise UserError(
            f"no run uses {options.folder}, so there is nothing to stop; pass the results_dir or checkpoint_dir of a "
            "running one"
        )
    path = write_stop_file(options.folder)
    if found.sure:
        print(f"wrote {path}: the run ({found.what}) saves and ends after its current step")
    else:
        print(f"wrote {path}: a run that uses this folder ends after its current step ({found.what})")


def _export(options: argparse.Namespace) -> None:
    import torch

    from bagel_ds.checkpoint.export import export_checkpoint
    from bagel_ds.checkpoint.step_folders import meant_checkpoint
    from bagel_ds.lora.base import base_folder
    from bagel_ds.lora.peft_files import holds_adapter

    log_to_stderr()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.save_dtype]
    limit = None if options.max_shard_size is None else _bytes_of(options.max_shard_size)
    if options.serve is not None and options.program is None:
        raise UserError(f"--serve {options.serve} needs --for; without it, both weight files are written")
    checkpoint = meant_checkpoint(options.checkpoint)
    if options.merge and checkpoint.is_dir() and not holds_adapter(checkpoint):
        raise UserError(f"{checkpoint} does not hold an adapter, so there is nothing to merge; leave out --merge")
    base = base_folder(checkpoint, options.model_path) if options.merge else None
    if options.model_path is not None and base is None:
        raise UserError("--model_path goes with --merge; other checkpoints hold the whole model")
    serve = options.serve or "auto"
    written = export_checkpoint(options.checkpoint, options.out, dtype, limit, options.program, serve, base)
    if options.json:
        print(json.dumps({str(path.relative_to(options.out)): path.stat().st_size for path in written}))
    else:
        for path in written:
            print(f"wrote {path} ({path.stat().st_size:,} bytes)")
    larger = [path.name for path in written if limit is not None and path.stat().st_size > limit + _HEADER_BYTES]
    if larger:
        print(
            f"bagel-ds: {len(larger)} files are larger than --max_shard_size {options.max_shard_size}, "
            "because each holds one larger tensor",
            file=sys.stderr,
        )


def _bytes_of(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", size, re.IGNORECASE)
    if match is None:
        raise UserError(f"--max_shard_size {size}: expected a size such as 5GB or 500MB")
    number, unit, binary = match.groups()
    found = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if found < 1:
        raise UserError(f"--max_shard_size {size}: no tensor fits; pass a size such as 5GB, or omit the option")
    return found
