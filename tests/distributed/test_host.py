"""Hosts that aren't prepared, in real launches: one message and exit code 2, or a way around that the log names."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.distributed.cases import arguments
from tests.distributed.started import steps_logged
from tests.launch import TRAIN, cpu_environment, deepspeed_command, run_ranks, run_to_end

pytestmark = pytest.mark.distributed


def without_compiler(folder: Path) -> dict[str, str]:
    """Nothing is compiled yet, and nothing can be."""
    return {"TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "CXX": "no-such-compiler"}


def one_error(output: str) -> str:
    """The only message of our own in what the launcher and two ranks have printed."""
    assert "Traceback" not in output, output[-4000:]
    lines = [line for line in output.splitlines() if line.startswith("ERROR: ")]
    assert len(lines) == 1, output[-4000:]
    return lines[0]


def test_a_port_in_use_is_one_message_and_code_2(demo: Path, tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        command = deepspeed_command(TRAIN, arguments(demo, tmp_path), 2, port)
        finished = run_to_end(command, cpu_environment(), port, 300)
    assert finished.code == 2
    assert f"port {port} (it is in use on this host" in one_error(finished.output)


def test_a_preset_that_compiles_is_refused_without_a_compiler(demo: Path, tmp_path: Path) -> None:
    words = arguments(demo, tmp_path / "run", ds_config="zero3_cpu.json")
    finished = run_ranks(TRAIN, words, ranks=2, timeout=300, env=without_compiler(tmp_path))
    message = one_error(finished.output)
    assert finished.code == 2
    for word in ("cpu_adam", "no C++ compiler", "CXX is 'no-such-compiler'", "apt-get install g++", "zero3.json"):
        assert word in message
    assert "libaio" not in finished.output and "loading" not in finished.output


@pytest.mark.slow
def test_without_a_compiler_ranks_on_the_cpu_train_through_gloo(demo: Path, tmp_path: Path) -> None:
    words = arguments(demo, tmp_path / "run", total_steps=2)
    finished = run_ranks(TRAIN, words, ranks=2, timeout=300, env=without_compiler(tmp_path))
    assert finished.code == 0, finished.output[-4000:]
    assert finished.output.count("ranks sum through gloo") == 1
    assert steps_logged(tmp_path / "run") == [0, 1]


def test_a_build_that_fails_is_one_message_with_the_end_of_the_compilers_output(demo: Path, tmp_path: Path) -> None:
    """A compiler that makes the probe and nothing else."""
    compiler = tmp_path / "c++"
    fails = 'case "$*" in *shm*) echo "shm.cpp:1: error: out of ideas" >&2; exit 1;; esac'
    compiler.write_text(f'#!/bin/sh\n{fails}\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    environment = {**without_compiler(tmp_path), "CXX": str(compiler)}
    finished = run_ranks(TRAIN, arguments(demo, tmp_path / "run"), ranks=2, timeout=300, env=environment)
    assert finished.code == 2
    assert "deepspeed_shm_comm (sums over ranks on the CPU) can't be built" in one_error(finished.output)
    assert finished.output.count("shm.cpp:1: error: out of ideas") <= 2, "once for each of its two files"
