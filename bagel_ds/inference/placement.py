"""Which weights lie on the GPU and which layers are streamed from host memory, for a given limit. Needs no torch.

Guarantees: weights and buffers on the GPU, plus `WORK_BYTES` for activations and contexts, stay within the limit; a
limit that is too small for the network is a `UserError` that names the least one that works.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bagel_ds.errors import UserError
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.parameters import parameter_sizes
from bagel_ds.model.shape.parts import GENERATION, part_of
from bagel_ds.units import GIB, MIB

WORK_BYTES = 3 * GIB  # activations, keys and values of one 1024 x 1024 image with all guidance branches at 7B
BUFFERS = 2  # layers on the GPU for streaming: one computes while the next one arrives
_LAYERS = "language_model.model.layers."


@dataclass(frozen=True)
class Placement:
    """`streamed`: decoder layers whose weights stay in host memory; empty if all weights fit on the GPU."""

    streamed: tuple[int, ...]
    layer_bytes: int  # of one decoder layer
    gpu_bytes: int  # of weights and streaming buffers

    @property
    def bytes_per_pass(self) -> int:
        """Bytes that cross PCIe in each call of the network; also the host memory of streamed layers."""
        return len(self.streamed) * self.layer_bytes


def gpu_limit(value: float | str) -> int:
    """Bytes of `max_gpu_memory`: a number of GiB, or text such as 24GiB, 24GB or 22000MiB. Raises `UserError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(GiB|GB|MiB|MB)?\s*", str(value), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UserError(f"max_gpu_memory {value!r}: expected a size such as 24 or 24GiB")
    unit = {"gib": GIB, "gb": 10**9, "mib": MIB, "mb": 10**6}[(match[2] or "GiB").lower()]
    return int(float(match[1]) * unit)


def place_weights(config: BagelConfig, dtype_bytes: int, limit: int | None = None, other_bytes: int = 0) -> Placement:
    """`limit` in bytes, None for none; `other_bytes` are taken on the GPU by something else, such as the autoencoder.

    Streamed layers are spread over the network, so that a layer arrives while those in between compute.
    """
    absent = () if config.visual_gen else GENERATION
    needed = [parameter for parameter in parameter_sizes(config) if part_of(parameter.name) not in absent]
    count = config.llm.num_hidden_layers
    in_layers = sum(parameter.numel for parameter in needed if parameter.name.startswith(_LAYERS))
    layer = dtype_bytes * in_layers // count
    rest = dtype_bytes * (sum(parameter.numel for parameter in needed) - in_layers) + other_bytes
    if limit is None or rest + count * layer + WORK_BYTES <= limit:
        return Placement((), layer, rest + count * layer)
    least = rest + BUFFERS * layer
    resident = (limit - WORK_BYTES - least) // layer
    if resident < 0:
        raise UserError(
            f"max_gpu_memory {limit / GIB:.1f} GiB is too small for this network: it needs "
            f"{(least + WORK_BYTES) / GIB:.1f} GiB ({rest / GIB:.1f} GiB outside the layers, {BUFFERS} layers of "
            f"{layer / GIB:.2f} GiB, {WORK_BYTES / GIB:.0f} GiB to work in)."
        )
    streams = count - resident
    streamed = tuple(number * count // streams for number in range(streams))
    return Placement(streamed, layer, least + resident * layer)
