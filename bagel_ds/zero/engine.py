"""The DeepSpeed engine around a BAGEL network: build, forward, backward, step.

Guarantees: the first step computes with the source's weights, and the masters have the source's own precision; a step's
gradient is that of the loss as given, not divided by accumulation steps; every step clips, updates and clears exactly
once.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, NamedTuple

import deepspeed
import torch
from deepspeed.runtime import compiler
from torch import Tensor, nn

from bagel_ds.errors import UserError
from bagel_ds.ranges import COPIED_ELEMENTS, WeightSource
from bagel_ds.zero.config.settings import SPLIT_MASTERS, ZeroSettings, offload_device
from bagel_ds.zero.ema import EMAOptions, ShardedEMA
from bagel_ds.zero.partitions import Partitions, load_masters
from bagel_ds.zero.split.optimizer import SplitAdamW
from bagel_ds.zero.split.partitions import SplitPartitions
from bagel_ds.zero.split.zero2 import split_zero2
from bagel_ds.zero.split.zero3 import split_zero3
from bagel_ds.zero.swap_patches import use_checked_swapping
from bagel_ds.zero.weights import full_shape, is_partitioned, load_weights

logger = logging.getLogger("bagel_ds")


class AdamOptions(NamedTuple):
    """AdamW; the defaults are the original's."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-15
    weight_decay: float = 0.0


class ZeroEngine:
    """One network under DeepSpeed. `build` makes the module; it need not initialize weights, which `start` loads."""

    def __init__(self, build: Callable[[], nn.Module], trainable: Callable[[str], bool], ds_config: dict[str, Any]):
        self._settings, self._ds_config = ZeroSettings.of(ds_config), _for_deepspeed(ds_config)
        self.stage = self._settings.stage
        if self._settings.swap_folders:
            use_checked_swapping()
        self.module = self._construct(build)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(trainable(name))
        self.shapes = {name: full_shape(parameter) for name, parameter in self.module.named_parameters()}
        self.device: torch.device = torch.device(deepspeed.get_accelerator().current_device_name())

    def start(self, weights: WeightSource, adam: AdamOptions, loaded: Callable[[], None] = lambda: None) -> int:
        """Load this rank's weights, make the optimizer, load its masters in the source's precision. Returns bytes read.

        `loaded` is called when this rank has read its weights, before it waits for any other rank.
        """
        read = load_weights(self.module, weights)
        loaded()
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if not parameters:
            raise UserError(
                "nothing to train: the freeze_* arguments with visual_und/visual_gen leave no trainable parameter; "
                "turn one of them off"
            )
        _import_muon()
        splits = split_zero3 if self.stage == 3 else split_zero2
        with splits() if self._settings.split_moments else nullcontext():
            self._engine, *_ = deepspeed.initialize(
                model=self.module, optimizer=self._adam(parameters, adam), config=self._ds_config
            )
        if self._settings.split_moments:
            folder = self._settings.split_folder(torch.distributed.get_rank())
            self.partitions: Partitions = SplitPartitions(self._engine, self._settings.split_moments, folder)
        else:
            self.partitions = Partitions(self._engine)
        load_masters(self.partitions, weights)
        return read

    def start_ema(self, options: EMAOptions, source: WeightSource | None) -> ShardedEMA:
        """The moving average, from `source` or, if that is None, from the masters. Every step updates it."""
        ema = ShardedEMA(self.partitions, options)
        if source is not None:
            ema.load(source)
        return ema

    def forward(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    @contextmanager
    def forward_only(self) -> Iterator[None]:
        """For forward passes between two steps, without gradients. They don't change the training state.

        Every rank must make the same number of passes.
        """
        with torch.no_grad():
            yield
        if self.stage == 3:  # DeepSpeed has gathered weights for a backward pass; release them
            self._engine.optimizer.parameter_offload.get_param_coordinator().reset_step()

    @contextmanager
    def average_in_place(self, ema: ShardedEMA) -> Iterator[None]:
        """Around `forward_only` blocks that compute with the average; afterwards the weights are what they were.

        No rank holds more of the weights meanwhile. No save may be under way.
        """
        with self.partitions.computing_with(ema.values):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, averaged over ranks."""
        self._engine.backward(loss, scale_wrt_gas=False)

    @property
    def states_move(self) -> str | None:
        """Why masters, moments and weights can't be read during forward and backward passes; None if they can.

        Only the update changes them. A backward pass writes only gradients, whose memory is separate except on NVMe.
        """
        for offload, what in ((self._settings.optimizer, "the optimizer"), (self._settings.param, "weights")):
            if offload.device == "nvme":
                return f"{what} on NVMe and gradients pass through the same buffers"
        return None

    def next_micro_batch(self) -> None:
        """Call between the micro-batches of a step. Gradients keep accumulating."""
        assert not self._engine.is_gradient_accumulation_boundary(), "a window has accumulation_steps micro-batches"
        self._engine.step()

    def update(self, learning_rate: float) -> tuple[bool, Tensor | float]:
        """Call after the step's last backward pass: clip, update, clear.

        Returns whether anything was updated, the same on every rank, and the gradient norm before clipping. Nothing is
        if the norm is not finite. DeepSpeed waits for the norm before it updates; nothing here waits after that.
        """
        assert self._engine.is_gradient_accumulation_boundary(), "a window has accumulation_steps micro-batches"
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.stage == 0:
            norm = self._unpartitioned_norm()
            applied = bool(torch.isfinite(norm))  # DeepSpeed computes neither for whole fp32 gradients
            if not applied and not self._settings.bf16:
                self._drop_gradients()  # its other optimizers skip such an update by themselves
            self._engine.step()
        else:
            self._engine.step()
            applied, norm = self._engine.was_step_applied(), self._engine.get_global_grad_norm()
        if applied:
            self.partitions.updated()
        return applied, norm

    def close(self) -> None:
        """Remove DeepSpeed's hooks and buffers, so that another engine can be built in this process."""
        self._engine.destroy()

    def _construct(self, build: Callable[[], nn.Module]) -> nn.Module:
        if self.stage == 3:
            # The dtype comes from the configuration: zero.Init's own argument is ignored where fp16 is unsupported.
            with deepspeed.zero.Init(config_dict_or_path=self._ds_config):
                module = build()
            _partition_rest(module)
            return module
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if self._settings.bf16 else torch.float32)
        try:
            with torch.device(deepspeed.get_accelerator().current_device_name()):
                return build()
        finally:
            torch.set_default_dtype(before)

    def _adam(self, parameters: list[nn.Parameter], adam: AdamOptions) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"lr": 0.0, **adam._asdict()}
        if self._settings.split_moments:
            return SplitAdamW(parameters, options)
        if self._settings.optimizer.device != "none":
            from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles its kernel on first use

            return DeepSpeedCPUAdam(parameters, **options, fp32_optimizer_states=self._settings.moment_bytes == 4)
        return torch.optim.AdamW(parameters, **options, fused=self.device.type == "cuda")

    def _drop_gradients(self) -> None:
        """Make stage 0's next `step` update nothing."""
        self.module.zero_grad(set_to_none=True)
        clip = self._engine.clip_fp32_gradients  # fails without any gradient

        def clip_once_more() -> None:
            self._engine.clip_fp32_gradients = clip

        self._engine.clip_fp32_gradients = clip_once_more

    def _unpartitioned_norm(self) -> Tensor:
        """The norm of stage 0's whole gradients, which DeepSpeed doesn't report. Summed in fp32, a piece at a time.

        Not with `vector_norm(dtype=)`: on the CPU it sums one by one and loses digits (3e-6 over 65,000 elements).
        """
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        pieces = (piece for gradient in gradients for piece in gradient.reshape(-1).split(COPIED_ELEMENTS))
        return torch.stack([torch.linalg.vector_norm(piece.float()) for piece in pieces]).norm()


def _for_deepspeed(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The configuration that DeepSpeed gets: what is on NVMe beside split masters is not its business."""
    if SPLIT_MASTERS not in ds_config or offload_device(ds_config, "optimizer") != "nvme":
        return ds_config
    zero = ds_config["zero_optimization"]
    in_memory = {"device": "cpu", "pin_memory": zero["offload_optimizer"].get("pin_memory") is True}
    return {**ds_config, "zero_optimization": {**zero, "offload_optimizer": in_memory}}


def _import_muon() -> None:
    """Import what DeepSpeed's optimizers import to ask whether theirs is a Muon, without torch's compiler.

    Two of its functions are for `torch.compile`, which loads the compiler (seconds on each rank) when it is named. Here
    no optimizer is a Muon, so they stay as DeepSpeed leaves them where torch can't compile.
    """
    usual = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = usual


def _partition_rest(module: nn.Module) -> None:
    """Partition what a module's parent gave it after its construction (adapters): zero.Init looks only once."""
    parameters = list(module.parameters())
    rest = [parameter for parameter in parameters if not is_partitioned(parameter)]
    if rest:
        partitioned: Any = next(parameter for parameter in parameters if is_partitioned(parameter))
        partitioned.convert_to_zero_parameters(param_list=rest)
