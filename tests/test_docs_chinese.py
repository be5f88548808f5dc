"""The Chinese pages show the same commands, options, figures and tests as the English ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
GUIDES = """README data low_memory lora multi_node launchers reliability inference migration troubleshooting""".split()
BLOCK = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
NOT_SHOWN = re.compile(r"<!--.*?-->", re.DOTALL)
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def english(name: str) -> str:
    return (REPOSITORY / "README.md" if name == "README" else DOCS / f"{name}.md").read_text(encoding="utf-8")


def chinese(name: str) -> str:
    return (DOCS / "zh" / f"{name}.md").read_text(encoding="utf-8")


def commands(page: str) -> list[tuple[str, list[str] | str]]:
    """Each block's language and lines; comments of shell commands, which are translated, are left out."""
    found: list[tuple[str, list[str] | str]] = []
    for language, text in BLOCK.findall(page):
        if language == "bash":
            lines = text.replace("\\\n", " ").splitlines()
            found.append((language, [" ".join(shlex.split(line, comments=True)) for line in lines]))
        else:
            found.append((language, text))
    return found


def test_every_user_guide_has_a_chinese_page_and_each_links_to_the_other() -> None:
    assert {path.stem for path in (DOCS / "zh").glob("*.md")} == set(GUIDES)
    for name in GUIDES:
        there, back = ("docs/zh", "../..") if name == "README" else ("zh", "..")
        assert f"English · [中文]({there}/{name}.md)" in english(name)
        assert f"[English]({back}/{name}.md) · 中文" in chinese(name)


@pytest.mark.parametrize("name", GUIDES)
def test_a_chinese_page_links_to_chinese_pages_and_says_where_one_is_english(name: str) -> None:
    for text, page in re.findall(r"\[([^\]]*)\]\((?:\.\./)+(\w+)\.md", chinese(name)):
        assert page not in GUIDES or text == "English", f"{name}: {page} is there in Chinese"
        assert page in GUIDES or "英文" in text, f"{name}: {page} is English"


@pytest.mark.parametrize("name", GUIDES)
def test_a_chinese_page_has_the_commands_of_the_english_one(name: str) -> None:
    assert commands(chinese(name)) == commands(english(name))
    assert len(commands(chinese(name))) >= 1


@pytest.mark.parametrize("name", GUIDES)
def test_a_chinese_page_has_the_headings_tables_options_and_tests_of_the_english_one(name: str) -> None:
    first, second = (NOT_SHOWN.sub("", BLOCK.sub("", page)) for page in (english(name), chinese(name)))
    for pattern in (r"--[a-z]\w+", r"tests/[\w/]+\.py", r"zero\d\w*(?:\.json)?", r"#\d+\b", r"\bval/\w+|\bloss/\w+"):
        assert set(re.findall(pattern, first)) == set(re.findall(pattern, second)), pattern
    for page_part in (r"^#+ ", r"^\|[-| ]+\|$", r"^\| "):
        counts = [len(re.findall(page_part, page, re.MULTILINE)) for page in (first, second)]
        assert counts[0] == counts[1], page_part
    assert len(CHINESE.findall(second)) > 500


def test_the_planners_table_is_the_same() -> None:
    rows = [
        re.findall(r"^\| \d+ x \d+ \|.*$", page, re.MULTILINE)
        for page in (english("low_memory"), chinese("low_memory"))
    ]
    assert rows[0] == rows[1] and len(rows[0]) > 15
