"""Layer inputs in host memory: how often they move, where they lie, when memory is free again, and equal gradients.

On CPU both places are host memory and copies are plain; all else is what a GPU has. `LateCopies` stands for a GPU's
stream at its laziest: it copies nothing before someone waits for it.
"""

from __future__ import annotations

import gc
import weakref
from collections import deque
from typing import Any, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bagel_ds.model.bagel import Bagel
from bagel_ds.model.offload import Copies, OffloadedInputs, PlainCopies
from bagel_ds.model.recompute import Recompute, recompute
from bagel_ds.model.shape.activations import ARENA_ALIGNMENT, arena_bytes
from tests.memory.test_phases import network, pack

SIZES = {"width": 64, "inner": 96, "layers": 3}
CONFIG = network(**SIZES)
INPUTS = 2 * CONFIG.llm.num_hidden_layers + CONFIG.vit.num_layers  # of both experts' tokens, and of ViT patches
# Tokens of text, drawn and seen: sizes change, and each may be none.
PACKS = [(9, 6, 5), (30, 0, 12), (4, 25, 0), (0, 0, 20), (0, 7, 0), (1, 1, 1), (0, 0, 0), (40, 30, 30), (9, 6, 5)]


def built(how: Recompute, dtype: torch.dtype = torch.float32, **switches: Any) -> Bagel:
    model = Bagel(network(**{**SIZES, **switches}), how)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.to(dtype)


def loss_of(model: Bagel, tokens: tuple[int, int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(tokens))
    device = model.llm2vae.weight.device
    output = model(pack(*tokens).to(device), torch.randn(tokens[1], 64, generator=generator).to(device))
    return output.ce.sum() + output.mse.sum()


def gradients(model: Bagel) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def inputs_bytes(tokens: tuple[int, int, int]) -> int:
    """Of all layers' inputs in fp32."""
    llm, vit = CONFIG.llm, CONFIG.vit
    return 4 * (sum(tokens) * llm.num_hidden_layers * llm.hidden_size + tokens[2] * vit.num_layers * vit.hidden_size)


class Counted(PlainCopies):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def start(self, target: Tensor, source: Tensor) -> None:
        self.sizes.append(source.nbytes)
        super().start(target, source)


class LateCopies(Copies):
    """One after the other, none before it is waited for. What comes to the device is NaN until then."""

    def __init__(self) -> None:
        self.arenas: set[int] = set()  # addresses
        self._asked = self._done = 0
        self._queue: deque[tuple[Any, Any]] = deque()

    def start(self, target: Tensor, source: Tensor) -> int:
        if self._in_arena(source):
            target.fill_(torch.nan)
        # The arena stays; a tensor on the device has to be held by whoever asks for the copy.
        self._queue.append(tuple(t if self._in_arena(t) else weakref.ref(t) for t in (target, source)))  # type: ignore[arg-type]
        self._asked += 1
        return self._asked

    @torch.no_grad()
    def wait(self, started: int) -> None:
        while self._done < started:
            target, source = (t() if isinstance(t, weakref.ref) else t for t in self._queue.popleft())
            assert target is not None and source is not None, "memory of a copy under way was given back"
            target.copy_(source)
            self._done += 1

    def finish(self) -> None:
        self.wait(self._asked)

    @staticmethod
    def _in_arena(tensor: Tensor) -> bool:
        return tensor.untyped_storage().nbytes() > tensor.nbytes


class CountedOperations(TorchDispatchMode):
    """Copies of tensors that are not empty."""

    copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            self.copies += bool(result.numel())
        return result


@pytest.mark.parametrize("copies", [PlainCopies, LateCopies])
@pytest.mark.parametrize("switches", [{}, {"freeze_und": True}, {"visual_gen": False}, {"visual_und": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_recomputing_to_the_bit(
    dtype: torch.dtype, switches: dict[str, bool], copies: type[Copies]
) -> None:
    """Over packs of changing sizes, in one arena."""
    offload = OffloadedInputs(arena_bytes(CONFIG, 100, 4), copies())
    offloaded, plain = built(offload, dtype, **switches), built(recompute, dtype, **switches)
    for text, drawn, seen in PACKS:
        tokens = (text, drawn * offloaded.config.visual_gen, seen * offloaded.config.visual_und)
        losses = [loss_of(model, tokens) for model in (offloaded, plain)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        assert_same(gradients(offloaded), gradients(plain))


def test_each_input_of_a_layer_is_copied_out_and_back_and_nothing_else_is() -> None:
    tokens, counts, copies = (9, 6, 5), [], Counted()
    for how in (OffloadedInputs(arena_bytes(CONFIG, 20, 4), copies), recompute):
        model = built(how)
        with CountedOperations() as counted:
            loss_of(model, tokens).backward()
        counts.append(counted.copies)
    assert counts[0] - counts[1] == len(copies.sizes) == 2 * INPUTS
    assert sum(copies.sizes) == 2 * inputs_bytes(tokens)


def test_what_the_layer_before_needs_is_fetched_while_a_layer_does_its_backward_pass() -> None:
    copies = Counted()
    model = built(OffloadedInputs(arena_bytes(CONFIG, 20, 4), copies))
    loss = loss_of(model, (9, 6, 0))
    seen: list[int] = []
    for layer in model.language_model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(len(copies.sizes)))
    out = len(copies.sizes)
    loss.backward()  # which computes the layers again, from the last to the first
    assert seen == [out + 4, out + 6, out + 6]  # two inputs each: its own and those of the layer before


def test_the_planned_arena_is_what_the_largest_pack_takes() -> None:
    """All tokens patches of an image: no pack of so many tokens takes more."""
    tokens = 128  # rows of 256 bytes: no slice is padded but by what the plan adds for it
    planned = arena_bytes(CONFIG, tokens, 4)
    offload = OffloadedInputs()
    model = built(offload)
    loss = loss_of(model, (0, 0, tokens))
    assert offload.arena.size <= 1.5 * planned  # grown by halves
    assert 0 <= planned - offload.arena._taken[-1][1] <= INPUTS * ARENA_ALIGNMENT
    del loss
    for text, drawn, seen in [(0, 0, tokens), (tokens, 0, 0), (40, 40, 48), (37, 43, 48)]:
        exact = OffloadedInputs(planned)
        loss_of(built(exact), (text, drawn, seen)).backward()
        assert exact.arena.size == planned


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Memory has to be free again when its last user is, not when cycles are looked for."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
def test_the_arena_is_used_again_and_nothing_is_left_in_it() -> None:
    offload = OffloadedInputs()
    model = built(offload)
    for tokens in PACKS:
        loss_of(model, tokens).backward()
        assert not list(offload.arena.alive())
    size, memory = offload.arena.size, offload.arena.memory
    assert size <= 1.5 * (inputs_bytes((40, 30, 30)) + INPUTS * ARENA_ALIGNMENT)
    for tokens in PACKS:
        loss_of(model, tokens).backward()
    assert offload.arena.size == size and offload.arena.memory is memory
    assert not offload._leaving and not offload._arriving


@pytest.mark.parametrize("copies", [PlainCopies, LateCopies])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_several_passes_in_flight_share_the_arena(order: tuple[int, ...], copies: type[Copies]) -> None:
    """And their gradients add up as those of recomputing; the arena is too small at first."""
    packs = [(9, 6, 5), (4, 25, 0), (30, 0, 12)]
    both = []
    for how in (OffloadedInputs(4096, copies()), recompute):
        model = built(how)
        losses = [loss_of(model, tokens) for tokens in packs]
        for index in order:
            losses[index].backward()
        both.append(gradients(model))
    assert_same(*both)


@pytest.mark.parametrize("copies", [PlainCopies, LateCopies])
def test_a_pass_that_is_given_up_leaves_nothing_behind(copies: type[Copies]) -> None:
    """Before its backward pass, or in the midst of it, when inputs of the next layer are on their way."""
    offload = OffloadedInputs(arena_bytes(CONFIG, 40, 4), copies())
    offloaded, plain = built(offload), built(recompute)
    loss_of(offloaded, (9, 6, 5))
    gc.collect()  # checkpoint's frames that nothing walked back through are cycles
    assert not list(offload.arena.alive())

    def fail(gradient: Tensor) -> None:
        raise ArithmeticError

    loss = loss_of(offloaded, (9, 6, 5))
    hook = offloaded.language_model.model.layers[1].mlp.down_proj.weight.register_hook(fail)
    with pytest.raises(ArithmeticError):
        loss.backward()
    hook.remove()
    del loss
    gradients(offloaded)
    for model in (offloaded, plain):
        loss_of(model, (9, 6, 5)).backward()
    assert_same(gradients(offloaded), gradients(plain))
    assert not offload._leaving and not offload._arriving


@pytest.mark.usefixtures("without_collector")
def test_a_graph_may_be_walked_twice() -> None:
    both = []
    for how in (OffloadedInputs(), recompute):
        model = built(how)
        loss = loss_of(model, (9, 6, 5))
        loss.backward(retain_graph=True)
        loss.backward()
        both.append(gradients(model))
    assert_same(*both)


def test_without_gradients_nothing_is_kept() -> None:
    copies = Counted()
    offload = OffloadedInputs(0, copies)
    with torch.no_grad():
        loss_of(built(offload), (9, 6, 5))
    assert not copies.sizes and offload.arena.memory is None
