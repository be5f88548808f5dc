"""`bagel-ds convert`: pictures with captions, edited pairs and conversations -> data to train on.

Guarantees: each kind takes only options that have a meaning for it. What was made goes to stdout, progress and bad rows
to stderr.
"""

from __future__ import annotations

import argparse
import os
import shlex
from typing import Any

from bagel_ds.cli.option_values import at_least_one
from bagel_ds.machine.output import log_to_stderr

_KINDS = {
    "captions": "pictures with captions: a folder with a .txt beside each picture, or a table -> text to image",
    "edit": "a table of pictures before and after, with an instruction -> editing",
    "chat": "a table of conversations (LLaVA's, or messages with roles) -> conversations about pictures",
}
_TABLES = "JSONL, JSON, CSV, TSV or parquet file, or a folder of parquet files or saved by Hugging Face datasets"


def add_command(commands: Any) -> None:
    """Add it, with one command per kind, to the subcommands of `bagel-ds`."""
    about = "make training data from pictures with captions, edited pairs or conversations"
    convert = commands.add_parser("convert", help=about, allow_abbrev=False)
    kinds = convert.add_subparsers(title="kinds", required=True, metavar="KIND")
    for kind, about in _KINDS.items():
        parser = kinds.add_parser(kind, help=about, description=about, allow_abbrev=False)
        parser.set_defaults(run=_run, kind=kind, command=parser)
        _add_options(parser, kind)


def _add_options(parser: argparse.ArgumentParser, kind: str) -> None:
    def column(option: str, holds: str) -> None:
        parser.add_argument(f"--{option}", f"--{option.replace('_', '-')}", help=f"column with {holds}")

    folder = "folder of pictures with captions beside them, or a " if kind == "captions" else ""
    parser.add_argument("source", metavar="INPUT", help=folder + _TABLES)
    parser.add_argument("--out", required=True, help="folder for the data, NAME.yaml and dataset_info.yaml")
    parser.add_argument("--name", help="name of the data set (default: that of the input)")
    if kind == "edit":
        column("source_column", "the pictures before (default: source, input_image, ... as there is)")
        column("target_column", "the pictures after (default: target, edited_image, ...)")
        column("text_column", "the instructions (default: instruction, edit_prompt, ...)")
    else:
        texts = "the captions (default: text, caption, ...)" if kind == "captions" else "the conversations or messages"
        column("image_column", "the pictures (default: image, file_name, path, ... as there is)")
        column("text_column", texts)
    if kind == "captions":
        parser.add_argument("--text_extension", "--text-extension", help="ending of captions' files (default .txt)")
    parser.add_argument(
        *("--image_folder", "--image-folder"),
        help="where relative paths of pictures begin (default: beside the table)",
    )
    parser.add_argument("--split", help="which split of a saved data set or of parquet files, such as train")
    if kind != "chat":
        parser.add_argument(
            *("--rows_per_file", "--rows-per-file"),
            type=at_least_one,
            default=10_000,
            help="rows of a parquet file, at most (default 10000)",
        )
    parser.add_argument("--workers", type=at_least_one, help="threads (default: the CPUs this process may use)")


def _run(options: argparse.Namespace) -> None:
    log_to_stderr()
    from bagel_ds.convert.conversion import Options, convert

    given = {key: value for key, value in vars(options).items() if key in Options.__dataclass_fields__}
    given["workers"] = options.workers or len(os.sched_getaffinity(0))
    result = convert(Options(**given))
    before = " (done by an earlier run; nothing was changed)" if result.was_done else ""
    print(f"{result.usable:,} rows are converted{before}")
    if result.bad:
        print(f"{result.bad:,} rows can't be used: {result.bad_rows}")
    print(f"check them: bagel-ds check --model_path MODEL --dataset_config_file {shlex.quote(str(result.config))}")
