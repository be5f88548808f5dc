"""bench/on_gpu.sh: each piece leaves its JSON whatever becomes of it, and the table tells of all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import on_gpu, on_gpu_table
from bench.on_gpu import PIECES, Piece
from tests.launch import REPOSITORY

STUB = """
import json, os, subprocess, sys, time
print("a library's remark {")
do = sys.argv[2]
if do == "fails":
    sys.exit("no such luck")
if do == "waits":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    open(sys.argv[3], "w").write(str(child.pid))
    time.sleep(600)
if do != "silent":
    print(json.dumps({"device": os.environ["DS_ACCELERATOR"], "words": sys.argv[1:]}, indent=1))
"""
TESTS = """
import os, pytest
def test_good(): assert os.environ["BAGEL_GPU_REHEARSAL"] == "1"
def test_bad(): assert False
@pytest.mark.skip(reason="needs 2 GPUs")
def test_left(): pass
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Which pieces run; its report is shown by the words it was given."""
    file = tmp_path / "stub.py"
    file.write_text(STUB)
    monkeypatch.setitem(on_gpu_table.NUMBERS, "stub", lambda report: " ".join(report["words"]))
    return file


def read(folder: Path, piece: str) -> dict[str, Any]:
    return json.loads((folder / f"{piece}.json").read_text())


def test_a_piece_that_fails_keeps_the_others_and_the_table_tells_of_all(
    stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = tmp_path / "test_stub.py"
    tests.write_text(TESTS)
    out = tmp_path / "out"
    pieces = [
        Piece("bad", str(stub), "", "fails"),
        Piece("silent", str(stub), "", "silent"),
        Piece("tests", str(tests)),
        Piece("good", str(stub), "at full size", "'at toy|size'"),
        Piece("other", str(stub), "", "never run"),
    ]
    assert on_gpu.main(["good", "bad", "silent", "tests", "--rehearse", "--out", str(out)], pieces) == 1

    good = read(out, "good")
    assert (good["exit_code"], good["device"], good["rehearsed"]) == (0, "CPU", True)
    assert good["report"] == {"device": "cpu", "words": ["--json", "at toy|size"]}
    assert good["command"] == f"python {stub} --json 'at toy|size'" and "seconds" in good
    assert set(good["versions"]) >= {"torch", "deepspeed", "python", "cuda", "driver"}
    bad = read(out, "bad")
    assert (bad["exit_code"], bad["report"]) == (1, None) and "no such luck" in bad["output_tail"]
    assert (read(out, "silent")["exit_code"], read(out, "silent")["report"]) == (0, None)
    counted = read(out, "tests")["report"]
    assert (counted["passed"], counted["failed"]) == (1, ["test_bad"]) and "2 GPUs" in counted["skipped"]["test_left"]

    capsys.readouterr()
    assert on_gpu.main(["table", "--out", str(out)], pieces) == 0
    text = (out / "table.md").read_text()
    assert capsys.readouterr().out == text
    assert text.startswith("Rehearsed at toy size") and "torch " in text
    rows = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if row.startswith("| ")}
    assert "| **exit code 1** |" in rows["bad"] and "| no report |" in rows["silent"]
    assert "1 passed, 1 skipped, failed: test_bad" in rows["tests"]
    assert rows["good"].endswith("| --json at toy\\|size |") and "| ok |" in rows["good"]
    assert "| not run |" in rows["other"]


def test_all_pieces_that_succeed_are_a_success(stub: Path, tmp_path: Path) -> None:
    pieces = [Piece(name, str(stub), "", "fine") for name in ("one", "two")]
    assert on_gpu.main(["all", "--rehearse", "--out", str(tmp_path / "out")], pieces) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json")) == ["one.json", "two.json"]


def test_a_piece_past_the_limit_is_ended_with_what_it_started(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpu, "ENDING", 1.0)
    out, child = tmp_path / "out", tmp_path / "child"
    pieces = [Piece("slow", str(stub), "", f"waits {child}"), Piece("next", str(stub), "", "fine")]
    assert on_gpu.main(["all", "--rehearse", "--out", str(out), "--limit", "10"], pieces) == 1
    assert read(out, "slow")["exit_code"] == 124 and read(out, "next")["exit_code"] == 0
    pid = int(child.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    on_gpu.main(["table", "--out", str(out)], pieces)
    assert "**past the limit**" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["depth", "--rehearse", "--out", "out"], "no piece depth; there are: tests-model, "),
        (["train-qlora"], "--out DIR is needed"),
    ],
)
def test_a_wrong_word_is_one_message(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        on_gpu.main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        on_gpu.main(["train-qlora", "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and "--rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert on_gpu.main(["table", "--out", str(tmp_path)]) == 2


def test_every_gpu_test_and_piece_is_listed_and_its_script_is_there() -> None:
    command = ["bash", str(REPOSITORY / "bench" / "on_gpu.sh"), "list"]
    listed = subprocess.run(
        command,
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHON": sys.executable},
    ).stdout
    assert [line.split()[0] for line in listed.splitlines()] == [piece.name for piece in PIECES]
    assert len({piece.name for piece in PIECES}) == len(PIECES)
    for piece in PIECES:
        assert (REPOSITORY / piece.script).is_file() and piece.numbers
        assert piece.is_test or piece.rehearsal, "a benchmark has a toy size"
    tests = {f"tests/gpu/{path.name}" for path in (REPOSITORY / "tests" / "gpu").glob("test_*.py")}
    assert tests == {piece.script for piece in PIECES if piece.is_test}
