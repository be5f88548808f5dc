"""Whatever stdout and stderr lead to: a closed pipe, a full disk, an encoding without the letters that are needed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.small_data import byte_tokenizer, conversation, write_conversations

REPOSITORY = Path(__file__).parents[2]
MODULE = [sys.executable, "-m"]
SIGPIPE = 141
COMMANDS = [
    [*MODULE, "bagel_ds.cli.main", "--help"],
    [*MODULE, "bagel_ds.cli.main", "--version"],
    [*MODULE, "bagel_ds.cli.main", "arguments"],
    [*MODULE, "bagel_ds.cli.main", "memory", "--help"],
    [*MODULE, "bagel_ds.cli.main", "memory", "--model", "7b", "--json"],
    [*MODULE, "bagel_ds.cli.main", "export", "--help"],
    [*MODULE, "bagel_ds.demo.summary", "--help"],
]
TRAINER_HELP = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--help"]


def environment(**extra: str) -> dict[str, str]:
    ours = {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    return {**os.environ, **ours, **extra}


def run(command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    options = {"stderr": subprocess.PIPE, "env": environment(), "encoding": "utf-8", "errors": "replace", **options}
    return subprocess.run(command, timeout=300, check=False, **options)  # type: ignore[call-overload]


def program(folder: Path, text: str) -> list[str]:
    """A command that runs `text`, whose letters reach Python in every locale."""
    (folder / "program.py").write_text(text, encoding="utf-8")
    return [sys.executable, str(folder / "program.py")]


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """The end of a pipe to write to that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[2:]))
def test_a_command_whose_reader_has_gone_ends_silently(command: list[str], closed_pipe: int) -> None:
    ran = run(command, stdout=closed_pipe)
    assert (ran.returncode, ran.stderr) == (SIGPIPE, "")


def test_help_without_a_buffer_is_silent_too(closed_pipe: int) -> None:
    ran = run(COMMANDS[0], stdout=closed_pipe, env=environment(PYTHONUNBUFFERED="1"))
    assert ran.returncode in (0, SIGPIPE) and ran.stderr == "", "argparse itself ignores what it can't print"


def test_a_reader_that_takes_a_few_lines_gets_them(tmp_path: Path) -> None:
    """As `| head`: the page of arguments is longer than what a pipe holds back."""
    process = subprocess.Popen(
        COMMANDS[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), bufsize=1
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "# Arguments\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) in (0, SIGPIPE)
    process.stderr.close()


@pytest.mark.parametrize("where", ["closed pipe", "full disk", "closed"])
def test_the_trainer_needs_no_reader(where: str, closed_pipe: int) -> None:
    with open("/dev/full", "w") as full:
        if where == "closed":
            ran = run(["sh", "-c", 'exec "$@" >&-', "sh", *TRAINER_HELP])
        else:
            ran = run(TRAINER_HELP, stdout=closed_pipe if where == "closed pipe" else full)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_command_says_that_its_output_does_not_fit_the_disk() -> None:
    with open("/dev/full", "w") as full:
        ran = run(COMMANDS[2], stdout=full)
    assert (ran.returncode, ran.stderr) == (2, "the output can't be written: No space left on device\n")


def test_an_error_of_another_pipe_is_not_taken_for_the_readers(tmp_path: Path) -> None:
    code = "from bagel_ds.machine.output import run_command\nimport os\n"
    code += "def other():\n    read, write = os.pipe()\n    os.close(read)\n    os.write(write, b'x')\n"
    ran = run(program(tmp_path, code + "run_command(other)"), stdout=subprocess.PIPE)
    assert ran.returncode == 1 and "BrokenPipeError" in ran.stderr


# What a run does: a line, a bar, a warning, words from a signal handler; the reader goes after the first line.
TRAINING = """
import logging, os, sys
from pathlib import Path
from bagel_ds.machine.output import outlive_the_reader, say
from contextlib import closing
from bagel_ds.train.metrics.console import setup_logging
from bagel_ds.train.metrics.log import MetricsLog
outlive_the_reader()
setup_logging(sys.argv[1], 0)
with closing(MetricsLog(sys.argv[1], 0, total_steps=50)) as metrics:
    for step in range(50):
        metrics.log(step, {"loss/ce": 1.0})
        metrics.advance()
        if step == 0:
            print("begun", flush=True)
            sys.stdin.readline()
logging.getLogger("bagel_ds").warning("saved")
say("stopping")
print("done", file=sys.stderr)
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_run_goes_on_when_its_reader_goes(unbuffered: str, tmp_path: Path) -> None:
    """As with `| tee log` after Ctrl-C, which ends tee at once while the run still saves."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(PYTHONUNBUFFERED=unbuffered, BAGEL_DS_PROGRESS="1"),
    )
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(120, process.kill)
    timer.start()
    lines = iter(process.stdout.readline, b"")
    assert any(b"begun" in line for line in lines), "ended before it began"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait() == 0
    timer.cancel()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 51 and lines[-1].endswith("WARNING: saved")


# ------------------------------------------------------------------------------------------------------- encodings
ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]
named = partial(pytest.mark.parametrize, "encoding", ids=lambda given: " ".join(f"{k}={v}" for k, v in given.items()))


@named([ENCODINGS[0], ENCODINGS[-1]])
def test_a_message_with_letters_that_the_terminal_lacks_is_no_traceback(
    encoding: dict[str, str], tmp_path: Path
) -> None:
    command = [*MODULE, "bagel_ds.cli.main", "index", "--model_path", "模型", "--dataset_config_file", "données.yaml"]
    ran = run(command, env=environment(**encoding), stdout=subprocess.PIPE, cwd=tmp_path)
    assert ran.returncode == 2 and "no such folder" in ran.stderr and "Traceback" not in ran.stderr, ran.stderr
    missing = ["--resume_from", "模型", "--stop_after", "Œ"]
    trained = run([*TRAINER_HELP[:-1], *missing], env=environment(**encoding), stdout=subprocess.PIPE, cwd=tmp_path)
    assert trained.returncode == 2 and trained.stderr.startswith("ERROR: --stop_after"), trained.stderr


@named(ENCODINGS)
def test_data_with_letters_that_the_terminal_lacks_are_shown_as_escapes(
    encoding: dict[str, str], tmp_path: Path
) -> None:
    code = "from bagel_ds.machine.output import run_command\nrun_command(lambda: print('一只 \\udcff') or 0)"
    ran = run(program(tmp_path, code), env=environment(**encoding), stdout=subprocess.PIPE)
    assert ran.stderr == "" and "\\udcff" in ran.stdout
    assert ("\\u4e00" in ran.stdout) != ("一只" in ran.stdout)


@named([ENCODINGS[0], ENCODINGS[-1]])
def test_the_log_of_a_run_is_whole_in_its_file_and_never_fails(encoding: dict[str, str], tmp_path: Path) -> None:
    code = TRAINING.replace('warning("saved")', 'info("gespeichert: 图 \\udcff é")').replace(".readline()", "")
    command = [*program(tmp_path, code), str(tmp_path)]
    ran = run(command, env=environment(**encoding), stdout=subprocess.PIPE)
    assert ran.returncode == 0 and "Traceback" not in ran.stderr and "Logging error" not in ran.stderr, ran.stderr
    assert "gespeichert: " in ran.stdout and "\\udcff" in ran.stdout
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()[-1].endswith("gespeichert: 图 \\udcff é")


@named(ENCODINGS)
def test_progress_bars_do_without_letters_that_the_terminal_lacks(encoding: dict[str, str], tmp_path: Path) -> None:
    code = "import sys\nfrom bagel_ds.machine.output import run_command\n"
    code += "from bagel_ds.data.index.progress import RowProgress\n"
    code += "sys.stderr.isatty = lambda: True\n"
    code += "def show():\n    with RowProgress(3, 'lire é 图', True) as bar:\n        bar.update(1)\n    return 0\n"
    code += "sys.exit(run_command(show))"
    ran = run(program(tmp_path, code), env=environment(**encoding))
    assert ran.returncode == 0 and "0/3" in ran.stderr and "Traceback" not in ran.stderr, ran.stderr


def test_a_file_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    code = "from bagel_ds.machine.output import run_command\nimport sys\n"
    code += "sys.exit(run_command(lambda: len('caf\\udce9.parquet'.encode()) and 0))"
    ran = run(program(tmp_path, code), stdout=subprocess.PIPE)
    assert ran.returncode == 2 and "the file name caf\\udce9.parquet is not valid" in ran.stderr


READER = """
import sys
from pathlib import Path
from bagel_ds.data.config.dataset_config import load_dataset_config
from bagel_ds.data.streams.opening import open_streams
from bagel_ds.data.streams.stream import SampleOptions
from bagel_ds.model_folder.tokenizer import load_tokenizer
from bagel_ds.machine.output import run_command

def show():
    config = load_dataset_config(str(Path(sys.argv[1], "data.yaml")), None)
    tokenizer = load_tokenizer(Path(sys.argv[1], "model"))
    (stream,) = open_streams(config, tokenizer, SampleOptions(max_num_tokens_per_sample=512))
    print(stream.datasets, stream.rows, len(stream.bad_rows))
    return 0

sys.exit(run_command(show))
"""


def test_files_in_other_languages_are_read_whatever_the_locale(tmp_path: Path) -> None:
    """Conversations and dataset config hold letters of their own; the paths to them do not."""
    byte_tokenizer(tmp_path / "model")
    paths = write_conversations(tmp_path / "data", [conversation("你好?", "是的。") for _ in range(3)])
    text = f"vlm_sft:\n  # 对话\n  dataset_names: [{{name: 对话, data_dir: {paths['data_dir']}, "
    (tmp_path / "data.yaml").write_text(f"{text}jsonl_path: {paths['jsonl_path']}}}]\n", encoding="utf-8")
    command = [*program(tmp_path, READER), str(tmp_path)]
    ran = run(command, env=environment(**ENCODINGS[-1]), stdout=subprocess.PIPE)
    assert (ran.returncode, ran.stdout) == (0, "('\\u5bf9\\u8bdd',) 3 0\n"), ran.stderr
