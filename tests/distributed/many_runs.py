"""Runs `bagel_ds.train.main` once per case in the same processes; started by cases.py.

Arguments: a JSON file with a list of cases {name, arguments, directory?, on_rank_1?, faults?} and a folder for the
results (<name>.rank<r>.json with code and output). `on_rank_1` may hold arguments, directory, versions {package:
version} and a kernels_fault (of the trial of fused kernels) that only rank 1 sees; `faults` are those of
faulty_train.py. What a case leaves unset is as it is for a launch of its own. On a GPU the peaks of a case's memory are
its own, but for what engines before it may have left.
"""

from __future__ import annotations

import gc
import io
import json
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import deepspeed
import torch

from bagel_ds.train import main as train
from bagel_ds.train import prepare
from bagel_ds.train.ranks import alarm, failure
from tests.distributed.engines import many_engines
from tests.distributed.faulty_train import going_wrong


def main(cases_file: str, results: str) -> None:
    rank = int(os.environ["RANK"])
    os.environ["BAGEL_DS_DETACH"] = "0"  # every case in this very process
    # Here no launcher waits for the first rank to end, and the process group lives as long as the processes: one that
    # was ended and made again hangs after an engine has used it (DeepSpeed keeps what belongs to the first).
    no_wait = mock.patch.object(train, "_GRACE_SECONDS", 0.0)
    # The same goes for a rank that would end its process because only it has failed.
    goes_on = mock.patch.object(failure, "end_at_once", sys.exit)
    with (
        many_engines(),
        no_wait,
        goes_on,
        mock.patch.object(deepspeed.comm, "destroy_process_group"),
        mock.patch.object(alarm, "sound"),
    ):
        for case in json.loads(Path(cases_file).read_text()):
            _forget_memory()
            mine = {**case, **(case.get("on_rank_1", {}) if rank == 1 else {})}
            code, output = run(mine)
            path = Path(results) / f"{case['name']}.rank{rank}.json"
            path.write_text(json.dumps({"code": code, "output": output}))
            if code not in (0, 2) and int(os.environ["WORLD_SIZE"]) > 1:
                sys.exit(1)  # the others may wait for this rank in a collective call


def _forget_memory() -> None:
    if torch.cuda.is_initialized():  # not by this, before a rank has chosen its GPU
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class _Printed(io.StringIO):
    """What a case prints; DeepSpeed's checks of its ops want the number of a file to redirect."""

    def fileno(self) -> int:
        return 2


def run(case: dict) -> tuple[int, str]:
    printed = _Printed()
    versions = case.get("versions", {})
    real = prepare.compared_versions
    os.chdir(case.get("directory", os.getcwd()))
    with redirect_stdout(printed), redirect_stderr(printed):
        patched = mock.patch.object(prepare, "compared_versions", lambda: {**real(), **versions})
        tried = (lambda *_: case["kernels_fault"]) if "kernels_fault" in case else prepare.fault_of
        with patched, mock.patch.object(prepare, "fault_of", tried), going_wrong(case.get("faults", [])):
            try:
                code = train.main(case["arguments"])
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
                code = 1
    return code, printed.getvalue()


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
