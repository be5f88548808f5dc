"""The loss is a mean over the whole optimizer step, however its tokens are spread over micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bagel_ds.data.batches.layout import Loaded, layout
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.sample import TEXT, VAE
from bagel_ds.model.bagel import BagelOutput
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.losses.normalization import LossOptions, LossSums, partial_means, weighted, window_counts
from bagel_ds.model_folder.tokenizer import SpecialTokens

SPECIAL = SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4, end_of_text=0)
FEATURES = LayoutOptions().latent_features


def text(length: int) -> list[Loaded]:
    return [Loaded(TEXT, ids=list(range(5, 5 + length)), loss=True)]


def image(rows: int, columns: int) -> list[Loaded]:
    pixels = torch.zeros(3, 16 * rows, 16 * columns, dtype=torch.uint8)
    return [Loaded(VAE, image=pixels, loss=True, timestep=0.3, noise=torch.zeros(rows * columns, FEATURES))]


def pack(*samples: list[Loaded]) -> PackedBatch:
    return layout(samples, SPECIAL, LayoutOptions())


def output_of(batch: PackedBatch, seed: int) -> BagelOutput:
    """What a network might say about a batch: per-token losses that gradients can reach."""
    generator = torch.Generator().manual_seed(seed)
    ce = torch.rand(len(batch.label_ids), generator=generator, dtype=torch.float64).requires_grad_()
    mse = torch.rand(len(batch.mse_loss_indexes), FEATURES, generator=generator, dtype=torch.float64).requires_grad_()
    return BagelOutput(ce=ce, mse=mse)


def summed(batches: Sequence[PackedBatch], outputs: Sequence[BagelOutput], options: LossOptions) -> LossSums:
    totals = window_counts(batches, options)
    parts = [partial_means(output, batch, totals, options) for batch, output in zip(batches, outputs, strict=True)]
    return LossSums(*(torch.stack(values).sum() for values in zip(*parts, strict=True)))


BATCHES = [pack(text(4), image(2, 3)), pack(text(31)), pack(image(5, 2), image(1, 1)), pack(text(1), text(9))]


def test_totals_count_labels_noised_tokens_and_all_tokens_of_the_window() -> None:
    totals = window_counts(BATCHES, LossOptions())
    # A text of n tokens has n + 1 labels; an image of r x c tokens has r * c targets and two markers.
    assert totals[:3] == (5 + 32 + 2 + 10, 6 + 10 + 1, 6 + 8 + 33 + 12 + 3 + 3 + 11)


def test_every_token_of_the_window_weighs_the_same() -> None:
    outputs = [output_of(batch, seed) for seed, batch in enumerate(BATCHES)]
    means = summed(BATCHES, outputs, LossOptions())
    assert float(means.ce.detach()) == pytest.approx(
        float(torch.cat([output.ce for output in outputs]).detach().mean()), rel=1e-12
    )
    mse = torch.cat([output.mse.mean(dim=-1) for output in outputs]).mean()
    assert float(means.mse.detach()) == pytest.approx(float(mse.detach()), rel=1e-12)

    weighted(means, LossOptions(ce_weight=0.25)).backward()
    for output in outputs:
        assert torch.allclose(output.ce.grad, torch.full_like(output.ce, 0.25 / 49))  # type: ignore[arg-type]
        assert torch.allclose(output.mse.grad, torch.full_like(output.mse, 1 / 17 / FEATURES))  # type: ignore[arg-type]


def test_reweighting_divides_by_the_sum_of_weights() -> None:
    options = LossOptions(ce_loss_reweighting=True)
    outputs = [output_of(batch, seed) for seed, batch in enumerate(BATCHES)]
    losses: Tensor = torch.cat([output.ce for output in outputs])
    weights = torch.cat([batch.ce_loss_weights for batch in BATCHES]).double()
    # Each text weighs n / sqrt(n) for its n labels.
    assert float(weights.sum()) == pytest.approx(sum(n**0.5 for n in (5, 32, 2, 10)), rel=1e-6)
    expected = float((losses.detach() * weights).sum() / weights.sum())
    assert float(summed(BATCHES, outputs, options).ce.detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("batch", "absent"), [(pack(image(2, 2)), "ce"), (pack(text(3)), "mse")])
def test_a_kind_that_nobody_has_is_zero_with_zero_gradient(batch: PackedBatch, absent: str) -> None:
    output = output_of(batch, 0)
    means = summed([batch], [output], LossOptions())
    assert float(getattr(means, absent).detach()) == 0.0
    weighted(means, LossOptions()).backward()
    gradient = getattr(output, absent).grad
    assert gradient is not None and gradient.numel() == 0


def test_a_batch_of_nothing_contributes_nothing() -> None:
    batches = [pack(), pack(text(3))]
    outputs = [output_of(batch, seed) for seed, batch in enumerate(batches)]
    assert float(summed(batches, outputs, LossOptions()).ce.detach()) == pytest.approx(
        float(outputs[1].ce.detach().mean()), rel=1e-12
    )
