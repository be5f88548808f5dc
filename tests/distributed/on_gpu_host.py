"""launch/train.py on a host that has eight GPUs, if torch is asked; started by test_cpu_on_gpu_host.py.

In a torch that is built for the CPU, whatever is asked of CUDA beyond that fails by itself. It prints which parts of
the autoencoder it holds and, at the end, which kernels it could have taken on a GPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 8

from bagel_ds.train import trainer  # noqa: E402
from bagel_ds.train.main import main  # noqa: E402


class ShownTrainer(trainer.Trainer):
    def run(self) -> None:
        print("autoencoder:", *dict(self.prepared.vae.named_children()))
        super().run()


if __name__ == "__main__":
    os.environ["BAGEL_DS_DETACH"] = "0"  # so that main runs in this process
    trainer.Trainer = ShownTrainer
    code = main()
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    print(f"cuDNN's attention: {torch.backends.cuda.cudnn_sdp_enabled()}; TF32: {cudnn}, {matmul}")
    sys.exit(code)
