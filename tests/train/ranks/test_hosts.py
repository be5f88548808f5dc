"""Ranks find out together which of them share a host, and share its GPUs and cores out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bagel_ds.errors import UserError
from bagel_ds.train.ranks import hosts as hosts_module
from bagel_ds.train.ranks.hosts import Hosts, core_limit, gpu_of, network_interface, threads_of
from tests.train.ranks.rank_info import rank_on


def of(rank: int, *names: str, **changed: Any) -> Hosts:
    """Ranks on the hosts of these names, seen by `rank`."""
    infos = [rank_on(name, pid=100 + number, **changed) for number, name in enumerate(names)]
    return Hosts(rank, tuple(infos))


# ------------------------------------------------------------------------------------------------------------ hosts
def test_hosts_may_have_unequal_numbers_of_ranks() -> None:
    found = of(3, "a", "b", "b", "b")
    assert (found.local_rank, found.local_size, found.here) == (2, 3, [1, 2, 3])
    assert found.neighbors == {1: 101, 2: 102}
    assert found.sizes == {"a": 1, "b": 3}
    assert "4 rank(s), started by srun, on 2 host(s) (a: 1, b: 3)" == found.describe("srun")
    assert (of(0, "a", "b", "b").local_rank, of(0, "a", "b", "b").local_size) == (0, 1)


@pytest.mark.parametrize(
    ("names", "group"), [("aabb", 2), ("aaaabb", 2), ("aabbb", 1), ("abab", 1), ("aaaa", 4), ("aabbaabb", 2)]
)
def test_ranks_are_grouped_only_within_hosts(names: str, group: int) -> None:
    assert of(0, *names).group == group


def test_containers_of_one_machine_are_hosts_of_their_own() -> None:
    ranks = (rank_on("node", processes="pid:[1]"), rank_on("node", processes="pid:[2]"))
    found = Hosts(0, ranks)
    assert found.here == [0] and found.local_size == 1 and found.on_one_machine
    said = Hosts(0, tuple(rank._replace(local_size=2) for rank in ranks))
    assert said.local_size == 2, "the memory of the machine is planned for both"


def test_machines_that_have_one_name_are_hosts_of_their_own() -> None:
    found = Hosts(0, (rank_on("localhost", kernel="one"), rank_on("localhost", kernel="two")))
    assert found.neighbors == {} and not found.on_one_machine


def test_a_kernel_that_does_not_tell_shares_writes_with_no_other() -> None:
    assert not of(0, "a", "a", kernel="").on_one_machine
    assert of(0, "a", kernel="").on_one_machine, "a single rank"
    assert of(0, "a", "a").on_one_machine


# ------------------------------------------------------------------------------------------------------------- GPUs
def gpus(*ranks: tuple[str, int | None, tuple[str, ...]]) -> list[int]:
    """The GPU of each rank, given host, local rank and what it sees."""
    infos = tuple(rank_on(host, local_rank=local, gpus=seen) for host, local, seen in ranks)
    return [gpu_of(Hosts(rank, infos)) for rank in range(len(infos))]


def test_a_rank_takes_the_gpu_of_its_local_rank() -> None:
    seen = ("A", "B")
    assert gpus(("a", 0, seen), ("a", 1, seen), ("b", 0, seen), ("b", 1, seen)) == [0, 1, 0, 1]
    assert gpus(("a", 1, seen), ("a", 0, seen)) == [1, 0], "as DeepSpeed counts on hosts with unequal slots"


def test_without_local_ranks_no_two_ranks_of_a_host_take_one_gpu() -> None:
    seen = ("A", "B")
    assert gpus(("a", None, seen), ("a", None, seen), ("b", None, seen)) == [0, 1, 0]


@pytest.mark.parametrize("local_ranks", [(0, 1), (0, 0), (None, None)])
def test_a_rank_that_sees_one_gpu_takes_that(local_ranks: tuple[int | None, int | None]) -> None:
    """As after `srun --gpus-per-task 1`, or with CUDA_VISIBLE_DEVICES set for each process."""
    assert gpus(("a", local_ranks[0], ("A",)), ("a", local_ranks[1], ("B",))) == [0, 0]


def test_two_ranks_that_are_told_the_same_gpu_take_two() -> None:
    assert gpus(("a", 0, ("A", "B")), ("a", 0, ("A", "B"))) == [0, 1]


def test_more_ranks_than_gpus_are_one_message_on_every_rank() -> None:
    infos = [rank_on("a", local_rank=0, gpus=("A",)), *(rank_on("b", local_rank=n, gpus=("A",)) for n in (0, 1))]
    for rank in range(3):
        with pytest.raises(UserError, match=r"host b has 1 usable GPU\(s\) for rank 2, but 2 ranks"):
            gpu_of(Hosts(rank, tuple(infos)))


# ---------------------------------------------------------------------------------------------------------- threads
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts_module, "_QUOTAS", ())


def threads(environ: dict[str, str], launcher: dict[str, str] | None = None, ranks: int = 4, cores: int = 64) -> Any:
    return threads_of(of(0, *["a"] * ranks, cores=tuple(range(cores))), environ, launcher)


def test_ranks_share_the_cores_of_their_host() -> None:
    assert threads({}).number == 16 and "64 core(s) for 4 rank(s)" in threads({}).describe()
    assert threads({}, ranks=8, cores=4).number == 1


def test_torchruns_default_is_not_the_users_wish() -> None:
    assert threads(TORCHRUN, {}).number == 16
    assert "torchrun's own default" in threads(TORCHRUN, {}).describe()


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({"OMP_NUM_THREADS": "1"}, None),
        ({"OMP_NUM_THREADS": "1"}, {}),  # not by torchrun: `deepspeed --bind_cores_to_rank`, say
        (TORCHRUN, {"OMP_NUM_THREADS": "1"}),
    ],
)
def test_a_users_number_of_threads_holds(environ: dict[str, str], launcher: dict[str, str] | None) -> None:
    assert threads(environ, launcher) == (1, "OMP_NUM_THREADS is set")
    assert threads({**environ, "OMP_NUM_THREADS": "7"}, launcher).number == 7


def test_a_number_of_threads_that_may_be_torchruns_is_kept_and_doubted() -> None:
    found = threads(TORCHRUN, None)
    assert found.number == 1 and "may be torchrun's default" in found.describe()


def test_ranks_that_are_bound_to_cores_of_their_own_take_all_of_them() -> None:
    """By `numactl`, or by srun's and mpirun's binding."""
    infos = tuple(rank_on("a", cores=tuple(range(8 * n, 8 * n + 8))) for n in range(4))
    assert threads_of(Hosts(1, infos), {}, None).number == 8


def test_a_container_that_may_use_fewer_cores_gets_fewer_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(hosts_module, "_QUOTAS", (tmp_path / "nowhere", limit))
    for content, cores in (("800000 100000\n", 8), ("50000 100000\n", 1), ("1250000 100000\n", 13)):
        limit.write_text(content)
        assert core_limit() == cores
        assert threads({}, ranks=1).number == cores
    limit.write_text("max 100000\n")
    assert threads({}, ranks=1).number == 64


def test_the_older_kind_of_container_limits_cores_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.cfs_quota_us"
    monkeypatch.setattr(hosts_module, "_QUOTAS", (quota,))
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    quota.write_text("400000\n")
    assert core_limit() == 4
    quota.write_text("-1\n")
    assert core_limit() > 10**6


# --------------------------------------------------------------------------------------------------------- networks
class _Address:
    def __init__(self, address: str):
        self.address = address


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("10.0.0.7", "eth0"),
        ("fe80::7", "eth1"),
        ("127.0.1.1", "eth0"),  # rank 0's host, whose own name is its loopback's: the way to another host counts
        ("10.9.9.9", None),
    ],
)
def test_gloo_is_given_the_interface_that_leads_to_the_other_hosts(
    own: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    interfaces = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.7"], "eth1": ["192.168.0.7", "fe80::7%eth1"]}
    held = {name: [_Address(each) for each in addresses] for name, addresses in interfaces.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: held)
    monkeypatch.setattr(hosts_module, "own_address", lambda towards, _: {"10.0.0.8": "10.0.0.7"}[towards])
    found = Hosts(0, (rank_on("a", address=own), rank_on("a", address=own), rank_on("b", address="10.0.0.8")))
    assert network_interface(found) == expected
