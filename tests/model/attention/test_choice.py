"""Which kernels a network gets: `auto` with faked kernels, messages, and what a trial finds out."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import Callable

import pytest
import torch
from torch import Tensor

from bagel_ds.errors import UserError
from bagel_ds.model.attention import choice, flash_package, flex, sdpa
from bagel_ds.model.attention.backends import BACKENDS, CHOICES, NAMES, Attend
from bagel_ds.model.attention.choice import Heads, Place, choose_attention, fault_of
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.attention.varlen import varlen, varlen_reference
from bagel_ds.model.bagel import Bagel
from tests.memory.test_phases import network

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TRAINING = Place(CPU, torch.float32, True)
LLM, VIT = Heads(4, 2, 64), Heads(4, 4, 16)  # of network()


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Decide which kernels work, for all heads or for those of one part."""

    def decide(*working: str | tuple[str, Heads]) -> None:
        def fault(name: str, heads: Heads, place: Place) -> str | None:
            return None if name == "sdpa" or name in working or (name, heads) in working else "faked"

        monkeypatch.setattr(choice, "fault_of", fault)

    return decide


@pytest.mark.parametrize(
    ("wanted", "working", "chosen"),
    [
        ("auto", ["flash_package", "flash_torch", "flex"], "flash_package"),
        ("auto", ["flash_torch", "flex"], "flash_torch"),
        ("auto", ["flex"], "flex"),
        ("auto", [], "sdpa"),
        ("flash", ["flash_torch", "flex"], "flash_torch"),
        ("flex", ["flash_package", "flex"], "flex"),
        ("sdpa", ["flash_package", "flex"], "sdpa"),
        ("use_flex", ["flash_package", "flex"], "flex"),
        ("use_flex", ["flash_package"], "sdpa"),
    ],
)
def test_the_first_kernel_that_works_is_taken_and_named(
    wanted: str, working: list[str], chosen: str, works: Callable[..., None]
) -> None:
    works(*working)
    config, line = choose_attention(network(), wanted, Place(GPU, torch.bfloat16, True))
    assert (config.attention, config.vit_attention) == (chosen, chosen)
    assert line.startswith(f"attention: {choice.backend_module(chosen).TITLE}") and "ViT" not in line
    before = NAMES[wanted][: NAMES[wanted].index(chosen)]
    assert all(f"{choice.backend_module(name).TITLE}: faked" in line for name in before)


def test_a_vit_whose_heads_the_kernel_refuses_gets_sdpa_and_the_line_says_so(works: Callable[..., None]) -> None:
    for wanted in ("auto", "flash"):
        works(("flash_package", LLM))
        config, line = choose_attention(network(), wanted, Place(GPU, torch.bfloat16, True))
        assert (config.attention, config.vit_attention) == ("flash_package", "sdpa")
        assert f"in the ViT {sdpa.TITLE} (not flash-attn: faked" in line
    config, line = choose_attention(network(visual_und=False), "auto", Place(GPU, torch.bfloat16, True))
    assert config.attention == "flash_package" and "ViT" not in line


def test_inference_compiles_nothing_unless_asked(works: Callable[..., None]) -> None:
    works("flex")
    for place in (Place(GPU, torch.bfloat16, False), Place(CPU, torch.float32, False)):
        assert choose_attention(network(), "auto", place)[0].attention == "sdpa"
        assert choose_attention(network(), "flex", place)[0].attention == "flex"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [True, False])
def test_auto_on_a_cpu_is_sdpa_in_few_words_without_a_compiler(
    precision: torch.dtype, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_kernel", lambda: pytest.fail("nothing to compile here"))
    config, line = choose_attention(network(), "auto", Place(CPU, precision, trains))
    assert (config.attention, config.vit_attention) == ("sdpa", "sdpa")
    assert line == f"attention: {sdpa.TITLE}"
    Bagel(config)


@pytest.mark.parametrize(
    ("wanted", "place", "reasons"),
    [
        ("flash", TRAINING, ["flash-attn: it computes on a GPU only", "varlen_attn: it computes on a GPU only"]),
        ("flash", Place(GPU, torch.float32, True), ["it computes in bf16 or fp16, not float32"]),
        ("flex", TRAINING, ["FlexAttention: it has no backward pass on a CPU"]),
    ],
)
def test_a_named_kernel_that_cant_be_used_is_one_message(wanted: str, place: Place, reasons: list[str]) -> None:
    with pytest.raises(UserError) as fault:
        choose_attention(network(), wanted, place)
    assert f"--attn {wanted} " in str(fault.value) and "--attn sdpa" in str(fault.value)
    assert all(reason in str(fault.value) for reason in reasons) and "\n" not in str(fault.value)


def test_use_flex_goes_on_where_it_cant_be_had_and_says_so() -> None:
    config, line = choose_attention(network(), "use_flex", TRAINING)
    assert config.attention == "sdpa" and "not FlexAttention: it has no backward pass on a CPU" in line


def test_heads_that_flash_doesnt_take() -> None:
    for dim, taken in ((64, True), (72, True), (128, True), (256, True), (36, False), (264, False)):
        assert (flash_package.unsupported(GPU, torch.bfloat16, dim, True) is None) == taken


# ------------------------------------------------------------------------------------------------------- the trial
def added(monkeypatch: pytest.MonkeyPatch, prepare: Callable[[AttentionLayout], Attend]) -> str:
    """A kernel of this function, which claims to take everything."""
    module = types.SimpleNamespace(prepare=prepare, unsupported=lambda *place: None, TITLE="a kernel")
    monkeypatch.setitem(BACKENDS, "tried", "tried_attention")
    monkeypatch.setitem(sys.modules, "tried_attention", module)  # type: ignore[arg-type]
    return "tried"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("heads", [LLM, VIT, Heads(28, 4, 128), Heads(16, 16, 72)])
def test_a_kernel_that_is_right_passes(
    heads: Heads, trains: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = added(monkeypatch, lambda layout: varlen(layout, varlen_reference))
    before = torch.random.get_rng_state()
    assert fault_of(name, heads, Place(CPU, dtype, trains)) is None
    assert torch.equal(torch.random.get_rng_state(), before)  # the run's random numbers stay what they were


def aligned_at_the_start(*tensors: Tensor) -> Tensor:
    """As old releases of flash-attn understand `causal`."""
    q, k, v, cu_q, cu_k, max_q, max_k, causal = tensors
    outputs = []
    for i in range(len(cu_q) - 1):
        query, key, value = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), is_causal=causal, enable_gqa=True
            ).transpose(0, 1)
        )
    return torch.cat(outputs)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return 1.1 * gradient


def test_a_kernel_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: no kernel image\nis available")

    def nothing(*tensors: Tensor) -> Tensor:
        return varlen_reference(*tensors) * torch.nan  # type: ignore[arg-type]

    def wrong_gradient(*tensors: Tensor) -> Tensor:
        found: Tensor = WrongGradient.apply(varlen_reference(*tensors))  # type: ignore[arg-type]
        return found

    for kernel, said in (
        (aligned_at_the_start, "% off those of torch's scaled_dot_product_attention"),
        (broken, "RuntimeError: CUDA error: no kernel image is available"),
        (nothing, "nan% off"),
        (wrong_gradient, "% off"),
    ):
        name = added(monkeypatch, lambda layout, kernel=kernel: varlen(layout, kernel))
        fault = fault_of(name, LLM, Place(CPU, torch.bfloat16, True))
        assert fault is not None and said in fault


def test_a_package_that_isnt_there_or_doesnt_fit_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_package, "unsupported", lambda *place: None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    fault = fault_of("flash_package", LLM, Place(CPU, torch.bfloat16, True))
    assert fault is not None and "flash_attn" in fault and fault.startswith(("ImportError", "ModuleNotFoundError"))


def test_a_cpu_doesnt_wait_for_torchs_compiler() -> None:
    """Importing it takes seconds; flex.py and torch's masks would do so."""
    program = """
import sys, torch
from bagel_ds.model.attention.choice import Place, choose_attention
from bagel_ds.model.shape.config import BagelConfig
choose_attention(BagelConfig(), "auto", Place(torch.device("cpu"), torch.bfloat16, True))
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_every_choice_has_kernels() -> None:
    assert set(CHOICES) | {"use_flex"} == NAMES.keys()
    assert {name for names in NAMES.values() for name in names} == BACKENDS.keys()
