"""Every command that the documentation shows is one: its program, its options and their values are parsed.

Blocks of commands are also run on the demo's model and data, with their paths mapped, here or by the tests that
WALKED names. A block that isn't has a comment above it with the reason: `<!-- not run by a test: ... -->`.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from bagel_ds.arguments.run_config import parse_arguments
from bagel_ds.cli.launch_line import launched_ranks, read_launch_line
from bagel_ds.cli.main import main, make_parser
from bagel_ds.demo import write_demo

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES += sorted(path for path in (REPOSITORY / "docs").glob("**/*.md"))
BLOCK = re.compile(r"^( *)```(\w*)( [\w-]+)?\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
REASON = re.compile(r"<!-- not run by a test: \S.{10,} -->\s*\Z", re.DOTALL)
# Who runs the other blocks: a page, the beginning of a command of the block, and the test that runs it.
WALKED = [
    ("README.md", "bagel-ds memory", "tests/test_docs_examples.py"),
    ("README.md", "bagel-ds generate", "tests/test_docs_commands.py"),
    ("docs/data.md", "bagel-ds convert", "tests/data/test_docs.py"),
    ("docs/data.md", "bagel-ds (index|check)", "tests/test_docs_commands.py"),
    ("docs/inference.md", "bagel-ds (generate|evaluate)|M=", "tests/test_docs_commands.py"),
    ("docs/lora.md", "bagel-ds|deepspeed", "tests/distributed/test_lora_page.py"),
    ("docs/low_memory.md", "bagel-ds memory", "tests/test_docs_examples.py"),
]
# Programs of others, whose options are theirs.
OTHERS = {"pip", "conda", "ssh", "hf", "apt-get", "docker", "cd", "git"}
PLACEHOLDER = re.compile(r"\.\.\.|<.*|.*>|&|the|same")  # as in `... <the same arguments>`


class Command(NamedTuple):
    page: str
    line: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.line[:60]}"


class Block(NamedTuple):
    page: str
    before: str  # the text above
    name: str  # behind the language
    commands: list[Command]


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of commands of a page: those marked bash, and others with lines that begin with `$ `."""
    name = str(page.relative_to(REPOSITORY))
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        lines = found[4].replace("\\\n", " ").splitlines()
        if found[2] != "bash":
            lines = [line.strip()[2:] for line in lines if line.strip().startswith("$ ")]
        commands = [
            Command(name, " ".join(line.split()), tuple(words))
            for line in lines
            if (words := shlex.split(line, comments=True))
        ]
        if commands:
            yield Block(name, text[: found.start()], (found[3] or "").strip(), commands)


BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [command for block in BLOCKS for command in block.commands]


# ------------------------------------------------------------------------------------------------------------ parsing
def parse(words: list[str]) -> None:
    """Raises where a program, an option or a value is none."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if not words:  # only variables
        return
    program = words[0]
    if program in ("deepspeed", "torchrun"):
        parse_launch(words)
    elif program == "bagel-ds":
        parse_own(words[1:])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif program in ("bash", "python", "sbatch"):
        scripts = [word for word in words[1:] if re.fullmatch(r"[\w/.]+\.(py|sh|sbatch)", word)]
        assert scripts and all((REPOSITORY / script).is_file() for script in scripts), words
    else:
        assert program in OTHERS, f"{program} is no program that this test knows"


def parse_launch(words: list[str]) -> None:
    if any(word.endswith("pretrain_unified_navit.py") for word in words):  # the original's, shown to be replaced
        return
    found = read_launch_line(words)
    if "--hostfile" not in found.launcher:
        assert launched_ranks(found.launcher) is not None
    known = torchrun_options() if "torchrun" in words else deepspeed_options()
    assert {word.partition("=")[0] for word in found.launcher if word.startswith("--")} <= known
    training = without_placeholders(found.training)
    if "launch/generate.py" in words:
        parse_own(["generate", *training])
    else:
        parse_arguments(training)


def without_placeholders(words: list[str]) -> list[str]:
    """Words but for those that stand for others; an option's value is kept whatever it is."""
    return [
        word for before, word in zip(["", *words], words) if before.startswith("--") or not PLACEHOLDER.fullmatch(word)
    ]


def deepspeed_options() -> set[str]:
    from bagel_ds.arguments.parse import LAUNCHER_OPTIONS

    return {f"--{name}" for name in LAUNCHER_OPTIONS} | {"--module"}


def torchrun_options() -> set[str]:
    from torch.distributed.run import get_args_parser

    names = {name for action in get_args_parser()._actions for name in action.option_strings}
    return names | {name.replace("-", "_") for name in names} | {f"--{name[2:].replace('_', '-')}" for name in names}


def parse_own(words: list[str]) -> None:
    options, training = make_parser().parse_known_args(without_placeholders(words))
    assert not training or hasattr(options, "training"), f"unknown: {training}"
    line = read_launch_line(training)
    parse_arguments(line.training)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_parsed(command: Command) -> None:
    parse(list(command.words))


@pytest.mark.parametrize("line", ["bagel-ds generate --promt x", "bagel-ds draw", "make demos", "bash launch/none.sh"])
def test_a_wrong_command_is_not_parsed(line: str) -> None:
    with pytest.raises((SystemExit, AssertionError)):
        parse(shlex.split(line))


def test_blocks_that_are_not_run_say_why() -> None:
    """Chinese pages show the commands of the English ones, which another test compares."""
    assert len(BLOCKS) > 30
    for block in BLOCKS:
        runs = [page == block.page and re.match(start, block.commands[0].line) for page, start, _ in WALKED]
        if not any(runs) and not block.page.startswith("docs/zh/"):
            assert REASON.search(block.before), (
                f"{block.page}: {block.commands[0].line} is not run, and doesn't say why"
            )
    for page, start, test in WALKED:
        assert (REPOSITORY / test).is_file()
        assert any(page == block.page and re.match(start, block.commands[0].line) for block in BLOCKS), (page, start)


# ------------------------------------------------------------------------------------------------------------ running
SHORT = ["--num_timesteps", "2", "--max_think_token_n", "2"]
SMALL = {
    "generate": [*SHORT, "--image_shapes", "32", "32"],
    "evaluate": "--val_max_batches 1 --json --max_num_tokens 448 --max_num_tokens_per_sample 448".split(),
    "metric": [*SHORT, "--max_iterations", "1"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which commands are typed, with what they name: the demo's model stands for all models."""
    folder = tmp_path_factory.mktemp("home")
    write_demo(folder / "demo")
    for name in ("models/BAGEL-7B-MoT", "results/checkpoints/step_1000", "results/checkpoints/step_2000"):
        shutil.copytree(folder / "demo" / "model", folder / name)
        shutil.copy(folder / name / "ema.safetensors", folder / name / "model.safetensors")
    for name in ("step_final", "latest"):
        (folder / "results" / "checkpoints" / name).symlink_to("step_2000")
    (folder / "data").mkdir()
    for name in ("my_data.yaml", "data/mine.yaml"):
        shutil.copy(folder / "demo" / "example.yaml", folder / name)
    places = (folder / "demo" / "dataset_info.yaml").read_text()
    (folder / "dataset_info.yaml").write_text(places.replace(" data/", " demo/data/"))
    held_out = shown_in("docs/inference.md", "yaml")
    for size, demos in (("512", "64"), ("256", "32"), ("518", "56"), ("224", "28")):  # the sizes of its pictures
        held_out = held_out.replace(size, demos)
    (folder / "val.yaml").write_text(held_out)
    (folder / "prompts.jsonl").write_text(shown_in("docs/inference.md", "json"))
    return folder


def shown_in(page: str, language: str) -> str:
    """The page's only block in this language."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    (found,) = (block[4] for block in BLOCK.finditer(text) if block[2] == language)
    return found


def run_here(page: str) -> list[Command]:
    own = [start for name, start, test in WALKED if name == page and test == "tests/test_docs_commands.py"]
    commands = [command for block in BLOCKS if block.page == page for command in block.commands]
    return [command for command in commands if any(re.match(start, command.line) for start in own)]


@pytest.mark.parametrize(("page", "commands"), [("README.md", 1), ("docs/inference.md", 6), ("docs/data.md", 3)])
def test_commands_of_a_page_run_in_their_order(
    page: str, commands: int, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    ran = 0
    for command in run_here(page):
        if command.words[0] != "bagel-ds":
            continue
        words = [word.replace("$M", "results/checkpoints/step_final") for word in command.words[1:]]
        code = main([*words, *SMALL.get(words[0], []), *(SMALL["metric"] if "--metric" in words else [])])
        shown = capsys.readouterr()
        assert code == 0, (command.line, shown.err[-2000:], shown.out[-2000:])
        ran += 1
    assert ran == commands
    if page != "docs/data.md":
        assert (home / "teapot.png").is_file()
