"""Tests and benchmarks for a machine with a GPU, in pieces of under 8 minutes that can be started one by one.

`bash bench/on_gpu.sh list` names the pieces, `bash bench/on_gpu.sh PIECE... --out DIR` runs some (`all`: all of them),
`bash bench/on_gpu.sh table --out DIR` makes a Markdown table of what DIR holds. Each piece leaves DIR/PIECE.json, also
where it fails or runs into the limit; the others then still run. `--rehearse` runs everything at toy size on a CPU.
TMPDIR chooses the drive for models, checkpoints and swap files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence
from xml.etree import ElementTree

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # also where the package is not installed

from bench.on_gpu_table import NUMBERS, Numbers, table  # noqa: E402

LIMIT = 480.0  # seconds
ENDING = 60.0  # for a piece that is past the limit to clean up
TIMED_OUT = 124
PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


class Piece(NamedTuple):
    """One command. `rehearsal` stands for `arguments` at toy size on a CPU."""

    name: str
    script: str  # in the repository; a test file is run by pytest
    arguments: str = ""
    rehearsal: str = ""

    def command(self, rehearse: bool, folder: Path) -> list[str]:
        if self.is_test:
            return [sys.executable, "-m", "pytest", "-q", self.script, f"--junitxml={folder / self.name}.xml"]
        words = shlex.split(self.rehearsal if rehearse else self.arguments)
        return [sys.executable, self.script, "--json", *words]

    @property
    def is_test(self) -> bool:
        return Path(self.script).name.startswith("test_")

    @property
    def numbers(self) -> Numbers:
        return NUMBERS["tests" if self.is_test else Path(self.script).stem]


TOY_TRAINING = "--layers 1 2 --width 256 --tokens 1024 --steps 1"
# A benchmark that prints one JSON object with --json joins by one line here, and one in NUMBERS (on_gpu_table.py).
PIECES = (
    Piece("tests-model", "tests/gpu/test_model.py"),
    Piece("tests-presets", "tests/gpu/test_presets.py"),
    Piece("tests-resume", "tests/gpu/test_resume.py"),
    Piece("tests-saving", "tests/gpu/test_saving.py"),
    Piece("tests-offload", "tests/gpu/test_offload.py"),
    Piece("tests-faults", "tests/gpu/test_faults.py"),
    Piece("tests-allocators", "tests/gpu/test_allocators.py"),
    Piece("attention", "bench/attention.py", "", "--lengths 256 --heads 4 2 16 --rounds 2"),
    Piece("attention-sweep", "bench/attention.py", "--sweep", "--sweep --lengths 256 --heads 4 2 16 --rounds 2"),
    Piece("pointwise", "bench/pointwise.py", "", "--tokens 64 --width 112 --inner 128 --rounds 2"),
    Piece("train-frozen-und", "bench/train_7b.py", "frozen-und", f"frozen-und {TOY_TRAINING}"),
    Piece("train-qlora", "bench/train_7b.py", "qlora", f"qlora {TOY_TRAINING}"),
    Piece("train-offload-24", "bench/train_7b.py", "offload-24", f"offload-24 {TOY_TRAINING}"),
    Piece("saving", "bench/saving.py", "--width 1024", "--width 128 --saves 1 --presets zero3.json"),
    Piece("cost-small", "bench/cost_model.py", "", "--packs 6 --tokens 512 --repeats 1"),
    Piece("cost-7b", "bench/cost_model.py", "--size 7b", "--packs 6 --tokens 512 --repeats 1"),
    Piece(
        "inference", "bench/inference.py", "--width 2048 --pixels 512", "--width 64 --layers 1 --pixels 32 --steps 2"
    ),
    Piece(
        "inference-7b",
        "bench/inference.py",
        "--size 7b --pixels 512 --steps 5 --repeats 2 --tokens 8 --max_gpu_memory 24GB",
        "--width 64 --layers 1 --pixels 32 --steps 2 --max_gpu_memory 24GB",
    ),
    Piece("nvme", "bench/nvme_step.py", "--elements 268435456", "--elements 4194304 --steps 1"),
)


def main(argv: Sequence[str] | None = None, pieces: Sequence[Piece] = PIECES) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", metavar="PIECE", help="names of pieces, or one of: all, list, table")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds per piece (default {LIMIT:.0f})")
    options = parser.parse_args(argv)
    if options.what == ["list"]:
        for piece in pieces:
            print(f"{piece.name:16} {piece.script} {piece.arguments}".rstrip())
        return 0
    if options.out is None:
        parser.error("--out DIR is needed: the folder for the results")
    folder = options.out.resolve()
    if options.what == ["table"]:
        return _write_table(folder, pieces)
    names = [piece.name for piece in pieces] if options.what == ["all"] else options.what
    if unknown := [name for name in names if name not in {piece.name for piece in pieces}]:
        parser.error(f"no piece {', '.join(unknown)}; there are: {', '.join(piece.name for piece in pieces)}")
    described = _machine(options.rehearse)
    if described["device"] is None:
        parser.error("torch sees no CUDA device here; --rehearse runs the pieces at toy size on the CPU")
    folder.mkdir(parents=True, exist_ok=True)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started by nohup: pieces must hear of the limit
        signal.signal(signal.SIGINT, signal.default_int_handler)
    chosen = [piece for piece in pieces if piece.name in names]
    return max([run(piece, folder, described, options.rehearse, options.limit) for piece in chosen])


def run(piece: Piece, folder: Path, described: dict[str, Any], rehearse: bool, limit: float) -> int:
    """Run a piece to its end and write its JSON; 0 where it succeeded and reported, else 1."""
    command = piece.command(rehearse, folder)
    print(f"[{piece.name}] {shlex.join(command)}", flush=True)
    log = folder / f"{piece.name}.log"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu" if rehearse else "cuda"}
    environment["BAGEL_GPU_REHEARSAL"] = "1" if rehearse else ""
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    began = time.monotonic()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        output, code = _until_end(process, limit)
    seconds = time.monotonic() - began
    report = _counted(folder / f"{piece.name}.xml") if piece.is_test else _last_object(output)
    result = {
        "piece": piece.name,
        "command": shlex.join(["python", *command[1:]]),
        "exit_code": code,
        "seconds": round(seconds, 1),
        **described,
        "report": report,
        "output_tail": output[-4000:] + log.read_text(errors="replace")[-4000:] if code or report is None else "",
    }
    (folder / f"{piece.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    state = f"exit code {code}" + ("" if report is not None else ", no report")
    print(f"[{piece.name}] {state} after {seconds:.0f} s", flush=True)
    return int(code != 0 or report is None)


def _until_end(process: subprocess.Popen[bytes], limit: float) -> tuple[str, int]:
    """What it printed, and its exit code or `TIMED_OUT`. Past the limit it is interrupted, which lets it end what it
    started; what is left of it and its children a minute later is killed."""
    try:
        output, _ = process.communicate(timeout=limit)
        return output.decode(errors="replace"), process.returncode
    except subprocess.TimeoutExpired:
        children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, left = psutil.wait_procs([psutil.Process(process.pid), *children], timeout=ENDING)
    for each in left:
        each.kill()
    output, _ = process.communicate()
    return output.decode(errors="replace"), TIMED_OUT


def _last_object(output: str) -> Any:
    """The JSON object that ends the output, after whatever libraries printed; None where there is none."""
    lines = output.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if line.startswith("{"):
            try:
                return json.loads("".join(lines[number:]))
            except ValueError:
                continue
    return None


def _counted(file: Path) -> dict[str, Any] | None:
    """Outcomes of a pytest run, from its JUnit file."""
    if not file.exists():
        return None
    cases = list(ElementTree.parse(file).iter("testcase"))
    file.unlink()
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = {
        str(case.get("name")): found.get("message") for case in cases if (found := case.find("skipped")) is not None
    }
    passed = len(cases) - len(failed) - len(skipped)
    return {"passed": passed, "failed": failed, "skipped": skipped}


def _machine(rehearse: bool) -> dict[str, Any]:
    """What a result depends on. `device` is None where a GPU is wanted and there is none."""
    import torch  # here, so that `list` and `table` need no torch

    from bagel_ds.machine.device import uses_cuda

    device, driver = ("CPU" if rehearse else None), None
    if not rehearse and uses_cuda():
        device = torch.cuda.get_device_name()
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        try:
            driver = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            driver = "unknown"
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return {
        "device": device,
        "devices": 1 if rehearse else torch.cuda.device_count(),
        "rehearsed": rehearse,
        "versions": {**versions, "cuda": torch.version.cuda, "driver": driver},
    }


def _write_table(folder: Path, pieces: Sequence[Piece]) -> int:
    found = {piece.name: folder / f"{piece.name}.json" for piece in pieces}
    results = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    if not results:
        print(f"on_gpu: {folder} holds no results of pieces", file=sys.stderr)
        return 2
    numbers: dict[str, Callable[[Any], str]] = {piece.name: piece.numbers for piece in pieces}
    text = table(results, numbers)
    (folder / "table.md").write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
