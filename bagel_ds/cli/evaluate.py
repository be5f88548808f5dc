"""`bagel-ds evaluate`: the losses of checkpoints on a held-out split, side by side.

Guarantees: the numbers are those that training logs as val/... for the same weights; all checkpoints are compared at
the same settings. One process, no DeepSpeed. The table goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bagel_ds.arguments.run_config import RunConfig, make_config, parse_arguments
from bagel_ds.cli.option_values import at_least_one
from bagel_ds.errors import UserError, all_faults
from bagel_ds.machine.output import log_to_stderr

if TYPE_CHECKING:
    from bagel_ds.inference.task_metric import TaskMetric

logger = logging.getLogger("bagel_ds")

_SETTINGS = ("num_timesteps", "max_think_token_n", "max_iterations")
_STEMS = ("ema", "model")  # of the two weight files


class Row(NamedTuple):
    """The scores of one weight file."""

    checkpoint: str
    weights: str  # "ema", "model", or the adapters of --lora
    scores: dict[str, float]


def add_command(commands: Any) -> None:
    """Add it to the subcommands of `bagel-ds`; the trainer's arguments come as `options.training`."""
    evaluate = commands.add_parser(
        "evaluate",
        help="losses of checkpoints on a held-out split, in one table",
        epilog="All arguments of the trainer are also understood (docs/arguments.md). Budgets, precision and switches "
        "that are not given are those of the run that wrote the first checkpoint.",
        allow_abbrev=False,
    )
    evaluate.set_defaults(run=run, training=[])
    add = evaluate.add_argument
    add(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="checkpoint, adapter, export or model folder",
    )
    add("--val_config", "--val-config", required=True, help="dataset YAML of the held-out split")
    add("--weights", choices=("both", *_STEMS), default="both", help="which of a folder's weight files (default both)")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER[:WEIGHT]",
        help="evaluate the model folders with this adapter, as in bagel-ds generate; may be given several times",
    )
    add("--metric", metavar="FILE.py:FUNCTION", help="also answer every row; FUNCTION(prediction, row) judges each")
    for name in _SETTINGS:
        add(f"--{name}", type=at_least_one, default=None, help="of --metric's answers, as in bagel-ds generate")
    add("--batch_size", "--batch-size", type=at_least_one, default=4, help="rows answered at a time (default 4)")
    add("--device", default=None, help="cpu, cuda or cuda:N (default: the first GPU, if there is one)")
    add("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Evaluate; the exit code. Raises `UserError` before the first evaluation where a folder is not usable."""
    from bagel_ds.checkpoint.step_folders import meant_checkpoint

    log_to_stderr()
    if not Path(options.val_config).is_file():
        raise UserError(
            f"--val_config {options.val_config}: no such file. Write a dataset YAML of the held-out rows "
            "(docs/inference.md)"
        )
    options.checkpoints = [meant_checkpoint(path) for path in options.checkpoints]  # `latest` may be a text file
    wanted = list(_STEMS) if options.weights == "both" else [options.weights]
    found = _with_adapters(options) if options.lora else _weight_files(options.checkpoints, wanted)
    config = _settings(options)
    from bagel_ds.inference.evaluate import Evaluator
    from bagel_ds.inference.loading import torch_device

    evaluator = Evaluator(config, torch_device(options.device), _bar, _metric(options))
    rows = []
    for checkpoint, kind in found:
        logger.info("%s: %s", checkpoint, kind)
        rows.append(Row(str(checkpoint), kind, evaluator.scores(checkpoint, kind, options.lora)))
    if options.json:
        print(json.dumps({"val_config": options.val_config, "results": [row._asdict() for row in rows]}, indent=1))
    else:
        print("\n".join(table(rows)))
    return 0


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of columns, one per score that any row has; "-" where a row lacks it."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    head = ["checkpoint", "weights", *(name.removeprefix("val/") for name in names)]
    cells = [head]
    for row in rows:
        scores = [f"{row.scores[name]:.4f}" if name in row.scores else "-" for name in names]
        cells.append([row.checkpoint, row.weights, *scores])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]


def _weight_files(checkpoints: Sequence[Path], wanted: Sequence[str]) -> list[tuple[Path, str]]:
    """(folder, "ema" or "model") of every wanted weight file. Raises `UserError` for a folder without any."""
    from bagel_ds.lora.peft_files import EMA_FOLDER, holds_adapter
    from bagel_ds.model_folder.folder import ModelFolder

    found, faults = [], []
    for path in checkpoints:
        if not path.is_dir():
            faults.append(f"{path}: no such folder; pass a checkpoint such as results/checkpoints/step_1000")
            continue
        if holds_adapter(path):
            held = {"model": True, "ema": holds_adapter(path / EMA_FOLDER)}
        else:
            held = {stem: bool(ModelFolder(path).weight_files(stem)) for stem in _STEMS}
        own = [(path, stem) for stem in wanted if held[stem]]
        found += own
        if not own:
            names = " and ".join(f"{stem}.safetensors" for stem in wanted)
            faults.append(f"{path} lacks {names}; pass a checkpoint or a model folder")
    all_faults(faults, "These checkpoints can't be evaluated:")
    return found


def _with_adapters(options: argparse.Namespace) -> list[tuple[Path, str]]:
    """(folder, what is added) of every model folder. Raises `UserError`."""
    from bagel_ds.inference.adapters import named_adapters
    from bagel_ds.lora.peft_files import holds_adapter

    if options.weights != "both":
        raise UserError("--weights: the adapters say which of the base model's files they belong to; leave it out")
    if adapters := [path for path in options.checkpoints if holds_adapter(path)]:
        raise UserError(f"{adapters[0]} is an adapter: pass it with --lora, too, and the base model in its place")
    shown = " + ".join(f"{adapter.name}:{adapter.weight:g}" for adapter in named_adapters(options.lora))
    return [(path, shown) for path in options.checkpoints]


def _metric(options: argparse.Namespace) -> TaskMetric | None:
    settings = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    if options.metric is None:
        if settings:
            raise UserError(f"--{next(iter(settings))} is for the answers that --metric judges; pass --metric, too")
        return None
    from bagel_ds.inference.settings import Settings
    from bagel_ds.inference.task_metric import load_metric

    Settings().changed(settings)
    return load_metric(options.metric, settings, options.batch_size)


def _settings(options: argparse.Namespace) -> RunConfig:
    """The trainer's arguments as given, then as the first checkpoint's run had them."""
    from bagel_ds.inference.evaluate import recorded_settings

    given = parse_arguments([*options.training, "--val_config", options.val_config], options.own)
    trainer = options.checkpoints[0] / "trainer.json"
    recorded: dict[str, Any] = {}
    if trainer.is_file():
        try:
            recorded = recorded_settings(json.loads(trainer.read_text())["arguments"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{trainer} can't be read ({type(error).__name__}: {error}), and it holds the settings of the run. "
                "Copy the checkpoint again, or remove the file and pass the settings."
            ) from None
    recorded = {name: value for name, value in recorded.items() if name not in given.explicit}
    return make_config(given.values() | recorded, given.explicit, given.places)


def _bar(items: Iterable[Any], count: int) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, total=count, desc="evaluating", disable=None)
