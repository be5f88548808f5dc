"""launch/train.py that says on stdout where it is and what the engine holds; started by bench/measured_run.py.

Guarantees: the run itself is the trainer's; only lines "MARK <phase>" (rank 0) and "HELD <rank> <bytes>" (live tensor
storage of a rank after loading, before the first step) are added, each after a barrier. BAGEL_BENCH_DEVICE_GIB caps
what a rank may take of its GPU.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where the package is not installed

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import bagel_ds.train.trainer as trainer_module  # noqa: E402
from bagel_ds.machine.device import uses_cuda  # noqa: E402
from bagel_ds.train.main import main  # noqa: E402
from bagel_ds.train.process.allocators import return_freed_memory  # noqa: E402
from bagel_ds.train.ranks.agreement import barrier, everyone  # noqa: E402
from bagel_ds.units import GIB  # noqa: E402


def mark(phase: str) -> None:
    barrier()
    if dist.get_rank() == 0:
        print(f"MARK {phase}", flush=True)
    barrier()


def live_tensor_bytes() -> int:
    """Storage of all tensors that Python can reach, each storage once."""
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at every object wakes up some deprecated ones
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
                for tensor in (thing, thing.grad if thing.is_leaf else None):
                    if tensor is not None:
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class MarkedTrainer(trainer_module.Trainer):
    def _load(self) -> None:
        mark("load")
        super()._load()
        mark("loaded")
        gc.collect()
        time.sleep(1)  # long enough to be sampled
        held = everyone(live_tensor_bytes())
        if dist.get_rank() == 0:
            for rank, size in enumerate(held):
                print(f"HELD {rank} {size}", flush=True)
        mark("step")

    def _save(self, *args: Any, **named: Any) -> None:
        mark("export")
        super()._save(*args, **named)
        mark("end")


def cap_device_memory() -> None:
    cap = os.environ.get("BAGEL_BENCH_DEVICE_GIB")
    if cap and uses_cuda():
        device = int(os.environ.get("LOCAL_RANK", "0"))
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(float(cap) * GIB / whole, 1.0), device)


if __name__ == "__main__":
    return_freed_memory()
    cap_device_memory()
    trainer_module.Trainer = MarkedTrainer  # type: ignore[misc]
    sys.exit(main())
