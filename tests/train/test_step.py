"""A step waits for the device only where its numbers are read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from bagel_ds.model.attention import backends, varlen
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.losses.breakdown import LossBreakdown
from bagel_ds.model.losses.normalization import LossOptions, WindowTotals
from bagel_ds.model.recompute import recompute_mode
from bagel_ds.model.shape.config import VAEConfig
from bagel_ds.model.vae import AutoEncoder, encode_batch
from bagel_ds.train import step as step_module
from bagel_ds.train.step import StepResult, WindowLosses, accumulate, update
from tests.model.test_bagel import TINY, pack

CPU = torch.device("cpu")
PACKS = [pack(6, labels=True, drawn=(2, 3)), pack(9, labels=True), pack(0, drawn=(1, 2)), pack(0)]


class Engine:
    """The network alone, with an update that changes nothing."""

    def __init__(self, network: Bagel):
        self.device, self.forward, self.micro_batches = CPU, network, 1

    def next_micro_batch(self) -> None:
        self.micro_batches += 1

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, learning_rate: float) -> tuple[bool, Tensor]:
        return True, torch.ones(())


@contextmanager
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Tensors without values: whoever reads one, as a wait for a GPU would, gets an error."""
    counts = WindowTotals(15.0, 8.0, 30.0)  # made on the host, before anything is on the device
    monkeypatch.setattr(step_module, "window_counts", lambda *_: counts)
    monkeypatch.setattr(step_module, "sum_over_ranks", list)
    monkeypatch.setattr(step_module, "on_any_rank", bool)
    with FakeTensorMode() as mode:
        yield mode


def shapeless_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    """In the place of a flash kernel: its output's shape, and gradients for all three."""
    return q * (k.sum() + v.sum())


@pytest.mark.parametrize("recomputation", ["none", "full", "selective"])
@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_a_step_reads_nothing_back_from_the_device(
    kernel: str, recomputation: str, monkeypatch: pytest.MonkeyPatch, process_group: None
) -> None:
    if kernel == "varlen":
        monkeypatch.setattr(
            "bagel_ds.model.attention.sdpa.prepare", lambda layout: varlen.varlen(layout, shapeless_kernel)
        )
    assert backends.BACKENDS["sdpa"] == "bagel_ds.model.attention.sdpa"
    window = [dataclasses.replace(batch, datasets=("some",) * len(batch.sample_lens)) for batch in PACKS]
    with unread(monkeypatch) as mode:
        network = Bagel(TINY, recompute_mode(recomputation, layers=1))
        autoencoder = AutoEncoder(VAEConfig(channels=32), decodes=False)
        engine: Any = Engine(network)

        def encode(batch: PackedBatch) -> Tensor:
            return encode_batch(autoencoder, batch, TINY.latent_patch_size, bf16=True)

        fake = [batch.map(mode.from_tensor) for batch in window]
        options = LossOptions(ce_loss_reweighting=True)
        losses = accumulate(engine, encode, fake, options, LossBreakdown(["some"], 1.0, options))
        result = update(engine, losses, 1e-4, wants_stop=lambda: "a reason")
        assert engine.micro_batches == len(window) and result.applied and result.stop and result.tokens == 30
        assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)
        with pytest.raises(DataDependentOutputException):
            float(result.grad_norm)  # the test itself: what is read is noticed


@pytest.mark.parametrize(
    ("totals", "expected"),
    [
        (WindowTotals(2.0, 3.0, 9.0), (0.75, 5.0, 0.25 * 0.75 + 5.0)),
        (WindowTotals(2.0, 0.0, 9.0), (0.75, None, 0.25 * 0.75 + 5.0)),
        (WindowTotals(0.0, 3.0, 9.0), (None, 5.0, 0.25 * 0.75 + 5.0)),
    ],
)
def test_means_are_sums_over_ranks_of_the_kinds_that_the_step_has(
    totals: WindowTotals, expected: Sequence[float | None]
) -> None:
    losses = WindowLosses(torch.zeros(2), totals, LossOptions(ce_weight=0.25), None)
    assert StepResult(losses, 1.0, True, False).means([[0.5, 2.0], [0.25, 3.0]]) == expected


def test_a_loss_that_is_not_finite_is_seen_in_the_means() -> None:
    losses = WindowLosses(torch.zeros(2), WindowTotals(1.0, 1.0, 2.0), LossOptions(), None)
    assert math.isnan(StepResult(losses, math.inf, False, False).means([[0.5, math.nan], [0.5, 1.0]]).total)
