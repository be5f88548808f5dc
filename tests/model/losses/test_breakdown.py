"""Losses by dataset and by timestep: equal to what one computes by hand, on one rank and on two."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bagel_ds.data.batches.layout import Loaded, layout
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.sample import VAE, VIT
from bagel_ds.model.bagel import BagelOutput
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.losses.breakdown import LossBreakdown
from bagel_ds.model.losses.normalization import LossOptions
from bagel_ds.train.step import accumulate, update
from tests.model.losses.test_normalization import FEATURES, SPECIAL, output_of, text

CPU = torch.device("cpu")
DATASETS = ["cats", "dogs", "chats"]
BANDS = ["loss/mse_t/0-0.25", "loss/mse_t/0.25-0.5", "loss/mse_t/0.5-0.75", "loss/mse_t/0.75-1"]


def drawn(tokens: int, timestep: float, *before: Loaded) -> list[Loaded]:
    pixels = torch.zeros(3, 16 * tokens, 16, dtype=torch.uint8)
    return [*before, Loaded(VAE, image=pixels, loss=True, timestep=timestep, noise=torch.zeros(tokens, FEATURES))]


def pack(*samples: tuple[str, list[Loaded]]) -> PackedBatch:
    return layout([sample for _, sample in samples], SPECIAL, LayoutOptions(), datasets=[name for name, _ in samples])


def clean(tokens: int) -> Loaded:
    return Loaded(VAE, image=torch.zeros(3, 16 * tokens, 16, dtype=torch.uint8))


def told(values: BagelOutput, ce: list[float], mse: list[float]) -> BagelOutput:
    assert len(ce) == len(values.ce) and len(mse) == len(values.mse), (len(values.ce), len(values.mse))
    return BagelOutput(torch.tensor(ce), torch.tensor(mse)[:, None].expand(-1, FEATURES))


def output(batch: PackedBatch, ce: list[float], mse: list[float]) -> BagelOutput:
    return told(output_of(batch, 0), ce, mse)


def logit(t: float) -> float:
    return math.log(t / (1 - t))


# Rank 0: 2 + 3 tokens of cats at t 0.1 and 0.6, then 2 labels of chats. Rank 1: 1 token of dogs at 0.6 behind a clean
# image and one to read, a text of cats (3 labels), 2 tokens of cats at 0.99.
READ = Loaded(VIT, image=torch.zeros(3, 28, 14, dtype=torch.uint8))
RANK_0 = [
    pack(("cats", drawn(2, logit(0.1))), ("cats", drawn(3, logit(0.6)))),
    pack(("chats", text(1))),
]
RANK_1 = [
    pack(("dogs", drawn(1, logit(0.6), clean(4), READ)), ("cats", text(2))),
    pack(("cats", drawn(2, logit(0.99)))),
]
SAID_0 = [output(RANK_0[0], [], [1.0, 2.0, 3.0, 4.0, 5.0]), output(RANK_0[1], [1.0, 3.0], [])]
SAID_1 = [output(RANK_1[0], [2.0, 4.0, 9.0], [7.0]), output(RANK_1[1], [], [0.5, 1.5])]
BY_HAND = {
    "loss/mse/cats": (1 + 2 + 3 + 4 + 5 + 0.5 + 1.5) / 7,
    "loss/mse/dogs": 7.0,
    "loss/ce/cats": 5.0,
    "loss/ce/chats": 2.0,
    BANDS[0]: 1.5,
    BANDS[2]: (3 + 4 + 5 + 7) / 4,
    BANDS[3]: 1.0,
}


def sums_of(breakdown: LossBreakdown, batches: list[PackedBatch], outputs: list[BagelOutput]) -> list[list[float]]:
    sums = breakdown.zeros(CPU)
    for batch, said in zip(batches, outputs, strict=True):
        breakdown.add(sums, said, batch)
    return sums.tolist()


def test_two_ranks_give_the_means_computed_by_hand() -> None:
    breakdown = LossBreakdown(DATASETS, 1.0, LossOptions())
    by_rank = [sums_of(breakdown, RANK_0, SAID_0), sums_of(breakdown, RANK_1, SAID_1)]
    assert breakdown.means(by_rank) == pytest.approx(BY_HAND, rel=1e-6)


def test_one_rank_with_all_micro_batches_gives_the_same() -> None:
    breakdown = LossBreakdown(DATASETS, 1.0, LossOptions())
    assert breakdown.means([sums_of(breakdown, RANK_0 + RANK_1, SAID_0 + SAID_1)]) == pytest.approx(BY_HAND, rel=1e-6)


def test_a_step_has_numbers_only_for_what_it_holds() -> None:
    breakdown = LossBreakdown(DATASETS, 1.0, LossOptions())
    assert breakdown.means([sums_of(breakdown, RANK_0[1:], SAID_0[1:])]) == {"loss/ce/chats": 2.0}
    assert breakdown.means([sums_of(breakdown, [pack()], [output(pack(), [], [])])]) == {}


def test_bands_are_of_t_after_the_shift() -> None:
    """A shift of 3 moves 0.1 to 0.25, 0.6 to 0.82."""
    breakdown = LossBreakdown(DATASETS, 3.0, LossOptions())
    found = breakdown.means([sums_of(breakdown, RANK_0[:1], SAID_0[:1])])
    shifted = 3 * 0.1 / (1 + 2 * 0.1)
    assert shifted == pytest.approx(0.25)
    assert found[BANDS[3]] == 4.0 and BANDS[2] not in found
    for t, band in ((0.24, 0), (0.26, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3)):
        batch = pack(("cats", drawn(1, logit(t))))
        unshifted = LossBreakdown(DATASETS, 1.0, LossOptions())
        assert unshifted.means([sums_of(unshifted, [batch], [output(batch, [], [3.0])])])[BANDS[band]] == 3.0


@pytest.mark.parametrize("timestep, band", [(-100.0, 0), (100.0, 3)])
def test_the_ends_of_time_are_in_the_outer_bands(timestep: float, band: int) -> None:
    breakdown, batch = LossBreakdown(DATASETS, 1.0, LossOptions()), pack(("cats", drawn(1, timestep)))
    assert breakdown.means([sums_of(breakdown, [batch], [output(batch, [], [3.0])])])[BANDS[band]] == 3.0


def test_reweighting_counts_as_in_the_loss() -> None:
    breakdown = LossBreakdown(DATASETS, 1.0, LossOptions(ce_loss_reweighting=True))
    batch = pack(("chats", text(3)), ("chats", text(0)))  # 4 labels of weight 1/2, one of weight 1
    found = breakdown.means([sums_of(breakdown, [batch], [output(batch, [1.0, 2.0, 3.0, 4.0, 10.0], [])])])
    assert found["loss/ce/chats"] == pytest.approx((10 / 2 + 10) / (4 / 2 + 1))


def test_batches_of_unknown_datasets_still_have_bands() -> None:
    breakdown = LossBreakdown(DATASETS, 1.0, LossOptions())
    batch = replace(RANK_0[0], datasets=())
    assert set(breakdown.means([sums_of(breakdown, [batch], SAID_0[:1])])) == {BANDS[0], BANDS[2]}


class _Engine:
    """What a step asks of an engine, with a network that says what it is told."""

    device = CPU

    def __init__(self, outputs: list[BagelOutput]) -> None:
        self.outputs = iter(outputs)

    def forward(self, *inputs: Any) -> BagelOutput:
        said = next(self.outputs)
        return BagelOutput(said.ce.clone().requires_grad_(), said.mse.clone().requires_grad_())

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def next_micro_batch(self) -> None:
        pass

    def update(self, learning_rate: float) -> tuple[bool, float]:
        return True, 1.0


@pytest.mark.usefixtures("process_group")
def test_a_step_exchanges_no_more_for_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanged: list[int] = []
    real = dist.all_reduce

    def counted(tensor: torch.Tensor, *rest: Any, **options: Any) -> None:
        exchanged.append(tensor.numel())
        real(tensor, *rest, **options)

    monkeypatch.setattr(dist, "all_reduce", counted)
    breakdown = LossBreakdown(DATASETS, 1.0, LossOptions())
    results, counts = [], []
    for wanted in (None, breakdown):
        exchanged.clear()
        engine: Any = _Engine(SAID_0 + SAID_1)
        window = RANK_0 + RANK_1
        losses = accumulate(engine, lambda batch: batch.noise, window, LossOptions(), wanted)
        results.append(update(engine, losses, 1.0))
        counts.append(list(exchanged))
    assert counts[0] == counts[1]
    without, sums = (result.losses.breakdown for result in results)
    assert without is None and sums is not None
    assert breakdown.means([sums.tolist()]) == pytest.approx(BY_HAND, rel=1e-6)
    means, same = (result.means([result.losses.sums.tolist()]) for result in results)
    assert means == same
    # The breakdown make the whole.
    mse, ce = (sums[:, :3].sum(1), sums[:, 3:6].sum(1))
    assert float(mse[0] / mse[1]) == pytest.approx(means.mse, rel=1e-6)
    assert float(ce[0] / ce[1]) == pytest.approx(means.ce, rel=1e-6)
