"""The fused head equals linear + cross entropy, in any number of chunks, down to zero positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bagel_ds.model.losses.head import CrossEntropyHead
from bagel_ds.model.shape import activations


def make(
    positions: int, vocabulary: int = 3001, hidden: int = 16
) -> tuple[CrossEntropyHead, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(positions)
    head = CrossEntropyHead(hidden, vocabulary)
    torch.nn.init.normal_(head.weight, generator=generator)
    states = torch.randn(positions, hidden, generator=generator, requires_grad=True)
    return head, states, torch.randint(0, vocabulary, (positions,), generator=generator)


@pytest.mark.parametrize("elements", [1, 4096, 2**25], ids=["many chunks", "some chunks", "one chunk"])
@pytest.mark.parametrize("positions", [0, 1, 7])
def test_loss_and_gradients_equal_the_plain_way(positions: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "CHUNK_ELEMENTS", elements)
    head, states, labels = make(positions)
    weights = torch.linspace(0.5, 2.0, positions)
    ours = head(states, labels)
    plain = F.cross_entropy(states @ head.weight.T, labels, reduction="none")
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad((ours * weights).sum(), (states, head.weight))
    expected = torch.autograd.grad((plain * weights).sum(), (states, head.weight))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_frozen_weight_gets_no_gradient_and_passes_one_on() -> None:
    head, states, labels = make(5)
    head.weight.requires_grad_(False)
    head(states, labels).sum().backward()
    assert head.weight.grad is None
    assert states.grad is not None and states.grad.abs().sum() > 0


def test_bf16_accumulates_the_loss_in_fp32() -> None:
    head, states, labels = make(6)
    head = head.to(torch.bfloat16)
    loss = head(states.to(torch.bfloat16), labels)
    assert loss.dtype == torch.float32
    exact = F.cross_entropy((states.bfloat16() @ head.weight.T).float(), labels, reduction="none")
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-5)
