"""The `bagel-ds` command.

Guarantees: a user's mistake is one message on stderr and exit code 2; `--help` needs neither torch nor DeepSpeed, as
each command imports what it needs only when it runs.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import bagel_ds
from bagel_ds.cli import convert, data, doctor, evaluate, generate, hub, run, web
from bagel_ds.cli import memory as memory_command
from bagel_ds.cli.option_values import not_negative
from bagel_ds.errors import UserError, nearest
from bagel_ds.machine.output import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = make_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and words[0] not in (known := _commands(parser)):
        parser.error(f"{words[0]!r} is not a command; {nearest(words[0], known)}")
    options, training = parser.parse_known_args(words)
    options.own = _option_names(options.command)
    if training and not hasattr(options, "training"):
        options.command.error(_unknown(training, options.own))
    options.training = training
    try:
        return options.run(options) or 0
    except UserError as fault:
        print(f"bagel-ds: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    """All commands; each sets `run`, a function of the parsed options; what it returns is the exit code, None is 0."""
    parser = argparse.ArgumentParser(prog="bagel-ds", description="Fine-tune BAGEL-7B-MoT with DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"bagel-ds {bagel_ds.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="write a tiny BAGEL and small data sets to try every command on")
    demo.add_argument("--out", type=Path, required=True, help="folder to write: model/, data/ and two dataset configs")
    demo.add_argument("--seed", type=not_negative, default=0, help="same seed, same files (default 0)")
    demo.set_defaults(run=_demo)

    arguments = commands.add_parser("arguments", help="print the page of all training arguments (docs/arguments.md)")
    arguments.set_defaults(run=_arguments)

    memory = commands.add_parser(
        "memory",
        help="predict GPU, host and NVMe memory of a training command, and what would make it fit",
        epilog="Add the training command's own arguments, or paste the whole line: bagel-ds memory --gpu_memory 24 "
        "--host_memory 128 deepspeed --num_gpus 2 launch/train.py --ds_config zero3_cpu.json ...",
        allow_abbrev=False,
    )
    memory.set_defaults(run=_memory, training=[])
    memory_command.add_options(memory)

    doctor.add_command(commands)
    hub.add_commands(commands)
    convert.add_command(commands)
    data.add_commands(commands)
    run.add_commands(commands)
    generate.add_command(commands)
    web.add_command(commands)
    evaluate.add_command(commands)
    for command in commands.choices.values():
        command.set_defaults(command=command)
    return parser


def _commands(parser: argparse.ArgumentParser) -> list[str]:
    """The names of all commands."""
    return [name for action in parser._actions for name in action.choices or () if action.nargs == argparse.PARSER]


def _option_names(command: argparse.ArgumentParser) -> list[str]:
    """The command's own options, without dashes."""
    names = [name for action in command._actions for name in action.option_strings if name.startswith("--")]
    return list(dict.fromkeys(name.removeprefix("--").replace("-", "_") for name in names))


def _unknown(words: Sequence[str], own: Sequence[str]) -> str:
    """What is wrong with words that no option of the command takes."""
    meant = difflib.get_close_matches(words[0].lstrip("-").partition("=")[0].replace("-", "_"), own, n=1)
    return f"unrecognized arguments: {' '.join(words)}" + (f"; did you mean --{meant[0]}?" if meant else "")


def _demo(options: argparse.Namespace) -> None:
    from bagel_ds.demo import write_demo

    write_demo(options.out, options.seed)


def _arguments(options: argparse.Namespace) -> None:
    from bagel_ds.arguments.page import arguments_page

    print(arguments_page(), end="")


def _memory(options: argparse.Namespace) -> int:
    return memory_command.run(options)


if __name__ == "__main__":
    sys.exit(main())
