"""What evaluations and samples take, which a run makes between two steps.

Guarantees: forward passes only, so what a backward pass keeps is not there; the sizes of samples follow from the run's
own prompts (`inference/workload.py`). Both phases are planned only if the run asks for them.
"""

from __future__ import annotations

from typing import NamedTuple

from bagel_ds.memory.phases import Phase, StepShape, arena, dequantized, gathering
from bagel_ds.memory.states import DEVICE, HOST, Sharding, State
from bagel_ds.model.shape.activations import decoder_bytes, vae_bytes
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.parameters import vae_decoder_parameters

EVALUATION, SAMPLES = "evaluation", "samples"


class SampleShape(NamedTuple):
    """The most that a rank's batch of prompts takes."""

    tokens: int  # of a call
    context: int  # tokens whose keys and values are kept
    pixels: int  # of a picture that is decoded
    seen: int  # pixels of an image that is encoded
    average: bool = False  # from the moving average, which takes the weights' place


def decoder(shape: StepShape, samples: SampleShape | None) -> list[State]:
    """The autoencoder's decoder, in host memory for the whole run where there are pictures to draw."""
    size = 4 * vae_decoder_parameters(shape.vae) if samples is not None and samples.pixels else 0
    return [State("decoder of the autoencoder", HOST, size)]


def evaluation(s: Sharding, shape: StepShape, workers: list[State]) -> Phase:
    """`workers` make the packs of the held-out split beside training's own."""
    beside = [State(f"{state.name} (held-out data)", state.place, state.size) for state in workers]
    call = _call(s, shape, shape.pack.tokens)
    return Phase(EVALUATION, [*call, *beside, *arena(s, shape)])


def samples(s: Sharding, shape: StepShape, wanted: SampleShape) -> Phase:
    """Drawing and answering: one call of the network, or one picture encoded or decoded beside the contexts."""
    tokens = _kv_bytes(shape.config, s.weight_bytes)
    # A call joins each context with its new tokens in new memory.
    contexts = State("keys and values of samples", DEVICE, tokens * (2 * wanted.context + wanted.tokens))
    decoding = [
        State("decoder of the autoencoder", DEVICE, 4 * vae_decoder_parameters(shape.vae) if wanted.pixels else 0),
        State("autoencoder, one picture", DEVICE, decoder_bytes(shape.vae, wanted.pixels, s.bf16, s.on_cpu)),
    ]
    encoding = [State("autoencoder, one image", DEVICE, vae_bytes(shape.vae, wanted.seen, s.bf16, s.on_cpu))]
    work = max(
        (_call(s, shape, wanted.tokens), decoding, encoding), key=lambda states: sum(state.size for state in states)
    )
    aside = []
    if wanted.average and s.stage == 0 and not s.bf16:  # the weights are the masters
        aside = [State("weights set aside for the EMA", HOST, 4 * -(-s.elements(True) // s.world))]
    return Phase(SAMPLES, [contexts, *work, *aside, *arena(s, shape)])


def _call(s: Sharding, shape: StepShape, tokens: int) -> list[State]:
    """A forward pass over `tokens`: a layer needs the most in its MLP."""
    llm, live = shape.config.llm, gathering(s, shape)
    width = s.weight_bytes * (4 * llm.hidden_size + 3 * llm.intermediate_size) + 8 * llm.hidden_size
    found = [State("activations of a forward pass", DEVICE, tokens * width), *dequantized(s, shape)]
    if live is not None:
        found.append(State("gathered parameters", DEVICE, live.largest))
    return found


def _kv_bytes(config: BagelConfig, dtype_bytes: int) -> int:
    """Of one token."""
    llm = config.llm
    return 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * dtype_bytes
