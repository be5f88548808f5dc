"""What a run needs is compiled before it loads, by one process at a time; killed builds block nobody."""

from __future__ import annotations

import fcntl
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel_ds.errors import UserError
from bagel_ds.machine import waiting
from bagel_ds.zero import ops
from bagel_ds.zero.ops import Op, build, is_built, needed_ops, remove_stale_locks

REPOSITORY = Path(__file__).resolve().parents[2]

# Builds a part of one line by torch's own means, as DeepSpeed does, and says how often the compiler was called.
BUILDER = """
import sys
from pathlib import Path
from torch.utils.cpp_extension import load
from bagel_ds.zero.ops import Op, build
source = Path(sys.argv[1])
part = Op("tiny_part", "a test", "nothing is compiled", lambda: load("tiny_part", [str(source)]))
build([part])
"""
SOURCE = "#include <Python.h>\nPyMODINIT_FUNC PyInit_tiny_part() { static PyModuleDef m = {}; m.m_base = "
SOURCE += 'PyModuleDef_HEAD_INIT; m.m_name = "tiny_part"; m.m_size = -1; return PyModule_Create(&m); }\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(logging.getLogger("bagel_ds"), "propagate", True)
    caplog.set_level(logging.INFO, "bagel_ds")
    yield caplog


def op(load: object = lambda: None, name: str = "part") -> Op:
    return Op(name, "a test", "zero3.json compiles nothing", load)  # type: ignore[arg-type]


def _raise(error: Exception) -> object:
    raise error


@pytest.mark.parametrize("device, names", [("none", []), ("cpu", ["cpu_adam"]), ("nvme", ["cpu_adam"])])
def test_an_optimizer_off_the_gpu_needs_cpu_adam(device: str, names: list[str]) -> None:
    ds_config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": device}}}
    assert [part.name for part in needed_ops(ds_config)] == names


def test_what_is_compiled_is_said_with_its_time_and_place_and_only_the_first_time(
    folder: Path, log: pytest.LogCaptureFixture
) -> None:
    def load() -> None:
        (folder / "part").mkdir(exist_ok=True)
        (folder / "part" / "part.so").touch()

    build([op(load)])
    assert log.messages == [f"compiling DeepSpeed's part (a test) into {folder}: 1 to 3 minutes, once on this machine"]
    assert is_built(op())
    build([op(load)])
    assert len(log.messages) == 1


def test_a_build_that_lasts_is_said_to_last(
    folder: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "FIRST", 0.0)
    ended = threading.Event()
    monkeypatch.setattr(waiting.logger, "log", lambda _, text, *rest: "to be compiled" in text % rest and ended.set())
    build([op(lambda: ended.wait(60))])
    assert ended.is_set()


def test_a_failing_compiler_is_one_message_with_the_end_of_its_output(folder: Path) -> None:
    output = ["[1/2] c++ " + "-I/include " * 500] + [f"part.cpp:{n}: error: line {n}" for n in range(40)]
    output += ["ninja: build stopped: subcommand failed."]
    failed = RuntimeError("Error building extension 'part': " + "\n".join(output))
    with pytest.raises(UserError) as caught:
        build([op(lambda: _raise(failed))])
    message = str(caught.value)
    assert "DeepSpeed's part (a test) can't be built on this machine" in message and "error: line 39" in message
    assert "zero3.json" in message and str(folder) in message
    assert len(message) < 2000 and "-I/include -I/include -I" not in message and "error: line 3\n" not in message


@pytest.mark.parametrize("error", [ImportError("undefined symbol"), FileNotFoundError(2, "No such file", "c++")])
def test_whatever_else_a_build_fails_of_is_a_message_too(error: Exception, folder: Path) -> None:
    with pytest.raises(UserError, match=f"{type(error).__name__}\n.*(undefined symbol|c..)"):
        build([op(lambda: _raise(error))])


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="can't be compiled into .*file.*set TORCH_EXTENSIONS_DIR"):
        build([op()])


def test_two_processes_compile_one_after_the_other_and_the_second_is_told(
    folder: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "FIRST", 0.01)
    folder.mkdir()
    loaded = threading.Event()
    with (folder / ops._LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=build, args=([op(loaded.set)],))
        thread.start()
        deadline = time.monotonic() + 60
        while not any("another process that compiles into" in line for line in log.messages):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not loaded.is_set()
    thread.join(60)
    assert loaded.is_set()


def test_a_file_system_without_locks_is_no_obstacle(
    folder: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: _raise(OSError(37, "No locks available")))
    loaded = threading.Event()
    build([op(loaded.set)])
    assert loaded.is_set() and any("No locks available" in line for line in log.messages)


def test_ranks_that_start_at_once_compile_once(tmp_path: Path, folder: Path) -> None:
    """Three real processes, a real compiler that notes each call, and the lock of a build that was killed before."""
    source, calls, compiler = tmp_path / "tiny.cpp", tmp_path / "calls", tmp_path / "c++"
    source.write_text(SOURCE)
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-MMD*) echo call >> {calls};; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    (folder / "tiny_part").mkdir(parents=True)
    (folder / "tiny_part" / "lock").touch()
    environment = {**ops.os.environ, "CXX": str(compiler), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BUILDER, str(source)]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    assert calls.read_text().splitlines() == ["call"]
    assert sum("left by a build that was killed" in output for output in outputs) == 1


# ----------------------------------------------------------------------------------------------------- torch's locks
def test_a_lock_without_a_builder_is_removed_and_a_held_one_stays(tmp_path: Path) -> None:
    stale, held = tmp_path / "py311_cpu" / "cpu_adam" / "lock", tmp_path / "cpu_adam" / "lock"
    for lock in (stale, held):
        lock.parent.mkdir(parents=True)
        lock.touch()
    with held.open():
        assert remove_stale_locks(tmp_path, "cpu_adam") == [stale]
    assert held.exists() and not stale.exists()


def test_locks_of_others_stay(tmp_path: Path) -> None:
    """Of other parts, of other programs, and what has the name but is no lock of torch's."""
    full, deep = tmp_path / "cpu_adam" / "lock", tmp_path / "a" / "b" / "cpu_adam" / "lock"
    mine = [tmp_path / "lock", tmp_path / "my_extension" / "lock", tmp_path / "async_io" / "lock", deep, full]
    stale = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    for lock in (*mine, stale):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    full.write_text("not torch's, whose lock is empty")
    assert remove_stale_locks(tmp_path, "cpu_adam") == [stale]
    assert all(lock.exists() for lock in mine)


def test_ranks_that_remove_the_same_locks_do_not_trip_over_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = [tmp_path / name / "cpu_adam" / "lock" for name in ("py311_cpu", "py312_cpu")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    look = ops.is_open_somewhere

    def another_rank_is_faster(path: Path) -> bool:
        for lock in locks:
            lock.unlink(missing_ok=True)
        return look(path)

    monkeypatch.setattr(ops, "is_open_somewhere", another_rank_is_faster)
    assert remove_stale_locks(tmp_path, "cpu_adam") == []
