"""dataset_info: where datasets lie. YAML, JSON, or the original's Python file, read as data.

Guarantees: a Python file is parsed, never executed: only literal assignments to DATASET_INFO (also by subscript) and
the names in DATASET_REGISTRY count, and anything that would have to be computed is an error naming its line. Whatever
a file holds, the only exception is a `UserError`.
"""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bagel_ds.config_files import (
    KeyPath,
    merge_or_remove,
    read_json,
    read_text,
    read_yaml,
    refuse_repeated_literals,
)
from bagel_ds.data.formats.registry import KINDS
from bagel_ds.errors import UserError, all_faults, shown
from bagel_ds.regular_files import file_fault

_NAMES = ("dataset_info.yaml", "dataset_info.json", "dataset_info.py")
# How the originals' dataset classes are called -> our kind.
_CLASSES = (
    *(("T2I", "t2i_pretrain"), ("Edit", "unified_edit"), ("SftJSONL", "vlm_sft"), ("VLM", "vlm_sft")),
    *(("Interleave", "interleave_reasoning"), ("Reason", "interleave_reasoning")),
)


@dataclass(frozen=True)
class DatasetInfo:
    """`datasets[group][name]` = paths; `kinds` names the kind of groups that a DATASET_REGISTRY lists."""

    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    path: str | None = None
    searched: str = ""
    lines: Mapping[KeyPath, int] = field(default_factory=dict)  # of groups and datasets; none in a Python file

    def where(self, *keys: Hashable) -> str:
        """ "file, line 7" for a group or a dataset in it, or the file."""
        line = self.lines.get(keys) or self.lines.get(("DATASET_INFO", *keys))
        return f"{self.path}, line {line}" if line else str(self.path)


def find_dataset_info(config: Path) -> Path | DatasetInfo:
    """The first dataset_info file beside the config, in its parent folder or in ./data; else where we looked."""
    folder = config.absolute().parent
    places = list(dict.fromkeys((folder, folder.parent, Path("data").absolute())))
    for place in places:
        for name in _NAMES:
            if os.path.lexists(place / name):  # also a link that leads nowhere: reading it says so
                return place / name
    return DatasetInfo(
        searched=f"there is no {', '.join(_NAMES[:-1])} or {_NAMES[-1]} in {', '.join(map(str, places))};"
        " write one (docs/data.md), pass --dataset_info, or give the paths in the config itself."
    )


def read_dataset_info(path: Path | DatasetInfo) -> DatasetInfo:
    """Read a dataset_info file. Raises `UserError`."""
    if isinstance(path, DatasetInfo):
        return path
    if fault := file_fault(path):
        raise UserError(f"--dataset_info {path}: {fault}. Give a dataset_info file (YAML, JSON or Python).")
    kinds: dict[str, str] = {}
    lines: Mapping[KeyPath, int] = {}
    if path.suffix == ".py":
        content, kinds = _read_python(path)
    else:
        content, _, lines = (read_json if path.suffix == ".json" else read_yaml)(path, _remedy_for_twice)
    if isinstance(content, dict) and set(content) == {"DATASET_INFO"}:
        content = content["DATASET_INFO"]
    expected = "expected {group: {dataset: {data_dir: ...}}} (docs/data.md)"
    if not isinstance(content, dict):
        raise UserError(f"{path}: {expected}, found {shown(content)}.")
    info = DatasetInfo(content, kinds, str(path), lines=lines)
    wrong = {name: group for name, group in content.items() if not isinstance(group, dict)}
    faults = [f"{info.where(name)}: {expected}, found {shown(group)}" for name, group in wrong.items()]
    all_faults(faults, f"{path} does not say where datasets lie:")
    return info


def _remedy_for_twice(path: KeyPath) -> str:
    group = path[1:] if path[0] == "DATASET_INFO" else path
    if len(group) == 1:
        return (
            "list the datasets of both under one key; groups of the dataset config that have names of their own find "
            f"them there by `kind: {group[0]}` (docs/data.md)"
        )
    return "give one of the two datasets another name" if len(group) == 2 else merge_or_remove(path)


def _read_python(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    info: dict[str, Any] | None = None
    kinds: dict[str, str] = {}
    for statement in _parse(path).body:
        targets: list[ast.expr]
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        elif isinstance(statement, ast.Assign):
            targets, value = list(statement.targets), statement.value
        else:
            if not isinstance(statement, (ast.FunctionDef, ast.ClassDef)) and _mentions(statement, "DATASET_INFO"):
                raise _refused(path, statement, "only assignments to DATASET_INFO are read")
            continue
        for target in targets:
            if isinstance(target, ast.Name) and target.id == "DATASET_INFO":
                if info is not None:
                    raise _refused(path, statement, "DATASET_INFO is assigned twice, and only the last would count")
                info = _literal(value, path)
            elif isinstance(target, ast.Name) and target.id == "DATASET_REGISTRY":
                refuse_repeated_literals(path, value, (), merge_or_remove)
                kinds.update(_registry(value))
            elif _mentions(target, "DATASET_INFO"):
                if info is None:
                    raise _refused(path, statement, "DATASET_INFO[...] is assigned before DATASET_INFO itself")
                keys = _keys(target, path)
                if not isinstance(info, dict) or not all(isinstance(key, str) for key in keys):
                    raise _refused(path, statement, "DATASET_INFO[...] needs a mapping, and text in the brackets")
                if not _assign(info, keys, _literal(value, path, tuple(keys))):
                    given = "".join(f"[{key!r}]" for key in keys)
                    remedy = _remedy_for_twice(tuple(keys))
                    raise _refused(path, statement, f"DATASET_INFO{given} is given twice; {remedy}")
    if info is None:
        raise UserError(f"{path}: no assignment to DATASET_INFO found.")
    return info, kinds


def _parse(path: Path) -> ast.Module:
    text = read_text(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about code that isn't run
            return ast.parse(text, str(path))
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        where = f"{path}, line {error.lineno}" if isinstance(error, SyntaxError) else str(path)
        reason = getattr(error, "msg", None) or str(error) or "it nests too deeply"
        raise UserError(f"{where}: cannot be read as Python ({reason}). Correct the file.") from None


def _literal(node: ast.expr, path: Path, inside: KeyPath = ()) -> Any:
    refuse_repeated_literals(path, node, inside, _remedy_for_twice)
    try:
        return ast.literal_eval(node)
    except (TypeError, MemoryError, RecursionError):
        raise _refused(path, node, "this is not a literal of mappings, lists and texts") from None
    except ValueError:
        inner = next((n for n in ast.walk(node) if _is_computed(n)), node)
        raise _refused(path, inner, f"`{ast.unparse(inner)[:200]}` would have to be computed") from None


def _is_computed(node: ast.AST) -> bool:
    return isinstance(node, (ast.Call, ast.JoinedStr, ast.BinOp, ast.Name, ast.Attribute, ast.DictComp, ast.Subscript))


def _keys(target: ast.expr, path: Path) -> list[Any]:
    keys: list[Any] = []
    while isinstance(target, ast.Subscript):
        keys.insert(0, _literal(target.slice, path))
        target = target.value
    if not isinstance(target, ast.Name):
        raise _refused(path, target, "only DATASET_INFO[...] = ... is read")
    return keys


def _assign(info: dict[str, Any], keys: list[Any], value: Any) -> bool:
    """Put `value` at `keys`; False where there is something already, or where they lead through something else."""
    for key in keys[:-1]:
        info = info.setdefault(key, {})
        if not isinstance(info, dict):
            return False
    if keys[-1] in info:
        return False
    info[keys[-1]] = value
    return True


def _registry(node: ast.expr) -> dict[str, str]:
    """Kind of each registered group, told from the name of its class; unknown classes are left out."""
    kinds: dict[str, str] = {}
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            name = ast.unparse(value).rsplit(".", 1)[-1]
            kind = next((kind for part, kind in _CLASSES if part.lower() in name.lower()), None)
            if isinstance(key, ast.Constant) and kind is not None and key.value not in KINDS:
                kinds[str(key.value)] = kind
    return kinds


def _mentions(node: ast.AST, name: str) -> bool:
    return any(isinstance(inner, ast.Name) and inner.id == name for inner in ast.walk(node))


def _refused(path: Path, node: ast.AST, reason: str) -> UserError:
    line = getattr(node, "lineno", 0)
    return UserError(
        f"{path}, line {line}: {reason}. The file is read as data and never run: write the paths out as plain strings,"
        " or use a dataset_info.yaml."
    )
