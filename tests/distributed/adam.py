"""Three updates of a small network under each DeepSpeed configuration; started by test_adam.py.

Arguments: a JSON file with a list of cases {name, ds_config, precision, rates, resumes} and a folder for the results:
<name>.<step>.safetensors with the masters after each update and <name>.json with the gradient norms. A case that
resumes also gives <name>.resumed.safetensors: the masters of an engine that takes up the state after the second update
and makes the third. Between the second and the third update the network computes with an average of its weights.

Loss and weights are linear in each other, so the gradient is what `gradients` draws, whatever the weights round to.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from safetensors.torch import load_file
from torch import Tensor, nn

from bagel_ds.arguments.run_config import make_config
from bagel_ds.ranges import MASTER, TensorInfo
from bagel_ds.train.saves.restore import restore_moments
from bagel_ds.zero.config.nvme import fit_buffers
from bagel_ds.zero.config.resolve import resolve_ds_config
from bagel_ds.zero.ema import EMAOptions
from bagel_ds.zero.engine import AdamOptions, ZeroEngine
from bagel_ds.zero.partitions import MOMENTS
from bagel_ds.zero.weights import held_weight
from tests.checkpoint.written import export_tensors
from tests.distributed.engines import many_engines

UPDATES = 3
# On both sides of stage3_param_persistence_threshold (100,000); sizes that no number of ranks divides.
SHAPES = {"first": (7,), "second": (301, 333), "third": (100,), "fourth": (13, 17), "fifth": (1,), "sixth": (64, 65)}
# The first and the last gradient are clipped at 1.0 (norms of about 200 and 12 on one rank), the second is not (0.4).
SCALES = (2.0**-3, 2.0**-12, 2.0**-7)


def start_weights() -> dict[str, Tensor]:
    """fp32 weights that bf16 can't hold."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) / 32 for name, shape in SHAPES.items()}


def gradients(step: int, rank: int) -> dict[str, Tensor]:
    """Whole numbers up to 8 times a power of two: exact in bf16, and so are sums and means over few ranks."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {
        name: SCALES[step] * torch.randint(-8, 9, shape, generator=generator).float() for name, shape in SHAPES.items()
    }


class Product(nn.Module):
    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, factor: Tensor) -> Tensor:
        return (self.weight * factor.to(self.weight)).sum()


class Linear(nn.Module):
    """The sum of all weights times given factors."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: Product(shape) for name, shape in SHAPES.items()})

    def forward(self, factors: dict[str, Tensor]) -> Tensor:
        return torch.stack([part(factors[name]).float() for name, part in self.parts.items()]).sum()


def weight_name(part: str) -> str:
    return f"parts.{part}.weight"


def held_weights(engine: ZeroEngine) -> dict[str, Tensor]:
    """This rank's share of every weight."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        with held_weight(name, parameter) as (place, values):
            found[name] = values[: place.numel].clone()
    return found


class Weights:
    """A `WeightSource` over tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.tensors[name].dtype, tuple(self.tensors[name].shape))

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        return self.tensors[name].flatten()[start : None if numel is None else start + numel]


class State:
    """What `restore_moments` reads of a training state, from tensors in memory by kind and name."""

    def __init__(self, kinds: dict[str, dict[str, Tensor]]):
        self.kinds = kinds

    def has(self, kind: str, name: str) -> bool:
        return name in self.kinds.get(kind, {})

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        return Weights(self.kinds[kind]).read(name, start, numel)


class Run:
    """One case's engine and what it writes."""

    def __init__(self, case: dict, results: Path, weights: Weights):
        self.case, self.results = case, results
        config = make_config({"precision": case["precision"], "nvme_path": str(results / "nvme")})
        self.ds_config, _ = resolve_ds_config(case["ds_config"], config, dist.get_world_size())
        fit_buffers(self.ds_config, max(tensor.numel() for tensor in start_weights().values()), dist.get_world_size())
        self.engine = ZeroEngine(Linear, lambda name: True, self.ds_config)
        self.engine.start(weights, AdamOptions())
        self.average = self.engine.start_ema(EMAOptions(0.5), None)

    def update(self, step: int, made: str) -> float:
        """The step's update; the masters after it are written as `made`. Returns the gradient's norm."""
        loss = self.engine.forward(gradients(step, dist.get_rank()))
        self.engine.backward(loss)
        norm = float(self.engine.update(self.case["rates"][step])[1])
        self.write(MASTER, made)
        return norm

    def write(self, kind: str, made: str) -> Path:
        infos = {name: TensorInfo(torch.float32, shape) for name, shape in self.engine.shapes.items()}
        path = self.results / f"{self.case['name']}.{made}.safetensors"
        export_tensors(path, infos, self.engine.partitions.pieces(kind), self.engine.device)
        dist.barrier()
        return path

    def check_average_in_place(self) -> None:
        """Between two updates the network computes with the average for once, and then as before, bit for bit."""
        engine, before = self.engine, held_weights(self.engine)
        factors = {name: values.sin() for name, values in start_weights().items()}

        def value() -> float:
            with engine.forward_only():
                return engine.forward(factors).item()

        weights = value()
        with engine.average_in_place(self.average):
            average = value()
        whole = {name: torch.zeros(shape).flatten() for name, shape in SHAPES.items()}
        for piece in self.average.pieces():
            for place, values in piece.ranges:
                whole[place.name.split(".")[1]][place.start : place.start + place.numel] = values
        for name, values in whole.items():
            dist.all_reduce(values)  # each element is one rank's
            whole[name] = values.view(SHAPES[name]).to(next(engine.module.parameters()).dtype)
        products = [(values * factors[name].to(values)).sum().float() for name, values in whole.items()]
        assert average == torch.stack(products).sum().item() != weights
        after = held_weights(engine)
        assert all(torch.equal(after[name], values) for name, values in before.items()) and value() == weights

    def close(self) -> None:
        self.engine.close()
        shutil.rmtree(self.results / "nvme", ignore_errors=True)
        # Or an engine with hpZ is the only one of its process: DeepSpeed makes the group once and asserts that.
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def train(case: dict, results: Path) -> None:
    run = Run(case, results, Weights({weight_name(name): values for name, values in start_weights().items()}))
    norms = [run.update(step, str(step)) for step in range(UPDATES - 1)]
    run.check_average_in_place()
    saved = {kind: load_file(run.write(kind, kind)) for kind in (MASTER, *MOMENTS)}
    norms.append(run.update(UPDATES - 1, str(UPDATES - 1)))
    run.close()
    if case["resumes"]:
        resume(case, results, saved)
    if dist.get_rank() == 0:
        (results / f"{case['name']}.json").write_text(json.dumps(norms))


def resume(case: dict, results: Path, saved: dict[str, dict[str, Tensor]]) -> None:
    """The last update again, by an engine that takes up what was `saved` before it, by kind and name."""
    resumed = Run(case, results, Weights(saved[MASTER]))
    restore_moments(resumed.engine, State(saved), UPDATES - 1)  # type: ignore[arg-type]
    resumed.update(UPDATES - 1, "resumed")
    resumed.close()


def main(cases_file: str, results: str) -> None:
    deepspeed.init_distributed()
    with many_engines():
        for case in json.loads(Path(cases_file).read_text()):
            train(case, Path(results))
            dist.barrier()
    assert "torch._inductor.compile_fx" not in sys.modules, "each rank would take seconds to import torch's compiler"


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
