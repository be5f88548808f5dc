"""YAML and JSON files that people write, and Python literals: read whole, with the line of every key.

Guarantees: whatever a file holds, it is read or refused with one `UserError`. A key that is given twice at any level is
an error that names both lines. In YAML, merge keys (`<<`) stay legal, `5e-4` is a number, dates are text. What the keys
mean is the caller's concern. A YAML mapping may contain itself, so walk over values with a limit.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.constructor import ConstructorError

from bagel_ds.errors import UserError, all_faults, shown
from bagel_ds.git_lfs import pointer_fault
from bagel_ds.regular_files import file_fault

KeyPath = tuple[Hashable, ...]  # keys, and numbers of list items, from the outermost in
Remedy = Callable[[KeyPath], str]  # what to do about a key that is given twice

LARGEST_FILE = 64 * 2**20  # bytes; a data file passed as a config would fill the memory
LONGEST_TEXT = 4096  # characters of a path or name; Linux allows no longer path
_MERGE = "tag:yaml.org,2002:merge"
_MOST_MERGED = 10_000  # keys; merges of merges can double their number at every level


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
    text = read_text(path)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        keys = [] if node is None else list(_yaml_keys(loader, node, (), set()))
        lines = _lines(path, keys, remedy)
        return Document(None if node is None else loader.construct_document(node), path, lines)
    except yaml.YAMLError as error:
        raise _not_yaml(path, error) from None
    except RecursionError:
        raise UserError(f"{path} nests too deeply to be a configuration. Correct the file.") from None


def read_json(path: Path, remedy: Remedy = merge_or_remove) -> Document:
    """A JSON file. Raises `UserError`."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}. Correct the file, or download it again.") from None
    return Document(content, path, _lines(path, _json_keys(text), remedy))


def read_text(path: Path) -> str:
    """The text of a regular UTF-8 file. Raises `UserError`."""
    if fault := file_fault(path):
        raise UserError(f"{path} can't be read: {fault}. Pass a file you may read.")
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}. Pass a file you may read.") from None
    if len(raw) > LARGEST_FILE:
        raise UserError(f"{path} is larger than {LARGEST_FILE >> 20} MiB: a data file? Pass a configuration file.")
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
    """YAML 1.1 as PyYAML reads it, but 1e-5 is a number, and 2024-01-31 and 1:30 are text, as in YAML 1.2."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # What PyYAML's constructors raise on `!!bool maybe`, `!!int ""` or a number of 5000 digits.
            problem = f"{shown(node.value)} is not a {node.tag.rpartition(':')[2]} that can be read"
            raise ConstructorError(None, None, problem, node.start_mark) from None

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        written = len(node.value)
        super().flatten_mapping(node)
        if len(node.value) > written + _MOST_MERGED:
            raise ConstructorError(None, None, f"more than {_MOST_MERGED} keys are merged here", node.start_mark)


_NUMBERS = {
    "int": r"[-+]?(0b[01_]+|0x[\da-fA-F_]+|0[0-7_]*|[1-9][\d_]*)",
    "float": r"[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))"
    r"|\.(nan|NaN|NAN)",
}
_REPLACED = {f"tag:yaml.org,2002:{tag}" for tag in (*_NUMBERS, "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"({_pattern})$"), list("-+.0123456789"))


def _not_yaml(path: Path, error: yaml.YAMLError) -> UserError:
    """The message about a file that PyYAML can't read."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"{path}, line {mark.line + 1}" if mark else str(path)
    said = [getattr(error, name, None) for name in ("context", "problem")]
    reason = ", ".join(filter(None, said)) or str(error)
    return UserError(f"{where}: this is not valid YAML ({' '.join(reason.split())}). Correct the file.")


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
