"""YAML, JSON and Python files that people write: no key is given twice, every message has a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.config_files import Document, read_json, read_yaml
from bagel_ds.errors import UserError

TWICE_IN_JSON = {
    "at_the_top": ('{"a": 1,\n "b": 2,\n "a": 3}', "line 3: the key 'a' is given twice (first in line 1)"),
    "inside": (
        '{"a": {\n"b": 1,\n"c": [1, {}],\n"b": 1}}',
        "line 4: the key 'b' in a is given twice (first in line 2)",
    ),
    "in_a_list": ('[{"a": 1}, [],\n{"b": 1, "a": {"b": 2},\n"b": 1}]', "line 3: the key 'b' in [2] is given twice"),
    "escaped": ('{"ab": 1,\n"a\\u0062": 2}', "line 2: the key 'ab' is given twice"),
    "tabs": ('{\n\t"a": "x:,{",\n\t"a": "}"\n}', "line 3: the key 'a' is given twice (first in line 2)"),
}


def _read(tmp_path: Path, name: str, text: str) -> Document:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return (read_json if name.endswith("json") else read_yaml)(path)


def _fault(tmp_path: Path, name: str, text: str) -> str:
    with pytest.raises(UserError) as caught:
        _read(tmp_path, name, text)
    assert str(tmp_path / name) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", TWICE_IN_JSON)
def test_a_json_key_given_twice_is_refused_with_both_lines(tmp_path: Path, case: str) -> None:
    text, message = TWICE_IN_JSON[case]
    assert message in _fault(tmp_path, "a.json", text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' is given twice (first in line 1)"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "line 4: the key 'b' in a is given twice (first in line 2)"),
        ("a:\n- {b: 1}\n- {c: 1,\n   c: 2}\n", "line 4: the key 'c' in a[1] is given twice"),
        ("a: 1\n'a': 2\n", "line 2: the key 'a' is given twice"),
        ("16: 1\n0x10: 2\n", "line 2: the key '16' is given twice"),
        ("x: &x {p: 1}\ny:\n  <<: *x\n  p: 2\n  p: 3\n", "line 5: the key 'p' in y is given twice (first in line 4)"),
        ("x: &x {p: 1,\n p: 2}\ny: *x\n", "line 2: the key 'p' in x is given twice"),
    ],
)
def test_a_yaml_key_given_twice_is_refused_with_both_lines(tmp_path: Path, text: str, message: str) -> None:
    assert message in _fault(tmp_path, "a.yaml", text)


@pytest.mark.parametrize(
    "name, text",
    [("a.yaml", "a:\n  b: {c: 1}\na:\n  b: {c: 2}\n"), ("a.json", '{"a": {"b": 1}, "a": {"b": 2}}')],
)
def test_what_is_inside_a_section_given_twice_is_not_listed(tmp_path: Path, name: str, text: str) -> None:
    message = _fault(tmp_path, name, text)
    assert "the key 'a' is given twice" in message and "\n" not in message


def test_all_keys_given_twice_are_listed_at_once(tmp_path: Path) -> None:
    assert _fault(tmp_path, "a.yaml", "a: 1\na: 2\nb: {c: 1, c: 2}\n").count("\n  - ") == 2


def test_merge_keys_aliases_and_recursion_stay_legal(tmp_path: Path) -> None:
    text = "x: &x {p: 1, q: 2}\nz: &z {r: 3}\ny:\n  <<: [*x, *z]\n  p: 4\nw: {<<: *x}\n"
    assert _read(tmp_path, "a.yaml", text).content["y"] == {"p": 4, "q": 2, "r": 3}
    own = _read(tmp_path, "b.yaml", "a: &a\n  b: *a\n").content
    assert own["a"]["b"] is own["a"]
    doubled = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    assert len(_read(tmp_path, "c.yaml", doubled).content) == 40  # 2^39 paths, if each were visited


@pytest.mark.parametrize("content", [{"a": [1, {"b": None}], "c": '\n"{'}, [], 3, "x", None, {"": {}}])
def test_what_is_read_is_what_json_reads_and_every_key_has_its_line(tmp_path: Path, content: Any) -> None:
    assert _read(tmp_path, "a.json", json.dumps(content, indent=1)).content == content


def test_lines_are_those_of_the_keys_or_of_what_holds_them(tmp_path: Path) -> None:
    document = _read(tmp_path, "a.json", '{\n"a": [\n{"b":\n1,\n"c": 2}]}')
    assert document.where("a", 0, "c") == f"{tmp_path / 'a.json'}, line 5"
    assert document.where("a", 0, "absent") == f"{tmp_path / 'a.json'}, line 2"
    assert document.where("absent") == str(tmp_path / "a.json")


@pytest.mark.parametrize(
    "text, value", [("1e-5", 1e-5), ("5E3", 5000.0), ("-2e+1", -20.0), ("1.5e-4", 1.5e-4), (".5e1", 5.0)]
)
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    assert _read(tmp_path, "a.yaml", f"a: {text}\n").content == {"a": value}


def test_other_words_stay_what_they_were(tmp_path: Path) -> None:
    text = "a: 1e5x\nb: e5\nc: 12\nd: v1e5\ne: yes\nf: 0x10\n"
    expected = {"a": "1e5x", "b": "e5", "c": 12, "d": "v1e5", "e": True, "f": 16}
    assert _read(tmp_path, "a.yaml", text).content == expected


def test_unreadable_files_are_one_message(tmp_path: Path) -> None:
    for name in ("a.yaml", "a.json"):
        assert "not valid" in _fault(tmp_path, name, "{")
        (tmp_path / name).write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match="not UTF-8"):
            (read_json if name.endswith("json") else read_yaml)(tmp_path / name)
    with pytest.raises(UserError, match="can't be read"):
        read_yaml(tmp_path)
    assert "not valid YAML" in _fault(tmp_path, "a.yaml", "a:\n\tb: 1\n")
