"""`bagel-ds doctor`: what this host, or every host of a hostfile, has and lacks for a run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from bagel_ds.arguments.run_config import RunConfig, parse_arguments
from bagel_ds.cli.launch_line import Ranks, hostfile_of, launched_ranks, read_launch_line
from bagel_ds.cli.option_values import at_least_one
from bagel_ds.errors import UserError
from bagel_ds.machine.output import log_to_stderr

NOT_READY = 1  # the exit code if something would end a run
_USUAL_CHECKPOINT_DIR = Path("results/checkpoints")


class _Run(NamedTuple):
    """What the training command says, if one was given."""

    words: list[str]  # the trainer's
    config: RunConfig | None
    ranks: Ranks | None
    hostfile: Path | None


def add_command(commands: Any) -> None:
    """Add it to the subcommands of `bagel-ds`."""
    doctor = commands.add_parser(
        "doctor",
        help="check this machine, or every host of a hostfile, for what a run needs",
        epilog="Add a training command, or paste its whole line, to check for that run: bagel-ds doctor deepspeed "
        "--hostfile hostfile launch/train.py --ds_config zero3_cpu.json ... The exit code is 1 "
        "if a line begins with fail.",
        allow_abbrev=False,
    )
    doctor.add_argument("--hostfile", type=Path, help="also ask each host of this DeepSpeed hostfile, over ssh")
    doctor.add_argument("--ssh_port", type=at_least_one, help="of the hosts, as `deepspeed --ssh_port`")
    doctor.add_argument("--ranks", type=at_least_one, help="ranks on this host (default: its GPUs)")
    doctor.add_argument("--checkpoint_dir", type=Path, help="where the run will save (default results/checkpoints)")
    doctor.add_argument("--nvme_path", type=Path, help="where the run will swap to")
    doctor.add_argument("--build_ops", action="store_true", help="compile DeepSpeed's C++ ops now: 1 to 3 minutes")
    doctor.add_argument("--no_speed", action="store_true", help="do not measure drives (a few seconds, 1 GiB each)")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=run, training=[])


def run(options: argparse.Namespace) -> int:
    """Print the report and return the exit code; `options.training` holds a training command's words."""
    from bagel_ds.doctor.report import as_json, is_ready, lines

    log_to_stderr()
    with redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout, which belongs to the result
        findings, hosts = _findings(options)
    print(json.dumps(as_json(findings, hosts), indent=1) if options.json else "\n".join(lines(findings)))
    return 0 if is_ready(findings) else NOT_READY


def _findings(options: argparse.Namespace) -> tuple[list[Any], dict[str, dict[str, Any]]]:
    from bagel_ds.doctor.environment import compared_versions
    from bagel_ds.doctor.hosts import host_findings, read_hostfile
    from bagel_ds.doctor.report import Wanted, gpu_count, host_report

    training = _training(options)
    hostfile = options.hostfile or training.hostfile
    hosts = [] if hostfile is None else read_hostfile(hostfile)  # before anything that takes long
    ranks = options.ranks or (training.ranks.per_host if training.ranks else gpu_count() or 1)
    checkpoint_dir, nvme_path = _folders(options, training.config)
    ops, built = _ops(training), []
    if options.build_ops:
        built = _build(ops)
    findings = (
        host_report(Wanted(ranks, ops, training.config is not None, checkpoint_dir, nvme_path, not options.no_speed))
        + built
    )
    if not hosts:
        return findings, {}
    words = ["--checkpoint_dir", str(checkpoint_dir.absolute()), "--no_speed"]
    words += [] if nvme_path is None else ["--nvme_path", str(nvme_path.absolute())]
    words += ["--build_ops"] * options.build_ops + training.words
    found, reports = host_findings(hosts, words, compared_versions(), options.ssh_port, checkpoint_dir)
    return findings + found, reports


def _training(options: argparse.Namespace) -> _Run:
    if not options.training:
        return _Run([], None, None, None)
    line = read_launch_line(options.training)
    hostfile = hostfile_of(line.launcher)
    # The command's own options of these names have taken them out of the line.
    taken = {"--checkpoint_dir": options.checkpoint_dir, "--nvme_path": options.nvme_path}
    words = [word for name, value in taken.items() if value is not None for word in (name, str(value))]
    config = parse_arguments([*line.training, *words], options.own)
    # A hostfile's hosts may differ, and each answers for itself.
    ranks = launched_ranks(line.launcher) if line.launcher and hostfile is None else None
    return _Run(line.training, config, ranks, hostfile)


def _folders(options: argparse.Namespace, config: RunConfig | None) -> tuple[Path, Path | None]:
    if config is None:
        return options.checkpoint_dir or _USUAL_CHECKPOINT_DIR, options.nvme_path
    swapped = config.training.nvme_path
    return Path(config.training.checkpoint_dir), None if swapped is None else Path(swapped)


def _ops(training: _Run) -> tuple[Any, ...]:
    """DeepSpeed's ops that the run needs, or all that any run needs."""
    from bagel_ds.zero.config.resolve import resolve_ds_config
    from bagel_ds.zero.ops import every_op, needed_ops

    if training.config is None:
        return tuple(every_op())
    world = 1 if training.ranks is None else training.ranks.all
    resolved, _ = resolve_ds_config(training.config.training.ds_config, training.config, world)
    return tuple(needed_ops(resolved))


def _build(ops: Sequence[Any]) -> list[Any]:
    """Compile what is missing; a failure is a finding."""
    from bagel_ds.doctor.environment import Finding, Verdict
    from bagel_ds.doctor.report import on_cpu
    from bagel_ds.zero.ops import build
    from bagel_ds.zero.shm_buffers import SUMS

    findings = []
    for op in [*ops, *([SUMS] if on_cpu() else [])]:
        try:
            build([op])
        except UserError as fault:
            findings.append(Finding(f"building {op.name}", Verdict.FAULT, str(fault)))
    return findings
