"""What the README promises is what the other pages say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import bagel_ds

REPOSITORY = Path(__file__).parents[1]


def page(name: str) -> str:
    return " ".join((REPOSITORY / name).read_text(encoding="utf-8").split())


def page_lines(name: str) -> list[str]:
    return (REPOSITORY / name).read_text(encoding="utf-8").splitlines()


def test_what_to_change_first_is_ranked_the_same_everywhere() -> None:
    """docs/low_memory.md has the list; the README its first three, and no page another first."""
    listed = re.findall(r" (\d)\. \*\*(.+?)\*\*", page("docs/low_memory.md"))
    first = [name for _, name in sorted(listed)][:3]
    assert first == ["Where things are kept.", "`--ema_dtype bf16`", "`--max_num_tokens`."]
    readme = page("README.md").partition("Running out of memory?")[2]
    places = [readme.index(words) for words in ("things are kept", "--ema_dtype bf16", "--max_num_tokens")]
    assert places == sorted(places) and "(docs/low_memory.md#what-to-change-first)" in readme
    for name in ("README.md", "docs/arguments.md", "docs/low_memory.md", "docs/migration.md"):
        assert not re.search(r"(lower|reduce) (it|`?--max_num_tokens`?) first", page(name), re.IGNORECASE), name


@pytest.mark.parametrize("name", ["README.md", "docs/zh/README.md"])
def test_the_hardware_table_has_rows_of_the_planners(name: str) -> None:
    """Those of docs/low_memory.md, which a test compares with the planner."""
    planned = set()
    for line in page_lines("docs/low_memory.md"):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if re.fullmatch(r"\d+ x \d+", cells[0] if cells else ""):
            gpus, ram, _, settings, tokens, gpu, host = cells[:7]
            planned |= {(gpus, size.strip(), settings, tokens, gpu, host) for size in ram.split(",")}
    row_of = re.compile(r"\| (\d+ x \d+) GB[,，] ?(\d+) GB \| [^|]+ \| ([^|]+) \| ([\d,]+) \| (\d+)[,、] ?(\d+) \|")
    rows = [row_of.fullmatch(line) for line in page_lines(name)]
    shown = [row.groups() for row in rows if row]
    assert len(shown) == 5 and set(shown) <= planned


def test_checkpoints_of_the_original_are_promised_as_weights_only() -> None:
    readme, migration = page("README.md"), page("docs/migration.md")
    assert "your checkpoints work unchanged" not in readme
    assert "its optimizer states are not read" in readme and "its optimizer files are not read" in migration
    assert "as weights to start from" in readme and "as weights to start from" in migration


def test_links_between_pages_lead_somewhere() -> None:
    for source in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("**/*.md")]:
        text = source.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", text):
            name, anchor = link
            if "://" in name:
                continue
            target = source.parent / name if name else source
            assert target.exists(), f"{source.name}: {name}"
            if anchor and target.suffix == ".md":
                heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                heads = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head) for head in heads]
                slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
                assert anchor[1:] in slugs, f"{source.name}: {name}{anchor}"


def test_the_newest_release_of_the_changelog_is_the_packages_version() -> None:
    released = re.findall(r"^## (\d\S*)", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert released[0] == bagel_ds.__version__
