"""Training of BAGEL-7B-MoT's layers on one GPU: speed, memory and where the time goes, beside what is possible.

One command, on a machine with a GPU: `python bench/train_7b.py CASE [--json]`. The cases:

  frozen-und   every layer, the understanding side frozen, the GPU's whole memory
  qlora        every layer in 4 bits, with adapters, the GPU's whole memory
  offload-24   all weights train with the optimizer in host memory and at most 24 GiB of the GPU, at the two largest
               depths that fit this host; what a layer adds is their difference, and 28 layers are extrapolated from it

Each is a run of the trainer on packs that the data plan makes of pictures of 512-1344 px. Weights are random and made
on the device, so nothing of their size is written or read. Of the steps, 3 come first and are not counted, 2 are
profiled, the profile is written during the next, and `--steps` are timed. `--layers 1 2 --width 512 --tokens 1024`
tries a case on a CPU, with the demo's pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # also where the package is not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from bagel_ds.arguments.run_config import RunConfig, make_config  # noqa: E402
from bagel_ds.data.plan.cost import CostModel  # noqa: E402
from bagel_ds.demo import write_demo  # noqa: E402
from bagel_ds.lora.targets import with_adapters  # noqa: E402
from bagel_ds.machine.device import device_type  # noqa: E402
from bagel_ds.memory.planner import GPU_RESERVED, MemoryOptions, MemoryPlan, plan_memory  # noqa: E402
from bagel_ds.memory.suggestions import resolved  # noqa: E402
from bagel_ds.model.shape.config import BagelConfig, VAEConfig  # noqa: E402
from bagel_ds.model.shape.parameters import parameter_sizes  # noqa: E402
from bagel_ds.model.vae import AutoEncoder  # noqa: E402
from bagel_ds.model_folder.folder import EMA, VAE  # noqa: E402
from bagel_ds.train.memory_plan import host_memory_gib  # noqa: E402
from bagel_ds.train.metrics.profile import SKIPPED  # noqa: E402
from bagel_ds.train.metrics.throughput import peak_tflops  # noqa: E402
from bagel_ds.units import GIB  # noqa: E402
from bagel_ds.zero.config.settings import ZeroSettings  # noqa: E402
from bench.host_memory import available_gib, gib  # noqa: E402
from bench.measured_run import measured_run  # noqa: E402
from bench.photo_sets import write_photo_sets  # noqa: E402
from bench.random_model import scaled_config, write_without_weights  # noqa: E402
from bench.roofline import Rates, beside_limits, demand, flops_per_weight, measure_rates  # noqa: E402
from bench.train_7b_report import extrapolated, lines, mean_pack, measurements, work_of_pack  # noqa: E402

PROFILED = 2  # steps
PROFILE = range(SKIPPED - 1, SKIPPED + PROFILED + 1)  # steps with the profiler, from its start to its end
ROWS = 40  # of each data set
DEMO_VAE, DEMO_IMAGE = VAEConfig(channels=32), 192**2
LARGEST_IMAGE = 1024**2
WHOLE = BagelConfig().llm.num_hidden_layers
SHARE = 0.85  # of the free host memory and disk that a run may take


class Case(NamedTuple):
    """A way to train. Of `presets`, the fastest first, a run takes the first that fits at its depths."""

    presets: tuple[str, ...]
    arguments: dict[str, Any] = {}
    cap: float | None = None  # GiB of the GPU; None: all there are
    largest_depths: int = 0  # so many, as deep as memory allows; 0: every layer of the released model


CASES = {
    "frozen-und": Case(
        ("zero2.json", "zero3_split.json", "zero2_cpu_split.json", "zero2_cpu_split_8bit.json"), {"freeze_und": True}
    ),
    "qlora": Case(("zero2.json",), {"lora_rank": 64, "base_precision": "nf4"}),
    "offload-24": Case(("zero3_cpu_split.json",), cap=24.0, largest_depths=2),
}


class Room(NamedTuple):
    """Bytes that a run may take. `device` is None without a GPU."""

    device: float | None
    host: float
    disk: float

    def holds(self, plan: MemoryPlan) -> bool:
        on_device = self.device is None or plan.gpu_peak <= self.device
        return on_device and plan.host_peak <= self.host and plan.nvme <= self.disk


@dataclass(frozen=True)
class Experiment:
    """What the command line asks for."""

    name: str
    case: Case
    tokens: int
    accumulation: int
    steps: int
    width: int | None
    tflops: float | None
    device: str

    def network(self, depth: int) -> BagelConfig:
        """So many layers of the released model, or of a narrower one."""
        config = BagelConfig() if self.width is None else scaled_config(self.width, depth, 16384)
        llm = dataclasses.replace(config.llm, num_hidden_layers=depth)
        config = dataclasses.replace(config, llm=llm, freeze_und=self.run("zero3.json").training.freeze_und)
        return with_adapters(self.run("zero3.json").training, config)

    def run(self, preset: str) -> RunConfig:
        return make_config(self.arguments(preset))

    def arguments(self, preset: str) -> dict[str, Any]:
        """The trainer's options that a memory plan depends on."""
        return {
            "ds_config": preset,
            "ema": 0,
            "num_workers": 4 if self.width is None else 1,
            "gradient_accumulation_steps": self.accumulation,
            "max_num_tokens": self.tokens,
            **self.case.arguments,
        }

    def planned(self, preset: str, depth: int) -> tuple[MemoryPlan, ZeroSettings]:
        run, config = self.run(preset), self.network(depth)
        settings = resolved(preset, run, config, 1)
        pixels = LARGEST_IMAGE if self.width is None else DEMO_IMAGE
        memory = MemoryOptions.of(run, 1, device=self.device, image_pixels=pixels, vae=self.vae)
        return plan_memory(config, settings, memory), settings

    @property
    def vae(self) -> VAEConfig:
        return VAEConfig() if self.width is None else DEMO_VAE


def main() -> None:
    options = parsed()
    experiment = experiment_of(options)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="train_7b_") as name:
        folder = Path(name)
        preset, depths = choose(experiment, room(folder, experiment), options.layers)
        data = write_inputs(folder, experiment)
        measured = [train(folder, data, preset, depth, experiment) for depth in depths]
    rates = measure_rates(experiment.tflops)  # now that the runs have left the machine
    runs = [found if "failed" in found else beside_plan(found, preset, experiment, rates) for found in measured]
    report = {
        "case": experiment.name,
        "device": torch.cuda.get_device_name() if experiment.device == "cuda" else "CPU",
        "preset": preset,
        "cap_gib": experiment.case.cap,
        "tokens": experiment.tokens,
        "accumulation": experiment.accumulation,
        "rates": rates._asdict(),
        "runs": runs,
        "extrapolated": extrapolated(runs[0], runs[1], WHOLE) if len(runs) == 2 else None,
    }
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))
    if any("failed" in run for run in runs):
        sys.exit(1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES, metavar="CASE", help=f"one of: {', '.join(CASES)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default 5)")
    parser.add_argument("--tokens", type=int, default=11520, help="of a pack (default 11520)")
    parser.add_argument("--accumulation", type=int, default=1, help="packs of a step (default 1)")
    parser.add_argument("--preset", help="ds_config (default: the case's first that fits)")
    parser.add_argument("--cap", type=float, help="GiB of the GPU that may be used (default: the case's)")
    parser.add_argument("--layers", type=int, nargs="+", help="depths (default: the case's)")
    parser.add_argument("--width", type=int, help="hidden size (default: the released model's)")
    parser.add_argument("--peak_tflops", type=float, default=0.0, help="of the device (default: its data sheet's)")
    parser.add_argument("--work", type=Path, help="folder for data and swap files (default: a temporary one)")
    options = parser.parse_args()
    if options.steps < 1 or options.accumulation < 1:
        parser.error("pass at least one timed step, of one pack")
    return options


def experiment_of(options: argparse.Namespace) -> Experiment:
    device, case = device_type(), CASES[options.case]
    if device == "cpu" and options.width is None:
        raise SystemExit("no GPU was found; --layers 1 2 --width 512 --tokens 1024 tries a case on a CPU")
    return Experiment(
        name=options.case,
        case=case._replace(
            presets=(options.preset,) if options.preset else case.presets,
            cap=case.cap if options.cap is None else options.cap,
        ),
        tokens=options.tokens,
        accumulation=options.accumulation,
        steps=options.steps,
        width=options.width,
        tflops=peak_tflops(options.peak_tflops),
        device=device,
    )


# ------------------------------------------------------------------------------------------------------- what is run
def room(folder: Path, experiment: Experiment) -> Room:
    device = None
    if experiment.device == "cuda":
        device = (1 - GPU_RESERVED) * torch.cuda.get_device_properties(0).total_memory
        device = device if experiment.case.cap is None else min(device, experiment.case.cap * GIB)
    host = min(available_gib(), host_memory_gib()) * GIB
    return Room(device, SHARE * host, SHARE * shutil.disk_usage(folder).free)


def choose(experiment: Experiment, free: Room, layers: Sequence[int] | None) -> tuple[str, Sequence[int]]:
    """The preset and the depths of the runs; `layers` are the depths if they are given."""
    presets = experiment.case.presets
    for preset in presets:
        depths = layers or largest_depths(experiment, preset, free)
        if depths and free.holds(experiment.planned(preset, max(depths))[0]):
            return preset, depths
    on_device = "" if free.device is None else f" and {free.device / GIB:.0f} of the GPU"
    raise SystemExit(
        f"{experiment.name}: {', '.join(presets)} don't fit into {free.host / GIB:.0f} GiB of host memory{on_device}"
    )


def largest_depths(experiment: Experiment, preset: str, free: Room) -> Sequence[int]:
    """As many depths as the case asks for, the largest that fit; fewer where no more do."""
    if not experiment.case.largest_depths:
        return [WHOLE]
    fitting = [depth for depth in range(1, WHOLE + 1) if free.holds(experiment.planned(preset, depth)[0])]
    return fitting[-experiment.case.largest_depths :]


def write_inputs(folder: Path, experiment: Experiment) -> Path:
    """The demo, an autoencoder of the released size if the network has it, and the data, whose config is returned."""
    write_demo(folder / "demo")
    if experiment.width is not None:
        return folder / "demo" / "example.yaml"
    torch.manual_seed(0)
    save_file(AutoEncoder(experiment.vae).state_dict(), folder / "demo" / "model" / VAE)
    return write_photo_sets(folder / "photos", ROWS, np.random.default_rng(0))


def train(folder: Path, data: Path, preset: str, depth: int, experiment: Experiment) -> dict[str, Any]:
    """Train at this depth, and stop before anything is saved: a checkpoint is 20 bytes per parameter."""
    config, results = experiment.network(depth), folder / f"run_{depth}"
    base = dataclasses.replace(config, lora=None)
    sizes = {
        "layers": depth,
        "parameters": sum(each.numel for each in parameter_sizes(base)),
        "trained": sum(each.numel for each in parameter_sizes(config) if each.trains),
    }
    say(f"{experiment.name}, {sizes}: {PROFILE.stop + experiment.steps} steps under {preset}")
    write_without_weights(folder / "model", folder / "demo" / "model", base)
    (folder / "model" / EMA).touch()  # stands for the weights that generated_train.py makes
    options = {
        **experiment.arguments(preset),
        **options_of_run(experiment),
        "model_path": folder / "model",
        "dataset_config_file": data,
        "results_dir": results,
        "checkpoint_dir": results / "checkpoints",
        "nvme_path": folder / "nvme",
    }
    launch = measured_run(
        [word for name, value in options.items() for word in (f"--{name}", value)],
        ranks=1,
        script="generated_train.py",
        until="export",
        device=experiment.device,
        environment=environment(experiment.case.cap),
    )
    found = measurements(launch, results, PROFILE, experiment.steps)
    shutil.rmtree(folder / "nvme", ignore_errors=True)
    return {**sizes, **found}


def options_of_run(experiment: Experiment) -> dict[str, Any]:
    """The trainer's options for a few steps from generated weights, some of them profiled."""
    return {
        "finetune_from_hf": True,
        "finetune_from_ema": True,
        "max_latent_size": BagelConfig().max_latent_size,
        "expected_num_tokens": experiment.tokens,
        "max_num_tokens_per_sample": experiment.tokens,
        "peak_device_tflops": experiment.tflops or 0.0,
        "total_steps": PROFILE.stop + experiment.steps,
        "save_every": 10**6,
        "log_every": 1,
        "profile": PROFILED,
        "lr": 1e-5,
        "warmup_steps": 1,
        "ignore_memory_plan": True,
    }


def environment(cap: float | None) -> dict[str, str]:
    """Of the trainer: as many threads as a user's run has, which CPU Adam needs, and the cap of the GPU in GiB."""
    threads = os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    return {"OMP_NUM_THREADS": threads, **({} if cap is None else {"BAGEL_BENCH_DEVICE_GIB": str(cap)})}


def beside_plan(found: dict[str, Any], preset: str, experiment: Experiment, rates: Rates) -> dict[str, Any]:
    """A run's numbers beside the planner's and the limits of this machine."""
    config = experiment.network(found["layers"])
    plan, settings = experiment.planned(preset, found["layers"])
    cost = CostModel.of(config, experiment.vae)
    work = [work_of_pack(pack) for pack in found["packs"]]
    least = demand(work, cost, plan, settings, found["trained"], experiment.steps)
    return {
        **found,
        "packs": mean_pack(found["packs"]),
        "planned_device_gib": gib(plan.gpu_peak),
        "planned_host_gib": gib(plan.host_peak),
        "roofline": beside_limits(least, rates, found["step_seconds"]),
        "flops_per_weight": flops_per_weight(cost, config),
    }


def say(text: str) -> None:
    print(f"[train_7b] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
