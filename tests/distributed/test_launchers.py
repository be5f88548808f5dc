"""Ranks that something other than a plain `deepspeed --num_gpus` starts, and single ranks that fail.

Each launch shows several things at once. The end of the process group waits for all ranks (faulty_train.py), as it does
under NCCL, so that a rank that leaves it to the others hangs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed.cases import arguments, losses
from tests.distributed.started import FAULTY
from tests.launch import REPOSITORY, cpu_environment, deepspeed, free_port, remove_shared_memory, run_to_end

pytestmark = pytest.mark.distributed

PATIENCE = 300.0  # seconds; a rank that leaves the others waiting would take ten minutes and more


def words_of(demo: Path, results: Path, **changed: object) -> list[str]:
    return arguments(demo, results, **{"precision": "fp32", "max_num_tokens": 448, **changed})


def start_by_hand(words: Sequence[str], port: int, variables: Sequence[dict[str, str]]) -> list[tuple[int, str]]:
    """One process for each set of variables; exit code and output of each."""
    usual = {name: value for name, value in cpu_environment().items() if name not in ("RANK", "WORLD_SIZE")}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(FAULTY), *words],
            cwd=REPOSITORY,
            env={**usual, **each, "MASTER_PORT": str(port)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for each in variables
    ]
    try:
        output = [rank.communicate(timeout=PATIENCE)[0] for rank in ranks]
        return [(rank.returncode, text) for rank, text in zip(ranks, output)]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
        remove_shared_memory(port)


def test_ranks_of_three_launchers_on_hosts_of_unequal_size_train_together(demo: Path, tmp_path: Path) -> None:
    """Rank 0 is a pod of a PyTorchJob on one host; OpenMPI and Slurm start ranks 1 and 2 on another."""
    places = [
        {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"},
        {
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "3",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
        },
        {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_LOCALID": "1", "MASTER_ADDR": "127.0.0.1"},
    ]
    hosts = ("one", "two", "two")
    variables = [{**place, "BAGEL_TEST_HOST": host, "BAGEL_TEST_FAULTS": "[]"} for place, host in zip(places, hosts)]
    words = words_of(demo, tmp_path, ds_config="zero3_hpz", total_steps=2)
    found = start_by_hand(words, free_port(), variables)
    assert [code for code, _ in found] == [0, 0, 0], "\n".join(text[-3000:] for _, text in found)
    main = found[0][1]
    assert "3 rank(s), started by a launcher that sets RANK and WORLD_SIZE, on 2 host(s) (one: 1, two: 2)" in main
    assert "no copy of the parameters per host" in main
    assert len(losses(tmp_path)) == 2


def test_two_hosts_of_a_run_swap_to_folders_of_different_names(demo: Path, tmp_path: Path) -> None:
    """Their DeepSpeed configurations differ only in these names."""
    nvme = tmp_path / "nvme"
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "BAGEL_TEST_FAULTS": "[]"}
    variables = [{**place, "RANK": str(rank), "BAGEL_TEST_HOST": host} for rank, host in enumerate(("one", "two"))]
    words = words_of(demo, tmp_path / "run", ds_config="zero3_nvme", nvme_path=nvme, total_steps=2)
    found = start_by_hand(words, free_port(), variables)
    assert [code for code, _ in found] == [0, 0], "\n".join(text[-3000:] for _, text in found)
    assert f"NVMe: {nvme}" in found[0][1] and len(losses(tmp_path / "run")) == 2
    assert list(nvme.iterdir()) == []


def test_a_rank_that_runs_out_of_memory_ends_a_job_of_torchrun_whose_other_rank_hangs(
    demo: Path, tmp_path: Path
) -> None:
    """The other rank sleeps where it would wait in NCCL: no connection is there whose end it could notice."""
    faults = [
        {"at": "step", "rank": 0, "step": 1, "do": "sleep", "seconds": 3600},
        {"at": "step", "rank": 1, "step": 1, "do": "oom"},
    ]
    port = free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = cpu_environment(BAGEL_TEST_FAULTS=json.dumps(faults))
    del environment["OMP_NUM_THREADS"]
    words = words_of(demo, tmp_path, total_steps=100)
    ended = run_to_end([*torchrun, str(FAULTY), *words], environment, port, PATIENCE)
    assert ended.code == 1, "torchrun's own"
    assert "2 rank(s), started by torchrun, on 1 host(s)" in ended.output
    assert "thread(s) per rank for work on the CPU" in ended.output and "torchrun's own default" in ended.output
    assert "ERROR: out of GPU memory: CUDA out of memory" in ended.output
    assert "The longest pack of this rank had" in ended.output and "--max_num_tokens (now 448)" in ended.output
    assert "[rank 0] rank 1 has ended (out of GPU memory" in ended.output


def test_a_fault_of_one_rank_ends_the_job_with_its_message_alone(demo: Path, tmp_path: Path) -> None:
    """The other rank waits in a gather of the engine. The launcher drops the user's CUDA_VISIBLE_DEVICES, too."""
    faults = [{"at": "load", "rank": 1, "do": "fault"}]
    variables = {"BAGEL_TEST_FAULTS": json.dumps(faults), "CUDA_VISIBLE_DEVICES": "2,3"}
    ended = deepspeed(FAULTY, words_of(demo, tmp_path), ranks=2, env=variables, timeout=PATIENCE)
    assert ended.code == 2
    assert ended.output.count("ERROR: ") == 1 and "ERROR: only this rank has a fault" in ended.output
    assert "Traceback" not in ended.output
    assert "CUDA_VISIBLE_DEVICES=2,3 has no effect" in ended.output
    assert "`--include localhost:2,3` instead of --num_gpus" in ended.output


def test_a_rank_that_does_not_know_where_to_meet_says_what_to_set(demo: Path, tmp_path: Path) -> None:
    variables = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "BAGEL_TEST_FAULTS": "[]"}
    ((code, output),) = start_by_hand(words_of(demo, tmp_path), free_port(), [variables])
    assert code == 2 and output.count("ERROR: ") == 1
    assert "MASTER_ADDR" in output and "Traceback" not in output and "mpi4py" not in output
