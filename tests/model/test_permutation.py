"""Rows in another order, and their gradients back."""

from __future__ import annotations

import pytest
import torch

from bagel_ds.model.permutation import permuted


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_it_equals_indexing_forward_and_backward(rows: int) -> None:
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
    x = torch.randn(rows, 3, 4, dtype=torch.float64, requires_grad=True)
    found = permuted(x, index, index.argsort())
    assert torch.equal(found, x[index])
    weights = torch.randn_like(found)
    ours, expected = (torch.autograd.grad((each * weights).sum(), x)[0] for each in (found, x[index]))
    assert torch.equal(ours, expected)
    assert torch.autograd.gradcheck(lambda y: permuted(y, index, index.argsort()), x)
