"""Ranks stop together, with one message that names the host, and never start when they differ."""

from __future__ import annotations

import logging
import re
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from bagel_ds.errors import UserError
from bagel_ds.machine import waiting
from bagel_ds.train.ranks import agreement
from bagel_ds.train.ranks.agreement import SharedFault, check_equal, check_shared_folder, one_per_host_first, together

pytestmark = pytest.mark.usefixtures("one_rank")


def gathers(monkeypatch: pytest.MonkeyPatch, *values: Any) -> None:
    """Let every exchange between ranks return these values."""
    monkeypatch.setattr(agreement, "everyone", lambda _: list(values))


def test_together_returns_the_result() -> None:
    assert together(lambda: 3) == 3


def _raise(error: BaseException) -> None:
    raise error


def test_a_fault_of_this_rank_is_known_to_all() -> None:
    with pytest.raises(SharedFault, match="^no such file$"):
        together(lambda: _raise(UserError("no such file")))


def test_a_fault_of_another_host_stops_this_rank_and_names_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    gathers(monkeypatch, [None, "here"], ["no such file", "there"])
    with pytest.raises(SharedFault, match="^on host there: no such file$"):
        together(lambda: 3)


def test_what_is_no_fault_of_a_person_is_not_caught() -> None:
    with pytest.raises(ZeroDivisionError):
        together(lambda: 1 // 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_one_per_host_first_runs_once_on_each_rank(local_rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "local_rank", lambda: int(local_rank))
    calls: list[int] = []
    assert one_per_host_first(lambda: calls.append(1) or len(calls)) == 1


def test_ranks_exchange_signs_of_life_while_the_first_works(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanged: list[Any] = []
    enough = threading.Event()
    everyone = agreement.everyone

    def counted(value: Any) -> list[Any]:
        exchanged.append(value)
        if len(exchanged) == 3:
            enough.set()
        return everyone(value)

    monkeypatch.setattr(agreement, "everyone", counted)
    assert one_per_host_first(lambda: enough.wait(60)), "three exchanges happened while it waited"


def test_a_host_that_others_wait_for_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("bagel_ds"), "propagate", True)
    caplog.set_level(logging.INFO, "bagel_ds")
    monkeypatch.setattr(waiting, "FIRST", 0.01)
    monkeypatch.setattr(waiting, "EVERY", 0.01)
    here = socket.gethostname()
    alone, both = [(True, here), (False, "there")], [(True, here), (True, "there")]
    said = threading.Event()
    monkeypatch.setattr(waiting.logger, "log", lambda _, text, *rest: lines.append(text % rest) or said.set())
    lines: list[str] = []
    states = iter([alone, alone, both])

    def until_said(_: object) -> list[tuple[bool, str]]:
        if (state := next(states, None)) is None:
            assert said.wait(60)
            return [(False, here), (False, "there")]
        return state

    monkeypatch.setattr(agreement, "everyone", until_said)
    agreement._wait_for(None, "it indexes its data")
    assert lines[0].startswith(f"waiting for {', '.join(sorted([here, 'there']))}: it indexes its data (")


def test_a_fault_of_the_first_rank_stops_all() -> None:
    with pytest.raises(SharedFault, match="^no such file$"):
        one_per_host_first(lambda: _raise(UserError("no such file")))


def test_equal_ranks_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    check_equal({"--lr": 1e-4})
    gathers(monkeypatch, ({"--lr": 1e-4}, "a"), ({"--lr": 1e-4}, "b"))
    check_equal({"--lr": 1e-4})


@pytest.mark.parametrize("theirs", [{"--lr": 2e-4}, {}])
def test_what_differs_is_named_with_rank_and_host(theirs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    gathers(monkeypatch, ({"--lr": 1e-4}, "node-a"), ({"--lr": 1e-4}, "node-a"), (theirs, "node-b"))
    expected = f"--lr differs between ranks: rank 0 on node-a has 0.0001, rank 2 on node-b has {theirs.get('--lr')}"
    with pytest.raises(SharedFault, match=expected):
        check_equal({"--lr": 1e-4})


def test_a_shared_folder_is_made_and_left_clean(tmp_path: Path) -> None:
    check_shared_folder(tmp_path / "a" / "b", "checkpoint_dir")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_is_not_the_same_on_all_hosts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "is_main", lambda: False)  # rank 0 writes elsewhere
    with pytest.raises(SharedFault, match="--checkpoint_dir .* not the folder that rank 0 writes to.* share"):
        check_shared_folder(tmp_path, "checkpoint_dir")


def test_a_folder_that_can_not_be_made_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SharedFault, match=r"--checkpoint_dir .*file/below can't be written: .*Pass a folder"):
        check_shared_folder(tmp_path / "file" / "below", "checkpoint_dir")


def test_a_local_host_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gathers(monkeypatch, [None, socket.gethostname()], ["bad", socket.gethostname()])
    with pytest.raises(SharedFault, match="^bad$"):
        together(lambda: 3)


def test_nothing_else_exchanges_objects_or_waits_at_a_barrier_over_the_engines_group() -> None:
    package = Path(agreement.__file__).parents[2]
    words = re.compile(r"dist(ributed)?\.(monitored_)?(barrier|\w*_object(_list)?)\(|comm\.barrier\(")
    found = [path.name for path in package.rglob("*.py") if words.search(path.read_text())]
    assert found == ["agreement.py"]


def test_ranks_talk_over_a_gloo_group_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under NCCL the group of all ranks would make each object a tensor on a GPU, and its watchdog would count time."""
    groups: list[Any] = []

    def noted(call: Any) -> Any:
        def note(*arguments: Any, group: Any = None, **options: Any) -> Any:
            groups.append(group)
            return call(*arguments, group=group, **options)

        return note

    for name in ("all_gather_object", "barrier"):
        monkeypatch.setattr(dist, name, noted(getattr(dist, name)))
    assert agreement.everyone("word") == ["word"]
    agreement.barrier()
    check_equal({"--lr": 1e-4})
    assert len(groups) == 3
    assert all(group is groups[0] is agreement.control_group() and group is not dist.group.WORLD for group in groups)
    assert dist.get_backend(groups[0]) == "gloo"
