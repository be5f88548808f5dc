"""Nonsense for every place of a YAML, JSON or Python file: what reads it may raise `UserError` only."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Callable

from bagel_ds.errors import UserError

DEEP = "[" * 1100 + "]" * 1100
# Each as it stands in a YAML file.
IN_YAML = {
    "null": "null",
    "text": "nonsense",
    "empty_text": "''",
    "number": "3",
    "negative": "-7",
    "zero": "0",
    "fraction": "0.5",
    "true": "true",
    "nan": ".nan",
    "infinite": ".inf",
    "float_beyond_range": "1e999",
    "large_number": "9" * 40,
    "number_of_5000_digits": "9" * 5000,
    "number_of_9000_hex_digits": "0x" + "f" * 9000,
    "date": "2024-01-31",
    "impossible_date": "2024-13-45",
    "list": "[1, [2], a]",
    "empty_list": "[]",
    "mapping": "{a: {b: 1}}",
    "empty_mapping": "{}",
    "keys_of_all_types": "{1: a, null: b, 2.5: c, .nan: e}",
    "list_as_key": "{? [a] : 1}",
    "set": "!!set {a, b}",
    "pairs": "!!pairs [a: 1, a: 2]",
    "binary": "!!binary aGVsbG8=",
    "bad_bool": "!!bool maybe",
    "bad_int": "!!int ''",
    "bad_timestamp": "!!timestamp x",
    "timestamp": "!!timestamp 2024-01-31",
    "unknown_tag": "!!python/object:os.system ls",
    "deep": DEEP,
    "contains_itself": "&itself [*itself, {a: *itself}]",
    "merges_itself": "&itself {<<: *itself}",
    "half_a_pair": '"\\ud800"',
    "nul": '"a\\0b"',
    "long_text": "x" * 100_000,
    "long_path": "/".join("x" * 50 for _ in range(200)),
    "uri": "nowhere://host/folder",
    "parent": "..",
    "home_of_nobody": "~nobody-of-that-name/x",
    "unset_variable": "$NOT_SET_ANYWHERE/x",
}
# Each as JSON, which a Python literal may be, too.
IN_JSON = {
    "text": '"nonsense"',
    "empty_text": '""',
    "number": "3",
    "negative": "-7",
    "zero": "0",
    "fraction": "0.5",
    "float_beyond_range": "1e999",
    "large_number": "9" * 40,
    "number_of_5000_digits": "9" * 5000,
    "list": '[1, [2], "a"]',
    "empty_list": "[]",
    "mapping": '{"a": {"b": 1}}',
    "empty_mapping": "{}",
    "deep": DEEP,
    "half_a_pair": '"\\ud800"',
    "nul": '"a\\u0000b"',
    "long_text": f'"{"x" * 100_000}"',
}
ONLY_JSON = {"null": "null", "true": "true", "nan": "NaN", "infinite": "-Infinity"}
_MARK = "NONSENSE-HERE"


def documents(content: Any, values: Mapping[str, str], write: Callable[[Any], str], step: int) -> Iterator[str]:
    """Every file that has one of `values` in place of a value, or as one more key, somewhere in `content`.

    Only every `step`-th of them; 1 gives all.
    """
    number = 0
    for path in places(content):
        for nonsense in values.values():
            for document in (marked(content, path), with_strange_keys(content, path)):
                number += 1
                if document is not None and number % step == 0:
                    yield filled(write(document), nonsense)


def refusal(read: Callable[[], Any]) -> str | None:
    """The message with which `read` refuses its input; None where it doesn't. Any other exception passes through."""
    try:
        read()
    except UserError as fault:
        return str(fault)
    return None


def places(content: Any) -> Iterator[tuple[Any, ...]]:
    """The path to every value in `content`, the whole of it included."""
    yield ()
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        for inner in places(value):
            yield (key, *inner)


def marked(content: Any, path: tuple[Any, ...]) -> Any:
    """`content` with a mark at `path`, which `filled` replaces in the written file."""
    if not path:
        return _MARK
    content = copy.deepcopy(content)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = _MARK
    return content


def with_strange_keys(content: Any, path: tuple[Any, ...]) -> Any:
    """`content` with one more key, the mark, in the mapping at `path`; None where there is no mapping."""
    content = copy.deepcopy(content)
    holder = content
    for key in path:
        holder = holder[key]
    if not isinstance(holder, dict):
        return None
    holder[_MARK] = 1
    return content


def filled(text: str, nonsense: str) -> str:
    """The written file with the nonsense in place of the mark, whatever quotes stand around that."""
    assert _MARK in text
    for quoted in (f'"{_MARK}"', f"'{_MARK}'", _MARK):
        text = text.replace(quoted, nonsense)
    return text
