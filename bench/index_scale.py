"""What opening many indexed rows costs: seconds, and memory of all processes of one host.

One command: `python bench/index_scale.py [--json]`. Several ranks open the same data at once, plan packs and start
workers, as training does. Memory is that of all ranks, servers and workers: private pages, and pages of the index in
parts where several processes use them. "Added" is what it exceeds that of the same processes over one row group by.

Synthetic: the parquet files are links to one file, whose rows hold one tiny picture and a caption each; its footer is a
real one. Their index files are real copies, in which one row in 64 is unusable, so the page cache has to hold them all.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import bagel_ds.train.trainer  # noqa: F401  what a rank has imported
from bagel_ds.data.batches.loader import PlannedData
from bagel_ds.data.config.dataset_config import load_dataset_config
from bagel_ds.data.formats.registry import SOURCES
from bagel_ds.data.index import cache
from bagel_ds.data.index.data_file import DataFile, layout_of
from bagel_ds.data.index.index import index_files
from bagel_ds.data.index.records import BadRows, FileRecords
from bagel_ds.data.plan.planner import PackingOptions
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.streams.opening import open_streams
from bagel_ds.data.streams.stream import SampleOptions
from bagel_ds.demo.tokenizer import train_tokenizer, write_tokenizer
from bagel_ds.model_folder.tokenizer import load_tokenizer
from bagel_ds.units import MIB

GROUP_ROWS = 1000  # of a row group
BAD = 64  # one row in so many is unusable
TITLES = (
    "files",
    "rows",
    "index MiB",
    "ranks",
    "open s",
    "plan s",
    "added MiB",
    "in all MiB",
    "rank MiB",
    "worker MiB",
)


def write_data(folder: Path, files: int, rows: int) -> None:
    """Files and their index files."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    data = folder / f"data-{files}"
    data.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (512, 512), (200, 40, 40)).save(picture, "PNG")
    captions = [json.dumps([f"picture number {row} " + "word " * (row % 40)]) for row in range(rows)]
    template = data / "00000.parquet"
    pq.write_table(
        pa.table({"image": [picture.getvalue()] * rows, "captions": captions}), template, row_group_size=GROUP_ROWS
    )
    (index,) = index_files([DataFile(str(template), SOURCES["t2i"])], tokenizer, str(folder / "index"))
    records = with_bad_rows(index.records)
    for number in range(files):
        path = data / f"{number:05}.parquet"
        if number:
            os.link(template, path)
        file = DataFile(str(path), SOURCES["t2i"])
        entry = cache.cache_file(folder / "index", file.path, f"{file.key} {tokenizer.fingerprint}")
        assert cache.save(entry, layout_of(file), records, cache.identity(file.path))
    (folder / f"{files}.yaml").write_text(f"t2i_pretrain: {{dataset_names: [{{name: all, data_dir: {data}}}]}}\n")


def with_bad_rows(records: FileRecords) -> FileRecords:
    rows = np.arange(0, records.rows, BAD)
    lengths = np.diff(records.offsets)
    kept = np.ones(records.rows, bool)
    kept[rows] = False
    numbers = records.numbers[np.repeat(kept, lengths)]
    offsets = np.concatenate([[0], np.cumsum(lengths * kept)])
    bad = BadRows.of([(row, f"image {row} is not a readable image (unknown format)") for row in rows.tolist()])
    return records._replace(numbers=numbers, offsets=offsets, bad=bad)


def rank(folder: Path, files: int, workers: int, packs: int) -> None:
    """One rank: print what it measured when it has its batches, end when its input closes."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    began = time.perf_counter()
    config = load_dataset_config(str(folder / f"{files}.yaml"))
    streams = open_streams(config, tokenizer, SampleOptions(), str(folder / "index"))
    data = PlannedData(streams, tokenizer, LayoutOptions(), PackingOptions(36864, 32768), 0)
    data.describe()
    opened = time.perf_counter()
    assert data.unusable_rows()["all"] >= streams[0].rows // BAD
    for _ in islice(data.planner.steps(8), packs):
        pass
    planned = time.perf_counter()
    batches = data.micro_batches(0, 8, num_workers=workers)
    next(batches)
    print(json.dumps({"open": opened - began, "plan": planned - opened, "rows": streams[0].rows}), flush=True)
    sys.stdin.read()
    batches.close()


def memory_of(process: psutil.Process) -> float:
    """MiB, without what a process shares with others: libraries, and what workers share with their server."""
    maps = process.memory_maps()
    of_index = [part.pss if part.path.endswith(".safetensors") else 0 for part in maps]
    private = [0 if pss else part.private_clean + part.private_dirty for part, pss in zip(maps, of_index, strict=True)]
    return (sum(of_index) + sum(private)) / MIB


def measure(folder: Path, files: int, ranks: int, workers: int, packs: int) -> dict[str, Any]:
    """All ranks at once; memory when each has a batch."""
    command = [sys.executable, __file__, "--rank", str(folder), str(files), str(workers), str(packs)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(ranks)
    ]
    found = [json.loads(process.stdout.readline()) for process in started if process.stdout]
    memory: dict[str, list[float]] = {"rank": [], "below": []}
    for process in started:
        here = psutil.Process(process.pid)
        memory["rank"].append(memory_of(here))
        memory["below"] += map(memory_of, here.children(recursive=True))
    for process in started:
        process.communicate()
    return {
        "files": files,
        "rows": found[0]["rows"],
        "ranks": ranks,
        "open": max(one["open"] for one in found),
        "plan": max(one["plan"] for one in found),
        "total": sum(memory["rank"]) + sum(memory["below"]),
        "rank": max(memory["rank"]),
        "worker": max(memory["below"]),
    }


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        folder, *numbers = sys.argv[2:]
        return rank(Path(folder), *map(int, numbers))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--files", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--rows", type=int, default=100_000, help="of each file")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="of each rank")
    parser.add_argument("--packs", type=int, default=64, help="global micro-steps of 8 packs that each rank plans")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer").mkdir()
        write_tokenizer(train_tokenizer(["picture number word"], 300), folder / "tokenizer")
        how = arguments.ranks, arguments.workers, arguments.packs
        write_data(folder, 1, GROUP_ROWS)
        base = measure(folder, 1, *how)
        for files in arguments.files:
            write_data(folder, files, arguments.rows)
            size = sum(path.stat().st_size for path in (folder / "index").iterdir()) / MIB
            results.append(measure(folder, files, *how) | {"index": size})
            results[-1]["added"] = results[-1]["total"] - base["total"]
            for path in (*(folder / "index").iterdir(), *(folder / f"data-{files}").iterdir()):
                path.unlink()
    if arguments.json:
        print(json.dumps({"base": base, "results": results}))
        return
    print(f"one file of {GROUP_ROWS} rows: {base['total']:,.0f} MiB in all, opened in {base['open']:.1f} s")
    print(("{:>12}" * len(TITLES)).format(*TITLES))
    for one in results:
        numbers = (one[key] for key in ("open", "plan", "added", "total", "rank", "worker"))
        print(f"{one['files']:12,}{one['rows']:12,}{one['index']:12,.0f}{one['ranks']:12}", end="")
        print("".join(f"{number:12,.1f}" for number in numbers))


if __name__ == "__main__":
    main()
