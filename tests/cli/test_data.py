"""bagel-ds index, check and inspect: with the trainer's own arguments, on the demo's data."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bagel_ds.cli import main
from bagel_ds.demo import write_demo

NUMBERS = {
    *("packing_efficiency", "imbalance_llm", "imbalance_vision", "packs", "samples", "dropped", "max_wait"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, 0)
    return folder


@pytest.fixture(autouse=True)
def log() -> Iterator[logging.Logger]:
    """The commands set up the log of their process: put back what was there."""
    logger = logging.getLogger("bagel_ds")
    before = (list(logger.handlers), logger.level)
    yield logger
    logger.handlers[:], logger.level = before


@pytest.fixture
def words(written: Path) -> list[str]:
    budgets = ["--max_num_tokens", "1024", "--expected-num-tokens=900", "--max_num_tokens_per_sample", "900"]
    return ["--model_path", str(written / "model"), "--dataset_config_file", str(written / "example.yaml"), *budgets]


def test_inspect_prints_the_plans_numbers(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["inspect", *words, "--world_size", "4", "--steps", "20", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert set(numbers) >= NUMBERS
    assert numbers["packs"] == 80 and numbers["dropped"] == 0 and 0.9 < numbers["packing_efficiency"] <= 1


def test_inspect_follows_the_trainers_switches(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["inspect", *words, "--visual_gen", "False", "--steps", "3", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["samples_by_group"]) == {"vlm_sft", "interleave_reasoning"}


def test_inspect_shows_packs_and_draws_them(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["inspect", *words, "--packs", "2", "--steps", "2", "--out", str(tmp_path / "seen")]) == 0
    printed = capsys.readouterr().out
    assert "pack 0: " in printed and "pack 1: " in printed and "packing efficiency" in printed
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == ["pack_0.png", "pack_1.png", "packs.txt"]
    assert (tmp_path / "seen" / "packs.txt").read_text().strip() in printed


def test_check_tells_the_same_in_both_forms(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["check", *words, "--workers", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trainable"] and all(data["usable"] == data["rows"] for data in found["datasets"])
    assert main.main(["check", *words, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{data['group']} / {data['dataset']}" in printed for data in found["datasets"])


def test_check_of_data_that_training_would_refuse_is_a_message(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["check", *words, "--workers", "1", "--max_num_tokens_per_sample", "20", "--json"]) == 2
    captured = capsys.readouterr()
    assert not json.loads(captured.out)["trainable"]
    assert "training would refuse this data" in captured.err and "unified_edit/seedxedit_multi" in captured.err


def test_shares_of_the_index_are_the_whole(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fresh = tmp_path / "demo"
    shutil.copytree(written, fresh, ignore=shutil.ignore_patterns(".bagel_ds_index"))
    words = ["--model_path", str(fresh / "model"), "--dataset_config_file", str(fresh / "example.yaml")]
    totals = []
    for share in ("1/2", "2/2"):
        assert main.main(["index", *words, "--shard", share]) == 0
        totals.append(capsys.readouterr())
    assert all("rows/s" in captured.err and "MB/s" in captured.err for captured in totals)
    assert main.main(["index", *words]) == 0
    whole = capsys.readouterr()
    assert "rows/s" not in whole.err, "nothing was left to index"
    rows = [int(captured.out.split(": ")[1].split(" rows")[0].replace(",", "")) for captured in (*totals, whole)]
    assert rows[0] + rows[1] == rows[2] > 0 and min(rows) > 0


def test_index_fails_where_its_result_cannot_be_kept(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with monkeypatch.context() as patched:
        patched.setattr("bagel_ds.data.index.index.index_files", lambda *_: pytest.fail("found out after the work"))
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            assert main.main(["index", *words, "--index_cache", str(folder)]) == 2
            captured = capsys.readouterr()
            assert f"--index_cache {folder} can't be written" in captured.err and captured.out == ""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("bagel_ds.data.index.cache.save_file", full)
        assert main.main(["index", *words, "--index_cache", str(tmp_path / "cache")]) == 2
    captured = capsys.readouterr()
    assert "could not be stored" in captured.err and "No space left on device" in captured.err and captured.out == ""
    assert main.main(["index", *words, "--index_cache", str(tmp_path / "cache")]) == 0


@pytest.mark.parametrize("below", ["", "below"])
def test_inspect_finds_an_unwritable_out_before_the_work(
    below: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("bagel_ds.inputs.data.open_inputs", lambda *_: pytest.fail("found out after the work"))
    assert main.main(["inspect", *words, "--out", str(tmp_path / "file" / below)]) == 2
    captured = capsys.readouterr()
    assert f"--out {tmp_path / 'file' / below} can't be written" in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--packs", "0", "--out", "seen"], "--out seen is for packs, but --packs 0 shows none"),
        (["--packs", "0", "--steps", "0"], "leave nothing to show"),
        (["--json", "--steps", "0"], "--steps 0 leaves none"),
        (["--json", "--pack", "results/nonfinite/step_1"], "--pack leaves none"),
    ],
)
def test_inspect_refuses_what_would_show_nothing(
    given: list[str],
    message: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["inspect", *words, *given]) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["inspect", "--nosuch", "1"], "unknown argument --nosuch"),
        (["check"], "no such folder"),
        (["index", "--visual_gen", "False", "--visual_und", "False"], "nothing to train"),
    ],
)
def test_mistakes_are_one_message(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("bagel-ds: ") and message in captured.err and captured.out == ""


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b"])
def test_a_share_that_does_not_exist_is_refused(shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["index", "--shard", shard])
    assert caught.value.code == 2
    assert f"such as 1/4, found '{shard}'" in capsys.readouterr().err


def test_the_commands_need_no_deepspeed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    code = "import sys\nsys.modules['deepspeed'] = None\n"
    code += "from bagel_ds.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    command: list[Any] = [sys.executable, "-c", code, "inspect", *words, "--packs", "1", "--steps", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (["check", "--worker", "3"], "the nearest known one is --workers "),
        (["inspect", "--pakcs", "3"], "the nearest known one is --packs "),
        (["index", "--sahrd", "1/2"], "the nearest known one is --shard "),
        (["memory", "--model", "7b", "--word_size", "3"], "the nearest known one is --world_size "),
        (["memory", "--model", "7b", "--num_gpus", "3"], "pass the number of ranks as --world_size"),
        (["check", "--num_gpus", "3"], "leave it out"),
        (
            ["check", "--max_num_tokes", "3"],
            "the nearest known one is --max_num_tokens ",
        ),  # a trainer's, which it takes
    ],
)
def test_suggestions_know_the_commands_own_options(
    command: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(command) == 2
    message = capsys.readouterr().err
    assert meant in message and "before launch/train.py" not in message and "--help lists all" not in message


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["export", "a", "--out", "b", "--max_shard_sise", "3"], "did you mean --max_shard_size?"),
        (["demo", "--out", "b", "--sede", "3"], "did you mean --seed?"),
        (["stop", "a", "--total_steps", "3"], "bagel-ds stop: error: unrecognized arguments: --total_steps 3\n"),
        (["export", "a", "--out", "b", "--lr", "3"], "bagel-ds export: error: unrecognized arguments: --lr 3\n"),
    ],
)
def test_commands_that_take_no_training_options_suggest_none(
    command: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(command)
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_ctrl_c_ends_a_check_and_its_processes_without_a_traceback(words: list[str]) -> None:
    """A terminal sends it to all of them, most of all while they are still importing."""
    command = [sys.executable, "-m", "bagel_ds.cli.main", "check", *words, "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, env=environment, **streams)  # type: ignore[call-overload]
    timer = threading.Timer(180, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    while not psutil.Process(process.pid).children():
        assert process.poll() is None, "it ended before it started processes"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    printed, said = process.communicate()
    timer.cancel()
    assert process.returncode == 130 and printed == "" and "Traceback" not in said, said
