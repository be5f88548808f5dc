"""The memory planner: bytes per parameter of every preset, what fits, what is suggested, and the page it fills."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.arguments.options import all_options
from bagel_ds.arguments.run_config import RunConfig, make_config, parse_arguments
from bagel_ds.errors import UserError
from bagel_ds.lora.targets import with_adapters
from bagel_ds.memory import table as table_module
from bagel_ds.memory.between_steps import SampleShape
from bagel_ds.memory.phases import StepShape, phases
from bagel_ds.memory.planner import MemoryItem, MemoryOptions, MemoryPlan, plan_memory
from bagel_ds.memory.report import report_lines, verdict
from bagel_ds.memory.states import Sharding
from bagel_ds.memory.suggestions import resolved, suggestions
from bagel_ds.memory.table import longest_packs, table
from bagel_ds.model.shape.activations import PackShape
from bagel_ds.model.shape.config import BagelConfig, VAEConfig
from bagel_ds.model.shape.lora import is_decoder_linear
from bagel_ds.model.shape.parameters import linear_layers, parameter_sizes, vae_decoder_parameters
from bagel_ds.model.shape.parts import Freezing
from bagel_ds.model.shape.quantization import QUANTIZATIONS
from bagel_ds.units import GIB, MIB

MODEL = BagelConfig()
PARAMETERS = sum(parameter.numel for parameter in parameter_sizes(MODEL))
LOW_MEMORY = Path(__file__).parents[2] / "docs" / "low_memory.md"


def config(preset: str = "zero3_cpu.json", **options: Any) -> RunConfig:
    return make_config({"max_num_tokens": 11520, **options, "ds_config": preset})


def plan(preset: str, world: int = 2, model: BagelConfig = MODEL, **options: Any) -> MemoryPlan:
    run = config(preset, **{key: value for key, value in options.items() if key in all_options()})
    others = {key: value for key, value in options.items() if key not in all_options()}
    return plan_memory(model, resolved(preset, run, model, world), MemoryOptions.of(run, world, **others))


def items(found: MemoryPlan, *names: str) -> list[MemoryItem]:
    return [item for item in found.items if item.name in names]


STATES = (
    "weights",
    "gradients",
    "gradients in the masters' format",
    "masters",
    "masters' upper halves",
    "masters' lower halves",
    "Adam moments",
    "updated weights in transit to the GPU",
)


# Bytes per parameter in host memory, measured with DeepSpeed 0.19.8 at 280 M parameters (without fixed parts).
@pytest.mark.parametrize(
    ("preset", "options", "expected"),
    [
        ("zero3_cpu.json", {}, 20),
        ("zero3_cpu.json", {"gradient_accumulation_steps": 2}, 22),
        ("zero3_cpu_split.json", {}, 14),
        ("zero3_cpu_split.json", {"gradient_accumulation_steps": 2}, 16),
        ("zero3_cpu_split_bf16.json", {}, 10),
        ("zero3_cpu_split_8bit.json", {}, 8),
        ("zero2_cpu.json", {}, 18),
        ("zero2_cpu_split.json", {}, 14),
        ("zero2_cpu_split.json", {"gradient_accumulation_steps": 2}, 16),
        ("zero2_cpu_split_bf16.json", {}, 10),
        ("zero2_cpu_split_8bit.json", {}, 8),
        ("zero3_nvme_split.json", {}, 4),
        ("zero3_nvme_split_8bit.json", {"gradient_accumulation_steps": 2}, 6),
        ("zero3_cpu.json", {"precision": "fp32"}, 24),
        ("zero3_nvme.json", {}, 4),
        ("zero3_nvme_all.json", {}, 2),
        ("zero3.json", {}, 0),
    ],
)
def test_host_bytes_per_parameter(preset: str, options: dict[str, Any], expected: float) -> None:
    found = plan(preset, **options)
    on_host = sum(item.bytes for item in items(found, *STATES) if item.place == "host")
    assert on_host == pytest.approx(expected * PARAMETERS, rel=0.005, abs=1e6)


@pytest.mark.parametrize(("preset", "expected"), [("zero3_nvme.json", 16 + 4), ("zero3_nvme_all.json", 18 + 4)])
def test_nvme_bytes_per_parameter(preset: str, expected: float) -> None:
    """Masters, moments and gradients in fp32 (16), weights (2), the moving average (4)."""
    assert plan(preset).nvme == pytest.approx(expected * PARAMETERS, rel=0.005)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_gpu_states_are_sharded(world: int) -> None:
    found = plan("zero3.json", world)
    states = sum(item.bytes for item in items(found, *STATES, "EMA") if item.place == "gpu")
    assert states == pytest.approx(20 * PARAMETERS / world, rel=0.005)


def test_without_sharding_every_gpu_holds_everything_but_the_average() -> None:
    found = plan("zero0.json", 4)
    assert sum(item.bytes for item in items(found, *STATES)) == pytest.approx(16 * PARAMETERS, rel=0.005)
    (average,) = items(found, "EMA")
    assert average.bytes == pytest.approx(PARAMETERS, rel=0.005)


def test_fp32_masters_beside_fp32_weights_are_counted() -> None:
    """DeepSpeed has both, 54 GiB over all GPUs (test_memory_deepspeed.py)."""
    found = plan("zero3.json", 4, precision="fp32")
    states = sum(item.bytes for item in items(found, *STATES) if item.place == "gpu")
    assert states == pytest.approx((4 + 4 + 4 + 8) * PARAMETERS / 4, rel=0.005)


@pytest.mark.parametrize(
    ("preset", "micro_batches", "expected"),
    [
        ("zero3_cpu.json", 1, 2 * 2 + 8),  # weights gathered twice; gradients to the host, back and as fp32
        ("zero3_nvme.json", 1, 2 * 2 + 8),
        ("zero3_cpu.json", 4, 4 * 2 * 2 + 8 * 4 + 4),
        ("zero2_cpu.json", 1, 2 + 4),  # updated weights, gradients
        ("zero2_cpu.json", 4, 2 + 4),  # summed on the GPU
        ("zero3.json", 1, 0),
    ],
)
def test_pcie_bytes_per_parameter(preset: str, micro_batches: int, expected: float) -> None:
    found = plan(preset, 1 if "zero2" in preset else 2, gradient_accumulation_steps=micro_batches)
    assert found.traffic.pcie == pytest.approx(expected * PARAMETERS, rel=0.01)


def test_sums_of_micro_batches_are_on_the_gpu_where_deepspeed_makes_them() -> None:
    """Under zero2_cpu in fp32 until the update, whatever is offloaded."""
    one, several = plan("zero2_cpu.json"), plan("zero2_cpu.json", gradient_accumulation_steps=2)
    assert several.gpu_peak - one.gpu_peak == pytest.approx(1.05 * 4 * PARAMETERS / 2, rel=0.01)
    assert several.host_peak == one.host_peak


def test_fp32_gradients_wait_for_nvme_on_the_gpu() -> None:
    """A bucket of them: 0.37 GiB on one GPU."""
    on_nvme, on_host = plan("zero3_nvme.json", 1), plan("zero3_cpu.json", 1)
    (waiting,) = (item for item in on_nvme.items if item.name == "fp32 gradients in transit to NVMe")
    assert waiting.place == "gpu"
    peaks = [dict(found.gpu_phases)["decoder layer backward"] for found in (on_nvme, on_host)]
    assert peaks[0] - peaks[1] == pytest.approx(1.05 * 4 * 1e8, rel=0.02)


def test_hpz_keeps_a_second_copy_per_group() -> None:
    run = config("zero3.json", num_shard=4, sharding_strategy="HYBRID_SHARD")
    settings = resolved("zero3.json", run, MODEL, 8)
    assert settings.hpz_group == 4
    found = plan_memory(MODEL, settings, MemoryOptions.of(run, 8))
    (copy,) = items(found, "weights, second copy within the group (hpZ)")
    assert copy.bytes == 2 * PARAMETERS // 4


def test_a_single_gpu_that_keeps_its_weights_gathers_nothing() -> None:
    assert not items(plan("zero3.json", 1), "gathered parameters")
    assert items(plan("zero3_cpu.json", 1), "gathered parameters")


def test_the_host_counts_its_own_ranks_only() -> None:
    whole, half = plan("zero3_cpu.json", 4), plan("zero3_cpu.json", 4, ranks_per_host=2)
    assert items(half, "masters")[0].bytes * 2 == items(whole, "masters")[0].bytes
    assert half.gpu_peak == whole.gpu_peak


@pytest.mark.parametrize("preset", ["zero0.json", "zero2.json", "zero3.json", "zero3_cpu.json", "zero3_nvme_all.json"])
def test_items_add_up_to_the_peaks(preset: str) -> None:
    found = plan(preset)
    for place, peak in (("gpu", found.gpu_peak), ("host", found.host_peak), ("nvme", found.nvme)):
        assert sum(item.bytes for item in found.items if item.place == place) == peak


def test_a_run_on_cpu_has_all_of_it_in_host_memory() -> None:
    found = plan("zero3.json", device="cpu")
    assert found.gpu_peak == 0 and all(item.place == "host" for item in found.items)
    assert found.host_peak > 20 * PARAMETERS


@pytest.mark.parametrize(("device", "expected"), [("cpu", [2]), ("cuda", [2, 1])])
def test_chunks_of_an_export_are_copied_only_from_a_gpu(device: str, expected: list[int]) -> None:
    """Each chunk of 64 MiB is gathered while the one before it is held."""
    settings = resolved("zero3.json", config("zero3.json"), MODEL, 1)
    sharding = Sharding.over(settings, parameter_sizes(MODEL), 1, on_cpu=device == "cpu")
    pack = PackShape(1000, labels=1000, vit_tokens=500)
    shape = StepShape(MODEL, Freezing(), VAEConfig(), pack, image_pixels=1024, checkpointing="full")
    (states,) = [phase.states for phase in phases(sharding, shape) if phase.name == "export"]
    assert [state.size // (64 * MIB) for state in states] == expected


@pytest.mark.parametrize(
    ("change", "smaller"),
    [
        ({"max_num_tokens": 5760}, "gpu_peak"),
        ({"ema": 0.0}, "host_peak"),
        ({"num_workers": 0}, "host_peak"),
    ],
)
def test_asking_for_less_takes_less(change: dict[str, Any], smaller: str) -> None:
    assert getattr(plan("zero3_cpu.json", **change), smaller) < getattr(plan("zero3_cpu.json"), smaller)


def test_page_locked_memory_that_is_rounded_takes_more() -> None:
    """Under an older torch; where it can, the trainer has large blocks exact."""
    exact, rounded = plan("zero3_cpu.json"), plan("zero3_cpu.json", rounds_pinned_memory=True)
    assert rounded.host_peak > exact.host_peak + PARAMETERS


ARENA = "layer inputs (one page-locked arena)"


def test_offloaded_layer_inputs_take_one_exact_block_and_leave_the_others_exact() -> None:
    kept, offloaded = plan("zero3_cpu.json"), plan("zero3_cpu.json", activation_checkpointing="offload")
    (arena,) = items(offloaded, ARENA)
    llm, vit = MODEL.llm, MODEL.vit
    per_token = 2 * (llm.num_hidden_layers * llm.hidden_size + vit.num_layers * vit.hidden_size)
    assert arena.place == "host" and arena.bytes == pytest.approx(2 * 11520 * per_token, rel=1e-3)
    load = [dict(found.host_phases).get("load", 0) for found in (kept, offloaded)]
    assert load[0] == load[1]  # it is made by the first forward pass
    assert offloaded.host_peak == kept.host_peak + arena.bytes


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_layer_inputs_cross_pcie_twice(micro_batches: int) -> None:
    kept, offloaded = (
        plan("zero3.json", activation_checkpointing=how, gradient_accumulation_steps=micro_batches)
        for how in ("full", "offload")
    )
    (inputs,) = items(plan("zero3.json"), "activation checkpoints")
    assert offloaded.traffic.pcie - kept.traffic.pcie == 2 * 2 * inputs.bytes * micro_batches  # each way, two ranks


def test_an_arena_of_torch_that_rounds_is_rounded() -> None:
    exact, rounded = (
        plan("zero2.json", 8, activation_checkpointing="offload", rounds_pinned_memory=rounds)
        for rounds in (False, True)
    )
    (arena,) = items(exact, ARENA)
    added = 8 * ((1 << (arena.bytes // 8 - 1).bit_length()) - arena.bytes // 8)
    assert rounded.host_peak - exact.host_peak == added


def test_small_pieces_of_page_locked_memory_are_kept_and_large_ones_not() -> None:
    """On 8 GPUs the partitions of the 7B's matrices are below 32 MiB, on 2 above."""
    excess = {
        world: items(plan("zero3_nvme.json", world), "page-locked memory: rounding and cache")[0].bytes
        for world in (2, 8)
    }
    assert excess[2] < 0.5 * PARAMETERS and excess[8] > 2 * PARAMETERS


def test_gradients_are_there_twice_while_they_are_page_locked() -> None:
    found = plan("zero3_nvme.json")
    (copied,) = items(found, "gradients being laid out")
    assert copied.phase == "load" and copied.bytes == pytest.approx(2 * PARAMETERS, rel=0.005)


def test_keeping_all_activations_takes_more() -> None:
    more = plan("zero3_cpu.json", activation_checkpointing="none")
    assert more.gpu_peak > 3 * plan("zero3_cpu.json").gpu_peak


def test_checkpoints_on_the_host_leave_the_gpu() -> None:
    """But for two layers' inputs: one is used, the next is on its way."""
    on_gpu, on_host = plan("zero3_cpu.json"), plan("zero3_cpu.json", activation_checkpointing="offload")
    assert on_host.gpu_peak < on_gpu.gpu_peak and on_host.host_peak > on_gpu.host_peak
    peaks = [dict(found.gpu_phases)["decoder layer backward"] for found in (on_gpu, on_host)]
    llm, vit = MODEL.llm, MODEL.vit
    patches = (11520 // 2) * vit.num_layers * vit.hidden_size
    less = 2 * (11520 * (llm.num_hidden_layers - 2) * llm.hidden_size + patches)
    assert peaks[0] - peaks[1] == pytest.approx(1.05 * less, rel=1e-3)


def test_a_vit_layers_backward_pass_finds_the_inputs_of_all() -> None:
    vit = MODEL.vit
    on_gpu, on_host = plan("zero3_cpu.json"), plan("zero3_cpu.json", activation_checkpointing="offload")
    peaks = [dict(found.gpu_phases)["ViT layer backward"] for found in (on_gpu, on_host)]
    less = 2 * (11520 // 2) * (vit.num_layers - 2) * vit.hidden_size
    assert peaks[0] - peaks[1] == pytest.approx(1.05 * less, rel=1e-3)


def test_frozen_parts_cost_their_weights_alone() -> None:
    frozen = dataclasses.replace(MODEL, freeze_und=True)
    found = plan("zero3_cpu.json", model=frozen, freeze_und=True)
    trainable = sum(parameter.numel for parameter in parameter_sizes(frozen) if parameter.trains)
    assert items(found, "weights")[0].bytes == pytest.approx(2 * PARAMETERS, rel=0.005)
    assert items(found, "masters")[0].bytes == pytest.approx(4 * trainable, rel=0.001)


def test_nothing_to_train_is_refused() -> None:
    frozen = dataclasses.replace(MODEL, visual_gen=False, freeze_und=True)
    with pytest.raises(UserError, match="nothing to train"):
        plan("zero3.json", model=frozen, freeze_llm=True)


# ------------------------------------------------------------------------------------------- budgets and suggestions
def budgets(gpu: float, host: float, nvme: float) -> dict[str, float]:
    return {"gpu_memory": gpu, "host_memory": host, "nvme": nvme}


def test_the_guides_own_machine_trains_everything_on_nvme_or_with_moments_in_8_bits() -> None:
    """2 cards of 24 GB and 128 GB of RAM: said plainly in docs/low_memory.md."""
    run = config("zero3_cpu.json")
    for nvme, expected in ((1000, "zero3_nvme_split"), (0, "zero3_cpu_split_8bit")):
        options = MemoryOptions.of(run, 2, **budgets(24, 128, nvme))
        present = plan_memory(MODEL, resolved("zero3_cpu.json", run, MODEL, 2), options)
        assert set(present.shortfalls) == {"host"}
        best = suggestions(MODEL, run, options, adapters=False)[0]
        assert any(expected in setting for setting in best.settings) and not best.trains


@pytest.mark.parametrize(
    ("preset", "options", "cards", "host", "at_most"),
    [
        ("zero3_cpu_split", {"ema_dtype": "bf16"}, 2, 256, 232),
        ("zero3_cpu_split_bf16", {}, 2, 256, 205),
        ("zero3_cpu_split_8bit", {"ema_dtype": "bf16"}, 2, 192, 172),
        ("zero3_cpu_split_8bit", {"ema": 0}, 2, 128, 120),
        ("zero3_split", {}, 4, 128, 128),
        ("zero2_cpu_split_8bit", {"ema": 0}, 1, 128, 124),
    ],
)
def test_split_masters_fit_all_parameters_where_fp32_ones_do_not(
    preset: str, options: dict[str, Any], cards: int, host: float, at_most: float
) -> None:
    gpu = 24 if cards == 2 else 80
    found = plan(f"{preset}.json", cards, **options, **budgets(gpu, host, 0))
    assert found.fits and found.host_peak <= at_most * GIB
    whole = "zero3.json" if cards == 4 else "zero3_cpu.json"
    assert not plan(whole, cards, **options, **budgets(gpu, host, 0)).fits


Machine = tuple[int, float, float, float | None]  # GPUs, GiB of each, of RAM, of NVMe
MACHINES: list[Machine] = [(1, 24, 64, 0), (2, 24, 128, 1000), (2, 24, 96, None), (4, 40, 256, 0), (4, 80, 128, 0)]


def replanned(words: str, machine: Machine) -> MemoryPlan:
    """What `bagel-ds memory` and the trainer make of a command line."""
    world, gpu, host, nvme = machine
    run = parse_arguments(words.split())
    model = with_adapters(run.training, dataclasses.replace(MODEL, freeze_und=run.training.freeze_und))
    options = MemoryOptions.of(run, world, gpu_memory=gpu, host_memory=host, nvme=nvme)
    return plan_memory(model, resolved(run.training.ds_config, run, model, world), options)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    "words",
    ["", "--ds_config zero3_cpu.json --max_num_tokens 11520", "--activation_checkpointing none --ema_dtype bf16"],
)
def test_each_suggestion_added_to_the_command_line_fits_as_it_said(words: str, machine: Machine) -> None:
    world, gpu, host, nvme = machine
    run = parse_arguments(words.split())
    options = MemoryOptions.of(run, world, gpu_memory=gpu, host_memory=host, nvme=nvme)
    found = suggestions(MODEL, run, options, count=20)
    assert found
    for suggestion in found:
        again = replanned(" ".join([words, *suggestion.settings]), machine)
        assert again.fits and again == suggestion.plan, suggestion.settings


@pytest.mark.parametrize("machine", MACHINES)
def test_no_suggestion_is_another_with_needless_settings_or_fewer_tokens(machine: Machine) -> None:
    world, gpu, host, nvme = machine
    run = parse_arguments([])
    options = MemoryOptions.of(run, world, gpu_memory=gpu, host_memory=host, nvme=nvme)
    found = []
    for suggestion in suggestions(MODEL, run, options, count=20):
        others = {setting for setting in suggestion.settings if "max_num_tokens" not in setting}
        tokens = [int(setting.split()[1]) for setting in suggestion.settings if "max_num_tokens" in setting]
        found.append((others, *(tokens or [run.data.max_num_tokens])))
    assert len(found) > 1
    for (others, tokens), (more, fewer) in itertools.permutations(found, 2):
        assert not (others <= more and tokens >= fewer), found


def test_what_is_suggested_are_remedies_of_different_kinds() -> None:
    """The guides' own machine and packs a little too long for it: fewer tokens, frozen parts, split masters, no EMA."""
    run = config("zero3.json", max_num_tokens=40960)
    found = suggestions(MODEL, run, MemoryOptions.of(run, 2, **budgets(24, 128, 1000)), count=9)
    settings = [" ".join(suggestion.settings) for suggestion in found]
    for remedy in (
        "--lora_rank 64",
        "zero3_nvme_split.json",
        "--max_num_tokens",
        "--freeze_und",
        "zero3_cpu_split",
        "--ema 0",
    ):
        assert any(remedy in each for each in settings), (remedy, settings)
    harmless = suggestions(MODEL, config("zero3.json"), MemoryOptions.of(config(), 4, **budgets(78, 128, 0)))
    assert harmless[0].settings == ("--ds_config zero3_split.json",)


@pytest.mark.parametrize("gpu, tokens", [(24, 11520), (40, 11520), (24, 20480), (80, 11520), (6, 11520)])
def test_selective_keeps_products_in_as_many_layers_as_fit(gpu: float, tokens: int) -> None:
    options = {"activation_checkpointing": "selective", "max_num_tokens": tokens}
    found = plan("zero3_cpu.json", **options, gpu_memory=gpu)
    kept, every = found.selective_layers, MODEL.llm.num_hidden_layers
    assert kept is not None
    if gpu > 6:
        assert "gpu" not in found.shortfalls and kept > 0
    else:
        assert "gpu" in found.shortfalls and kept == 0
    if kept < every:
        more = plan("zero3_cpu.json", **options, gpu_memory=gpu, selective_layers=kept + 1)
        assert "gpu" in more.shortfalls
    assert f"(selective): {kept}" in "\n".join(report_lines(found))
    unknown = plan("zero3_cpu.json", **options)
    assert unknown.selective_layers == every
    full = plan("zero3_cpu.json", max_num_tokens=tokens, gpu_memory=gpu)
    assert full.selective_layers is None and full.gpu_peak <= found.gpu_peak < unknown.gpu_peak + 1


def test_what_was_compared_with_nothing_is_said() -> None:
    found = plan("zero3_nvme.json", gpu_memory=24, host_memory=128)
    expected = f"it fits the sizes you gave; NVMe not compared: {found.nvme / GIB:.0f} GiB needed (pass --nvme)"
    assert found.fits and verdict(found) == expected
    assert verdict(plan("zero3_nvme.json", **budgets(24, 128, 1000))) == "it fits"


def test_a_hopeless_machine_gets_no_suggestion() -> None:
    run = config("zero3.json")
    assert suggestions(MODEL, run, MemoryOptions.of(run, 1, **budgets(4, 8, 0))) == []


def test_no_nvme_is_a_budget_of_zero() -> None:
    found = plan("zero3_nvme.json", **budgets(80, 512, 0))
    assert set(found.shortfalls) == {"nvme"} and not found.fits


def test_planning_needs_neither_torch_nor_deepspeed() -> None:
    code = "import sys, bagel_ds.memory.suggestions; sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_tables_tokens_fit_where_settings_come_with_fewer_tokens() -> None:
    machine = (2, 40, 256, 0)
    settings = ("--ds_config zero2_cpu.json", "--max_num_tokens 8448", "--ema 0")
    tokens, found = longest_packs(*machine, settings)
    assert tokens < 11520 and found == replanned(f"{settings[0]} --ema 0 --max_num_tokens {tokens}", machine)


@pytest.fixture(scope="module")
def pages_table() -> str:
    """The table takes a quarter of a minute."""
    return table()


def test_the_pages_table_is_current(pages_table: str) -> None:
    """`python bench/low_memory_page.py` writes it; run that when this fails."""
    assert pages_table in LOW_MEMORY.read_text()


def test_the_table_says_no_answer_twice_and_has_one_for_every_machine(
    pages_table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = 2 + len(table_module.LORA_MACHINES)
    assert all("lora_rank" in line for line in pages_table.splitlines()[2:first])
    assert sum("base_precision" in line for line in pages_table.splitlines()[2:first]) == 2
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in pages_table.splitlines()[first:]]
    answers = [(gpus, *answer) for gpus, _, _, *answer in rows]
    assert len(set(answers)) == len(answers)
    machines = Counter(
        (gpus, host, nvme)
        for gpus, hosts, nvmes, *_ in rows
        for host, nvme in itertools.product(hosts.split(", "), nvmes.split(" or "))
    )
    expected = itertools.product(table_module.MACHINES, table_module.HOST_GIB, table_module.NVME_GIB)
    assert machines == Counter((f"{n} x {gpu}", str(host), str(nvme or "none")) for (n, gpu), host, nvme in expected)
    # Answers that differ keep their rows, also where sizes of RAM with the same answer differ in their NVMe.
    answer = {(128, 0): "a", (128, 1000): "b", (256, 0): "b", (256, 1000): "b", (512, 0): "c", (512, 1000): "b"}
    monkeypatch.setattr(table_module, "MACHINES", ((1, 24),))
    monkeypatch.setattr(table_module, "_answer", lambda count, gpu, host, nvme: answer[host, nvme])
    assert table().splitlines()[first:] == [
        "| 1 x 24 | 128 | none | a |",
        "| 1 x 24 | 128, 512 | 1000 | b |",
        "| 1 x 24 | 256 | none or 1000 | b |",
        "| 1 x 24 | 512 | none | c |",
    ]


def test_adapters_are_suggested_before_what_costs_more_and_after_what_trains_everything() -> None:
    run = config("zero3_cpu.json")
    options = MemoryOptions.of(run, 1, **budgets(24, 64, 0))
    best, *_ = suggestions(MODEL, run, options)
    assert "--lora_rank 64" in best.settings and best.plan.fits and "adapters of rank 64" in best.trains
    for adapters in True, False:
        found = suggestions(MODEL, run, MemoryOptions.of(run, 2, **budgets(24, 96, 1000)), adapters=adapters)
        assert any("lora_rank" in setting for setting in found[0].settings) == adapters
    run = config("zero3.json")
    found = suggestions(MODEL, run, MemoryOptions.of(run, 4, **budgets(78, 128, 0)))
    places = [place for place, each in enumerate(found) if any("lora_rank" in setting for setting in each.settings)]
    assert places != [0]


def test_a_base_of_4_bits_is_suggested_where_a_whole_one_does_not_fit_with_adapters() -> None:
    run = config("zero3_cpu.json")
    best, *_ = suggestions(MODEL, run, MemoryOptions.of(run, 1, **budgets(24, 32, 0)))
    assert {"--lora_rank 64", "--base_precision nf4"} <= set(best.settings) and "in 4 bits" in best.trains
    run = config("zero3.json", lora_rank=16)
    model = with_adapters(run.training, MODEL)
    options = MemoryOptions.of(run, 1, **budgets(24, 24, 0))
    assert not plan_memory(model, resolved("zero3.json", run, model, 1), options).fits
    assert [suggestion.settings for suggestion in suggestions(model, run, options)][0] == ("--base_precision nf4",)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("base_precision", "bits"), [("nf4", 4), ("int8", 8)])
@pytest.mark.parametrize(("preset", "world"), [("zero2.json", 2), ("zero3.json", 1), ("zero3.json", 2)])
def test_a_quantized_base_takes_its_codes_and_largest_values(
    preset: str, world: int, base_precision: str, bits: int, precision: str
) -> None:
    """Everything else stays, but for one weight that is whole while it is used."""
    items = []
    for base in "full", base_precision:
        run = config(preset, lora_rank=16, precision=precision, base_precision=base)
        model = with_adapters(run.training, MODEL)
        options = MemoryOptions.of(run, world)
        found = plan_memory(model, resolved(preset, run, model, world), options)
        items.append({(item.place, item.name): item.bytes for item in found.items})
    full, small = items
    sizes = {parameter.name: parameter.numel for parameter in parameter_sizes(MODEL)}
    layers = [f"{layer}.weight" for layer in linear_layers(MODEL) if is_decoder_linear(layer)]
    quantized, size = sum(sizes[name] for name in layers), 2 if precision == "bf16" else 4
    block = QUANTIZATIONS[base_precision].block
    saved = quantized * (size - bits / 8 - size / block)
    shared = world if preset == "zero3.json" else 1
    assert full["gpu", "weights"] - small["gpu", "weights"] == pytest.approx(saved / shared, rel=1e-4)
    whole = max(sizes[name] for name in layers) * size
    assert whole < small["gpu", "a quantized layer's weight"] < 1.5 * whole
    if ("gpu", "gathered parameters") in full:
        assert small["gpu", "gathered parameters"] < full["gpu", "gathered parameters"]
    for name in "Adam moments", "masters", "activations of a decoder layer":
        assert small.get(("gpu", name)) == full.get(("gpu", name))


SAMPLES = SampleShape(tokens=3 * 4098, context=400, pixels=1024**2, seen=0)


def test_evaluations_and_samples_are_planned_where_the_run_has_them() -> None:
    base = plan("zero3_cpu.json")
    assert not {"evaluation", "samples"} & {name for name, _ in base.host_phases}
    both = plan("zero3_cpu.json", samples=SAMPLES, val_config="val.yaml")
    gpu, host = dict(both.gpu_phases), dict(both.host_phases)
    assert both.gpu_peak == base.gpu_peak, "a picture of 1024 x 1024 takes less than a step of 11520 tokens"
    # Per rank: 4 workers, 8 packs of 11520 tokens.
    before, decoder = dict(base.host_phases)["head backward"], 2 * 4 * vae_decoder_parameters(VAEConfig())
    assert host["evaluation"] - before - decoder == 2 * (4 * 90 * 2**20 + 8 * 11520 * 2100)
    assert host["samples"] - before == decoder
    assert [item.bytes for item in items(both, "decoder of the autoencoder")] == [decoder]
    keys = 2 * 28 * 4 * 128 * 2
    more = plan("zero3_cpu.json", samples=SAMPLES._replace(context=400 + 10**5))
    difference = dict(more.gpu_phases)["samples"] - gpu["samples"]
    assert difference == pytest.approx(1.05 * 2 * 10**5 * keys, rel=1e-6), "5 % are lost to fragmentation"
    assert more.gpu_peak == dict(more.gpu_phases)["samples"] and more.gpu_peak > base.gpu_peak
    assert items(more, "keys and values of samples") and not items(both, "keys and values of samples")


def test_the_report_shows_evaluations_and_samples() -> None:
    text = "\n".join(report_lines(plan("zero3_cpu.json", samples=SAMPLES, val_config="val.yaml")))
    for name in ("evaluation", "samples"):
        assert re.search(rf"^during {name}: GPU [0-9.]+ GiB, host [0-9.]+ GiB$", text, re.MULTILINE)
    assert not re.search("^during", "\n".join(report_lines(plan("zero3_cpu.json"))), re.MULTILINE)


def test_samples_of_the_average_set_weights_aside_only_where_they_are_the_masters() -> None:
    average = SAMPLES._replace(average=True)
    for precision, preset, aside in (("fp32", "zero0.json", 4 * PARAMETERS), ("bf16", "zero0.json", 0)):
        found = [
            dict(plan(preset, precision=precision, samples=samples).host_phases)["samples"]
            for samples in (SAMPLES, average)
        ]
        assert found[1] - found[0] == pytest.approx(aside, rel=0.05)
