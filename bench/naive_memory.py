"""How the original loads and saves, for comparison in bench/host_memory.py only; started by the launcher.

Every rank reads the whole weight file into memory, fills a whole fp32 network, copies it for the moving average, then
keeps its shard; to save, both are gathered whole on rank 0 and written. Arguments: model folder, file to write.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where the package is not installed

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bagel_ds.model.bagel import Bagel  # noqa: E402
from bench.marked_train import mark  # noqa: E402
from bench.random_model import folder_config  # noqa: E402


def main(folder: Path, output: Path) -> None:
    dist.init_process_group("gloo")
    mark("load")
    network = Bagel(folder_config(folder))
    weights = load_file(folder / "ema.safetensors")
    network.load_state_dict(weights)
    average = copy.deepcopy(network)
    mark("loaded")
    del weights
    shards = [own_shard(module) for module in (network, average)]
    del network, average
    mark("sharded")
    time.sleep(1)  # long enough to be sampled
    mark("export")
    whole = [gathered(shard) for shard in shards]
    if dist.get_rank() == 0:
        for state in whole:
            save_file(state, output)
    mark("end")


def own_shard(module: nn.Module) -> dict[str, tuple[torch.Size, Tensor]]:
    """This rank's part of every flattened parameter, with its whole shape."""
    world, rank = dist.get_world_size(), dist.get_rank()
    found = {}
    for name, parameter in module.named_parameters():
        flat = nn.functional.pad(parameter.detach().flatten(), (0, -parameter.numel() % world))
        found[name] = (parameter.shape, flat.chunk(world)[rank].clone())
    return found


def gathered(shards: dict[str, tuple[torch.Size, Tensor]]) -> dict[str, Tensor]:
    """All parameters whole on rank 0, nothing elsewhere."""
    world, rank = dist.get_world_size(), dist.get_rank()
    whole = {}
    for name, (shape, shard) in shards.items():
        parts = [torch.empty_like(shard) for _ in range(world)] if rank == 0 else None
        dist.gather(shard, parts)
        if parts is not None:
            whole[name] = torch.cat(parts)[: shape.numel()].view(shape)
    return whole


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(words[0]), Path(words[1]))
