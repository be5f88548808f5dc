"""Images and tokens per second: prompts in a batch, one by one, guidance branch by branch, and the original's way.

One command: `python bench/inference.py [--json]`. All ways do the same work with the same random weights in turn,
`--repeats` times, and a ratio is the median over the rounds, so that a machine with other work on it still gives fair
ones. `differs` compares their results. The default takes 5 to 25 minutes on one CPU thread. `--size 7b` has the shape
of BAGEL-7B-MoT; with `--max_gpu_memory` layers that don't fit are streamed from host memory, which the original can't
do, so that its way is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where the package is not installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bagel_ds.demo import write_demo  # noqa: E402
from bagel_ds.inference.generation import Inferencer  # noqa: E402
from bagel_ds.inference.loading import DTYPES, open_inferencer, place_bagel, torch_device  # noqa: E402
from bagel_ds.inference.placement import gpu_limit, place_weights  # noqa: E402
from bagel_ds.inference.sampler import Drawing, _Call, draw, guided  # noqa: E402
from bagel_ds.inference.settings import DEFAULTS, Settings  # noqa: E402
from bagel_ds.inference.text import Text, generate_texts  # noqa: E402
from bagel_ds.model.attention.choice import Place, choose_attention  # noqa: E402
from bagel_ds.model.shape.config import BagelConfig  # noqa: E402
from bagel_ds.ranges import TensorInfo  # noqa: E402
from bench import original_inference  # noqa: E402
from bench.random_model import parameter_shapes, scaled_config  # noqa: E402

PROMPTS = [
    "a small red square on a white background",
    "two blue circles, one above the other",
    "a green triangle beside a yellow square",
    "a large purple circle",
]


class RandomWeights:
    """A `WeightSource` of random numbers, made on the device that computes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype):
        self._shapes, self._device, self._dtype = shapes, device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self._dtype, self._shapes[name])

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        values = torch.empty(self.info(name).numel, dtype=self._dtype, device=self._device)
        if "norm" in name.split(".")[-2]:
            values.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            values.normal_(0, 0.02, generator=self._generator)
        return values[start:][:numel]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object")
    add("--size", choices=("small", "7b"), default="small", help="small: --width and --layers; 7b: the released shape")
    add("--width", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--pixels", type=int, default=256, help="width and height of an image")
    add("--steps", type=int, default=10, help="steps of drawing")
    add("--tokens", type=int, default=32, help="tokens of an answer")
    add("--repeats", type=int, default=3)
    add("--device", default=None, help="cpu, cuda or cuda:N (default: the GPU, or else the CPU)")
    add("--max_gpu_memory", default=None, help="such as 24GB: stream layers beyond it")
    options = parser.parse_args()
    report = measure(options)
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = torch_device(options.device)
    inferencer = random_inferencer(options, device)
    settings = dataclasses.replace(
        DEFAULTS["t2i"], num_timesteps=options.steps + 1, image_shapes=(options.pixels, options.pixels)
    )
    streams = options.max_gpu_memory is not None and device.type == "cuda"
    brief = dataclasses.replace(settings, num_timesteps=2)
    for way in image_ways(inferencer, brief, not streams).values():
        way()  # so that no way pays for the first use of a kernel
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    images = compared(image_ways(inferencer, settings, with_original=not streams), options.repeats, device)
    tokens = compared(token_ways(inferencer, options.tokens, with_original=not streams), options.repeats, device)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "precision": str(inferencer.network.model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in inferencer.network.model.parameters()),
        "prompts": len(PROMPTS),
        "pixels": options.pixels,
        "steps": options.steps,
        "max_gpu_memory": options.max_gpu_memory,
        "peak_gpu_gib": peak,
        "images": rated(images, len(PROMPTS)),
        "tokens": rated(tokens, len(PROMPTS) * options.tokens),
    }


def random_inferencer(options: argparse.Namespace, device: torch.device) -> Inferencer:
    """The demo's tokenizer and autoencoder with a network of random weights."""
    with tempfile.TemporaryDirectory(prefix="bagel_ds_inference_") as folder:
        write_demo(Path(folder) / "demo")
        network = open_inferencer(Path(folder) / "demo" / "model", str(device)).network
    demo = network.model.config
    if options.size == "7b":
        config = BagelConfig()
    else:
        config = scaled_config(options.width, options.layers, demo.llm.vocab_size)
    config = dataclasses.replace(config, vit=demo.vit, max_latent_size=demo.max_latent_size)
    dtype = DTYPES["bf16" if device.type == "cuda" else "fp32"]
    config, line = choose_attention(config, "auto", Place(device, dtype, trains=False))
    print(line, file=sys.stderr)
    limited = options.max_gpu_memory is not None and device.type == "cuda"
    placement = place_weights(config, dtype.itemsize, gpu_limit(options.max_gpu_memory) if limited else None)
    shapes = parameter_shapes(config)
    model = place_bagel(config, shapes, RandomWeights(shapes, device, dtype), device, dtype, placement.streamed)
    return Inferencer(dataclasses.replace(network, model=model))


def image_ways(inferencer: Inferencer, settings: Settings, with_original: bool) -> dict[str, Callable[[], Any]]:
    """Each draws all prompts and returns their latents."""
    network = inferencer.network

    def begun(prompts: list[str], first_seed: int = 0) -> list[Drawing]:
        options = dataclasses.asdict(settings)
        requests = [
            inferencer.request(prompt, seed=first_seed + number, **options) for number, prompt in enumerate(prompts)
        ]
        return [inferencer.begin(work) for work in inferencer.contexts(requests)]

    def batched() -> list[Tensor]:
        drawings = begun(PROMPTS)
        draw(network, drawings)
        return [drawing.latents for drawing in drawings]

    def one_by_one() -> list[Tensor]:
        found = []
        for number, prompt in enumerate(PROMPTS):
            drawings = begun([prompt], number)
            draw(network, drawings)
            found.append(drawings[0].latents)
        return found

    def branch_by_branch() -> list[Tensor]:
        found = []
        for number, prompt in enumerate(PROMPTS):
            drawing = begun([prompt], number)[0]
            calls = {name: _Call(network) for name in ("gen", "cfg_text", "cfg_img")}
            for step in range(len(drawing.times)):
                velocities = {name: calls[name]([(drawing, name)], step)[0][0] for name in drawing.wanted(step)}
                drawing.latents = drawing.latents - guided(velocities, settings) * float(drawing.lengths[step])
            found.append(drawing.latents)
        return found

    def original() -> list[Tensor]:
        return [original_inference.draw(network, prompt, settings, number) for number, prompt in enumerate(PROMPTS)]

    ways = {"batched": batched, "one by one": one_by_one, "branch by branch": branch_by_branch}
    return ways | ({"original": original} if with_original else {})


def token_ways(inferencer: Inferencer, tokens: int, with_original: bool) -> dict[str, Callable[[], Any]]:
    """Each answers all prompts; the ids of the answers."""
    network = inferencer.network

    def answered(prompts: list[str]) -> list[list[int]]:
        requests = [inferencer.request(prompt, mode="vqa", max_think_token_n=tokens + 1) for prompt in prompts]
        texts = [
            Text(work.branches.gen, work.request.settings, work.generator) for work in inferencer.contexts(requests)
        ]
        generate_texts(network, texts)
        assert all(len(text.ids) == tokens + 1 for text in texts), "random weights ended an answer early"
        return [text.ids[1:] for text in texts]

    def original() -> list[list[int]]:
        return [original_inference.answer(network, prompt, tokens) for prompt in PROMPTS]

    ways: dict[str, Callable[[], Any]] = {
        "batched": lambda: answered(PROMPTS),
        "one by one": lambda: [answered([prompt])[0] for prompt in PROMPTS],
    }
    return ways | ({"original": original} if with_original else {})


def compared(ways: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of each way, run in turn; how far its results are from the batch's."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            _wait(device)
            began = time.perf_counter()
            results[name] = way()
            _wait(device)
            seconds[name].append(time.perf_counter() - began)
    first = results["batched"]
    return {"seconds": seconds, "differs": {name: _difference(found, first) for name, found in results.items()}}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _difference(found: list[Any], wanted: list[Any]) -> float:
    """Of latents, the largest over the largest latent; of ids, the share that differs."""
    if isinstance(found[0], Tensor):
        return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, wanted))
    pairs = [pair for one, other in zip(found, wanted) for pair in zip(one, other)]
    return sum(one != other for one, other in pairs) / len(pairs)


def rated(found: dict[str, Any], count: int) -> dict[str, Any]:
    """Medians, rates and how many times faster than each way the batch is."""
    median = {name: statistics.median(seconds) for name, seconds in found["seconds"].items()}
    ratios = {
        name: statistics.median(other / ours for other, ours in zip(seconds, found["seconds"]["batched"]))
        for name, seconds in found["seconds"].items()
    }
    return {
        name: {
            "seconds": round(median[name], 3),
            "per_second": round(count / median[name], 3),
            "batched_is_faster": round(ratios[name], 3),
            "differs": found["differs"][name],
        }
        for name in median
    }


def lines(report: dict[str, Any]) -> list[str]:
    said = [
        f"{report['parameters']:,} parameters, {report['precision']}, {report['device']}, {report['threads']} threads; "
        f"{report['prompts']} prompts, {report['pixels']} pixels square, {report['steps']} steps"
    ]
    for kind in ("images", "tokens"):
        said += ["", f"{kind + ' per second':24}{'':>8}{'batched is faster':>20}{'results differ by':>20}"]
        for name, one in report[kind].items():
            said.append(f"  {name:22}{one['per_second']:8.3f}{one['batched_is_faster']:20.2f}{one['differs']:20.1e}")
    return said


if __name__ == "__main__":
    main()
