"""YAML and JSON files that people write, and Python literals: read whole, with the line of every key.

Guarantees: a key that is given twice at any level is an error that names both lines, never silently the last of the
two; a file that can't be read or parsed is one message. YAML's merge keys (`<<`) stay legal, and `5e-4` is a number in
YAML too. What the keys mean is the caller's concern.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bagel_ds.errors import UserError, all_faults
from bagel_ds.git_lfs import pointer_fault

KeyPath = tuple[Hashable, ...]  # keys, and numbers of list items, from the outermost in
Remedy = Callable[[KeyPath], str]  # what to do about a key that is given twice

_MERGE = "tag:yaml.org,2002:merge"


class Document(NamedTuple):
    """What a file holds, and on which line each key stands, counted from 1."""

    content: Any
    path: Path
    lines: Mapping[KeyPath, int]

    def where(self, *keys: Hashable) -> str:
        """ "file, line 7" for the key at `keys`, or for the innermost of them that has a line."""
        for stop in range(len(keys), 0, -1):
            if keys[:stop] in self.lines:
                return f"{self.path}, line {self.lines[keys[:stop]]}"
        return str(self.path)


class Key(NamedTuple):
    """One occurrence of a key in a file."""

    path: KeyPath
    line: int


def merge_or_remove(path: KeyPath) -> str:
    """The remedy where nothing better is known."""
    return "keep one of the two"


def read_yaml(path: Path, remedy: Remedy = merge_or_remove) -> Document:
    """A YAML file. Raises `UserError`."""
    loader = _Loader(read_text(path))
    try:
        node = loader.get_single_node()
        keys = [] if node is None else list(_yaml_keys(loader, node, (), set()))
        lines = _lines(path, keys, remedy)
        return Document(None if node is None else loader.construct_document(node), path, lines)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}. Correct the file.") from None
    finally:
        loader.dispose()


def read_json(path: Path, remedy: Remedy = merge_or_remove) -> Document:
    """A JSON file. Raises `UserError`."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}. Correct the file, or download it again.") from None
    return Document(content, path, _lines(path, _json_keys(text), remedy))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises `UserError`."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}. Pass a file you may read.") from None
    if fault := pointer_fault(raw):
        raise UserError(f"{path}: {fault}.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from None


def refuse_repeated_literals(path: Path, value: ast.expr, inside: KeyPath, remedy: Remedy) -> None:
    """Raise `UserError` where a Python literal that stands at the keys `inside` gives a key twice."""
    _lines(path, list(_python_keys(value, inside)), remedy)


def _lines(path: Path, keys: list[Key], remedy: Remedy) -> dict[KeyPath, int]:
    """The line of each key. Raises `UserError` with every key that is given twice."""
    lines: dict[KeyPath, int] = {}
    faults = []
    twice: set[KeyPath] = set()
    for key in keys:
        if any(key.path[:depth] in twice for depth in range(1, len(key.path))):
            continue  # inside a section that is reported as a whole
        if key.path in lines:
            twice.add(key.path)
            faults.append(
                f"{path}, line {key.line}: the key {_shown(key.path)} is given twice (first in line "
                f"{lines[key.path]}), and only one of the two would count; {remedy(key.path)}"
            )
        lines.setdefault(key.path, key.line)
    all_faults(faults, f"{path} gives keys twice:")
    return lines


def _shown(path: KeyPath) -> str:
    inside = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[:-1]).removeprefix(".")
    return f"{str(path[-1])!r}" + (f" in {inside}" if inside else "")


# ------------------------------------------------------------------------------------------------------------- YAML
class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, with the floats of YAML 1.2: 1e-5 is a number there, and a string in PyYAML."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _yaml_keys(loader: _Loader, node: yaml.Node, inside: KeyPath, seen: set[int]) -> Iterator[Key]:
    """Every key below `node`; what several aliases share is visited once, so that aliases can't multiply the work."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _yaml_keys(loader, item, (*inside, number), seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == _MERGE or not isinstance(key, yaml.ScalarNode):
                continue  # merged keys yield to those written out, and have lines of their own
            path = (*inside, loader.construct_object(key))
            yield Key(path, key.start_mark.line + 1)
            yield from _yaml_keys(loader, value, path, seen)


# ------------------------------------------------------------------------------------------------------------- JSON
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)


def _json_keys(text: str) -> list[Key]:
    """Every key of a text that is valid JSON."""
    keys: list[Key] = []
    # Of each open bracket: the path to it, and the number of its next item, or None in an object.
    open_brackets: list[tuple[KeyPath, int | None]] = []
    path: KeyPath = ()  # of the value that comes next
    expects_key, line, position = False, 1, 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        line, position = line + text.count("\n", position, match.start()), match.start()
        if token == "{":
            open_brackets.append((path, None))
            expects_key = True
        elif token == "[":
            open_brackets.append((path, 0))
            path, expects_key = (*path, 0), False
        elif token in "}]":
            path, expects_key = open_brackets.pop()[0], False
        elif token == ",":
            inside, number = open_brackets[-1]
            expects_key = number is None
            if number is not None:
                open_brackets[-1] = (inside, number + 1)
                path = (*inside, number + 1)
        elif expects_key and token != ":":
            path, expects_key = (*open_brackets[-1][0], json.loads(token, strict=False)), False
            keys.append(Key(path, line))
    return keys


# ----------------------------------------------------------------------------------------------------------- Python
def _python_keys(node: ast.expr, inside: KeyPath) -> Iterator[Key]:
    if isinstance(node, (ast.List, ast.Tuple)):
        for number, item in enumerate(node.elts):
            yield from _python_keys(item, (*inside, number))
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):  # any other key is refused when the literal is evaluated
                path = (*inside, key.value)
                yield Key(path, key.lineno)
                yield from _python_keys(value, path)
