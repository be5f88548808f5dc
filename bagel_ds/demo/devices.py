"""How many GPUs the demo can use: `python -m bagel_ds.demo.devices` prints the number, 0 for the CPU.

Guarantees: a GPU that is there but can't be used (old driver, torch built for the CPU) is an error with exit code 2,
never silent training on the CPU; DS_ACCELERATOR=cpu asks for the CPU.
"""

from __future__ import annotations

import sys

from bagel_ds.doctor.environment import check_gpu
from bagel_ds.errors import UserError
from bagel_ds.machine.device import uses_cuda


def usable_gpus() -> int:
    """GPUs that torch can use, 0 where the CPU is asked for or all there is. Raises UserError for unusable ones."""
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
