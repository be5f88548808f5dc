"""Language-model head and cross entropy as one module.

Guarantees: in training, the [K, vocabulary] logits never exist as a whole in fp32: they are made chunk by chunk, and
what is kept of them for the backward pass, in the run's dtype, has a limit (both in shape/activations.py). The module
is called exactly once per micro-batch on every rank and reads its weight only inside its own forward and backward, so
under ZeRO-3 the weight is gathered once for each, however many chunks a rank needs.

Shape legend: K positions with a label, C hidden, V vocabulary (padded rows included), v one vocabulary chunk.
"""

from __future__ import annotations

from typing import Any, Iterator

import torch
from torch import Tensor, nn

from bagel_ds.model.shape.activations import KEPT_LOGITS, chunk_columns


class CrossEntropyHead(nn.Module):
    """`lm_head`: weight [V, C], no bias."""

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, hidden_KC: Tensor, label_ids_K: Tensor | None = None) -> Tensor:
        """Cross entropy of each position, [K] fp32; zero positions give an empty tensor that still has gradients.

        Without labels (inference): the logits, [K, V] fp32.
        """
        if label_ids_K is None:
            return (hidden_KC @ self.weight.T).float()
        return _ChunkedCrossEntropy.apply(hidden_KC, self.weight, label_ids_K)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Chunks run over the vocabulary, so each weight row's gradient is one matrix product: nothing is rounded twice.

    The first chunks' logits, up to `KEPT_LOGITS` elements, are kept for the backward pass in the run's dtype; those of
    the others are computed again.
    """

    @staticmethod
    def forward(ctx: Any, hidden_KC: Tensor, weight_VC: Tensor, label_ids_K: Tensor) -> Tensor:
        log_sum = torch.full((len(hidden_KC),), -torch.inf, device=hidden_KC.device)
        label_logit = torch.zeros_like(log_sum)
        kept: list[Tensor] = []
        room = KEPT_LOGITS if any(ctx.needs_input_grad) else 0
        for start, stop in _chunks(len(hidden_KC), len(weight_VC)):
            logits_Kv = hidden_KC @ weight_VC[start:stop].T
            room -= logits_Kv.numel()
            if room >= 0:
                kept.append(logits_Kv)
            log_sum = torch.logaddexp(log_sum, logits_Kv.float().logsumexp(dim=1))
            inside = (label_ids_K >= start) & (label_ids_K < stop)
            columns = (label_ids_K - start).clamp(0, stop - start - 1)
            label_logit += logits_Kv.gather(1, columns[:, None])[:, 0].float() * inside
        ctx.save_for_backward(hidden_KC, weight_VC, label_ids_K, log_sum)
        ctx.kept = kept  # not an input or output, and changed in the backward pass
        return log_sum - label_logit

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden_KC, weight_VC, label_ids_K, log_sum = ctx.saved_tensors
        kept, ctx.kept = ctx.kept[::-1], []  # they are used up: a second backward pass computes them again
        grad_K1 = grad_outputs[0].float()[:, None]
        grad_hidden = torch.zeros_like(hidden_KC, dtype=torch.float32)
        grad_weight = torch.empty_like(weight_VC) if ctx.needs_input_grad[1] else None
        rows = torch.arange(len(hidden_KC), device=hidden_KC.device)
        for start, stop in _chunks(len(hidden_KC), len(weight_VC)):
            chunk = weight_VC[start:stop]
            logits_Kv = kept.pop() if kept else hidden_KC @ chunk.T
            grad_logits = logits_Kv.float().sub_(log_sum[:, None]).exp_().mul_(grad_K1)
            inside = (label_ids_K >= start) & (label_ids_K < stop)
            columns = (label_ids_K - start).clamp(0, stop - start - 1)
            grad_logits[rows, columns] -= grad_K1[:, 0] * inside
            grad_logits = grad_logits.to(hidden_KC.dtype)
            grad_hidden += grad_logits @ chunk
            if grad_weight is not None:
                torch.mm(grad_logits.T, hidden_KC, out=grad_weight[start:stop])
        return grad_hidden.to(hidden_KC.dtype), grad_weight, None


def _chunks(positions: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    size = chunk_columns(positions)
    for start in range(0, vocabulary, size):
        yield start, min(start + size, vocabulary)
