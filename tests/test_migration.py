"""docs/migration.md maps every argument of the originals and the guides' launcher lines; the tests it names exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bagel_ds.arguments.options import all_options
from bagel_ds.arguments.run_config import parse_arguments
from bagel_ds.cli.launch_line import Ranks, launched_ranks, read_launch_line
from tests.code_blocks import code_blocks
from tests.guide_commands import BAGEL_MULTI_GPU, BAGEL_MULTI_NODE, BAGEL_SINGLE_GPU, BLOCKMOVING, arguments

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "migration.md"
# The words before the arguments in both guides, the script included.
LAUNCHER_LINES = [
    (
        "CUDA_VISIBLE_DEVICES=0 PYTHONPATH=. CUDA_VISIBLE_DEVICES=0 torchrun --nnodes=1 --node_rank=0 "
        "--nproc_per_node=1 --master_addr=localhost --master_port=29500 train/pretrain_unified_navit.py",
        BAGEL_SINGLE_GPU,
        (1, 1),
    ),
    (
        "PYTHONPATH=. CUDA_VISIBLE_DEVICES=0,1,2,3 torchrun --nnodes=1 --node_rank=0 --nproc_per_node=4 "
        "--master_addr=localhost --master_port=29500 train/pretrain_unified_navit.py",
        BAGEL_MULTI_GPU,
        (4, 4),
    ),
    (
        "PYTHONPATH=. torchrun --nnodes=2 --node_rank=1 --nproc_per_node=8 --master_addr=10.0.0.1 --master_port=29500 "
        "train/pretrain_unified_navit.py",
        BAGEL_MULTI_NODE,
        (16, 8),
    ),
    (
        "torchrun --nnodes=1 --node_rank=0 --master_addr=localhost --master_port=29501 --nproc_per_node=4 "
        "-m train.pretrain_unified_navit",
        BLOCKMOVING,
        (4, 4),
    ),
]


def with_our_script(line: str) -> list[str]:
    """The launcher's words with only the script replaced, as the page says."""
    line = line.replace("train/pretrain_unified_navit.py", "launch/train.py --ds_config zero3.json")
    return shlex.split(line.replace("train.pretrain_unified_navit", "bagel_ds.train --ds_config zero3.json"))


def section(name: str) -> str:
    return PAGE.read_text(encoding="utf-8").partition(f"\n## {name}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(("launcher", "guide", "ranks"), LAUNCHER_LINES)
def test_the_guides_torchrun_lines_work_with_only_the_script_replaced(
    launcher: str, guide: str, ranks: tuple[int, int]
) -> None:
    found = read_launch_line([*with_our_script(launcher), *arguments(guide)])
    assert launched_ranks(found.launcher) == Ranks(*ranks)
    assert found.training == ["--ds_config", "zero3.json", *arguments(guide)]
    given = [word.partition("=")[0] for word in found.launcher if word.startswith("--")]
    rows = section("torchrun")
    assert given and all(f"| `{option} " in rows for option in given)


def test_the_pages_torchrun_line_is_the_first_guides() -> None:
    (line,) = (line for block in code_blocks(PAGE) for line in block if "torchrun" in line and "--num_shard" in line)
    found = read_launch_line(shlex.split(line))
    launcher = shlex.split(LAUNCHER_LINES[1][0])[:-1]
    assert found.launcher == launcher
    added = ["--ds_config", "zero3.json", "--ema_dtype", "bf16"]
    assert parse_arguments(found.training).values() == parse_arguments([*arguments(BAGEL_MULTI_GPU), *added]).values()


def test_every_argument_of_the_originals_is_mapped() -> None:
    """Ours are marked so in their help, and need no mapping."""
    theirs = {name for name, option in all_options().items() if not option.metadata["help"].startswith("(ours)")}
    named = set(re.findall(r"`(\w+)`", section("Arguments")))
    assert len(theirs) > 70
    assert theirs - named == set()


def test_every_test_that_a_page_names_exists() -> None:
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("**/*.md")]
    named = {name for page in pages for name in re.findall(r"tests/[\w/]+\.py", page.read_text(encoding="utf-8"))}
    assert len(named) > 40
    assert {name for name in named if not (REPOSITORY / name).is_file()} == set()


def test_both_guides_sections_are_in_the_table() -> None:
    rows = section("Both guides, command by command")
    for chapter in "1.2 2.1 2.3 2.4 3.1 4.1 4.2 4.3 5.1 5.4 6.1 6.2 6.3 7.1 7.2".split():
        assert re.search(rf"^\| {re.escape(chapter)} ", rows, re.MULTILINE), chapter
    for line in rows.splitlines():
        if line.startswith("| ") and not line.startswith(("| BAGEL guide", "| BlockMoving guide")):
            assert re.search(r"\| (`tests/[\w/.]+`(, )?)+ \|$", line), f"no test: {line}"
