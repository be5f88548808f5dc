"""Where weights and optimizer states lie changes no bit of what is trained: NVMe beside CPU memory, at sizes that move.

Nor does it whether masters are split (beside fp32 masters in CPU memory, with gradients in fp32 and in bf16, under
stages 2 and 3).

Every table of a random network has its own size, so that offsets in a group miss every alignment. Between presets of
one case the groups hold the same parameters in the same order, so masters, moments, moving average, weights and
gradient norms (hence the clipping factors) must be equal bit for bit.

Mechanisms with a threshold, both sides of each drawn below. DeepSpeed's: states of a group and gradients swap at 1 MiB
of fp32 per rank; weights at 1 MiB; a parameter persists up to stage3_param_persistence_threshold elements; gradients
are reduced in buckets of reduce_bucket_size; groups end at sub_group_size; stage3_prefetch_bucket_size,
stage3_max_live_parameters and stage3_max_reuse_distance; offload_param.buffer_size (the largest parameter exactly, by
`fit_buffers`). Ours: gradients are cut at whole sectors; COPIED_ELEMENTS (ranges.py) and the average's _CHUNK, patched
to small odd numbers in half of the cases; SECTOR, BOUNCE and REQUEST of swap_io.py are tested in
tests/zero/test_swap_io.py, aio.block_size and max_in_cpu, which keep things in memory, in
tests/zero/config/test_nvme.py.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Mapping

import pytest
import torch
from safetensors.torch import load_file

from bench.random_model import scaled_config, write_random_model
from tests.distributed.cases import soak
from tests.launch import run_ranks

pytestmark = pytest.mark.distributed

OFFLOADED = Path(__file__).with_name("offloaded.py")
UNEVEN = Path(__file__).with_name("uneven.py")
PRESETS = ("zero3_cpu", "zero3_nvme", "zero3_nvme_all")
SWAPS = 2**20 // 4  # fp32 elements per rank
PERSISTS = 100_000  # elements, our presets' threshold
SEEDS = (0, 1, 2)
# With split masters, and in fp32: for the seeds in bf16. Without accumulation gradients are bf16.
SPLIT = {"zero3_cpu_split": "zero3_cpu", "zero3_nvme_split": "zero3_cpu", "zero2_cpu_split": "zero2_cpu"}
SPLIT_SEEDS = (1, 3)
RANKS = [1, 2, soak(3)]


@dataclass(frozen=True)
class Case:
    """One network under one preset. `zero` changes the preset's ZeRO section; `piece` is the size at which our own
    copies are cut, 0 for the usual one."""

    name: str
    preset: str
    precision: str
    accumulation: int
    sizes: list[int]
    piece: int
    zero: dict[str, int | bool] = field(default_factory=dict)
    steps: int = 3


def table_sizes(draw: random.Random, world: int) -> list[int]:
    """Elements of each table: small ones of any size, and some around every threshold for this number of ranks."""
    around = [SWAPS * world + draw.choice((-world, 0, world)) for _ in range(2)]
    around += [2 * SWAPS * world + draw.choice((-world, 0, 1)), PERSISTS + draw.choice((-1, 0, 1))]
    large = [draw.randint(SWAPS * world, 3 * SWAPS * world) for _ in range(2)]
    small = [draw.randint(1, 5000) for _ in range(5)] + [draw.choice((100, 64, 128, 1024, 3))]
    sizes = around + large + small
    draw.shuffle(sizes)
    return sizes


def drawn_cases(world: int, seed: int) -> list[Case]:
    """The same random network and settings under each preset."""
    draw = random.Random(1000 * world + seed)
    sizes = table_sizes(draw, world)
    shared = {
        # One group holds everything, so that offsets are not aligned, or each holds little.
        "sub_group_size": 10**9 if seed < 2 else draw.choice((1, SWAPS, 2 * SWAPS + 1)),
        "reduce_bucket_size": draw.choice((1000, SWAPS, 10**9)),
        "stage3_param_persistence_threshold": draw.choice((0, PERSISTS, (SWAPS - 1) * world)),
    }
    fetching = {
        "stage3_prefetch_bucket_size": draw.choice((0, PERSISTS, 10**9)),
        "stage3_max_live_parameters": draw.choice((0, SWAPS, 10**9)),
        "stage3_max_reuse_distance": draw.choice((0, SWAPS, 10**9)),
    }
    stage2 = {name: draw.choice((1000, SWAPS, 10**9)) for name in ("reduce_bucket_size", "allgather_bucket_size")}
    stage2["round_robin_gradients"] = draw.choice((False, True))
    settings = {"zero3_nvme_all": shared}  # weights on NVMe are fetched as the preset says
    settings |= dict.fromkeys(("zero2_cpu", "zero2_cpu_split"), stage2)
    precision, accumulation = (("fp32", 1), ("bf16", 2), ("fp32", 2), ("bf16", 1))[seed]
    presets = [*(PRESETS if seed in SEEDS else PRESETS[:1]), *([*SPLIT, "zero2_cpu"] if precision == "bf16" else [])]
    return [
        Case(
            name=f"{preset}-{world}-{seed}",
            preset=preset,
            precision=precision,
            accumulation=accumulation,
            sizes=sizes,
            piece=draw.choice((0, 10_007)),
            zero=settings.get(preset, {**shared, **fetching}),
        )
        for preset in presets
    ]


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    world = request.param
    folder = tmp_path_factory.mktemp(f"offloaded_{world}")
    train_tables(folder, world)
    return world, folder


def train_tables(folder: Path, world: int, env: Mapping[str, str] | None = None) -> None:
    """Every case of so many ranks, in one launch."""
    cases = [case for seed in sorted({*SEEDS, *SPLIT_SEEDS}) for case in drawn_cases(world, seed)]
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    finished = run_ranks(OFFLOADED, [folder / "cases.json", folder], world, timeout=900, env=env)
    assert finished.code == 0, finished.output[-6000:]


@pytest.mark.parametrize("trained", RANKS, indirect=True)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("preset", PRESETS[1:])
def test_states_on_nvme_are_those_in_memory_to_the_last_bit(trained: tuple[int, Path], seed: int, preset: str) -> None:
    other = assert_same(trained[1], trained[0], seed, preset, "zero3_cpu")
    assert other["gradient_bytes"] > 0, "this network is large enough to swap gradients"


@pytest.mark.parametrize("trained", RANKS, indirect=True)
@pytest.mark.parametrize("seed", SPLIT_SEEDS)
@pytest.mark.parametrize("preset", SPLIT)
def test_split_masters_are_fp32_masters_to_the_last_bit(trained: tuple[int, Path], seed: int, preset: str) -> None:
    """Masters, moments, average, weights and gradient norms."""
    assert_same(trained[1], trained[0], seed, preset, SPLIT[preset])


def assert_same(folder: Path, world: int, seed: int, preset: str, reference: str) -> dict[str, Any]:
    """What `train_tables` left under one preset equals, to the last bit, what it left under another."""
    expected_run = json.loads((folder / f"{reference}-{world}-{seed}.json").read_text())
    other: dict[str, Any] = json.loads((folder / f"{preset}-{world}-{seed}.json").read_text())
    assert other["norms"] == expected_run["norms"], "the clipping factors follow from these"
    for rank in range(world):
        expected = load_file(folder / f"{reference}-{world}-{seed}.rank{rank}.safetensors")
        found = load_file(folder / f"{preset}-{world}-{seed}.rank{rank}.safetensors")
        assert found.keys() == expected.keys()
        differ = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not differ, f"rank {rank}: {len(differ)} of {len(expected)}, {differ[:5]}"
    return other


# ------------------------------------------------------------------------------------------- a network of BAGEL's own
STEPS = 3
ON_DEVICE = ("zero2", "zero3", "zero2_cpu")


@pytest.fixture(scope="module")
def bagel(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A BAGEL whose position tables, vocabulary and MLPs pass 1 MiB, trained under every preset; results by ranks."""
    folder = tmp_path_factory.mktemp("larger")
    write_random_model(folder / "model", demo / "model", scaled_config(256, 2, 1030, vit_width=64, vit_layers=2))
    cases = [{"name": preset, "ds_config": preset, "mixed": True} for preset in (*PRESETS, *ON_DEVICE)]
    (folder / "cases.json").write_text(json.dumps({"steps": STEPS, "cases": cases}))
    found = {}
    for ranks in (1, 2):
        found[ranks] = folder / str(ranks)
        found[ranks].mkdir()
        finished = run_ranks(UNEVEN, [folder / "model", folder / "cases.json", found[ranks]], ranks, timeout=900)
        assert finished.code == 0, finished.output[-6000:]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("preset", PRESETS[1:])
def test_a_larger_bagel_trains_the_same_on_nvme_to_the_last_bit(
    bagel: dict[int, Path], ranks: int, preset: str
) -> None:
    losses = [json.loads((bagel[ranks] / f"{name}.json").read_text()) for name in (preset, "zero3_cpu")]
    assert losses[0] == losses[1]
    found, expected = (load_file(bagel[ranks] / f"{name}.safetensors") for name in (preset, "zero3_cpu"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("preset", ON_DEVICE)
def test_a_larger_bagel_trains_the_same_wherever_things_lie(bagel: dict[int, Path], ranks: int, preset: str) -> None:
    """Other stages sum in another order and torch's AdamW rounds differently from the CPU optimizer."""
    found, expected = (json.loads((bagel[ranks] / f"{name}.json").read_text()) for name in (preset, "zero3_cpu"))
    for step, (ours, theirs) in enumerate(zip(found, expected)):
        assert ours == pytest.approx(theirs, rel=1e-5), step
    weights, reference = (load_file(bagel[ranks] / f"{name}.safetensors") for name in (preset, "zero3_cpu"))
    furthest = max(float((weights[name] - reference[name]).abs().max()) for name in reference)
    assert furthest < 1e-5, "a thirtieth of what these steps can move a weight"
