"""The fused head equals linear + cross entropy, in any number of chunks, down to zero positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bagel_ds.model.losses import head as head_module
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


@pytest.mark.parametrize("kept", [0, 1024 * 7 - 1, 1024 * 7, 2**29], ids=["none", "under", "one", "all kept"])
@pytest.mark.parametrize("elements", [1, 4096, 2**25], ids=["many chunks", "some chunks", "one chunk"])
@pytest.mark.parametrize("positions", [0, 1, 7])
def test_loss_and_gradients_equal_the_plain_way(
    positions: int, elements: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(head_module, "KEPT_LOGITS", kept)
    head, states, labels = make(positions)
    weights = torch.linspace(0.5, 2.0, positions)
    ours = head(states, labels)
    plain = F.cross_entropy(states @ head.weight.T, labels, reduction="none")
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad((ours * weights).sum(), (states, head.weight))
    expected = torch.autograd.grad((plain * weights).sum(), (states, head.weight))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With half of them kept, others are computed again; the head multiplies as often as it must."""
    monkeypatch.setattr(activations, "CHUNK_ELEMENTS", 1)
    found = []
    for kept in (0, 1024 * 7, 2**29):
        monkeypatch.setattr(head_module, "KEPT_LOGITS", kept)
        head, states, labels = make(7)
        head, states = head.to(dtype), states.detach().to(dtype).requires_grad_()
        with Products() as products:
            loss = head(states, labels)
            loss.mul(torch.linspace(-1, 2, 7)).sum().backward()
        assert head.weight.grad is not None and states.grad is not None
        found.append((loss, states.grad, head.weight.grad))
        assert products.count == {0: 12, 2**29: 9}.get(kept, 11)  # three chunks
    for one, two in zip(found, found[1:]):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class Products(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.mm.default or function is torch.ops.aten.mm.out
        return function(*args, **(kwargs or {}))


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
