"""bench/marked_train.py with weights that no file holds, a phase for each step and a line for each pack.

Guarantees: the run is the trainer's. Only what would be read from the model folder's weight file is made instead, on
the device and piece by piece (`random_weights.py`), so a 7B starts without 29 GB on disk. Phases of steps are step_0,
step_1 and so on; lines "PACK <step> <JSON>" say what the packs hold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where the package is not installed

import torch  # noqa: E402

import bagel_ds.train.saves.restore as restore_module  # noqa: E402
import bagel_ds.train.trainer as trainer_module  # noqa: E402
from bagel_ds.data.batches.loader import MicroBatch  # noqa: E402
from bagel_ds.machine.device import uses_cuda  # noqa: E402
from bagel_ds.model.attention.layout import AttentionLayout  # noqa: E402
from bagel_ds.model.batch import PackedBatch  # noqa: E402
from bagel_ds.model_folder.folder import EMA, ModelFolder  # noqa: E402
from bagel_ds.model_folder.tensor_files import TensorFiles  # noqa: E402
from bagel_ds.train.main import main  # noqa: E402
from bagel_ds.train.process.allocators import return_freed_memory  # noqa: E402
from bench.marked_train import MarkedTrainer, cap_device_memory, mark  # noqa: E402
from bench.random_model import folder_config, parameter_shapes  # noqa: E402
from bench.random_weights import RandomWeights  # noqa: E402


class GeneratedFiles(RandomWeights):
    """In place of the `TensorFiles` of a folder that `write_without_weights` wrote."""

    def __init__(self, folder: Path):
        device = torch.device("cuda", torch.cuda.current_device()) if uses_cuda() else torch.device("cpu")
        super().__init__(parameter_shapes(folder_config(folder)), device)
        self.paths = [folder / EMA]


class PackTrainer(MarkedTrainer):
    def _step(self, number: int, window: Sequence[MicroBatch], *others: Any) -> Any:
        mark(f"step_{number}")
        for micro in window:
            print(f"PACK {number} {json.dumps(contents(micro.batch))}", flush=True)
        return super()._step(number, list(window), *others)


def contents(batch: PackedBatch) -> dict[str, Any]:
    """What a pack holds: counts of tokens by kind, and what else its cost depends on."""
    return {
        "samples": len(batch.sample_lens),
        "text": len(batch.text_indexes),
        "vit": len(batch.vit_indexes),
        "latents": len(batch.vae_indexes),
        "drawn": len(batch.mse_loss_indexes),
        "labels": len(batch.label_ids),
        "pairs": AttentionLayout.from_splits(batch.sample_lens, batch.split_lens, batch.attn_modes).pairs,
        "vit_patches": batch.vit_seqlens,
        "vae_pixels": [image.shape[1] * image.shape[2] for image in batch.images],
    }


def open_generated(folder: ModelFolder, prefer_ema: bool) -> TensorFiles:
    """Instead of `ModelFolder.open_weights`."""
    return cast(TensorFiles, GeneratedFiles(folder.path))


if __name__ == "__main__":
    return_freed_memory()
    cap_device_memory()
    ModelFolder.open_weights = open_generated  # type: ignore[assignment, method-assign]
    # Adapters record it of their base model. It is computed in host memory, and nothing is saved here.
    restore_module.base_fingerprint = lambda files: "generated"
    trainer_module.Trainer = PackTrainer  # type: ignore[misc]
    sys.exit(main())
