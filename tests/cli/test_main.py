"""The bagel-ds command: exit codes, messages, and that asking for help costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bagel_ds
from bagel_ds.arguments.options import all_options
from bagel_ds.arguments.page import arguments_page
from bagel_ds.cli import main
from bagel_ds.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def test_the_page_of_arguments_is_current() -> None:
    page = (REPOSITORY / "docs" / "arguments.md").read_text(encoding="utf-8")
    assert page == arguments_page(), "run: bagel-ds arguments > docs/arguments.md"


def test_the_page_names_every_argument_and_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["arguments"]) == 0
    page = capsys.readouterr().out
    assert all(f"| `{name}` |" in page for name in all_options())
    assert all(f"| {preset.stem} |" in page for preset in (REPOSITORY / "ds_configs").glob("*.json"))


def test_help_of_every_command_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in ((["--help"], ["demo", "arguments"]), (["demo", "--help"], ["--out", "--seed"])):
        with pytest.raises(SystemExit) as caught:
            main.main(words)
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in expected)


@pytest.mark.parametrize("words", [[], ["nosuch"], ["demo"], ["demo", "--out"]])
def test_wrong_usage_exits_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(words)
    assert caught.value.code == 2
    assert "usage: bagel-ds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "remedy"), [("gnerate", "did you mean 'generate'?"), ("xyz", "the nearest known ones are ")]
)
def test_an_unknown_command_names_the_nearest(word: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main([word, "--prompt", "a cat"])
    assert caught.value.code == 2
    assert f"bagel-ds: error: {word!r} is not a command; {remedy}" in capsys.readouterr().err


def test_a_users_mistake_is_a_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> None:
        raise UserError("the folder is full")

    monkeypatch.setattr(main, "_arguments", fail)
    assert main.main(["arguments"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "bagel-ds: the folder is full\n" and captured.out == ""


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(main, "_arguments", fail)
    with pytest.raises(RuntimeError):
        main.main(["arguments"])


def test_help_imports_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys\n"
        "from bagel_ds.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "main(['arguments'])\n"
        "from bagel_ds.arguments.run_config import parse_arguments\n"
        "import bagel_ds.zero.config.resolve\n"
        "parse_arguments([])\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert ran.returncode == 0, ran.stderr


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["--version"])
    assert capsys.readouterr().out.strip() == f"bagel-ds {bagel_ds.__version__}"
