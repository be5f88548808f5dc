"""Outputs, activations and gradients of the network against the recorded forward passes.

The issue's tolerances: 1e-5 of the recorded tensor's maximum for outputs and activations, 1e-4 for gradients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bagel_ds.model.bagel import Bagel, BagelOutput
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.recompute import MODES, keep, recompute_mode
from tests.recordings import cases, loaded_model, read_json, recorded_batch, reference, relative, tensors

FORWARD = cases("forward/*.safetensors")
GRADIENTS = cases("forward/*_grads.safetensors", needs_json=False)


class Watched:
    """A forward pass whose inner activations are kept, in sequence order where the recording has them so."""

    def __init__(self, model: Bagel, batch: PackedBatch, latents: Tensor):
        self.seen: dict[str, Any] = {}
        language_model = model.language_model.model
        handles = [
            model.connector.register_forward_hook(self._keep("connector_output")),
            model.vit_model.register_forward_hook(self._keep("vit_output")),
            language_model.register_forward_hook(self._keep("last_hidden_state")),
            *(layer.register_forward_hook(self._keep(f"layer.{i}")) for i, layer in enumerate(language_model.layers)),
            language_model.layers[0].register_forward_pre_hook(
                lambda _, inputs: self.seen.update(llm_input=inputs[:2])
            ),
        ]
        self.output: BagelOutput = model(batch, latents)
        to_sequence = model.geometry(batch).to_sequence
        for name, value in self.seen.items():
            if isinstance(value, tuple):
                self.seen[name] = torch.cat(value)[to_sequence]
        for handle in handles:
            handle.remove()

    def _keep(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self.seen[name] = output

        return hook


def run(stem: str, mode: Any = keep, fused: bool = False) -> tuple[Watched, Bagel, dict[str, Tensor]]:
    info, recorded = read_json(stem), tensors(stem)
    model = loaded_model(reference() / "model", timestep_shift=info["timestep_shift"], fused_kernels=fused)
    model.recompute = mode
    batch, latents = recorded_batch(recorded, info, model.config)
    return Watched(model, batch, latents), model, recorded


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in modules that torch's compiler imports
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("stem", FORWARD)
def test_losses_equal_the_recording(stem: str, fused: bool) -> None:
    watched, _, recorded = run(stem, fused=fused)
    compared = 0
    for name, found in (("out.ce", watched.output.ce), ("out.mse", watched.output.mse)):
        if name in recorded:
            assert relative(found, recorded[name]) <= 1e-5, name
            compared += 1
        else:
            assert found.numel() == 0, f"{name} is not recorded, so there is nothing to predict"
    assert compared


@pytest.mark.parametrize("stem", FORWARD)
def test_hidden_states_and_inner_activations_equal_the_recording(stem: str) -> None:
    watched, _, recorded = run(stem)
    assert relative(watched.seen["last_hidden_state"], recorded["out.last_hidden_state"]) <= 1e-5
    names = [name for name in recorded if name.startswith("dbg.")]
    assert names
    for name in names:
        assert relative(watched.seen[name.removeprefix("dbg.")], recorded[name]) <= 1e-5, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in modules that torch's compiler imports
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stem", GRADIENTS)
def test_gradients_equal_the_recording(stem: str, mode: str, fused: bool) -> None:
    """With and without activation checkpointing; loss = ce.mean() * 0.25 + mse.mean(-1).mean()."""
    expected = tensors(stem)
    watched, model, _ = run(stem.removesuffix("_grads"), recompute_mode(mode), fused)
    (watched.output.ce.mean() * 0.25 + watched.output.mse.mean(-1).mean()).backward()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    compared = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert f"grad.{name}" not in expected
            continue
        assert parameter.grad is not None, name
        wanted = expected[f"grad.{name}"]
        if name.endswith("k_proj.bias") and name.startswith("vit_model"):
            # Adding a constant to all keys changes no softmax: the true gradient is 0, what is recorded is rounding.
            assert float(parameter.grad.abs().max()) <= 1e-7 * largest, name
        else:
            assert relative(parameter.grad, wanted) <= 1e-4, name
        compared += 1
    assert compared == len(expected)


@pytest.mark.parametrize("stem", FORWARD)
def test_positions_of_two_packs_do_not_mix(stem: str) -> None:
    """The same samples as one pack and as the recording's pack twice in a row give the same losses."""
    info, recorded = read_json(stem), tensors(stem)
    model = loaded_model(reference() / "model", timestep_shift=info["timestep_shift"])
    batch, latents = recorded_batch(recorded, info, model.config)
    twice, twice_latents = doubled(batch, latents)
    with torch.no_grad():
        one, two = model(batch, latents), model(twice, twice_latents)
    for once, both in zip(one, two):
        torch.testing.assert_close(both, torch.cat([once, once]), rtol=1e-4, atol=1e-5)


def doubled(batch: PackedBatch, latents: Tensor) -> tuple[PackedBatch, Tensor]:
    """Two copies of a pack, one after the other, as one pack."""
    changes: dict[str, Any] = {}
    for name in batch.__dataclass_fields__:
        value = getattr(batch, name)
        if isinstance(value, tuple):
            changes[name] = value + value
        else:
            is_index = name.endswith("_indexes")
            changes[name] = torch.cat([value, value + batch.sequence_length if is_index else value])
    return PackedBatch(**changes), torch.cat([latents, latents])
