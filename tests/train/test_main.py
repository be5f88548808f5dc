"""What the entry point checks before anything is loaded."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bagel_ds.arguments.run_config import parse_arguments
from bagel_ds.errors import UserError
from bagel_ds.train import main
from bagel_ds.train.main import check_wandb_of

REPOSITORY = Path(__file__).resolve().parents[2]


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


NEW_IN_3_11 = {"Self", "StrEnum", "tomllib", "assert_never", "Never", "LiteralString", "ExceptionGroup", "TaskGroup"}
IMPORTED = """
import sys
import bagel_ds.train.main
print(*(module.__file__ for name, module in sys.modules.items() if name.startswith("bagel_ds")), sep="\\n")
"""


def test_an_old_python_gets_as_far_as_its_message() -> None:
    """What is imported before the version is looked at is Python 3.10, in syntax and names."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run([sys.executable, "-c", IMPORTED], env=environment, capture_output=True, text=True, check=True)
    files = ran.stdout.split()
    assert len(files) > 10
    for file in files:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"), feature_version=(3, 10))
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not {alias.name for node in imports for alias in node.names} & NEW_IN_3_11, file
