"""docs/troubleshooting.md answers every problem that users of the original reported, in the words of its messages."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# Of ByteDance-Seed/Bagel, as users' reports were sorted by problem.
ISSUES = {
    "host memory": (121, 172, 180, 215),
    "memory of the GPU": (157,),
    "cards": (273, 290),
    "saving": (71, 90, 139, 151, 160, 204, 218),
    "not loaded": (43,),
    "another model": (80, 110),
    "arguments": (93,),
    "position tables": (127, 131, 140),
    "understanding only": (195,),
    "freezing": (104, 226),
    "NCCL": (156, 245),
    "parquet_info": (89,),
    "formats": (72, 200, 263, 272),
    "lost samples": (278,),
    "batch size": (135,),
}
# What torch, the launcher, the shell and other programs say.
FOREIGN = {
    "exitcode: -9",
    "Signal 9 (SIGKILL) received",
    "size mismatch for latent_pos_embed",
    "weight ... is on the meta device",
    "Must flatten tensors with uniform ...",
    "Cannot copy out of meta tensor",
    "No module named flash_attn",
    "CUDA out of memory",
    "Watchdog caught collective operation timeout",
    "Address already in use",
    "undefined symbol",
    "requires a different Python",
    "CUDA_HOME does not exist",
    "unhandled system error",
    "No space left on device",
    "ibv_reg_mr ... failed",
    "host=node1 was not reachable via ssh",
    "launcher 'pdsh' not installed",
    "Connection refused",
    "Connection closed by peer",
    "Connection reset by peer",
    "Killing subprocess",
    "huggingface-cli: command not found",
    "ranks x --gradient_accumulation_steps",  # a formula
}
COMMAND = re.compile(r"(--\w|bagel-ds |pip |conda |make |apt-get |dmesg |docker |ulimit |hf |ssh-copy-id |deepspeed )")


@cache
def source() -> str:
    """All texts of the package, and what tests find in the output of runs, with `...` in the place of values."""
    texts = []
    files = [path for folder in ("bagel_ds", "tests") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    for path in files:
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%(,?\.?\d*)[dsfg]", "...", node.value))
    return "\n".join(texts)


def is_said(message: str) -> bool:
    """Whether the package says each part of this between its `...`, which stand for values and parts of their own."""
    parts = message.removeprefix("waiting for ").split("...")  # which machine/waiting.py puts before
    return all(part.strip(" ,;:") in source() for part in parts)


@pytest.mark.parametrize("problem", ISSUES)
def test_each_reported_problem_is_found_by_its_issue_number(problem: str) -> None:
    index = PAGE.partition("\n## Issues of the original\n")[2]
    answers = PAGE.partition("\n## Issues of the original\n")[0]
    for number in ISSUES[problem]:
        assert re.search(rf"#{number}\b", answers), f"no answer names #{number}"
        assert re.search(rf"^\|[^|]*#{number}\b[^|]*\|[^|]*\| \[", index, re.MULTILINE), f"the list lacks #{number}"


@pytest.mark.parametrize(
    "words",
    ["SIGKILL at load", "hang at step 0", "loss 11", "weight on meta device", "NCCL timeout", "OOM", "NaN", "KeyError"]
    + ["Signal 9", "size mismatch", "meta tensor", "OutOfMemoryError", "ChildFailedError", "stuck", "num_used_data"],
)
def test_the_words_that_people_type_are_found(words: str) -> None:
    assert words.lower() in " ".join(PAGE.split()).lower()


def quoted(page: str) -> set[str]:
    """What stands between backticks outside blocks."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    return {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)}


def test_the_chinese_page_quotes_the_same_messages_commands_and_options() -> None:
    assert quoted((REPOSITORY / "docs" / "zh" / "troubleshooting.md").read_text(encoding="utf-8")) == quoted(PAGE)


def test_quoted_messages_are_those_of_the_code() -> None:
    messages = {span for span in quoted(PAGE) if " " in span and not COMMAND.match(span)}
    assert len(messages) > 25
    unknown = {message for message in messages - FOREIGN if not is_said(message)}
    assert unknown == set()
    assert FOREIGN <= messages


def test_what_another_program_says_is_not_taken_for_ours() -> None:
    assert not is_said("weight ... is on the meta device") and is_said("this run's memory plan: ...")


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (
            "troubleshooting.md",
            r"(\d+) to (\d+) GiB with `zero3_nvme_split.json`, (\d+) to (\d+) with .*?less than (\d+)",
        ),
        (
            "zh/troubleshooting.md",
            r"`zero3_nvme_split.json` 是 (\d+) 到 (\d+) GiB，.*?时 (\d+) 到 (\d+)，.*?不到 (\d+)",
        ),
    ],
)
def test_the_host_memory_it_names_is_the_planners(page: str, said: str) -> None:
    """Of training all weights, as in the table of docs/low_memory.md."""
    docs = REPOSITORY / "docs"
    table = re.findall(r"^\| \d+ x \d+ \|.*$", (docs / "low_memory.md").read_text(encoding="utf-8"), re.MULTILINE)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table]
    hosts: dict[str, list[int]] = {"nvme": [], "cpu": [], "gpu": []}
    for _, _, _, settings, _, _, host, *_ in rows:
        if "lora" not in settings:
            hosts["nvme" if "nvme" in settings else "cpu" if "cpu" in settings else "gpu"].append(int(host))
    found = re.search(said, " ".join((docs / page).read_text(encoding="utf-8").split()))
    assert found
    nvme, cpu = hosts["nvme"], hosts["cpu"]
    assert [int(number) for number in found.groups()[:4]] == [min(nvme), max(nvme), min(cpu), max(cpu)]
    assert max(hosts["gpu"]) < int(found[5])


@pytest.mark.parametrize("page", ["troubleshooting.md", "zh/troubleshooting.md"])
def test_the_packs_it_names_are_the_planners(page: str) -> None:
    docs = REPOSITORY / "docs"
    row = re.compile(r"^\| (\d+) x (\d+) \|[^|]*\|[^|]*\| `zero3_cpu\.json` \| ([\d,]+) \|", re.MULTILINE)
    planned = {found[1] + " x " + found[2]: found[3] for found in row.finditer((docs / "low_memory.md").read_text())}
    text = " ".join((docs / page).read_text(encoding="utf-8").split())
    named = re.findall(r"([\d,]+) (?:tokens(?: here)? \(planned\)|token 的 pack（规划值）)", text)
    assert named == [planned["1 x 24"], planned["2 x 40"]]
    assert planned["1 x 24"] == planned["2 x 24"], "a card of 24 GB, whichever the number"


def test_no_line_begins_with_an_issue_number() -> None:
    """Such a line is a heading for the site, which needs no space behind `#`."""
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("**/*.md")]
    assert [str(page) for page in pages if re.search(r"^#+\d", page.read_text(encoding="utf-8"), re.MULTILINE)] == []
