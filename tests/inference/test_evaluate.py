"""Scores of a held-out split: every token weighs the same, by kind, dataset and band of timesteps."""

from __future__ import annotations

import pytest
import torch

from bagel_ds.data.batches.held_out import HeldOut, held_out_options
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.streams.opening import open_streams
from bagel_ds.data.streams.stream import SampleOptions
from bagel_ds.inference.evaluate import validate
from bagel_ds.model.bagel import BagelOutput
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.flow import flow_time
from tests.small_data import byte_tokenizer, config_of, mixed_groups

CPU = torch.device("cpu")
SHIFT = 2.0


def forward(batch: PackedBatch) -> BagelOutput:
    """Losses that differ from token to token."""
    rows = torch.searchsorted(batch.vae_indexes, batch.mse_loss_indexes)
    return BagelOutput(batch.label_ids.float() / 7, batch.noise[rows] ** 2)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    folder = tmp_path_factory.mktemp("data")
    tokenizer = byte_tokenizer(folder / "tokenizer")
    options = held_out_options(SampleOptions(max_num_tokens_per_sample=200))
    streams = open_streams(config_of(folder, mixed_groups(folder)), tokenizer, options, str(folder / "index"))
    return HeldOut(streams, tokenizer, LayoutOptions(), 200)


def test_scores_are_means_over_tokens_and_not_over_packs(held_out: HeldOut) -> None:
    batches = list(held_out.batches())
    scores = validate(batches, forward, CPU, held_out.datasets, SHIFT)
    outputs = [forward(batch) for batch in batches]
    ce = torch.cat([output.ce for output in outputs]).double()
    mse = torch.cat([output.mse for output in outputs]).mean(dim=1).double()
    assert scores["val/ce"] == pytest.approx(float(ce.mean()), rel=1e-6)
    assert scores["val/mse"] == pytest.approx(float(mse.mean()), rel=1e-6)
    assert scores["val/ce"] != pytest.approx(sum(float(o.ce.mean()) for o in outputs if len(o.ce)) / len(outputs))
    rows = [torch.searchsorted(batch.vae_indexes, batch.mse_loss_indexes) for batch in batches]
    t = torch.cat([flow_time(batch.timesteps[own], SHIFT) for batch, own in zip(batches, rows, strict=True)])
    middle = mse[(t >= 0.5) & (t < 0.75)]
    assert len(middle) and scores["val/mse_t/0.5-0.75"] == pytest.approx(float(middle.mean()), rel=1e-6)
    assert {"val/ce/talks", "val/mse/pictures", "val/mse/edits"} <= set(scores)
    assert "val/ce/pictures" not in scores, "a dataset without such tokens has no score"


@pytest.mark.parametrize("world_size", [2, 7])
def test_scores_do_not_depend_on_the_number_of_ranks(world_size: int, held_out: HeldOut) -> None:
    sums: list[torch.Tensor] = []

    def collect(own: torch.Tensor) -> torch.Tensor:
        sums.append(own)
        return torch.stack(sums).sum(dim=0)

    for rank in range(world_size):
        together = validate(held_out.batches(rank, world_size), forward, CPU, held_out.datasets, SHIFT, collect)
    assert together == pytest.approx(validate(held_out.batches(), forward, CPU, held_out.datasets, SHIFT), rel=1e-12)
