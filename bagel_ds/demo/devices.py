"""How many GPUs the demo can use: `python -m bagel_ds.demo.devices` prints the number, 0 for the CPU.

Guarantees: a GPU that can't be used (old driver, torch built for the CPU) is an error with exit code 2, never silent
training on the CPU. DS_ACCELERATOR=cpu chooses the CPU.
"""

from __future__ import annotations

import sys

from bagel_ds.doctor.environment import check_gpu
from bagel_ds.errors import UserError
from bagel_ds.machine.device import uses_cuda


def usable_gpus() -> int:
    """The number of GPUs that torch can use; 0 on the CPU. Raises UserError if there is an unusable one."""
    check_gpu()
    if not uses_cuda():
        return 0
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    try:
        print(usable_gpus())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
