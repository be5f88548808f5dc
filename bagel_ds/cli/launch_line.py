"""A training command as pasted from a script: the trainer's words, and how many ranks its launcher starts.

Guarantees: understands `deepspeed` and `torchrun` (also as `python -m ...`) after variables or words such as nohup, the
script by path or as -m/--module, and a command quoted as one word with its line breaks. Words without a launcher stay
as they are. A number of ranks that the launcher leaves to the machine is None, never guessed.
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
_SHELL = re.compile(r"\d?[|&;<>].*")  # where a command ends in a line of shell


class LaunchLine(NamedTuple):
    training: list[str]  # the trainer's words
    launcher: list[str]  # from variables to before the script; empty where none was pasted


class Ranks(NamedTuple):
    all: int
    per_host: int


def read_launch_line(words: list[str]) -> LaunchLine:
    """Take a launcher's part out of `words`. Raises `UserError` where one is there and no script behind it."""
    words = [part for word in words for part in _unquoted(word)]
    start = _start(words)
    if start is None:
        return LaunchLine(words, [])
    line = words[start:]
    script = _script(line)
    if script is None:
        raise UserError(
            f"{' '.join(line[:3])} ...: this launcher's line names no script; expected launch/train.py, or --module "
            "bagel_ds.train, and the trainer's options behind it"
        )
    return LaunchLine(words[:start] + line[script + 1 :], line[:script] or line[:1])


def launched_ranks(launcher: list[str]) -> Ranks | None:
    """How many ranks these words start; None where they leave it to the machine. Raises `UserError`."""
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
            f"the launcher's hosts have unequal numbers of GPUs ({', '.join(map(str, slots))}), which one plan can't "
            "show; pass --world_size and --ranks_per_host as for the host with the most"
        )
    return Ranks(sum(slots), slots[0])


def _unquoted(word: str) -> list[str]:
    """The words of a whole command that came as one, up to a pipe or a redirection; any other word as it is."""
    if len(word.split()) < 2:
        return [word]
    try:
        parts = shlex.split(word.replace("\\\n", " "))
    except ValueError:
        return [word]
    if _start(parts) != 0 or _script(parts) is None:
        return [word]
    return parts[: next((i for i, part in enumerate(parts) if _SHELL.fullmatch(part)), len(parts))]


def _start(words: list[str]) -> int | None:
    """Where a launcher's line begins: at the first word that is neither an option nor its value (a variable, nohup, the
    launcher itself), if a launcher's program or a script is among such words.
    """
    alone = [
        index
        for index, word in enumerate(words)
        if not word.startswith("-") and not (index and words[index - 1].startswith("-") and "=" not in words[index - 1])
    ]
    is_launch = any(Path(words[index]).name in _PROGRAMS or _is_script(words[index]) for index in alone)
    return alone[0] if is_launch else None


def _is_script(word: str) -> bool:
    return word.endswith(".py") and not word.startswith("-") and "=" not in word


def _script(line: list[str]) -> int | None:
    """Where the script stands, or the module's name."""
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
    """GPUs of each host that `deepspeed` is to use; None where no option names hosts, empty where it isn't said."""
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
            f"--hostfile {path}: can't be read ({fault.strerror}); pass --world_size and --ranks_per_host instead"
        ) from None
    entries = [re.fullmatch(r"\s*(\S+)\s+slots=(\d+)\s*", line.partition("#")[0]) for line in lines]
    return {entry[1]: int(entry[2]) for entry in entries if entry}


def _filter(text: str) -> dict[str, list[str]]:
    """DeepSpeed's `host1@host2:0,1`: the GPUs that are named of each host; none where all are meant."""
    found = {}
    for part in filter(None, text.split("@")):
        host, _, gpus = part.partition(":")
        found[host.strip()] = [gpu for gpu in gpus.split(",") if gpu.strip()]
    return found


def _visible(launcher: list[str]) -> int | None:
    given = next((word for word in launcher if word.startswith("CUDA_VISIBLE_DEVICES=")), "")
    return len([gpu for gpu in given.partition("=")[2].split(",") if gpu.strip()]) or None


def _count(word: str) -> int | None:
    return int(word) if word.isdecimal() and int(word) > 0 else None
