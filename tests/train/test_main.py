"""What the entry point checks before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bagel_ds.config import parse_arguments
from bagel_ds.errors import UserError
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
