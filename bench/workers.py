"""What data workers cost: seconds until the first batch, and memory per process.

One command: `python bench/workers.py [--json]`. The process that asks for batches has imported what a rank has; its
data have a tokenizer as large as BAGEL's and an index of many rows. "Own" is memory that would be free without the
process (USS), "share" counts pages that several processes use in parts (PSS). Beside it: a process that imports for
itself what a worker needs, as one that multiprocessing spawns does.
"""

from __future__ import annotations

import argparse
import json
import string
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from loader import BUDGETS, write_data

import bagel_ds.train.trainer  # noqa: F401  what a rank has imported
from bagel_ds.data.batches.loader import PlannedData
from bagel_ds.data.config.dataset_config import load_dataset_config
from bagel_ds.data.plan.planner import PackingOptions
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.streams.opening import open_streams
from bagel_ds.data.streams.stream import SampleOptions
from bagel_ds.model_folder.tokenizer import load_tokenizer
from bagel_ds.units import MIB

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
TEXT = {"from": "human", "value": "a question"}, {"from": "gpt", "value": "an answer"}


def large_tokenizer(size: int = 151_643) -> Tokenizer:
    """Byte-level BPE with as many words as Qwen2.5's."""
    vocab = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    parts = list(string.ascii_lowercase)
    while len(vocab) < size:
        pairs = list(islice(product(parts, repeat=2), size - len(vocab)))
        merges += pairs
        parts = [first + second for first, second in pairs]
        vocab |= {whole: len(vocab) + number for number, whole in enumerate(parts)}
    fast = Tokenizer(models.BPE(vocab, merges))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(SPECIAL)
    return fast


def open_data(folder: Path, pictures: int, lines: int) -> PlannedData:
    """Pictures of all kinds, and `lines` conversations without one."""
    write_data(folder, pictures)
    large_tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    line = json.dumps({"conversations": TEXT}) + "\n"
    (folder / "lines").mkdir()
    (folder / "lines" / "data.jsonl").write_text(line * lines)
    many = f"data_dir: {folder}/vlm/images, jsonl_path: {folder}/lines/data.jsonl"
    with (folder / "data.yaml").open("a") as config:
        config.write(f"more: {{kind: vlm_sft, weight: 0.01, dataset_names: [{{name: many, {many}}}]}}\n")
    tokenizer = load_tokenizer(folder / "tokenizer")
    streams = open_streams(
        load_dataset_config(str(folder / "data.yaml")), tokenizer, SampleOptions(), str(folder / "index")
    )
    return PlannedData(streams, tokenizer, LayoutOptions(), PackingOptions(**BUDGETS), 0)


def measure(data: PlannedData, workers: int, batches: int) -> dict[str, Any]:
    """`batches` of each worker; memory is looked at after the last one."""
    began = time.perf_counter()
    found = data.micro_batches(0, 1, num_workers=workers)
    next(found)
    first = time.perf_counter() - began
    for _ in range(batches * workers - 1):
        next(found)
    time.sleep(1)
    server, *forked = [process.memory_full_info() for process in psutil.Process().children(recursive=True)]
    found.close()
    own, share = ([getattr(info, kind) / MIB for info in (server, *forked)] for kind in ("uss", "pss"))
    return {"workers": workers, "first_batch_seconds": first, "own_mib": own, "share_mib": share}


def spawned() -> dict[str, float]:
    """A process that has imported what a worker needs."""
    modules = "bagel_ds.data.batches.loader, bagel_ds.data.inspect.check, psutil"
    code = f"import {modules}; print(psutil.Process().memory_full_info().uss)"
    began = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return {"seconds": time.perf_counter() - began, "own_mib": int(ended.stdout) / MIB}


def describe(report: dict[str, Any]) -> str:
    spawn = report["spawned"]
    lines = [
        f"one process that imports all for itself: {spawn['seconds']:.2f} s, own {spawn['own_mib']:.0f} MiB",
        f"rank: own {report['rank_own_mib']:.0f} MiB",
    ]
    for number, case in enumerate(report["cases"]):
        own, share = (" ".join(f"{value:.0f}" for value in case[kind]) for kind in ("own_mib", "share_mib"))
        lines.append(
            f"{case['workers']} worker(s): first batch after {case['first_batch_seconds']:.2f} s"
            f"{', starting the server included' if number == 0 else ''}; MiB of the server and each worker: own {own}, "
            f"share {share}, together {sum(case['share_mib']):.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 1, 4, 8])
    parser.add_argument("--pictures", type=int, default=60, help="rows of each of the three data sets with pictures")
    parser.add_argument("--lines", type=int, default=1_000_000, help="rows without a picture")
    parser.add_argument("--batches", type=int, default=3, help="of each worker, before memory is looked at")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        data = open_data(Path(name), arguments.pictures, arguments.lines)
        report = {"cases": [measure(data, workers, arguments.batches) for workers in arguments.workers]}
        report |= {"rank_own_mib": psutil.Process().memory_full_info().uss / MIB, "spawned": spawned()}
    print(json.dumps(report) if arguments.json else describe(report))


if __name__ == "__main__":
    main()
