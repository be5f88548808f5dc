"""The true BAGEL-7B-MoT shape on a small machine: parameters on NVMe, everything but one part frozen.

Builds the 14.6 B network under ZeRO-3 with random weights made on the fly (no source file), runs one forward and
backward pass and one update of a small pack, exports the result into a hashing sink, and prints what memory and disk
it took. Needs about 32 GB of free disk and 16 GB of RAM, and refuses less. One process, CPU or GPU:

    python bench/full_size.py --nvme_path /some/local/ssd [--layers 28] [--json]
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import threading
import time
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bagel_ds.arguments.run_config import make_config  # noqa: E402
from bagel_ds.checkpoint.gather import Gathering  # noqa: E402
from bagel_ds.data.batches.layout import Loaded, layout  # noqa: E402
from bagel_ds.data.samples.sample import TEXT, VAE  # noqa: E402
from bagel_ds.errors import UserError  # noqa: E402
from bagel_ds.model.bagel import Bagel  # noqa: E402
from bagel_ds.model.batch import PackedBatch  # noqa: E402
from bagel_ds.model.losses.normalization import LossOptions  # noqa: E402
from bagel_ds.model.shape.config import BagelConfig  # noqa: E402
from bagel_ds.model.shape.parts import part_of  # noqa: E402
from bagel_ds.model_folder.tokenizer import SpecialTokens  # noqa: E402
from bagel_ds.ranges import MASTER, TensorInfo  # noqa: E402
from bagel_ds.train.metrics.throughput import host_gib  # noqa: E402
from bagel_ds.train.step import accumulate, update  # noqa: E402
from bagel_ds.units import GIB  # noqa: E402
from bagel_ds.zero.config.nvme import fit_buffers  # noqa: E402
from bagel_ds.zero.config.resolve import resolve_ds_config  # noqa: E402
from bagel_ds.zero.config.settings import ZeroSettings  # noqa: E402
from bagel_ds.zero.engine import AdamOptions, ZeroEngine  # noqa: E402
from bagel_ds.zero.nvme_check import check_drives, check_space  # noqa: E402
from bagel_ds.zero.swap_folders import sweep_folders  # noqa: E402
from bagel_ds.zero.weights import frozen_pieces  # noqa: E402
from bench.random_weights import RandomWeights  # noqa: E402

TRAINED = "vae2llm"  # at the network's entrance, so that the backward pass goes through every layer
RAM_NEEDED = 16 * GIB
DISK_MARGIN = 2 * GIB


class HashingSink:
    """What `Gathering.collect` writes to: nothing is kept but a digest and the count of bytes."""

    def __init__(self) -> None:
        self.digest, self.nbytes, self.largest = hashlib.sha256(), 0, 0

    def write(self, name: str, start: int, values: Tensor) -> None:
        self.digest.update(f"{name} {start}".encode())
        self.digest.update(values.contiguous().view(torch.uint8).numpy().data)
        self.nbytes += values.nbytes


class HostPeak:
    """The highest anonymous and shared memory of this process, sampled every 50 ms."""

    def __init__(self) -> None:
        self.gib, self._stop = 0.0, threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self.gib = max(self.gib, host_gib())

    def take(self) -> float:
        """The peak since the last call."""
        peak, self.gib = self.gib, 0.0
        return peak


def small_pack(config: BagelConfig, text: int = 24, rows: int = 4, columns: int = 4) -> PackedBatch:
    """A caption with labels and one image to draw."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.llm.vocab_size, (text - 2,), generator=generator).tolist()
    noise = torch.randn(rows * columns, config.latent_features, generator=generator)
    image = torch.empty(3, 16 * rows, 16 * columns, dtype=torch.uint8)
    caption, drawn = Loaded(TEXT, ids, loss=True), Loaded(VAE, image=image, loss=True, timestep=0.0, noise=noise)
    return layout([[caption, drawn]], SpecialTokens(0, 1, 2, 3, 4))


def check_machine(nvme_path: Path, disk: int) -> None:
    free = shutil.disk_usage(nvme_path).free
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if free < disk:
        raise UserError(f"{nvme_path} has {free / GIB:.0f} GiB free, this benchmark needs {disk / GIB:.0f}")
    if memory < RAM_NEEDED // 2:
        raise UserError(f"{memory / GIB:.0f} GiB of RAM are free, this benchmark needs {RAM_NEEDED / GIB:.0f}")


def run(nvme_path: Path, layers: int) -> dict[str, object]:
    nvme_path.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(BagelConfig(), llm=dataclasses.replace(BagelConfig().llm, num_hidden_layers=layers))
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Bagel(config).named_parameters()}
    parameters = sum(TensorInfo(torch.bfloat16, shape).numel for shape in shapes.values())
    check_machine(nvme_path, 2 * parameters + DISK_MARGIN)
    arguments = make_config({"nvme_path": str(nvme_path), "checkpoint_dir": str(nvme_path / "none")})
    ds_config, _ = resolve_ds_config("zero3_nvme_all", arguments, 1)
    # No recomputation: DeepSpeed would hold a layer's frozen weights all at once, and 16 buffers of 1.1 GB are too many
    # for this machine. The pack is so small that its activations don't matter. 5 buffers are the least that works.
    ds_config["zero_optimization"]["offload_param"]["buffer_count"] = 5
    fit_buffers(ds_config, max(math.prod(shape) for shape in shapes.values()), 1)
    folders = ZeroSettings.of(ds_config).swap_folders
    check_drives(folders)
    check_space(folders, 2 * parameters)
    sweep_folders(str(nvme_path))
    peak, weights, phases = HostPeak(), RandomWeights(shapes), {}

    def phase(name: str, began: float) -> None:
        phases[name] = {"seconds": round(time.monotonic() - began, 1), "host_peak_gib": round(peak.take(), 2)}
        print(f"{name}: {phases[name]}", file=sys.stderr, flush=True)

    try:
        began = time.monotonic()
        engine = ZeroEngine(lambda: Bagel(config), lambda name: part_of(name) == TRAINED, ds_config)
        phase("construct", began)
        began = time.monotonic()
        engine.start(weights, AdamOptions())
        phase("load", began)
        on_disk = sum(path.stat().st_size for path in nvme_path.rglob("*.swp"))
        began = time.monotonic()
        pack = small_pack(config)
        latents = torch.zeros(len(pack.vae_indexes), config.latent_features, device=engine.device)
        result = update(engine, accumulate(engine, lambda _: latents, [pack], LossOptions()), 1e-4)
        losses = result.read()
        phase("step", began)
        began = time.monotonic()
        sink = HashingSink()
        infos = {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()}
        pieces = chain(engine.partitions.pieces(MASTER), frozen_pieces(engine.module))
        Gathering(engine.device).collect(sink, infos, pieces)  # type: ignore[arg-type]
        phase("export", began)
        engine.close()
    finally:
        sweep_folders(str(nvme_path))
    return {
        "parameters": parameters,
        "layers": layers,
        "weights_gib": round(2 * parameters / GIB, 2),
        "nvme_gib": round(on_disk / GIB, 2),
        "phases": phases,
        "ce": losses.ce,
        "mse": losses.mse,
        "grad_norm": float(result.grad_norm),
        "exported_gib": round(sink.nbytes / GIB, 2),
        "exported_sha256": sink.digest.hexdigest(),
        "host_peak_over_weights": round(max(p["host_peak_gib"] for p in phases.values()) / (2 * parameters / GIB), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvme_path", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29611")
    deepspeed.init_distributed(verbose=False)
    try:
        found = run(options.nvme_path, options.layers)
    except UserError as fault:
        print(f"ERROR: {fault}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
