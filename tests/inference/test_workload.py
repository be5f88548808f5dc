"""Bounds of what requests take, beside what a network is really asked."""

from __future__ import annotations

from typing import Any

import pytest

from bagel_ds.inference.generation import Inferencer, Request
from bagel_ds.inference.jobs import answers_of
from bagel_ds.inference.loading import ImageTransforms
from bagel_ds.inference.workload import Workload, batched, together, workload
from tests.inference.recorded import inferencer
from tests.inference.test_batches import PICTURE, TINY

REQUESTS: dict[str, tuple[str, Any, str, dict[str, Any]]] = {
    "t2i": ("a red square", None, "t2i", {}),
    "edit": ("make it blue", PICTURE, "edit", {"num_timesteps": 5}),
    "no guidance": ("a cat", None, "t2i", {"cfg_text_scale": 1.0}),
    "vqa": ("what is it?", PICTURE, "vqa", {}),
    "think": ("a green circle", None, "think", {}),
    "interleave": ("what follows?", PICTURE, "interleave", {"max_iterations": 3}),
}


def asked(name: str) -> tuple[Request, bool]:
    prompt, image, mode, options = REQUESTS[name]
    return inferencer().request(prompt, image, mode, **TINY | options), mode == "interleave"


def measured(found: Inferencer, requests: list[tuple[Request, bool]]) -> tuple[int, int, int]:
    """(calls, tokens of the largest, most tokens kept before a call)."""
    calls: list[tuple[int, int]] = []

    def note(module: Any, inputs: Any) -> None:
        batch, *_, cached = inputs
        calls.append((batch.sequence_length, sum(cached)))

    hook = found.network.model.register_forward_pre_hook(note)  # type: ignore[attr-defined]
    answers_of(found, [request for request, _ in requests], [reasons for _, reasons in requests])
    hook.remove()
    return len(calls), max(tokens for tokens, _ in calls), max(kept for _, kept in calls)


def planned(requests: list[tuple[Request, bool]]) -> Workload:
    network = inferencer().network
    transforms = ImageTransforms(network.vae_transform, network.vit_transform)
    return together([workload(request, network.layout, transforms, reasons) for request, reasons in requests])


@pytest.mark.parametrize("name", REQUESTS)
def test_no_request_takes_more_than_planned(name: str) -> None:
    plan = planned([asked(name)])
    calls, tokens, kept = measured(inferencer(), [asked(name)])
    assert calls <= plan.calls and tokens <= plan.tokens and kept <= plan.context + plan.tokens
    if name in ("t2i", "edit", "no guidance"):
        assert calls >= plan.calls - 1, "reading a text alone takes one call, not two"
        assert tokens <= plan.tokens <= 1.3 * tokens, "the largest call draws, or reads an image and a text"


def test_no_batch_of_all_kinds_takes_more_than_planned() -> None:
    every = [asked(name) for name in REQUESTS]
    calls, tokens, kept = measured(inferencer(), every)
    plan = planned(every)
    assert calls <= plan.calls and tokens <= plan.tokens and kept <= plan.context + plan.tokens


def test_a_picture_to_decode_and_an_image_to_encode_are_of_the_size_that_they_have() -> None:
    plan = planned([asked("t2i")])
    assert (plan.pixels, plan.seen) == (64 * 96, 0)
    width, height = inferencer().network.vae_transform.size(*PICTURE.size)
    assert planned([asked("vqa")])[-2:] == (0, 0)
    drawn = planned([asked("edit")])
    assert drawn.pixels == drawn.seen and drawn.seen >= width * height


def test_batches_hold_neighbors_that_fit_and_what_is_too_large_by_itself() -> None:
    works = [Workload(1, 0, 1, 0, tokens, 0, 0, 0) for tokens in (5, 5, 20, 3, 3, 3, 3)]
    assert batched(works, 10) == [range(0, 2), range(2, 3), range(3, 6), range(6, 7)]
    assert batched([], 10) == []
