"""Two hosts, started by `deepspeed --hostfile` over ssh: they train and save, one loses power, the other resumes.

They save while the next step computes, and the bits of their checkpoint are those of one host.

The hosts are network namespaces (tests/two_hosts.py). Where these are not allowed, two `deepspeed --no_ssh` launches
stand in; the test of namespaces then skips with the reason, and `.ci/run` fails if they would have been allowed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.distributed.cases import arguments, checksums, losses
from tests.distributed.started import ENDING, PATIENCE, steps_logged
from tests.launch import (
    LAUNCH,
    REPOSITORY,
    SHOWN,
    TRAIN,
    cpu_environment,
    end_with_stacks,
    free_port,
    processes_of,
    remove_shared_memory,
    run_ranks,
)
from tests.two_hosts import TwoHosts, lacking, remote_environment, write_hostfile

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timed]

IMPATIENT = Path(__file__).with_name("impatient_train.py")
DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")
HANDED_ON = ("DS_ACCELERATOR", "PATH", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "TOKENIZERS_PARALLELISM", LAUNCH)
WHY_NOT = lacking()


class Launches:
    """Commands of one test with one environment; leaving the block ends all that is left of them."""

    def __init__(self, folder: Path):
        self.port = free_port()
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.environment: Mapping[str, str] = cpu_environment()
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Launches:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        remove_shared_memory(self.port)

    def start(self, command: Sequence[object]) -> tuple[subprocess.Popen[bytes], Path]:
        """The process and the file of its output."""
        log = self.folder / f"output-{len(self._started)}.txt"
        with log.open("wb") as file:
            words = [str(word) for word in command]
            process = subprocess.Popen(
                words,
                cwd=REPOSITORY,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process, log

    def end(self, process: subprocess.Popen[bytes], log: Path) -> tuple[int, str]:
        try:
            return process.wait(PATIENCE), log.read_text(errors="replace")
        except subprocess.TimeoutExpired:
            end_with_stacks(self.environment[LAUNCH])
            raise AssertionError(f"no end in {PATIENCE:.0f} s:\n{log.read_text(errors='replace')[-SHOWN:]}") from None

    def all_ended(self) -> None:
        deadline = time.monotonic() + ENDING
        while left := processes_of(self.environment[LAUNCH]):
            assert time.monotonic() < deadline, [process.cmdline() for process in left]
            time.sleep(0.1)

    def kill(self) -> None:
        for process in processes_of(self.environment[LAUNCH]):
            process.kill()
        for started in self._started:
            started.wait()
        self.all_ended()

    def until(self, words: str, process: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + PATIENCE
        while words not in log.read_text(errors="replace"):
            ended = process.poll() is not None or time.monotonic() > deadline
            assert not ended, f"no {words!r}:\n{log.read_text(errors='replace')[-SHOWN:]}"
            time.sleep(0.1)

    def until_step(self, results: Path, step: int, process: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + PATIENCE
        while step not in steps_logged(results):
            ended = process.poll() is not None or time.monotonic() > deadline
            assert not ended, f"no step {step}:\n{log.read_text(errors='replace')[-SHOWN:]}"
            time.sleep(0.1)


def words_of(demo: Path, results: Path, total_steps: int) -> list[str]:
    changed = {"ds_config": "zero2", "max_num_tokens": 448, "save_every": 2, "auto_resume": True}
    return arguments(demo, results, total_steps=total_steps, **changed)


def resume_alone(launches: Launches, command: list[str], demo: Path, results: Path) -> None:
    """On one rank, `command` continues the run of two from its last save, for two steps."""
    last = max(steps_logged(results))
    alone = [*command, DEEPSPEED, "--num_gpus", "1", "--master_port", str(launches.port), str(IMPATIENT)]
    code, said = launches.end(*launches.start([*alone, *words_of(demo, results, total_steps=last + 3)]))
    assert code == 0 and f"done: {last + 3} steps" in said, said[-SHOWN:]
    assert re.search(r"resumed after step \d+ \(saved on 2 ranks, now 1\)", said)
    assert sorted(losses(results)) == list(range(last + 3))


def saves_as_one_host_does(demo: Path, results: Path, said: str, alone: Path) -> None:
    """The weights were gathered only when the third step's update waited for them."""
    assert "gathering while the next update waits" in said
    ran = run_ranks(TRAIN, words_of(demo, alone, total_steps=2), ranks=2)
    assert ran.code == 0, ran.output[-SHOWN:]
    assert losses(alone) == {step: found for step, found in losses(results).items() if step < 2}
    assert checksums(results, 2) == checksums(alone, 2)


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_a_host_that_loses_power_is_named_and_the_other_resumes(demo: Path, tmp_path: Path) -> None:
    hostfile, results = write_hostfile(tmp_path / "hostfile"), tmp_path / "run"
    with TwoHosts(tmp_path / "hosts") as hosts, Launches(tmp_path) as launches:
        launches.environment = remote_environment(tmp_path / "environment", launches.environment, HANDED_ON)
        doctor = [sys.executable, "-m", "bagel_ds.cli.main", "doctor", "--hostfile", str(hostfile), "--no_speed"]
        doctor += ["--checkpoint_dir", str(results / "checkpoints")]
        code, said = launches.end(*launches.start(hosts.command(0, [*doctor, "--json"])))
        assert code == 0, said
        report = json.loads(said[said.index('{\n "ok"') :])
        assert set(report["hosts"]) == {"node1", "node2"}
        told = {finding["name"]: finding["message"] for finding in report["findings"]}
        assert told["host node2"].startswith("reached, the same versions") and "host node1" in told

        launch = [DEEPSPEED, "--hostfile", str(hostfile), "--master_port", str(launches.port), str(IMPATIENT)]
        process, log = launches.start(hosts.command(0, [*launch, *words_of(demo, results, total_steps=1000)]))
        launches.until_step(results, 3, process, log)
        assert "2 rank(s), started by deepspeed, on 2 host(s) (node1: 1, node2: 1)" in log.read_text()
        hosts.lose(1)
        code, said = launches.end(process, log)
        assert code != 0 and "[rank 0] host node2 (rank 1) has sent nothing for " in said, said[-SHOWN:]
        launches.all_ended()
        saves_as_one_host_does(demo, results, said, tmp_path / "alone")

        without_it, log = launches.start(hosts.command(0, [*launch, *words_of(demo, results, total_steps=1000)]))
        code, said = launches.end(*launches.start(hosts.command(0, doctor)))
        assert code == 1 and "fail  host node2" in said and "can't be reached by ssh: " in said, said
        assert "ssh-copy-id" in said and "ok    host node1" in said
        launches.until("node2: ssh: connect to host node2", without_it, log)
        launches.until("waiting for rank 1 (node2) to join at ", without_it, log)
        assert "; rank 0 (node1) here (" in log.read_text()
        launches.kill()
        resume_alone(launches, hosts.command(0, []), demo, results)


@pytest.mark.skipif(WHY_NOT is None, reason="namespaces work here: the test of two hosts runs")
def test_without_namespaces_two_launches_stand_in_for_hosts(demo: Path, tmp_path: Path) -> None:
    hostfile, results = write_hostfile(tmp_path / "hostfile"), tmp_path / "run"
    with Launches(tmp_path) as launches, Launches(tmp_path / "second") as second:
        started = []
        for rank, each in enumerate((launches, second)):
            each.environment = {**each.environment, "BAGEL_TEST_HOST": f"node{rank + 1}"}
            command = [DEEPSPEED, "--hostfile", hostfile, "--no_ssh", "--node_rank", rank, "--master_addr", "127.0.0.1"]
            words = words_of(demo, results, total_steps=1000)
            started.append(each.start([*command, "--master_port", launches.port, IMPATIENT, *words]))
        launches.until_step(results, 3, *started[0])
        assert "on 2 host(s) (node1: 1, node2: 1)" in started[0][1].read_text()
        for ended in processes_of(second.environment[LAUNCH]):
            ended.kill()
        code, said = launches.end(*started[0])
        assert code != 0 and "host node2 (rank 1)" in said, said[-SHOWN:]
        launches.all_ended()
        saves_as_one_host_does(demo, results, said, tmp_path / "alone")
        resume_alone(launches, [], demo, results)
