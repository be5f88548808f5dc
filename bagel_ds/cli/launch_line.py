"""Splits a training command, pasted from a script, into the launcher's words and the trainer's.

Guarantees: understands `deepspeed` and `torchrun` (also as `python -m ...`), preceded by variables or words such as
nohup, with the script as a path or as -m/--module, also quoted as one word with line breaks. A line without a launcher
is left as it is. If the number of ranks depends on the machine, it is None, never a guess.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from bagel_ds.errors import UserError

_PROGRAMS = ("deepspeed", "torchrun", "python", "python3")
_LAUNCHER_MODULES = ("deepspeed", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch")
_SHORT = {"H": "hostfile", "i": "include", "e": "exclude"}
_VARIABLE = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_SHELL = re.compile(r"\d?[|&;<>].*")  # ends a command in a shell line


class LaunchLine(NamedTuple):
    training: list[str]  # the trainer's words
    launcher: list[str]  # everything before the script; empty without a launcher


class Ranks(NamedTuple):
    all: int
    per_host: int


def read_launch_line(words: list[str]) -> LaunchLine:
    """Split `words`. Raises `UserError` if there is a launcher without a script."""
    words = [part for word in words for part in _unquoted(word)]
    start = _start(words)
    if start is None:
        return LaunchLine(words, [])
    line = words[start:]
    script = _script(line)
    if script is None:
        raise UserError(
            f"{' '.join(line[:3])} ...: this launcher's line lacks a script; expected launch/train.py, or --module "
            "bagel_ds.train, followed by the trainer's options"
        )
    return LaunchLine(words[:start] + line[script + 1 :], line[:script] or line[:1])


def launched_ranks(launcher: list[str]) -> Ranks | None:
    """How many ranks the launcher starts; None if that depends on the machine. Raises `UserError`."""
    options = _options(launcher)
    if any(Path(word).name == "torchrun" or word.startswith("torch.distributed.") for word in launcher):
        hosts, each = _count(options.get("nnodes", "1")), _count(options.get("nproc_per_node", "1"))
        return Ranks(hosts * each, each) if hosts and each else None
    slots = _slots(options)
    if slots is None:
        hosts, each = _count(options.get("num_nodes", "1")), _count(options.get("num_gpus", ""))
        each = each or (_visible(launcher) if hosts == 1 else None)
        return Ranks(hosts * each, each) if hosts and each else None
    if not slots:
        return None
    if len(set(slots)) != 1:
        raise UserError(
            f"the launcher's hosts have unequal numbers of GPUs ({', '.join(map(str, slots))}), but a plan is for "
            "equal hosts; pass --world_size and --ranks_per_host as for the host with the most GPUs"
        )
    return Ranks(sum(slots), slots[0])


def hostfile_of(launcher: list[str]) -> Path | None:
    """The hostfile that the launcher's words name."""
    named = _options(launcher).get("hostfile")
    return None if named is None else Path(named)


def _unquoted(word: str) -> list[str]:
    """The words of a command that was quoted as one word, up to a pipe or redirection; any other word as it is."""
    if len(word.split()) < 2:
        return [word]
    try:
        words = shlex.split(word.replace("\\\n", " "))
    except ValueError:
        return [word]
    if _start(words) != 0 or _script(words) is None:
        return [word]
    return words[: next((i for i, each in enumerate(words) if _SHELL.fullmatch(each)), len(words))]


def _start(words: list[str]) -> int | None:
    """The index at which a launcher's line begins; None without a launcher.

    That is the first word that is neither an option nor its value (a variable, nohup, the launcher itself), provided
    that a launcher's program or a script is among such words.
    """
    plain = [
        index
        for index, word in enumerate(words)
        if not word.startswith("-") and not (index and words[index - 1].startswith("-") and "=" not in words[index - 1])
    ]
    is_launch = any(Path(words[index]).name in _PROGRAMS or _is_script(words[index]) for index in plain)
    return plain[0] if is_launch else None


def _is_script(word: str) -> bool:
    return word.endswith(".py") and not word.startswith("-") and "=" not in word


def _script(line: list[str]) -> int | None:
    """The index of the script's path or of the module's name."""
    for index, word in enumerate(line):
        is_module = index > 0 and line[index - 1] in ("-m", "--module") and word not in _LAUNCHER_MODULES
        if is_module or _is_script(word):
            return index
    return None


def _options(launcher: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for index, word in enumerate(launcher):
        if word.startswith("-"):
            name, equals, value = word.lstrip("-").partition("=")
            if not equals:
                value = launcher[index + 1] if index + 1 < len(launcher) else ""
            found[_SHORT.get(name, name.replace("-", "_"))] = value
    return found


def _slots(options: dict[str, str]) -> list[int] | None:
    """GPUs that `deepspeed` uses on each host; None if no option names hosts, empty if the numbers are unknown."""
    hosts: dict[str, int | None] = _hostfile(Path(options["hostfile"])) if "hostfile" in options else {}
    if "include" in options:
        hosts = {host: len(gpus) or hosts.get(host) for host, gpus in _filter(options["include"]).items()}
    for host, gpus in _filter(options.get("exclude", "")).items():
        left = hosts.get(host)
        hosts[host] = 0 if not gpus else None if left is None else left - len(gpus)
    if not hosts:
        return None
    if None in hosts.values():
        return []
    slots = [count for count in hosts.values() if count]
    limit = _count(options.get("num_gpus", ""))
    slots = slots[: _count(options.get("num_nodes", ""))]
    return [min(count, limit) if limit else count for count in slots]


def _hostfile(path: Path) -> dict[str, int | None]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as fault:
        raise UserError(
            f"--hostfile {path} can't be read ({fault.strerror}); pass --world_size and --ranks_per_host instead"
        ) from None
    entries = [re.fullmatch(r"\s*(\S+)\s+slots=(\d+)\s*", line.partition("#")[0]) for line in lines]
    return {entry[1]: int(entry[2]) for entry in entries if entry}


def _filter(text: str) -> dict[str, list[str]]:
    """DeepSpeed's `host1@host2:0,1` as the GPUs of each host; an empty list means all."""
    found = {}
    for entry in filter(None, text.split("@")):
        host, _, gpus = entry.partition(":")
        found[host.strip()] = [gpu for gpu in gpus.split(",") if gpu.strip()]
    return found


def _visible(launcher: list[str]) -> int | None:
    given = next((word for word in launcher if word.startswith("CUDA_VISIBLE_DEVICES=")), "")
    return len([gpu for gpu in given.partition("=")[2].split(",") if gpu.strip()]) or None


def _count(word: str) -> int | None:
    return int(word) if word.isdecimal() and int(word) > 0 else None
