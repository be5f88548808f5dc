"""The network on a GPU: fp32 equals the CPU, bf16 stays near it, layer inputs kept on the host change nothing."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from bagel_ds.machine.device import choose_kernels
from bagel_ds.model import quantized
from bagel_ds.model.attention.backends import BACKENDS, attention_backend
from bagel_ds.model.attention.choice import Heads, Place, fault_of
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.batch import CAUSAL, FULL, NOISE
from bagel_ds.model.offload import OffloadedInputs
from bagel_ds.model.pointwise.choice import fault_of as fused_fault
from bagel_ds.model.quantized import dequantize, quantize
from bagel_ds.model.recompute import MODES, recompute, recompute_mode
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.quantization import QUANTIZATIONS, Quantization
from bagel_ds.model.vae import SpatialAttention
from tests.gpu.launches import DEVICE, REHEARSED, only_on_a_gpu
from tests.model.attention.structures import dense, drawn, with_gradients
from tests.model.test_bagel import TINY, loss_of, pack, tiny
from tests.model.test_offload import built
from tests.model.test_offload import loss_of as loss_of_pack


@pytest.fixture(autouse=True)
def exact_matmul() -> None:
    choose_kernels("fp32")


def gradients(mode: str, device: str, **changes: bool) -> dict[str, torch.Tensor]:
    model, batch = copy.deepcopy(tiny(**changes)).to(device), pack(6, [0, 1, 2], drawn=(3, 4)).to(device)
    model.recompute = recompute_mode(mode)
    output = model(batch, torch.zeros(len(batch.vae_indexes), 64, device=device))
    (output.ce.sum() + output.mse.sum()).backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("mode", MODES)
def test_fp32_gradients_equal_the_cpus(mode: str) -> None:
    on_cpu, on_gpu = gradients("none", "cpu"), gradients(mode, DEVICE)
    assert on_cpu.keys() == on_gpu.keys()
    for name, expected in on_cpu.items():
        scale = float(expected.abs().max())
        assert float((on_gpu[name] - expected).abs().max()) <= 1e-4 * scale + 1e-7, name


@only_on_a_gpu
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_a_step_does_not_wait_for_the_gpu(mode: str) -> None:
    """As tests/train/test_step.py, with the attention that a GPU has: torch raises at every wait."""
    model, batch = tiny().to(DEVICE), pack(6, labels=True, drawn=(3, 4)).pin_memory()
    model.recompute = recompute_mode(mode, layers=1)
    loss_of(model, batch.to(DEVICE))  # kernels are chosen and loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = batch.to(DEVICE)
        output = model(batch, torch.zeros(len(batch.vae_indexes), 64, device=DEVICE))
        (output.ce.sum() + output.mse.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=list(QUANTIZATIONS))
@pytest.mark.parametrize("kernel", [True, False], ids=["bitsandbytes", "torch"])
def test_quantized_weights_are_the_cpus_to_the_last_bit(
    kernel: bool, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bitsandbytes' kernel where it is installed, and with torch alone."""
    if not kernel:
        monkeypatch.setattr(quantized, "_bitsandbytes", lambda device: None)
    shape = (96, 3 * 64 + 32)
    codes, absmax = quantize(torch.randn(shape).bfloat16().flatten(), quantization)
    for dtype in (torch.float32, torch.bfloat16):
        expected = dequantize(codes, absmax, quantization, shape, dtype)
        found = dequantize(codes.to(DEVICE), absmax.to(DEVICE), quantization, shape, dtype)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=list(QUANTIZATIONS))
def test_a_weight_on_the_gpu_has_the_cpus_codes(quantization: Quantization) -> None:
    weight = torch.randn(96 * 225).bfloat16()
    for expected, found in zip(quantize(weight, quantization), quantize(weight.to(DEVICE), quantization)):
        assert torch.equal(found.cpu(), expected)


def test_layer_inputs_come_back_from_page_locked_memory_as_they_were() -> None:
    """Packs of changing sizes, wide enough for copies that last; some gradients are summed in no fixed order."""
    offload = OffloadedInputs(1 << 20)  # which grows
    sizes = {} if REHEARSED else {"width": 1024, "inner": 2048}
    offloaded, plain = (built(how, **sizes).to(DEVICE) for how in (offload, recompute))
    for tokens in [(900, 600, 500), (2000, 0, 0), (0, 1500, 3), (0, 0, 2000), (3000, 1000, 1000)]:
        losses = [loss_of_pack(model, tokens) for model in (offloaded, plain)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        for (name, found), expected in zip(offloaded.named_parameters(), plain.parameters()):
            if expected.grad is None:  # frozen: a table of positions
                assert found.grad is None and not expected.requires_grad, name
                continue
            assert (found.grad - expected.grad).norm() <= 1e-5 * expected.grad.norm(), name
        offloaded.zero_grad()
        plain.zero_grad()
    assert offload.arena.memory is not None and offload.arena.memory.is_pinned() == (not REHEARSED)


def test_bf16_loss_is_near_fp32() -> None:
    batch = pack(6, [0, 1, 2], drawn=(3, 4))
    exact = float(loss_of(tiny(), batch).detach())
    model, batch = tiny().to(DEVICE, torch.bfloat16), batch.to(DEVICE)
    output = model(batch, torch.zeros(len(batch.vae_indexes), 64, device=DEVICE))
    assert float((output.ce.sum() + output.mse.sum()).detach()) == pytest.approx(exact, rel=2e-2)


def random_layout(seed: int) -> AttentionLayout:
    """Samples of up to 6 splits, with every kind behind every other."""
    draw, longest = random.Random(seed), 30 if REHEARSED else 300
    samples = [[draw.randint(1, longest) for _ in range(draw.randint(1, 6))] for _ in range(4)]
    lens = [length for sample in samples for length in sample]
    return AttentionLayout.from_splits(
        [sum(s) for s in samples], lens, draw.choices([CAUSAL, FULL, NOISE], k=len(lens))
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in modules that torch's compiler imports
@pytest.mark.parametrize("heads", [Heads(8, 2, 64), Heads(28, 4, 128), Heads(16, 16, 72)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_equal_a_dense_mask(backend: str, dtype: torch.dtype, heads: Heads) -> None:
    """Values and gradients over random packs."""
    place = Place(torch.device(DEVICE), dtype, True)
    if fault := fault_of(backend, heads, place):
        pytest.skip(fault)
    for seed in range(6):
        layout = random_layout(seed)
        tensors = drawn(layout, heads.dim, DEVICE, heads[:2])
        found = with_gradients(attention_backend(backend)(layout), [x.to(dtype) for x in tensors])
        for one, exact in zip(found, with_gradients(dense(layout), [x.to(dtype).double() for x in tensors])):
            error = float((one.double() - exact).norm() / exact.norm())
            assert error < (1e-4 if dtype == torch.float32 else 1.5e-2), (backend, seed)


@only_on_a_gpu
@pytest.mark.parametrize("heads", [Heads(28, 4, 128), Heads(16, 16, 72)], ids=str)
def test_torchs_own_flash_kernels_work_here(heads: Heads) -> None:
    """Not skipped, so that a torch whose function has changed is noticed."""
    assert fault_of("flash_torch", heads, Place(torch.device("cuda"), torch.bfloat16, True)) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in modules that torch's compiler imports
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernels_give_what_torchs_own_give(dtype: torch.dtype) -> None:
    """Not skipped, so that a torch that no longer compiles them is noticed. On a GPU in the 7B's widths."""
    config = TINY if REHEARSED else BagelConfig()
    assert fused_fault(config, Place(torch.device(DEVICE), dtype, True)) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
def test_fused_kernels_train_as_torchs_own(mode: str) -> None:
    """Also in the threads in which a GPU's backward passes run."""
    on_cpu, on_gpu = gradients("none", "cpu"), gradients(mode, DEVICE, fused_kernels=True)
    for name, expected in on_cpu.items():
        scale = float(expected.abs().max())
        assert float((on_gpu[name] - expected).abs().max()) <= 1e-4 * scale + 1e-7, name


@only_on_a_gpu
def test_flash_waits_for_nothing_and_forms_no_matrix_of_scores() -> None:
    layout = AttentionLayout.from_splits([16000], [1000, 6000, 500, 500, 8000], [CAUSAL, NOISE, FULL, CAUSAL, NOISE])
    tensors = [x.bfloat16() for x in drawn(layout, 128, "cuda", (28, 4))]
    attend = attention_backend("flash_torch")(layout)
    with_gradients(attend, tensors)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(attention_backend("flash_torch")(layout), tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 12 * tensors[0].nbytes  # scores would be 14 GB


def test_attention_takes_no_kernel_of_cudnn() -> None:
    """It would build a plan for each new shape, and keep it."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    layout = AttentionLayout.from_splits([200, 90], [60, 80, 60, 90], [CAUSAL, NOISE, FULL, CAUSAL])
    q, k, v = (
        torch.randn(290, heads, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)
    )
    with torch.profiler.profile() as profile:
        attention_backend("sdpa")(layout)(q, k, v).sum().backward()
    names = {event.name for event in profile.events()}
    assert any("scaled_dot_product" in name for name in names), "attention was seen"
    assert not [name for name in names if "cudnn" in name.lower()]


@only_on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_autoencoders_attention_holds_no_matrix_of_all_cells(dtype: torch.dtype) -> None:
    """128 x 128 cells, as of an image of 1024 x 1024: the matrix would be 0.5 to 1 GiB."""
    attention = SpatialAttention(512).to("cuda", dtype).requires_grad_(False)
    x = torch.randn(1, 512, 128, 128, device="cuda", dtype=dtype)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(x)
    assert torch.cuda.max_memory_allocated() - before < 12 * x.nbytes
