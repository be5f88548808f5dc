"""How well the planner's costs explain time: packs of very different composition, timed and fitted.

One command: `python bench/cost_model.py [--json]`, on a CUDA device where there is one. Each pack is full, so that
tokens alone (what the original fills packs by) call all of them equal. Forward and backward of the language model and
of vision (ViT, connector, autoencoder) are timed apart, as they are priced apart, with activation checkpointing and
with the linear layers that ZeRO-3 runs. Then: how far each way of counting is from the time; which weights of its
terms explain it best; and what planning by weights would gain at 7B, where these or others held.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from cost_packs import SIZES, Size, make_packs
from data_plan import BUDGETS, mix
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from bagel_ds.data.plan.cost import CostModel, Work, work_of
from bagel_ds.data.plan.packing import LLM_TOLERANCE, VISION_TOLERANCE
from bagel_ds.data.plan.planner import PackingOptions, Planner, imbalance
from bagel_ds.machine.device import choose_kernels, device_type
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.batch import PackedBatch, normalize_pixels
from bagel_ds.model.recompute import recompute
from bagel_ds.model.vae import AutoEncoder, encode_images

PARTS = ("llm", "vision")
TERMS = {
    "llm": {"linear": ("und_token", "gen_token"), "attention": ("attention_pair",), "cross entropy": ("ce_token",)},
    "vision": {"vit": ("vit_patch", "vit_pair"), "vae": ("vae_cell", "vae_pair")},
}
WORLD = 8
ROWS, PLANNED = 30_000, 1024  # of the synthetic index; packs of it
LIGHT = 0.25  # packs with less than this share of the mean are not compared: no step waits for them
# What might hold on another device.
SUPPOSED: tuple[dict[str, float], ...] = (
    {"attention": 0.5},
    {"attention": 2},
    {"attention": 4},
    {"vae": 0.5},
    {"vae": 2},
    {"vae": 4},
)


class Timed(NamedTuple):
    """A pack, what it asks for, and the seconds of each part, a round of all packs after the other."""

    theme: str
    works: tuple[Work, ...]
    batch: PackedBatch
    seconds: dict[str, list[float]]


class Line(NamedTuple):
    """How one way of counting explains the seconds of one part."""

    part: str
    counted: str
    spread: float  # standard deviation of measured / predicted
    worst: float  # largest |measured / predicted - 1|
    imbalance: float  # of steps of `WORLD` packs that are equal by this count: mean of slowest / mean - 1
    ratio: float  # spread in units of ours


# Time


class Given(nn.Module):
    """Stands for ViT and connector while the language model is timed alone."""

    def __init__(self, like: nn.Parameter):
        super().__init__()
        self.like = [like]  # in a list: not a parameter of this module

    def forward(self, patches: Tensor, *_: Any) -> Tensor:
        return self.like[0].new_zeros(len(patches), self.like[0].shape[0]).requires_grad_()


class Network:
    """The network, cut where it is priced."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        with device:
            self.bagel = Bagel(size.config, recompute).to(dtype)
            self.vae = AutoEncoder(size.vae).requires_grad_(False)
        for name, weight in self.bagel.named_parameters():
            nn.init.ones_(weight) if "norm" in name else nn.init.normal_(weight, std=0.02)
        self.vit, self.connector = self.bagel.vit_model, self.bagel.connector
        self.bagel.vit_model, self.bagel.connector = Given(self.connector.fc2.weight), nn.Identity()  # type: ignore

    def llm(self, batch: PackedBatch) -> None:
        output = self.bagel(batch, torch.zeros_like(batch.noise))
        (output.ce.sum() + output.mse.sum()).backward()

    def vision(self, batch: PackedBatch) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            encode_images(self.vae, batch.images, batch.latent_shapes, batch.posterior_eps, 2)
        patches = normalize_pixels(batch.vit_patches).to(self.dtype)
        features = self.connector(self.vit(patches, batch.vit_position_ids, batch.vit_seqlens, recompute))
        features.backward(torch.ones_like(features))

    def seconds(self, part: str, batch: PackedBatch) -> float:
        """Of the device; on a CPU processor seconds of the one thread, which neighbours disturb less."""
        self.bagel.zero_grad()
        self.vit.zero_grad()
        self.connector.zero_grad()
        if self.device.type != "cuda":
            begin = time.process_time()
            getattr(self, part)(batch)
            return time.process_time() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        getattr(self, part)(batch)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000


def time_packs(packs: list[Timed], size: Size, repeats: int, device: torch.device, dtype: torch.dtype) -> None:
    """Fill in the seconds: round after round over all packs, so that a disturbance does not fall on one."""
    network = Network(size, device, dtype)
    for part in PARTS:
        network.seconds(part, packs[-1].batch.to(device))  # the first call of every kernel
    with tqdm(total=len(packs) * repeats, desc="packs", unit="pack", mininterval=1) as progress:
        for _ in range(repeats):
            for pack in packs:
                batch = pack.batch.to(device)
                for part in PARTS:
                    pack.seconds[part].append(network.seconds(part, batch))
                progress.update()


# Costs


def reweighted(model: CostModel, weights: Mapping[str, float]) -> CostModel:
    """The prices of each term times its weight, where one is given."""
    fields = {field: term for terms in TERMS.values() for term, names in terms.items() for field in names}
    changed = {field: round(getattr(model, field) * weights.get(term, 1.0)) for field, term in fields.items()}
    return dataclasses.replace(model, **changed)


def alone(model: CostModel, kept: str) -> CostModel:
    """The prices of one term, the others free."""
    return reweighted(model, {term: 0.0 for terms in TERMS.values() for term in terms if term != kept})


def priced(packs: Sequence[Timed], model: CostModel, part: str) -> NDArray[np.float64]:
    """GFLOP of the packs' part."""
    costs = [[getattr(model.price(work), part) for work in pack.works] for pack in packs]
    return np.array([sum(each) / 1e3 for each in costs])


def fit(terms: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds per unit of each term [K], none negative, with the least sum of squares of predicted / measured - 1."""
    used = list(range(terms.shape[1]))
    while True:
        found = np.linalg.lstsq(terms[:, used] / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0).all():
            weights = np.zeros(terms.shape[1])
            weights[used] = found
            return weights
        del used[int(found.argmin())]


def compared(part: str, counted: str, counts: NDArray[np.float64], seconds: NDArray[np.float64], ours: float) -> Line:
    ratios = seconds / counts
    ratios = ratios / ratios.mean()
    steps = np.random.default_rng(0).choice(ratios, (10_000, WORLD))
    uneven = float((steps.max(1) / steps.mean(1) - 1).mean())
    spread = float(ratios.std())
    return Line(part, counted, spread, float(np.abs(ratios - 1).max()), uneven, spread / (ours or spread))


@dataclass
class Calibration:
    """What was found of one part."""

    lines: list[Line]
    noise: float  # mean over packs: how far the rounds of one pack are apart (median / fastest - 1)
    seconds_per_gflop: float  # one for all terms
    weights: dict[str, float]  # seconds per GFLOP of each term, relative to the first's
    uncertain: dict[str, float]  # their standard deviation over random draws of the packs


def calibrate(part: str, packs: Sequence[Timed], model: CostModel) -> Calibration:
    counts = priced(packs, model, part)
    there = counts > LIGHT * counts.mean()
    packs = [pack for pack, kept in zip(packs, there, strict=True) if kept]
    counts = counts[there]
    seconds = np.array([min(pack.seconds[part]) for pack in packs])
    noise = float(np.mean([np.median(pack.seconds[part]) / min(pack.seconds[part]) - 1 for pack in packs]))
    terms = np.stack([priced(packs, alone(model, term), part) for term in TERMS[part]], axis=1)
    fitted = fit(terms, seconds)
    ours = compared(part, "cost", counts, seconds, 0.0)
    others = {"tokens": np.array([float(sum(work.tokens for work in pack.works)) for pack in packs])}
    if part == "llm":
        others["cost without attention"] = priced(packs, reweighted(model, {"attention": 0.0}), part)
    others["cost, terms weighted"] = terms @ fitted
    lines = [ours, *(compared(part, name, other, seconds, ours.spread) for name, other in others.items())]
    drawn = np.random.default_rng(0).integers(len(packs), size=(500, len(packs)))
    refitted = np.array([fit(terms[draw], seconds[draw]) for draw in drawn])
    weights = dict(zip(TERMS[part], (fitted / fitted[0]).tolist(), strict=True))
    uncertain = dict(zip(TERMS[part], (refitted / fitted[0]).std(0).tolist(), strict=True))
    return Calibration(lines, noise, float((seconds / counts).mean()), weights, uncertain)


class Gain(NamedTuple):
    """Imbalance in time at 7B if a FLOP of some terms took longer, or shorter, by these weights."""

    weights: dict[str, float]
    part: str
    by_flop: float  # of packs planned by FLOP
    by_weights: float  # of packs planned by the weights

    @property
    def matters(self) -> bool:
        """Whether the difference is larger than those that the planner itself does not look at."""
        return self.by_flop - self.by_weights > {"llm": LLM_TOLERANCE, "vision": VISION_TOLERANCE}[self.part]


def planned(model: CostModel) -> list[list[list[Work]]]:
    """The works of each pack of each step, of a mix like bagel_example (see data_plan.py)."""
    expected, limit, per_sample = BUDGETS[1]
    steps = Planner(mix(ROWS, per_sample), PackingOptions(limit, expected), model).steps(WORLD)
    return [[[work_of(plan) for plan in pack.samples] for pack in next(steps).packs] for _ in range(PLANNED // WORLD)]


def uneven(steps: list[list[list[Work]]], true: CostModel, part: str) -> float:
    costs = [[sum(getattr(true.price(work), part) for work in pack) for pack in step] for step in steps]
    return float(np.mean([imbalance(step) for step in costs]))


def gains(scenarios: Sequence[Mapping[str, float]]) -> list[Gain]:
    """For each scenario, of the parts that its weights are about."""
    flop, found = CostModel.of(), []
    plain = planned(flop)
    for weights in tqdm(scenarios, desc="plans", unit="plan"):
        true = reweighted(flop, weights)
        steps = planned(true)
        for part in PARTS:
            if set(weights) & set(TERMS[part]):
                found.append(Gain(dict(weights), part, uneven(plain, true, part), uneven(steps, true, part)))
    return found


# Report


def show(found: Mapping[str, Calibration], gained: Sequence[Gain], packs: Sequence[Timed], model: CostModel) -> None:
    print(f"{'pack':22}{'samples':>8}{'llm GFLOP':>11}{'s':>8}{'vision GFLOP':>14}{'s':>8}")
    gflop = {part: priced(packs, model, part) for part in PARTS}
    for number, pack in enumerate(packs):
        llm, vision = (min(pack.seconds[part]) for part in PARTS)
        print(f"{pack.theme:22}{len(pack.works):8}{gflop['llm'][number]:11.1f}{llm:8.3f}", end="")
        print(f"{gflop['vision'][number]:14.1f}{vision:8.3f}")
    print(f"\n{'part':8}{'counted by':24}{'spread':>9}{'worst':>9}{'imbalance':>11}{'spread / ours':>15}")
    for line in (line for part in PARTS for line in found[part].lines):
        print("{:8}{:24}{:9.2%}{:9.2%}{:11.2%}{:15.1f}".format(*line))
    print(f"\nspread, worst: of measured / predicted; imbalance: of {WORLD} ranks whose packs are equal by the count")
    for part, calibration in found.items():
        weights = [f"{term} {w:.2f} +- {calibration.uncertain[term]:.2f}" for term, w in calibration.weights.items()]
        print(f"{part}: {calibration.seconds_per_gflop * 1e3:.3g} ms per GFLOP; ", end="")
        print(f"a FLOP takes by term: {', '.join(weights)}; rounds of a pack are {calibration.noise:.1%} apart")
    print(f"\n{'if a FLOP takes longer by':50}{'part':8}{'planned by FLOP':>17}{'by the weights':>16}  it matters")
    for gain in gained:
        weights = ", ".join(f"{term} x{weight:.2g}" for term, weight in gain.weights.items())
        answer = "yes" if gain.matters else "no"
        print(f"{weights:50}{gain.part:8}{gain.by_flop:17.2%}{gain.by_weights:16.2%}  {answer}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--size", choices=SIZES, default="small", help="7b: its widths, four layers; for a GPU")
    parser.add_argument("--packs", type=int, default=28)
    parser.add_argument("--tokens", type=int, help="per pack, instead of the size's own")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts: disturbances only add")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.nn.functional.linear = zero3_linear_wrap  # as zero.Init does; other stages recompute one product less
    device = torch.device(device_type())
    choose_kernels("bf16")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = SIZES[arguments.size]
    size = size._replace(tokens=arguments.tokens or size.tokens)
    packs = [
        Timed(theme, tuple(map(work_of, plans)), batch, {part: [] for part in PARTS})
        for theme, plans, batch in make_packs(arguments.packs, size, arguments.seed)
    ]
    time_packs(packs, size, arguments.repeats, device, dtype)
    model = CostModel.of(size.config, size.vae)
    found = {part: calibrate(part, packs, model) for part in PARTS}
    gained = gains([*(found[part].weights for part in PARTS), *SUPPOSED])
    if arguments.json:
        parts = {part: dataclasses.asdict(calibration) for part, calibration in found.items()}
        for part in PARTS:
            parts[part]["lines"] = [line._asdict() for line in found[part].lines]
        timed = [{"theme": pack.theme, "samples": len(pack.works), "seconds": pack.seconds} for pack in packs]
        gain = [{**one._asdict(), "matters": one.matters} for one in gained]
        print(json.dumps({"device": device.type, "packs": timed, "parts": parts, "planned_at_7b": gain}))
    else:
        show(found, gained, packs, model)


if __name__ == "__main__":
    main()
