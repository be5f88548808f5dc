"""Turns words of a command line, or keys of a YAML file, into typed values by option name.

Guarantees: `_` equals `-`, `--name value` equals `--name=value`, a boolean needs no value, unambiguous prefixes work,
and the last of repeated options wins. One pass finds every fault, and the caller raises them together. `run_config.py`
checks whether the values fit together.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bagel_ds.arguments.options import SECTIONS, all_options, is_optional, type_name
from bagel_ds.config_files import LONGEST_TEXT, KeyPath, read_yaml
from bagel_ds.errors import UserError, shown

# The parser's own options: a YAML file, and local_rank, which the deepspeed launcher adds (LOCAL_RANK has it too).
OWN_WORDS = {"config": "read options from this YAML file; the command line wins", "local_rank": ""}
TRUE_WORDS = ("true", "1", "yes", "on")
FALSE_WORDS = ("false", "0", "no", "off")


@dataclasses.dataclass
class Words:
    """What one source of options contains: typed values by option name, and their lines (`places`) in a file."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    places: dict[str, str] = dataclasses.field(default_factory=dict)
    explicit: set[str] = dataclasses.field(default_factory=set)
    faults: list[str] = dataclasses.field(default_factory=list)
    config_file: str | None = None
    help: bool = False


def parse_value(name: str, raw: Any) -> Any:
    """The value of option `name` from a word or a YAML scalar. Raises ValueError with the message for the user."""
    field = all_options()[name]
    wanted = type_name(field)
    if is_optional(field) and raw == "":  # scripts pass an empty "$RESUME" if there is nothing to resume from
        return None
    is_choice = isinstance(raw, str) and raw.strip().lower() in (field.metadata["choices"] or ())
    if raw is None or (isinstance(raw, str) and raw.strip().lower() in ("none", "null") and not is_choice):
        if is_optional(field):
            return None
        raise ValueError(f"--{name} expects {_expected(field)}, found None")
    if not isinstance(raw, (str, int, float)):
        raise ValueError(f"--{name} expects one value ({_expected(field)}), found {shown(raw)}")
    if isinstance(raw, bool) and wanted != "bool":
        raise ValueError(f"--{name} expects {_expected(field)}, found {raw}; put it in quotes if it is a name")
    try:
        word = str(raw).strip()
        value = _READERS[wanted](word)
    except (ValueError, OverflowError):
        raise ValueError(f"--{name} expects {_expected(field)}, found {shown(raw)}") from None
    choices = field.metadata["choices"]
    if choices and value not in choices:
        same = [choice for choice in choices if choice.lower() == word.lower()]
        if not same:
            raise ValueError(f"--{name} expects {_expected(field)}, found {shown(raw)}")
        return same[0]
    return value


def _read_bool(word: str) -> bool:
    if word.lower() in TRUE_WORDS:
        return True
    if word.lower() in FALSE_WORDS:
        return False
    raise ValueError(word)


def _read_text(word: str) -> str:
    if "\0" in word or len(word) > LONGEST_TEXT:
        raise ValueError(word)
    os.fsencode(word)  # raises ValueError for a lone surrogate
    return word


def _read_float(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(word)
    return value


_READERS: dict[str, Any] = {"str": _read_text, "int": int, "float": _read_float, "bool": _read_bool}


def _expected(field: dataclasses.Field[Any]) -> str:
    if field.metadata["choices"]:
        return "one of " + ", ".join(field.metadata["choices"])
    words = {"str": "text", "int": "a whole number", "float": "a finite number", "bool": "True or False"}
    return words[type_name(field)] + (" or None" if is_optional(field) else "")


# Names in other trainers -> names here. They are only suggested, never accepted.
SYNONYMS = {
    "learning_rate": "lr",
    "model": "model_path",
    "pretrained_model_name_or_path": "model_path",
    "data_path": "dataset_config_file",
    "dataset": "dataset_config_file",
    "output_dir": "results_dir",
    "save_dir": "checkpoint_dir",
    "batch_size": "max_num_tokens",
    "per_device_train_batch_size": "max_num_tokens",
    "max_seq_length": "max_num_tokens",
    "accumulation_steps": "gradient_accumulation_steps",
    "max_steps": "total_steps",
    "num_train_steps": "total_steps",
    "save_steps": "save_every",
    "logging_steps": "log_every",
    "warmup": "warmup_steps",
    "seed": "global_seed",
    "deepspeed": "ds_config",
    "deepspeed_config": "ds_config",
    "gradient_clipping": "max_grad_norm",
    "bf16": "precision",
    "gradient_checkpointing": "activation_checkpointing",
    "resume_from_checkpoint": "resume_from",
}


# The deepspeed launcher's own options (0.19.8). After the script's name they would go to the script.
LAUNCHER_OPTIONS = """hostfile include exclude num_nodes num_gpus num_accelerators master_port master_addr node_rank
    launcher launcher_args module no_python no_local_rank no_ssh no_ssh_check force_multi save_pid enable_each_rank_log
    autotuning bind_cores_to_rank bind_core_list ssh_port venv_script log_level quiet""".split()
LAUNCHER_LETTERS = ("-H", "-i", "-e", "-q")
_TORCHRUN = {"nproc_per_node": "num_gpus", "nnodes": "num_nodes"}  # torchrun's names -> deepspeed's
_BEFORE_SCRIPT = "option of the deepspeed launcher, which goes before launch/train.py"
_HELP = "--help lists all"
_COMMAND_HELP = "--help lists the command's own, docs/arguments.md the trainer's"
_LIKENESS, _SURELY = 0.65, 0.85  # difflib's ratio of two spellings; below it a suggestion would be a guess


def find_name(word: str, own: Sequence[str] = ()) -> str:
    """The full name of the option `word` (without dashes). Raises ValueError with the nearest name or the candidates.

    `own` are the options of a command that also takes the trainer's; they are only suggested.
    """
    name = word.replace("-", "_")
    known = [*all_options(), *OWN_WORDS, "help"]
    if name in known:
        return name
    if name in LAUNCHER_OPTIONS:
        raise ValueError(f"--{word} is an {_BEFORE_SCRIPT}" if not own else _not_for_commands(word, own))
    candidates = [option for option in dict.fromkeys([*known, *own]) if name and option.startswith(name)]
    if len(candidates) == 1 and candidates[0] in known:
        return candidates[0]
    if len(candidates) > 1:
        raise ValueError(f"--{word} is ambiguous: it could be {', '.join('--' + option for option in candidates)}")
    raise ValueError(f"unknown argument --{word}{_suggestion(name, own)} ({_COMMAND_HELP if own else _HELP})")


def _suggestion(name: str, own: Sequence[str]) -> str:
    """The part of a message that suggests a name for an unknown one; "" if none is similar."""
    launcher = [] if own else difflib.get_close_matches(name, [*LAUNCHER_OPTIONS, *_TORCHRUN], n=1, cutoff=_SURELY)
    spellings = [*own, *all_options(), *SYNONYMS, "config", "help"]  # not local_rank, which only the launcher passes
    close = launcher or difflib.get_close_matches(name, spellings, n=1, cutoff=_LIKENESS)
    if not close:
        return ""
    meant = close[0] if close[0] in own else (SYNONYMS | _TORCHRUN).get(close[0], close[0])
    place = f", an {_BEFORE_SCRIPT}" if meant in LAUNCHER_OPTIONS else ""
    return f"; the nearest known one is --{meant}{place}"


def _not_for_commands(word: str, own: Sequence[str]) -> str:
    remedy = "pass the number of ranks as --world_size" if "world_size" in own else "leave it out"
    return f"--{word} is an option of the deepspeed launcher, which this command does not start; {remedy}"


def read_words(argv: list[str], own: Sequence[str] = ()) -> Words:
    """Read a command line without the program's name; `own` as in `find_name`."""
    words = Words()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "-h":
            words.help = True
        elif word[:2] in LAUNCHER_LETTERS:
            words.faults.append(f"{word} is an {_BEFORE_SCRIPT}")
            if rest and not rest[0].startswith("-") and word != "-q":
                rest.pop(0)
        elif not word.startswith("--") or word == "--":
            words.faults.append(f"{word!r} has no option before it; options are written --name value or --name=value")
        else:
            _read_option(word[2:], rest, words, own)
    return words


def _read_option(word: str, rest: list[str], words: Words, own: Sequence[str]) -> None:
    """Read one option, and if needed take its value from the front of `rest`."""
    written, equals, given = word.partition("=")
    try:
        name = find_name(written, own)
    except ValueError as fault:
        words.faults.append(str(fault))
        if not equals and rest and not rest[0].startswith("--"):
            rest.pop(0)  # don't report the unknown option's value as a second fault
        return
    if name == "help":
        words.help = True
        return
    is_bool = name in all_options() and type_name(all_options()[name]) == "bool"
    if not equals:
        if rest and not rest[0].startswith("--"):
            given = rest.pop(0)
        elif is_bool:
            given = "True"
        else:
            words.faults.append(f"--{name} needs a value")
            return
    if name == "config":
        words.config_file = given
    elif name != "local_rank":
        _keep(name, given, words)


def _keep(name: str, raw: Any, words: Words, where: str = "") -> None:
    try:
        words.values[name] = parse_value(name, raw)
        words.explicit.add(name)
    except ValueError as fault:
        words.faults.append(f"{where}{fault}")


def read_option_file(file: str) -> Words:
    """Read options from a YAML mapping, flat or under `model`, `data`, `training`.

    A list `explicit` (written by `RunConfig.to_yaml`) names the options that the user gave. Without it, the user gave
    every option in the file.
    """
    words = Words()
    try:
        document = read_yaml(Path(file))
    except UserError as fault:
        words.faults.append(f"--config: {fault}")
        return words
    if document.content is not None and not isinstance(document.content, dict):
        found = shown(document.content)
        words.faults.append(f"--config {file}: expected a mapping of option names to values, found {found}")
        return words
    content = dict(document.content or {})
    given = content.pop("explicit", None)
    for path, value in _flattened(content):
        _keep_from_file(path[-1], value, document.where(*path), words)
    if isinstance(given, list):
        words.explicit &= {name for name in given if isinstance(name, str)}
    elif given is not None:
        words.faults.append(
            f"--config {document.where('explicit')}: explicit must be a list of option names, found {shown(given)}"
        )
    return words


def _keep_from_file(key: Any, value: Any, where: str, words: Words) -> None:
    if not isinstance(key, str):
        words.faults.append(f"--config {where}: expected the name of an option, found {shown(key)}")
        return
    try:
        name = find_name(key)
    except ValueError as fault:
        words.faults.append(f"--config {where}: {fault}")
        return
    if name not in all_options():
        words.faults.append(f"--config {where}: {key!r} works only on the command line, not in a file")
    elif name in words.places:  # with another spelling, or both inside and outside a section
        words.faults.append(
            f"--config {where}: {name} is given twice (first in {words.places[name]}); keep one of them"
        )
    else:
        words.places[name] = where
        _keep(name, value, words, f"--config {where}: ")


def _flattened(content: dict[Any, Any]) -> list[tuple[KeyPath, Any]]:
    pairs: list[tuple[KeyPath, Any]] = []
    for key, value in content.items():
        in_section = key in SECTIONS and isinstance(value, dict)
        pairs += [((key, inner), found) for inner, found in value.items()] if in_section else [((key,), value)]
    return pairs


def help_text() -> str:
    """The text that --help prints."""
    lines = [
        "deepspeed [launcher options] launch/train.py --ds_config zero3.json [options]",
        "",
        "Write options as --name value, --name=value or, for True, --name. '-' and '_' are the same, and an",
        "unambiguous prefix of a name is enough.",
        "",
        "  --config FILE",
        f"        {OWN_WORDS['config']}",
    ]
    for title, section in SECTIONS.items():
        lines += ["", f"{title} - {section.__doc__}"]
        for field in dataclasses.fields(section):
            shown = "{" + ",".join(field.metadata["choices"]) + "}" if field.metadata["choices"] else type_name(field)
            lines.append(f"  --{field.name} {shown}")
            text = f"{field.metadata['help']} [{field.default}]"
            lines += textwrap.wrap(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def duration_text(seconds: float) -> str:
    """A duration as "2d4h", "3h50m", "12m" or "45s"."""
    whole = round(seconds) if seconds < 60 else 60 * round(seconds / 60)
    days, hours, minutes = whole // 86400, whole % 86400 // 3600, whole % 3600 // 60
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m" if minutes else f"{whole}s"


_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def duration_seconds(text: str) -> float | None:
    """Seconds of "3h50m", "90m", "45s", "1d" or a plain number of seconds; None for anything else."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    terms = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if not terms or "".join(number + unit for number, unit in terms) != text:
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in terms)
