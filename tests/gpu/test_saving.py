"""Saves that overlap training on a GPU: the thread's copies wait for what was computed before, and for nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bagel_ds.checkpoint.state import Held, StateFiles, fill_rank, open_rank
from bagel_ds.checkpoint.step_folders import step_folders
from bagel_ds.ranges import MASTER, Pieces, Range
from bagel_ds.train.saves.background import Background
from tests.checkpoint import gathering
from tests.distributed.cases import Case, Outcome
from tests.gpu.launches import DEVICE, RANKS, REHEARSED, assert_done, metrics, run_cases, words_of
from tests.launch import run_ranks

PRESETS = ("zero0", "zero1", "zero2", "zero2_cpu", "zero3", "zero3_cpu", "zero3_nvme", "zero3_nvme_all")
# The last rank begins to write its states only when the next update waits for them. States on NVMe are read at once.
LATE = {"at": "write", "rank": RANKS - 1, "do": "late"}
HOSTS = {"at": "hosts", "do": "nothing"}
FULL = {"at": "write", "rank": RANKS - 1, "do": "full", "times": 1}
STEPS = 3

Saved = tuple[Path, dict[str, list[Outcome]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_thread_reads_what_the_gpu_had_been_asked_to_compute(dtype: torch.dtype, tmp_path: Path) -> None:
    """64 or 32 MiB, several chunks, filled behind work that takes far longer than it takes the thread to begin."""
    device, count = torch.device(DEVICE), 2**24
    states = torch.zeros(count, dtype=dtype, device=device)
    factor = torch.eye(64 if REHEARSED else 8192, device=device)
    if not REHEARSED:
        torch.cuda.synchronize()
    for _ in range(20):
        factor = factor @ factor
    states.fill_(7)
    background = Background(device)
    held = [Held(MASTER, "w", 0, count, torch.float32)]
    with open_rank(tmp_path / "rank_00000.safetensors", held) as writer:
        background.add(lambda: fill_rank(writer, held, [(MASTER, Pieces("w", [(Range("w", 0, count), states)]))]))
        background.wait()
    assert load_file(tmp_path / "rank_00000.safetensors")["master/w"].eq(7).all()


def test_weights_on_a_gpu_are_gathered_with_their_bits(tmp_path: Path) -> None:
    """Three processes on one GPU: gloo carries what each has cast there."""
    ran = run_ranks(Path(gathering.__file__), [tmp_path], ranks=gathering.RANKS, env={"BAGEL_TEST_DEVICE": DEVICE})
    assert ran.code == 0, ran.output
    loaded = load_file(tmp_path / "beside.safetensors")
    for name, shape in gathering.SHAPES.items():
        expected = gathering.whole(name).bfloat16().view(shape)
        assert torch.equal(loaded[name].view(torch.int16), expected.view(torch.int16)), name


@pytest.fixture(scope="module")
def saved(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Each run's results lie in a folder of its name."""
    folder = tmp_path_factory.mktemp("saving")

    def case(name: str, preset: str, *faults: dict[str, object]) -> Case:
        results = folder / name
        options = {"total_steps": STEPS, "save_every": 1, "save_dtype": "fp32", "nvme_path": results / "nvme"}
        return Case(name, words_of(demo, results, ds_config=preset, **options), faults=list(faults))

    several = [case(preset, preset, *([] if "nvme" in preset else [LATE])) for preset in PRESETS]
    several += [case("full", "zero3", FULL), case("gathered", "zero3", LATE, HOSTS)]
    return folder, run_cases(folder / "launch", several)


@pytest.mark.parametrize("preset", [*PRESETS, "gathered"])
def test_states_weights_and_average_of_a_checkpoint_are_of_one_step(preset: str, saved: Saved) -> None:
    """They are written one after the other while the next step computes: an update between them would show."""
    folder, outcomes = saved
    assert_done(outcomes[preset])
    masters = []
    for step in range(1, STEPS + 1):
        checkpoint = folder / preset / "checkpoints" / f"step_{step}"
        state = StateFiles(checkpoint / "state")
        for kind, file in ((MASTER, "model.safetensors"), ("ema", "ema.safetensors")):
            compared = {name: values for name, values in load_file(checkpoint / file).items() if state.has(kind, name)}
            assert compared
            for name, values in compared.items():
                assert state.read(kind, name, 0, values.numel()).equal(values.flatten()), (step, kind, name)
        masters.append(load_file(checkpoint / "model.safetensors"))
    for one, other in zip(masters, masters[1:]):
        assert not all(one[name].equal(other[name]) for name in one), "each step moved the weights"


def test_a_disk_that_fills_while_the_thread_writes_costs_one_checkpoint(saved: Saved) -> None:
    folder, outcomes = saved
    assert_done(outcomes["full"])
    output = outcomes["full"][0].output
    assert "could not be saved" in output and "Training goes on" in output
    assert [step for step, _ in step_folders(folder / "full" / "checkpoints")] == [2, 3]
    assert [line["step"] for line in metrics(folder / "full")] == [0, 1, 2]
