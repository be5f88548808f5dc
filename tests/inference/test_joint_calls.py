"""Ranks with unequal requests make the same number of calls of the network, and each gets what it gets by itself."""

from __future__ import annotations

import threading
from typing import Any

import torch

from bagel_ds.data.batches.layout import layout
from bagel_ds.inference.generation import Inferencer, Request, Result
from bagel_ds.inference.joint_calls import JointCalls
from bagel_ds.inference.network import Network
from tests.inference.recorded import inferencer
from tests.inference.test_batches import PICTURE, TINY, assert_same

PATIENCE = 120.0  # seconds; a rank that waits for ever fails the test


class Ranks:
    """Threads in place of ranks: `any_rank` is their collective, and every call of the network waits for all."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=PATIENCE)
        self._said = [False] * count
        self.calls: list[list[int]] = [[] for _ in range(count)]  # tokens of each call

    def any_rank(self, rank: int, value: bool) -> bool:
        self._said[rank] = value
        self._barrier.wait()
        found = any(self._said)
        self._barrier.wait()
        return found

    def forward(self, rank: int, network: Network, *inputs: Any) -> Any:
        self._barrier.wait()  # as ZeRO-3's gathering would
        self.calls[rank].append(inputs[0].sequence_length)
        return network.model(*inputs)


def on_ranks(batches: list[list[list[Request]]]) -> tuple[list[list[Result]], Ranks]:
    """The results of each rank's batches."""
    whole, ranks = inferencer().network, Ranks(len(batches))
    results: list[list[Result]] = [[] for _ in batches]

    def work(rank: int) -> None:
        empty = layout([], whole.tokenizer.special, whole.layout)
        calls = JointCalls(
            whole.model.config,
            whole.model.dtype,
            lambda *inputs: ranks.forward(rank, whole, *inputs),
            lambda value: ranks.any_rank(rank, value),
            empty,
        )
        parts = (whole.vae, whole.tokenizer, whole.layout, whole.vae_transform, whole.vit_transform, whole.device)
        with torch.no_grad():  # of this thread
            for batch in batches[rank]:
                results[rank] += Inferencer(Network(calls, *parts)).run(batch)
            calls.finish()
        assert calls.made == len(ranks.calls[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a rank waits for another"
    return results, ranks


def test_unequal_ranks_make_the_same_number_of_calls_and_get_their_own_results() -> None:
    found = inferencer()
    drawn = [found.request(f"a cat {number}", None, "t2i", seed=number, **TINY) for number in range(2)]
    asked = found.request("what is it?", PICTURE, "vqa", seed=4, **TINY | {"max_think_token_n": 9})
    results, ranks = on_ranks([[drawn[:1], [asked]], [drawn[1:]], []])
    assert len(ranks.calls[0]) == len(ranks.calls[1]) == len(ranks.calls[2])
    assert set(ranks.calls[2]) == {0}, "a rank without requests joins with empty packs"
    assert [len(own) for own in results] == [2, 1, 0]
    for result, request in zip([*results[0], *results[1]], [drawn[0], asked, drawn[1]]):
        assert_same(result, found.run([request])[0])


def test_nothing_to_do_anywhere_takes_no_call() -> None:
    assert on_ranks([[], []])[1].calls == [[], []]
