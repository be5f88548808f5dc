"""Every launcher's variables give a rank its place, or one message says what is missing."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.errors import UserError
from bagel_ds.train.ranks import launcher
from bagel_ds.train.ranks.launcher import Launch, LauncherProcess, check_address, first_slurm_host, read_launch

REPOSITORY = Path(__file__).resolve().parents[3]


def place(**variables: str) -> tuple[Any, ...]:
    """Rank, world size, local rank, local size, address, port."""
    found = read_launch(variables)
    return (found.rank, found.world_size, found.local_rank, found.local_size, found.address, found.port)


MEETING = {"MASTER_ADDR": "host1", "MASTER_PORT": "4000"}
WORLDS = {
    "deepspeed": (
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"},
        (5, 8, 1, 4, "host1", 4000),
    ),
    "torchrun": (
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"},
        (5, 8, 1, 4, "host1", 4000),
    ),
    "a launcher that sets RANK and WORLD_SIZE": (
        {"RANK": "1", "WORLD_SIZE": "2"},
        (1, 2, None, None, "host1", 4000),
    ),
    "OpenMPI": (
        {
            "OMPI_COMM_WORLD_RANK": "5",
            "OMPI_COMM_WORLD_SIZE": "8",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
        },
        (5, 8, 1, 4, "host1", 4000),
    ),
    "MVAPICH": (
        {
            "MV2_COMM_WORLD_RANK": "5",
            "MV2_COMM_WORLD_SIZE": "8",
            "MV2_COMM_WORLD_LOCAL_RANK": "1",
            "MV2_COMM_WORLD_LOCAL_SIZE": "4",
        },
        (5, 8, 1, 4, "host1", 4000),
    ),
    "MPICH or Intel MPI": (
        {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"},
        (5, 8, 1, 4, "host1", 4000),
    ),
    "Slurm": (
        {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"},
        (5, 8, 1, 4, "host1", 4000),
    ),
}


@pytest.mark.parametrize("name", WORLDS)
def test_every_launcher_gives_a_rank_its_place(name: str) -> None:
    variables, expected = WORLDS[name]
    assert place(**variables, **MEETING) == expected
    assert read_launch({**variables, **MEETING}).launcher == name


def test_what_one_launcher_leaves_out_another_at_the_same_place_tells() -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    assert place(RANK="5", WORLD_SIZE="8", **slurm, **MEETING)[2] == 1
    assert place(RANK="0", WORLD_SIZE="2", **slurm, **MEETING)[2] is None, "another world: torchrun in a Slurm task"


def test_the_innermost_launcher_counts() -> None:
    """mpirun starts its daemons by srun; a batch script has variables of its first task."""
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "16"}
    assert place(**slurm, **mpi, **MEETING)[:2] == (3, 16)
    assert place(**slurm, **mpi, RANK="7", WORLD_SIZE="32", **MEETING)[:2] == (7, 32)


def test_slurm_tells_where_to_meet_and_jobs_on_one_node_do_not_meet() -> None:
    variables = {
        "SLURM_PROCID": "2",
        "SLURM_NTASKS": "9",
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2,1",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "gpu[07-09,12],login1",
        "SLURM_JOB_ID": "123456",
    }
    assert place(**variables) == (2, 3, 0, 1, "gpu07", 23456)
    assert place(**{**variables, "SLURM_JOB_ID": "123457"})[-1] == 23457


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[3,5-7]", "n3"), ("rack[2-3]n[08-11]-ib,x1", "rack2n08-ib")],
)
def test_the_first_name_of_a_slurm_list(hosts: str, first: str) -> None:
    assert first_slurm_host(hosts) == first


@pytest.mark.parametrize(
    ("tasks", "node", "expected"), [("2(x3),1", "0", 2), ("2(x3),1", "3", 1), ("4", "0", 4), ("1,3(x2)", "2", 3)]
)
def test_the_tasks_of_each_node_are_read(tasks: str, node: str, expected: int) -> None:
    variables = {"SLURM_PROCID": "0", "SLURM_NTASKS": "9", "SLURM_TASKS_PER_NODE": tasks, "SLURM_NODEID": node}
    assert place(**variables)[3] == expected


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
    ],
)
def test_ranks_of_one_host_need_no_address(variables: dict[str, str]) -> None:
    assert place(**variables)[-2:] == ("127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "no launcher has started.*deepspeed --num_gpus 1"),
        ({"RANK": "0"}, "WORLD_SIZE is not: set WORLD_SIZE"),
        (
            {"SLURM_PROCID": "0"},
            "SLURM_PROCID.*not the number of ranks.*WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER",
        ),
        ({"PMI_RANK": "0"}, "PMI_RANK.*not the number of ranks"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK must be a whole number, found 'one'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2 ranks"),
        *(
            ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": port}, f"{port}: expected a whole number from 1 to 65535")
            for port in ("0", "65536", "-1", "http", "", "29500 ")
        ),
    ],
)
def test_what_is_missing_or_wrong_is_one_message(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_launch(variables)


def test_ranks_that_nobody_tells_where_to_meet_are_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch(1, 16, 1, 8, None, 29500, "OpenMPI")
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"16 ranks \(OpenMPI\).*MASTER_ADDR.*mpi4py"):
        check_address(launch)
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda _: object())
    check_address(launch)  # DeepSpeed will ask MPI


def test_torch_and_deepspeed_find_what_they_read() -> None:
    launch = read_launch({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", **MEETING})
    assert launch.environment() == {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host1", "MASTER_PORT": "4000"}


# ------------------------------------------------------------------------------------------- the launcher's process
_LOOKS = """
import json, os
from bagel_ds.train.ranks.launcher import launcher_process
found = launcher_process(os.environ)
names = ("OMP_NUM_THREADS", "WISH")
print(json.dumps(found and [*(found.environment.get(name) for name in names), *found.planned]))
"""


def looks(tmp_path: Path, name: str, between: str, *words: str) -> Any:
    """What a process sees of its launcher `name`, which changes its environment by `between` before it starts it."""
    (tmp_path / "rank.py").write_text(_LOOKS)
    start = f"import os, subprocess, sys\n{between}\nsubprocess.run([sys.executable, {str(tmp_path / 'rank.py')!r}])\n"
    (tmp_path / name).write_text(start)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "WISH": "2,3"}
    for variable in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        environment.pop(variable, None)
    command = [sys.executable, str(tmp_path / name), *words]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(ran.stdout)


def test_what_the_users_shell_had_set_is_seen_behind_deepspeeds_back(tmp_path: Path) -> None:
    assert looks(tmp_path, "deepspeed", "del os.environ['WISH']") == [None, "2,3"]


@pytest.mark.parametrize(
    ("world", "planned"),
    [({"node1": [0, 1], "node2": [0]}, ["node1", "node1", "node2"]), ({}, []), ([1], []), ("x", []), ({"n": 2}, [])],
)
def test_the_hosts_that_deepspeed_has_planned_are_known(world: Any, planned: list[str], tmp_path: Path) -> None:
    told = "--world_info=" + base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    assert looks(tmp_path, "deepspeed", "", told) == [None, "2,3", *planned]
    if not planned:
        assert looks(tmp_path, "deepspeed", "", "--world_info=?") == [None, "2,3"]


def test_what_torchrun_sets_by_itself_is_told_from_what_the_user_set(tmp_path: Path) -> None:
    between = "os.environ.update(TORCHELASTIC_RUN_ID='none', OMP_NUM_THREADS='1')"
    assert looks(tmp_path, "torchrun", between) == [None, "2,3"]


def test_another_launcher_is_left_alone(tmp_path: Path) -> None:
    assert looks(tmp_path, "mpirun", "") is None


@pytest.mark.parametrize(
    ("words", "names"),
    [("--num_gpus 2 train.py", False), ("--include localhost:2 train.py", True), ("--exclude=host1:0 train.py", True)],
)
def test_a_launcher_that_was_told_which_gpus_is_known(words: str, names: bool) -> None:
    assert LauncherProcess({}, ["deepspeed", *words.split()]).names_gpus is names
