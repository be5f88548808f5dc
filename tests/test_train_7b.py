"""bench/train_7b.py: the time split of a trace, the limits of a machine, what is run and what is reported of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bagel_ds.data.plan.cost import CostModel, Work
from bagel_ds.model.shape.flops import llm_matmul_parameters
from bagel_ds.model_folder.weights import BagelWeights
from bagel_ds.train.metrics.profile import PHASES, SKIPPED, StepProfile, phase_of_step
from bagel_ds.units import GIB
from bench import train_7b
from bench.generated_train import GeneratedFiles
from bench.measure import Peak
from bench.measured_run import Measured
from bench.on_gpu_table import train_7b as table_entry
from bench.random_model import folder_config, parameter_shapes, scaled_config, write_without_weights
from bench.random_weights import RandomWeights
from bench.roofline import Demand, Rates, beside_limits, demand, flops_per_weight, update_bytes
from bench.time_split import Copies, TimeSplit, read_trace, step_times
from bench.train_7b import CASES, WHOLE, Experiment, Room, choose
from bench.train_7b_report import extrapolated, lines, mean_pack, measurements, work_of_pack

PACK = {"samples": 2, "text": 30, "vit": 20, "latents": 50, "drawn": 40, "labels": 10, "pairs": 4000}
PACK |= {"vit_patches": [12, 8], "vae_pixels": [12800]}


def event(category: str, name: str, begin: float, end: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": end - begin, "args": args}


# Two steps of 100 microseconds, as torch's profiler writes them on a GPU; in the second the GPU computes throughout.
GPU_TRACE = [
    event("user_annotation", "ProfilerStep#3", 0, 100),
    event("user_annotation", "data", 0, 10),
    event("user_annotation", "forward", 10, 40),
    event("kernel", "gemm", 15, 40),
    event("gpu_memset", "Memset (Device)", 40, 45),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 20, 30, bytes=30),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 45, 55, bytes=10),
    event("user_annotation", "update", 60, 100),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 60, 70, bytes=8),
    event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 90, 95, bytes=8),
    event("kernel", "norm", 68, 75),
    event("gpu_user_annotation", "update", 68, 75),
    event("user_annotation", "ProfilerStep#4", 100, 200),
    event("cpu_op", "aten::mm", 100, 200),
    event("kernel", "gemm", 90, 210),
    {"ph": "i", "name": "an event without a length", "ts": 5},
]


def written(folder: Path, events: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_every_moment_of_a_step_counts_once(tmp_path: Path) -> None:
    times = step_times(read_trace(written(tmp_path, GPU_TRACE)))
    assert times.seconds == pytest.approx(100e-6)
    # Of the first step: 30 + 7 + 10 of computing, the copies beside it, then what no GPU work covers.
    first = TimeSplit(compute=47, pcie=18, update=15, data=10, idle=10)
    assert sum(first) == 100
    assert times.split == pytest.approx([(one + two) / 2 * 1e-6 for one, two in zip(first, (100, 0, 0, 0, 0))])
    assert times.copies == {"HtoD": Copies(pytest.approx(10e-6), 20), "DtoH": Copies(pytest.approx(5e-6), 4)}
    assert times.copies["HtoD"].rate == pytest.approx(2e6)


def test_without_a_gpu_computing_is_what_operations_of_the_passes_take(tmp_path: Path) -> None:
    events = [
        event("user_annotation", "ProfilerStep#3", 0, 100),
        event("user_annotation", "data", 0, 10),
        event("cpu_op", "aten::empty", 5, 8),
        event("user_annotation", "forward", 10, 40),
        event("cpu_op", "aten::mm", 12, 30),
        event("cpu_op", "aten::as_strided", 13, 14),
        event("user_annotation", "backward", 40, 70),
        event("cpu_op", "aten::mm", 35, 60),
        event("user_annotation", "update", 75, 95),
        event("cpu_op", "aten::mul_", 75, 95),
    ]
    times = step_times(events)
    assert times.copies == {}
    assert times.split == pytest.approx([1e-6 * part for part in TimeSplit(43, 0, 20, 10, 27)])


def test_the_trainers_own_profile_can_be_split(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, 1)
    for step in range(SKIPPED + 1):
        for name in PHASES:
            with phase_of_step(name):
                torch.ones(400, 400) @ torch.ones(400, 400)
        profile.step(step)
    profile.close()
    times = step_times(read_trace(tmp_path / "trace.json.gz"))
    assert sum(times.split) == pytest.approx(times.seconds)
    assert times.split.compute > 0 and times.split.update > 0 and times.split.data > 0


def test_a_trace_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="no ProfilerStep"):
        step_times([event("kernel", "gemm", 0, 1)])


# --------------------------------------------------------------------------------------------------------- the limits
def experiment(name: str, device: str = "cuda", **others: Any) -> Experiment:
    given = {"tokens": 11520, "accumulation": 1, "steps": 2, "width": None, "tflops": 989.0, **others}
    return Experiment(name, CASES[name], device=device, **given)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("offload-24", {"understanding": 8, "generation": 8}),
        ("frozen-und", {"understanding": 4, "generation": 8}),
        ("qlora", {"understanding": 6, "generation": 6}),
    ],
)
def test_only_gradients_that_are_needed_count(name: str, expected: dict[str, int]) -> None:
    config = experiment(name).network(3)
    cost = CostModel.of(config)
    assert flops_per_weight(cost, config) == expected
    plan, settings = experiment(name).planned(CASES[name].presets[0], 3)
    work = [Work(30, 70, 0, 0, (), ()), Work(70, 30, 0, 0, (), ())]  # of two steps
    least = demand(work, cost, plan, settings, trained=1000, steps=2)
    each = 50 * llm_matmul_parameters(config.llm)
    assert least.layer_flops == each * sum(expected.values())
    assert least.flops == pytest.approx(least.layer_flops, rel=1e-4)  # priced in whole MFLOP
    assert (least.pcie_bytes, least.update_bytes) == (plan.traffic.pcie, 1000 * update_bytes(settings))


@pytest.mark.parametrize(
    ("preset", "expected"), [("zero3.json", 0), ("zero3_cpu.json", 48), ("zero3_cpu_split_8bit.json", 14)]
)
def test_an_update_on_the_host_reads_and_writes_what_its_preset_keeps(preset: str, expected: int) -> None:
    assert update_bytes(experiment("offload-24").planned(preset, 1)[1]) == expected


def test_a_step_is_compared_with_the_largest_limit_that_is_known() -> None:
    least = Demand(flops=100, layer_flops=50, pcie_bytes=10, update_bytes=20)
    found = beside_limits(least, Rates(flops=50, pcie=10, host=5), step_seconds=8)
    assert found["seconds"] == {"compute": 2, "pcie": 1, "update": 4}
    assert (found["largest"], found["reached"]) == ("update", 0.5)
    assert (found["layers_seconds"], found["layers_reached"], found["layers_attainable"]) == (1, 0.125, 0.25)
    unknown = beside_limits(least, Rates(None, None, 5), step_seconds=8)
    assert unknown["seconds"] == {"compute": None, "pcie": None, "update": 4} and unknown["layers_reached"] is None


# ------------------------------------------------------------------------------------------------------- what is run
def room(device_gib: float, host_gib: float) -> Room:
    return Room(device_gib * GIB, host_gib * GIB, 100 * GIB)


@pytest.mark.parametrize(
    ("free", "preset"),
    [(room(170, 20), "zero2.json"), (room(135, 100), "zero3_split.json"), (room(76, 100), "zero2_cpu_split.json")],
)
def test_a_case_at_full_depth_takes_the_first_preset_that_fits(free: Room, preset: str) -> None:
    assert choose(experiment("frozen-und"), free, None) == (preset, [WHOLE])


def test_offload_takes_the_two_largest_depths_that_fit() -> None:
    offload, free = experiment("offload-24"), room(24, 100)
    preset, (one, two) = choose(offload, free, None)
    assert two == one + 1 < WHOLE
    assert free.holds(offload.planned(preset, two)[0]) and not free.holds(offload.planned(preset, two + 1)[0])


@pytest.mark.parametrize(("name", "layers"), [("frozen-und", None), ("offload-24", [WHOLE])])
def test_what_fits_nowhere_is_one_message(name: str, layers: list[int] | None) -> None:
    with pytest.raises(SystemExit, match=rf"{name}: .* don't fit into 50 GiB of host memory and 24 of the GPU"):
        choose(experiment(name), room(24, 50), layers)


def test_the_7b_is_not_tried_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train_7b.py", "qlora"])
    monkeypatch.setattr(train_7b, "device_type", lambda: "cpu")
    with pytest.raises(SystemExit, match="no GPU was found; --layers 1 2 --width 512"):
        train_7b.main()


def test_generated_weights_are_equal_however_they_are_cut() -> None:
    weights = RandomWeights({"a.weight": (4099, 1500), "b.weight": (64, 3), "norm.weight": (5,)})
    whole = weights.read("a.weight")  # more than the elements that repeat
    assert whole.numel() == 4099 * 1500 and not torch.equal(whole[:192], weights.read("b.weight"))
    for start, numel in ((0, 7), (4_194_300, 100), (1, 5_000_000), (6_000_000, 148_500)):
        assert torch.equal(weights.read("a.weight", start, numel), whole[start : start + numel])
    assert torch.equal(weights.read("norm.weight", 1), torch.ones(4, dtype=torch.bfloat16))


def test_a_model_folder_without_weights_can_be_trained_from(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    demo.mkdir()
    for name in ("llm_config.json", "vit_config.json", "config.json"):
        (demo / name).write_text('{"patch_size": 14}')
    write_without_weights(tmp_path / "model", demo, scaled_config(128, 2, 1024))
    files: Any = GeneratedFiles(tmp_path / "model")
    shapes = parameter_shapes(folder_config(tmp_path / "model"))
    weights = BagelWeights(files, shapes, copy_init_moe=True, where=str(files.paths[0]))
    assert weights.names == list(shapes) and not weights.copied and not weights.unexpected
    assert not list((tmp_path / "model").glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------------- what is reported
def launched(folder: Path, seconds: list[float]) -> Measured:
    """A run of so many steps, as its files and lines tell of it: the profile's are 2 to 5."""
    written(folder / "profile", GPU_TRACE)
    steps = [
        {"perf/step_seconds": one, "perf/tokens_per_sec": 100 / one, "perf/mfu": 0.4, "memory/device_reserved_gib": 9.5}
        for one in seconds
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    output = "".join(f"PACK {step} {json.dumps(PACK | {'samples': step})}\n" for step in range(len(seconds)))
    peaks = {f"step_{step}": Peak(host=int((2 if step < 2 else 9) * GIB)) for step in range(len(seconds))}
    return Measured(0, 10.0, {"load": Peak(host=GIB), **peaks}, [], "torch says something\n" + output)


def test_only_timed_steps_count_and_host_memory_is_without_the_profiler(tmp_path: Path) -> None:
    found = measurements(launched(tmp_path, [9, 9, 9, 9, 9, 9, 1, 2, 5]), tmp_path, train_7b.PROFILE, timed=3)
    assert (found["step_seconds"], found["tokens_per_second"], found["mfu"]) == (2, 50, 0.4)
    assert (found["device_gib"], found["host_gib"]) == (9.5, 2)
    assert [pack["samples"] for pack in found["packs"]] == [6, 7, 8]
    assert found["profiled"]["step_seconds"] == pytest.approx(100e-6)


def test_a_run_that_ended_early_has_failed(tmp_path: Path) -> None:
    found = measurements(launched(tmp_path, [1] * 8), tmp_path, train_7b.PROFILE, timed=3)
    assert "torch says something" in found["failed"]


def test_a_pack_is_priced_by_what_it_holds() -> None:
    assert work_of_pack(PACK) == Work(50, 50, 10, 4000, (12, 8), (12800,))
    mean = mean_pack([PACK, PACK | {"text": 50}])
    assert (mean["text"], mean["tokens"], mean["visible_keys"]) == (40, 110, 36.4)


def test_the_report_says_the_same_in_words_and_in_the_table(tmp_path: Path) -> None:
    offload = experiment("offload-24")
    found = measurements(launched(tmp_path, [9] * 6 + [2, 2]), tmp_path, train_7b.PROFILE, timed=2)
    sizes = {"parameters": 3_000_000_000, "trained": 2_900_000_000}
    rates = Rates(flops=989e12, pcie=25e9, host=100e9)
    one, two = (
        train_7b.beside_plan({"layers": depth, **sizes, **found}, "zero3_cpu_split.json", offload, rates)
        for depth in (5, 6)
    )
    two |= {"step_seconds": 2.5, "device_gib": 9.7}
    report = {"case": "offload-24", "device": "H100", "preset": "zero3_cpu_split.json", "cap_gib": 24.0}
    report |= {"tokens": 11520, "accumulation": 1, "runs": [one, two, {"layers": 7, **sizes, "failed": "a\nlast"}]}
    report["extrapolated"] = extrapolated(one, two, WHOLE)
    assert report["extrapolated"]["step_seconds"] == 2.5 + 22 * 0.5
    text, entry = "\n".join(lines(report)), table_entry(report)
    assert "at most 24 GiB of the GPU" in text and "3,000,000,000 parameters and 2,900,000,000 that train" in text
    assert f"device 9.50 ({one['planned_device_gib']:.2f})" in text and "7 layers, 3,000,000,000" in text
    assert "failed: last" in text and "7 layers failed" in entry
    for said in (text, entry):
        assert "MFU 40.0%" in said and "28 layers, extrapolated" in said and "50 tokens/s" in said
    assert "copies HtoD" in text and "compute 74%" in entry and f"of the {one['roofline']['largest']} limit" in entry
