"""Every training and planning command of README and docs/ fits the machine that the line above it names.

Such a line is `# fits 4 x 80 GB GPUs, 128 GB of RAM and 1000 GB of NVMe`, or `# does not fit ...`; hosts and NVMe are
named where they matter. What a command leaves out (`...`) are the arguments of README's own training command.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from bagel_ds.cli.main import main
from tests.code_blocks import code_blocks
from tests.guide_commands import GUIDE_COMMANDS, arguments

REPOSITORY = Path(__file__).parents[1]
# Chinese pages have the same commands (tests/test_docs_chinese.py).
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
MACHINE = re.compile(
    r"(?P<fits>fits|does not fit) (?:(?P<hosts>\d+) hosts of )?(?P<gpus>\d+) x (?P<gpu>\d+) GB GPUs(?: and|,) "
    r"(?P<ram>\d+) GB of RAM(?: and (?P<nvme>\d+) GB of NVMe)?"
)
ROW = re.compile(
    r"\| (?P<guide>[^|]+?) \| (?:(?P<hosts>\d+) hosts of )?(?P<gpus>\d+) x (?P<gpu>\d+) GB, (?P<ram>\d+) GB RAM"
    r"(?:, (?P<nvme>\d+) GB NVMe)? \| (?:`(?P<settings>[^`]+)`|as it is) \|"
)
GUIDES = {
    "BAGEL guide, one GPU": "bagel-single-gpu",
    "BAGEL guide, 4 GPUs": "bagel-multi-gpu",
    "BAGEL guide, several hosts": "bagel-multi-node",
    "BlockMoving guide": "blockmoving",
}


class Example(NamedTuple):
    place: str
    words: tuple[str, ...]
    remark: str  # the line above

    def __str__(self) -> str:
        return self.place


def examples(page: Path) -> Iterator[Example]:
    """Training and planning commands in the page's blocks of code."""
    for block in code_blocks(page):
        for remark, line in zip(["", *block], block):
            if re.match(r"\s*(\w+=\S* )*((deepspeed|torchrun) .*launch/train\.py|bagel-ds memory)", line):
                yield Example(f"{page.name}: {' '.join(line.split())[:60]}", tuple(shlex.split(line)), remark.strip())


EXAMPLES = [example for page in PAGES for example in examples(page)]
ROWS = list(ROW.finditer((REPOSITORY / "docs" / "migration.md").read_text(encoding="utf-8")))


def behind_the_script(words: tuple[str, ...]) -> list[str]:
    return list(words[words.index("launch/train.py") + 1 :])


def fits(words: list[str], machine: re.Match[str]) -> bool:
    """Whether training with these arguments fits that machine."""
    ranks = int(machine["hosts"] or 1) * int(machine["gpus"])
    sizes = ["--gpu_memory", machine["gpu"], "--host_memory", machine["ram"], "--nvme", machine["nvme"] or "0"]
    code = main(["memory", "--check", *sizes, "--world_size", str(ranks), "--ranks_per_host", machine["gpus"], *words])
    assert code in (0, 1)
    return code == 0


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_an_example_fits_the_machine_it_names(example: Example) -> None:
    if "<the" in example.words:
        pytest.skip("it stands for the guides' commands: the next test")
    machine = MACHINE.fullmatch(example.remark.removeprefix("# "))
    assert machine, f"above the command should stand which machine it fits, found {example.remark!r}"
    if example.words[0] == "bagel-ds":
        sizes = [
            example.words[example.words.index(option) + 1] for option in ("--gpu_memory", "--host_memory", "--nvme")
        ]
        assert sizes == [machine["gpu"], machine["ram"], machine["nvme"]]
        found = main([*example.words[1:], "--check"]) == 0
    else:
        (whole,) = (other.words for other in EXAMPLES if "--lr" in other.words and "README" in other.place)
        words = [word for word in behind_the_script(example.words) if word != "..."]
        found = fits([*(behind_the_script(whole) if "..." in example.words else []), *words], machine)
    assert found == (machine["fits"] == "fits")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_guides_command_fits_the_machine_it_is_listed_for(row: re.Match[str]) -> None:
    settings = (row["settings"] or "--ds_config zero3.json").split()
    command = arguments(GUIDE_COMMANDS[GUIDES[row["guide"]]])
    assert fits([*command, *settings, "--model_path", "ByteDance-Seed/BAGEL-7B-MoT"], row)


def test_what_the_pages_say_is_lacking_on_80_gb_cards_is(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*arguments(GUIDE_COMMANDS["bagel-multi-gpu"]), "--model_path", "BAGEL-7B-MoT", "--ds_config", "zero3.json"]
    assert main(["memory", "--world_size", "4", "--gpu_memory", "80", "--host_memory", "128", "--json", *words]) == 0
    lacking = f"{json.loads(capsys.readouterr().out)['shortfalls_gib']['gpu']:.1f} GiB"
    pages = [" ".join(page.read_text(encoding="utf-8").split()) for page in PAGES]
    assert sum(f"need {lacking} more" in page for page in pages) == 1  # README
    assert sum(f"needs {lacking} more than cards of 80 GB have" in page for page in pages) == 1  # migration
    assert sum(f"all but {lacking} per card" in page for page in pages) == 1  # low_memory


def test_examples_and_rows_were_found() -> None:
    assert len(EXAMPLES) >= 5 and {row["guide"] for row in ROWS} == set(GUIDES)
