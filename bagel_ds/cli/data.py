"""`bagel-ds index`, `check` and `inspect`: work on data without training.

Guarantees: the commands take every argument of the trainer under its own name, so a training command's data can be
checked unchanged. They write only the index cache and `--out`, and need neither a GPU nor DeepSpeed. Results go to
stdout, progress and notes to stderr.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from bagel_ds.arguments.run_config import RunConfig, parse_arguments
from bagel_ds.cli.option_values import at_least_one, not_negative
from bagel_ds.errors import UserError
from bagel_ds.machine.output import log_to_stderr
from bagel_ds.machine.user_folders import settle_user_folders

_EPILOG = (
    "All arguments of the trainer work here too (docs/arguments.md): --dataset_config_file and --model_path name the "
    "data and the tokenizer; token budgets, dropout and modality switches apply as in training."
)


def add_commands(commands: Any) -> None:
    """Add the three commands to the subparsers of `bagel-ds`; `options.training` gets the trainer's arguments."""
    index = _command(commands, "index", _index, "index data before training, in parallel and split over hosts")
    _add_workers(index)
    index.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="index only share I of N of the files (I from 1)"
    )

    check = _command(commands, "check", _check, "read every row once, count rows, list unusable ones, repair the index")
    _add_workers(check)
    check.add_argument("--json", action="store_true", help="print one JSON object")

    inspect = _command(commands, "inspect", _inspect, "show the first packs as training will see them, and their plan")
    inspect.add_argument("--packs", type=not_negative, default=4, help="packs to show (default 4)")
    inspect.add_argument(
        "--pack", type=Path, help="show a pack that a run kept, as in results_dir/nonfinite, instead of planned ones"
    )
    inspect.add_argument("--out", type=Path, help="folder for packs.txt and a picture of each pack")
    inspect.add_argument("--world_size", "--world-size", type=at_least_one, default=1, help="ranks (default 1)")
    inspect.add_argument(
        "--steps",
        type=not_negative,
        default=100,
        help="micro-steps to plan for the numbers (default 100)",
    )
    inspect.add_argument("--json", action="store_true", help="print the plan's numbers as one JSON object")


def _command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, epilog=_EPILOG, allow_abbrev=False)
    parser.set_defaults(run=run, training=[])
    return parser


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=at_least_one, help="processes (default: the CPUs this one may use)")


# ------------------------------------------------------------------------------------------------------ the commands
def _index(options: argparse.Namespace) -> None:
    config = _start(options)
    from bagel_ds.data.index.index import index_files
    from bagel_ds.data.streams.opening import files_to_index
    from bagel_ds.inputs.data import open_inputs

    inputs = open_inputs(config)
    number, shares = options.shard
    every = sorted(files_to_index(inputs.datasets), key=lambda file: (file.path, file.key))
    files = every[number - 1 :: shares]
    for path in {file.path.rpartition("/")[0]: file.path for file in files}.values():
        _check_cache(path, config.data.index_cache)
    lock = f"-{number}-of-{shares}" if shares > 1 else ""  # shares have different files, so they needn't wait
    indexes = index_files(files, inputs.tokenizer, config.data.index_cache, True, options.workers, lock)
    lost = [index.path for index in indexes if not index.is_kept and not index.layout.error]
    if lost:
        raise UserError(
            f"the index of {len(lost)} of {len(files)} files could not be stored (first: {lost[0]}). See the warnings "
            "above, then run the same command again; it continues with these files"
        )
    rows, bad = sum(index.rows for index in indexes), sum(len(index.bad) for index in indexes)
    share = f" (share {number} of {shares}, {len(every)} files in all)" if shares > 1 else ""
    print(f"{len(files)} files are indexed{share}: {rows:,} rows, {bad:,} unusable")


def _check_cache(path: str, index_cache: str | None) -> None:
    """Raise `UserError` if the index of a data file can't be stored."""
    from bagel_ds.data.index.cache import cache_folder

    folder = cache_folder(path, index_cache)
    if folder is None and index_cache is None:
        raise UserError(
            f"the index of {path} can't be stored next to it or in ~/.cache; pass --index_cache with a folder"
        )
    _check_writable(Path(index_cache or "") if folder is None else folder, "--index_cache")


def _check(options: argparse.Namespace) -> None:
    config = _start(options)
    from bagel_ds.data.inspect.check import check_streams
    from bagel_ds.data.inspect.check_report import as_json, as_text, unusable
    from bagel_ds.data.streams.opening import index_streams
    from bagel_ds.inputs.data import open_inputs

    inputs = open_inputs(config)
    began = time.monotonic()
    cache = config.data.index_cache
    streams = index_streams(
        inputs.datasets, inputs.tokenizer, inputs.sample_options, cache, progress=True, workers=options.workers
    )
    results = check_streams(streams, inputs.tokenizer, options.workers, progress=True)
    seconds = time.monotonic() - began
    if options.json:
        datasets = [as_json(result) for result in results]
        print(json.dumps({"datasets": datasets, "trainable": not unusable(results), "seconds": seconds}, indent=1))
    else:
        print("\n".join(as_text(results)))
    if faults := unusable(results):
        raise UserError("training would refuse this data: " + "; ".join(faults))


def _inspect(options: argparse.Namespace) -> None:
    _check_shown(options)
    config = _start(options)
    from bagel_ds.data.inspect.packs import first_packs, kept_pack, pack_text
    from bagel_ds.data.inspect.plan_numbers import plan_numbers, plan_text
    from bagel_ds.inputs.data import open_inputs

    inputs = open_inputs(config)
    shift = inputs.model.timestep_shift
    if options.pack:
        pack = kept_pack(_load(options.pack), inputs.tokenizer, config.data.max_num_tokens)
        text = pack_text(pack, shift)
        print("\n".join(text))
        if options.out:
            _draw(pack, shift, options.out)
            _write_text(text, options.out)
        return
    data = inputs.plan(progress=True)
    text = []
    if options.packs and (options.out or not options.json):
        for pack in first_packs(data, options.packs):
            lines = pack_text(pack, shift)
            text += [*lines, ""]
            if not options.json:
                print("\n".join(lines), end="\n\n")
            if options.out:
                _draw(pack, shift, options.out)
    if options.out and text:
        _write_text(text, options.out)
    if not options.steps:
        return
    numbers = plan_numbers(data, options.world_size, options.steps)
    print(json.dumps(numbers._asdict(), indent=1) if options.json else "\n".join(plan_text(numbers)))


def _check_shown(options: argparse.Namespace) -> None:
    """Raise `UserError` before any work if nothing would be shown or `--out` can't be written."""
    if options.pack is None and options.packs == 0:
        if options.out:
            raise UserError(f"--out {options.out} is for packs, but --packs 0 shows none; leave out one of the two")
        if options.steps == 0:
            raise UserError("--packs 0 and --steps 0 leave nothing to show; leave out one of the two")
    if options.json and (options.pack or options.steps == 0):
        given = "--pack" if options.pack else "--steps 0"
        raise UserError(f"--json prints the plan's numbers, but {given} leaves none; leave out one of the two")
    if options.out:
        _check_writable(options.out, "--out")


def _check_writable(folder: Path, option: str) -> None:
    """Create `folder` if it does not exist; raise `UserError` unless a file can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{option} {folder} can't be written: {error.strerror or error}; pass a folder that you can write to"
        ) from None


def _write_text(text: list[str], folder: Path) -> None:
    try:
        (folder / "packs.txt").write_text("\n".join(text), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {folder} can't be written: {error.strerror or error}") from None
    logging.getLogger("bagel_ds").info("wrote %s: packs.txt and a picture of each pack", folder)


def _load(path: Path) -> Any:
    from bagel_ds.data.batches.batch_file import load_batch

    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    missing = [end for end in (".json", ".safetensors") if not stem.with_suffix(end).is_file()]
    if missing:
        raise UserError(
            f"--pack {path}: {stem.with_suffix(missing[0])} does not exist. Pass a pack that a run kept, such as "
            "results/nonfinite/step_7_rank_0_pack_0"
        )
    return load_batch(stem)


def _draw(pack: Any, shift: float, folder: Path) -> None:
    from bagel_ds.data.inspect.sheet import contact_sheets

    sheets = contact_sheets(pack, shift)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for page, sheet in enumerate(sheets, 1):
            sheet.save(folder / (f"pack_{pack.number}.png" if len(sheets) == 1 else f"pack_{pack.number}_{page}.png"))
    except OSError as error:
        raise UserError(f"--out {folder} can't be written: {error.strerror or error}") from None


# ------------------------------------------------------------------------------------------------------- the options
def _start(options: argparse.Namespace) -> RunConfig:
    """Parse the trainer's arguments and log the notes on data to stderr."""
    log_to_stderr()
    config = parse_arguments(options.training, options.own)
    for note in [*settle_user_folders(), *config.data_notes]:
        logging.getLogger("bagel_ds").info(note)
    return config


def _shard(word: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", word)
    number, shares = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= shares:
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, such as 1/4, found {word!r}")
    return number, shares
