"""Counts of arithmetic agree with the masks and with torch's own counter."""

from __future__ import annotations

from typing import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bagel_ds.data.batches.layout import Loaded, layout
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.sample import TEXT, VAE, VIT
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.batch import CAUSAL, FULL, NOISE, PackedBatch
from bagel_ds.model.shape.config import BagelConfig, LLMConfig, ViTConfig
from bagel_ds.model_folder.tokenizer import SpecialTokens
from bagel_ds.train.metrics import throughput
from bagel_ds.train.metrics.throughput import (
    PEAK_TFLOPS,
    device_memory,
    host_gib,
    pack_flops,
    peak_tflops,
)

SPECIAL = SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4, end_of_text=0)
CONFIG = BagelConfig(
    llm=LLMConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    ),
    vit=ViTConfig(hidden_size=48, intermediate_size=96, num_layers=2, num_attention_heads=4),
    max_latent_size=32,
)

splits = st.tuples(st.integers(1, 12), st.sampled_from([CAUSAL, FULL, NOISE]))
samples = st.lists(st.lists(splits, min_size=1, max_size=5), min_size=1, max_size=4)


@given(structure=samples)
def test_attended_pairs_are_those_of_the_dense_mask(structure: list[list[tuple[int, str]]]) -> None:
    sample_lens = [sum(length for length, _ in sample) for sample in structure]
    flat = [split for sample in structure for split in sample]
    found = AttentionLayout.from_splits(sample_lens, [length for length, _ in flat], [mode for _, mode in flat])
    assert found.pairs == int(found.dense_mask().sum())


def pack(*samples: list[Loaded]) -> PackedBatch:
    return layout(samples, SPECIAL, LayoutOptions(max_latent_size=32))


def text(length: int) -> Loaded:
    return Loaded(TEXT, ids=list(range(5, 5 + length)), loss=True)


def picture(kind: str, rows: int, columns: int, side: int, loss: bool = False) -> Loaded:
    pixels = torch.zeros(3, side * rows, side * columns, dtype=torch.uint8)
    noise = torch.zeros(rows * columns, CONFIG.latent_features) if loss else None
    return Loaded(kind, image=pixels, loss=loss, timestep=0.2 if loss else float("-inf"), noise=noise)


def counted(batch: PackedBatch) -> int:
    """FLOPs of the matrix products of one forward pass, by torch's counter."""
    model = Bagel(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        with FlopCounterMode(display=False) as counter:
            model(batch, torch.zeros(len(batch.vae_indexes), CONFIG.latent_features))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "batch",
    [
        pack([text(180)], [text(90)]),
        pack([text(10), picture(VAE, 9, 12, 16, loss=True)]),
        pack([picture(VIT, 10, 8, 14), text(60)], [picture(VIT, 5, 5, 14), text(30)]),
    ],
    ids=["text", "generation", "understanding"],
)
def test_flops_are_three_times_a_forward_pass(batch: PackedBatch) -> None:
    """Within 20 %: the time embedder and the projections at the edges, left out, weigh most in a small network.

    torch does not count attention on the CPU.
    """
    mask = AttentionLayout.from_splits(batch.sample_lens, batch.split_lens, batch.attn_modes).dense_mask()
    attention = 12 * CONFIG.llm.num_hidden_layers * CONFIG.llm.hidden_size * int(mask.sum())
    images = sum(length**2 for length in batch.vit_seqlens)
    attention += 12 * CONFIG.vit.num_layers * CONFIG.vit.hidden_size * images
    assert pack_flops(batch, CONFIG) - attention == pytest.approx(3 * counted(batch), rel=0.2)


def test_a_modality_that_is_off_costs_nothing() -> None:
    batch = pack([picture(VIT, 10, 8, 14), text(60)])
    without = BagelConfig(llm=CONFIG.llm, vit=CONFIG.vit, max_latent_size=32, visual_und=False)
    assert pack_flops(batch, without) < pack_flops(batch, CONFIG)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the name of the GPU that this process has, or so it seems."""
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    return lambda name: monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)


def test_an_unknown_device_has_no_peak(gpu: Callable[[str], None]) -> None:
    gpu("NVIDIA Something 9000")
    assert peak_tflops(0.0) is None
    assert peak_tflops(100.0) == 100.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A6000", 155.0),
        ("NVIDIA RTX 6000 Ada Generation", 364.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA H800 PCIe", 756.0),
        ("NVIDIA H20 NVL", None),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA B300 SXM6 AC", 2250.0),
        ("NVIDIA GB300", 2500.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA L4", 121.0),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 500.0),
    ],
)
def test_known_devices_are_told_apart(name: str, expected: float | None, gpu: Callable[[str], None]) -> None:
    gpu(name)
    assert peak_tflops(0.0) == expected


def test_every_entry_is_found_by_its_own_name_whatever_the_order(
    gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for order in (list(PEAK_TFLOPS), list(reversed(PEAK_TFLOPS))):
        monkeypatch.setattr(throughput, "PEAK_TFLOPS", {part: PEAK_TFLOPS[part] for part in order})
        for part, peak in PEAK_TFLOPS.items():
            gpu(f"NVIDIA {part}")
            assert peak_tflops(0.0) == peak, part


def test_the_cpu_of_a_host_with_gpus_has_no_peak_and_no_device_memory(
    gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 5 * 2**30)
    assert peak_tflops(0.0) == 989.0 and device_memory() == (3.0, 5.0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert peak_tflops(0.0) is None and device_memory() is None


def test_memory_of_this_process_is_measured() -> None:
    before = host_gib()
    held = torch.ones(64 * 2**20 // 4)
    assert 0.05 < host_gib() - before < 0.2 and held.numel()
