"""Forward and backward passes of our network beside the original's way, on equal weights, packs and noise.

One command: `python bench/step.py [--json] [--cases TEXT ...] [--pairs 9] [--layers 2] [--threads N] [--dtype fp32]
[--fused]`.
A case is a kind of pack, its tokens, the network's width and its vocabulary; `--cases` takes those whose names contain
one of the texts. Both ways take turns; a case's ratio is the median of the original's time over ours in the same pair,
so above 1 ours is faster, with the quartiles beside it. Losses and gradients are compared before. Memory is the highest
resident size of one pass above what was resident before it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # also where the package is not installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bagel_ds.model.bagel import Bagel  # noqa: E402
from bagel_ds.model.batch import CAUSAL, FULL, NOISE, PackedBatch  # noqa: E402
from bagel_ds.model.recompute import recompute_mode  # noqa: E402
from bench.original_step import losses  # noqa: E402
from bench.random_model import scaled_config  # noqa: E402

SMALL, REAL = 8192, 152_064  # vocabularies
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # of gradients, relative to their norm


class Case(NamedTuple):
    pack: str
    tokens: int
    width: int
    vocabulary: int = SMALL
    recompute: str = "none"  # ours; the original's way recomputes whole layers unless it is "none"

    def __str__(self) -> str:
        ending = "" if self.recompute == "none" else f"-{self.recompute}"
        return f"{self.pack}-{self.tokens}-{self.width}{'-real' if self.vocabulary == REAL else ''}{ending}"


CASES = (
    *(Case(pack, tokens, 512) for tokens in (2048, 4096) for pack in ("mixed", "t2i", "text", "short")),
    *(Case(pack, 2048, 1024) for pack in ("mixed", "t2i", "text", "short")),
    *(Case(pack, tokens, 512, REAL) for tokens in (2048, 4096) for pack in ("mixed", "t2i", "text", "short")),
    *(Case("mixed", tokens, 512, recompute=mode) for tokens in (2048, 4096) for mode in ("full", "selective")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--cases", nargs="+", default=[""], help="texts, one of which a case's name contains")
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs of each case (default 9)")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (default 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: torch's)")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="fp32", help="(default fp32)")
    parser.add_argument("--fused", action="store_true", help="ours with fused kernels (model/pointwise)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = [case for case in CASES if any(text in str(case) for text in options.cases)]
    if not chosen or options.pairs < 1:
        parser.error(f"pass at least one pair, and cases among {', '.join(map(str, CASES))}")
    found = []
    for case in chosen:
        print(f"{case} ...", end="\r", file=sys.stderr, flush=True)
        found.append(measure(case, options.pairs, options.layers, options.dtype, options.fused))
        if not options.json:
            print(line(found[-1]), flush=True)
    if options.json:
        report = {"threads": options.threads, "layers": options.layers, "dtype": options.dtype}
        report |= {"fused": options.fused, "cases": found}
        print(json.dumps(report, indent=1))


def measure(case: Case, pairs: int, layers: int, dtype: str, fused: bool) -> dict[str, Any]:
    ours, original, model = ways(case, layers, dtype, fused)
    off = compared(model, ours, original)
    assert off < TOLERANCE[dtype], f"{case}: gradients are off by {off:.1e}"
    memory = [peak(run) for run in (original, ours)]
    times: list[tuple[float, float]] = []
    for number in range(pairs):
        order = (original, ours) if number % 2 else (ours, original)
        seconds = {run: timed(run) for run in order}
        times.append((seconds[original], seconds[ours]))
    ratios = [one / other for one, other in times]
    low, middle, high = statistics.quantiles(ratios, n=4) if pairs > 1 else ratios * 3
    return {
        "case": str(case),
        "ratio": statistics.median(ratios),
        "quartiles": [low, high],
        "original_seconds": statistics.median(one for one, _ in times),
        "our_seconds": statistics.median(other for _, other in times),
        "original_mib": memory[0] / 2**20,
        "our_mib": memory[1] / 2**20,
        "gradients_off": off,
    }


def line(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    return (
        f"{found['case']:28} {found['ratio']:.2f} ({low:.2f} to {high:.2f})  {found['original_seconds']:.2f} s / "
        f"{found['our_seconds']:.2f} s  {found['original_mib']:.0f} / {found['our_mib']:.0f} MiB"
    )


def ways(case: Case, layers: int, dtype: str, fused: bool) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Bagel]:
    """(ours, the original's, the network): each clears gradients, runs both passes and returns the loss."""
    torch.manual_seed(0)
    config = replace(scaled_config(case.width, layers, case.vocabulary), fused_kernels=fused)
    model = Bagel(config, recompute_mode(case.recompute)).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.ones_like(parameter) if "norm" in name else torch.randn_like(parameter) * 0.02
            parameter.copy_(values)
    batch = PACKS[case.pack](case.tokens, case.vocabulary)
    latents = torch.randn(len(batch.vae_indexes), config.latent_features)

    def total(ce: Tensor, mse: Tensor) -> Tensor:
        return ce.sum() / max(len(ce), 1) + mse.mean(dim=-1).sum() / max(len(mse), 1)

    def ours() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = total(*model(batch, latents))
        loss.backward()
        return loss.detach()

    def original() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = total(*losses(model, batch, latents, recompute=case.recompute != "none"))
        loss.backward()
        return loss.detach()

    return ours, original, model


def compared(model: Bagel, ours: Callable[[], Tensor], original: Callable[[], Tensor]) -> float:
    """The largest distance between two gradients of a parameter, relative to the norm of all."""
    loss = ours()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert abs(original() / loss - 1) < 0.01, "the losses differ"
    whole = torch.stack([gradient.float().norm() for gradient in gradients.values()]).norm()
    others = {name: parameter.grad for name, parameter in model.named_parameters()}
    lacking = [name for name, gradient in gradients.items() if others[name] is None and gradient.any()]
    assert not lacking, lacking
    both = [(gradient, other) for name, gradient in gradients.items() if (other := others[name]) is not None]
    return max(float((one.float() - other.float()).norm() / whole) for one, other in both)


def timed(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak(run: Callable[[], Tensor]) -> float:
    """Bytes that a pass adds to the resident memory at its peak."""
    run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size is now the present one
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# -------------------------------------------------------------------------------------------------------------- packs
class _Pack:
    """Splits one after the other; every text token but the last of a split has a label."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary
        self.samples: list[int] = []
        self.splits: list[tuple[int, str]] = []
        self.kinds: list[str] = []  # per token

    def sample(self, *parts: tuple[str, int]) -> None:
        for kind, length in parts:
            mode = {"text": CAUSAL, "see": FULL, "draw": NOISE}[kind]
            self.splits.append((length, mode))
            self.kinds += [kind] * length
        self.samples.append(sum(length for _, length in parts))

    def batch(self) -> PackedBatch:
        place = {kind: [i for i, found in enumerate(self.kinds) if found == kind] for kind in ("text", "see", "draw")}
        text, see, draw = (torch.tensor(place[kind], dtype=torch.int64) for kind in ("text", "see", "draw"))
        seen, drawn = (tuple(n for n, mode in self.splits if mode == kind) for kind in (FULL, NOISE))
        return PackedBatch(
            sample_lens=tuple(self.samples),
            split_lens=tuple(length for length, _ in self.splits),
            attn_modes=tuple(mode for _, mode in self.splits),
            position_ids=torch.cat([torch.arange(length) for length in self.samples]),
            text_ids=torch.randint(self.vocabulary, (len(text),)),
            text_indexes=text,
            vit_patches=torch.randint(256, (len(see), 588), dtype=torch.uint8),
            vit_indexes=see,
            vit_position_ids=torch.arange(len(see)) % 4900,
            vit_seqlens=seen,
            images=(),
            latent_shapes=tuple((length, 1) for length in drawn),
            vae_indexes=draw,
            latent_position_ids=torch.arange(len(draw)) % 4096,
            timesteps=torch.randn(len(draw)),
            noise=torch.randn(len(draw), 64),
            posterior_eps=torch.randn(len(draw), 64),
            mse_loss_indexes=draw,
            ce_loss_indexes=text,
            label_ids=torch.randint(self.vocabulary, (len(text),)),
            ce_loss_weights=torch.ones(len(text)),
        )


def _mixed(tokens: int, vocabulary: int) -> PackedBatch:
    """Samples as of editing with a text: a question, an image to see, an answer, an image to draw."""
    pack = _Pack(vocabulary)
    for _ in range(tokens // 1024):
        pack.sample(("text", 128), ("see", 320), ("text", 192), ("draw", 384))
    return pack.batch()


def _t2i(tokens: int, vocabulary: int) -> PackedBatch:
    """Captions, which have labels here, and images."""
    pack = _Pack(vocabulary)
    for _ in range(tokens // 1024):
        pack.sample(("text", 64), ("draw", 960))
    return pack.batch()


def _text(tokens: int, vocabulary: int) -> PackedBatch:
    pack = _Pack(vocabulary)
    for _ in range(tokens // 1024):
        pack.sample(("text", 1024))
    return pack.batch()


def _short(tokens: int, vocabulary: int) -> PackedBatch:
    """Many short samples."""
    pack = _Pack(vocabulary)
    for _ in range(tokens // 64):
        pack.sample(("text", 16), ("see", 16), ("text", 16), ("draw", 16))
    return pack.batch()


PACKS: dict[str, Callable[[int, int], PackedBatch]] = {"mixed": _mixed, "t2i": _t2i, "text": _text, "short": _short}


if __name__ == "__main__":
    main()
