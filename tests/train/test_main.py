"""What the entry point checks before anything is loaded."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from bagel_ds.config import parse_arguments
from bagel_ds.errors import UserError
from bagel_ds.train import main
from bagel_ds.train.main import check_wandb_of


def test_wandb_that_cannot_work_is_told_by_the_rank_that_logs_and_only_where_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc file
    monkeypatch.setitem(sys.modules, "wandb", None)  # any import of it now raises
    wanted = parse_arguments("--wandb_name mine".split())
    with pytest.raises(UserError, match="not installed.*--enable_wandb False"):
        check_wandb_of(wanted, 0)
    check_wandb_of(wanted, 1)
    check_wandb_of(parse_arguments("--wandb_name mine --enable_wandb False".split()), 0)


@pytest.mark.parametrize("hangs", [True, False])
def test_a_process_group_that_does_not_end_is_not_waited_for(hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under NCCL its end waits for all ranks, one of which may be killed on the way."""
    ended, codes = threading.Event(), []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(main, "_CLOSING_SECONDS", 0.2)
    monkeypatch.setattr(main, "end_at_once", end)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("deepspeed.comm.destroy_process_group", lambda: hangs and ended.wait(60))
    main._leave_group(2)
    assert codes == ([2] if hangs else [])
    assert ended.wait(0.5) is hangs, "nothing comes later"
