"""A file of prompts: each line a request with its own settings, results kept as they come.

Guarantees: a result is written whole or not at all, and recorded in results.jsonl once its files are there; a second
start goes on with what is missing. A bad line is reported with its place, and the others are done. Several processes
share a file by taking every n-th line.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from bagel_ds.errors import UserError
from bagel_ds.inference.adapters import Adapters, asked_adapters
from bagel_ds.inference.generation import Inferencer, Request

logger = logging.getLogger("bagel_ds")

RESULTS = "results.jsonl"


class Made(NamedTuple):
    """What a request gave: `images`, and the answer, thought or interleaved text, which names the images' files."""

    images: list[Image.Image]
    text: str | None


@dataclass(frozen=True)
class Job:
    """One result to make. `name`: its file below the output folder, without ending; `words`: what is asked, as JSON."""

    place: str
    name: str
    words: dict[str, Any]
    beside: dict[str, str]  # further files to write, by path below the output folder

    @property
    def key(self) -> str:
        """Changes with anything that changes the result."""
        return hashlib.sha256(json.dumps(self.words, sort_keys=True).encode()).hexdigest()[:16]


def read_jobs(path: Path, common: dict[str, Any], seed: int, faults: list[str], option: str = "--prompts") -> list[Job]:
    """A job per line of a JSONL or row of a parquet file; what can't be one goes into `faults`.

    A line holds `prompt` and, if need be, image, mode, seed, think, lora and settings by name; `common` holds for lines
    that don't say otherwise. Without a seed a line gets `seed` plus its number. Messages name the file's `option`.
    """
    jobs = []
    for number, place, row in _rows(path, faults, option):
        row = {name: value for name, value in row.items() if value is not None}
        if isinstance(row.get("image"), str):
            row["image"] = str((path.parent / row["image"]).resolve())
        words = {**common, "seed": seed + number, **row}
        if not isinstance(words.get("prompt", ""), str):
            faults.append(f"{place}: prompt is {words['prompt']!r:.60}, expected a text")
        elif not isinstance(words["seed"], int) or isinstance(words["seed"], bool):
            faults.append(f"{place}: seed is {words['seed']!r:.60}, expected a whole number")
        else:
            jobs.append(Job(place, f"{number:06d}", words, {}))
    return jobs


def geneval_jobs(path: Path, common: dict[str, Any], seed: int, faults: list[str]) -> list[Job]:
    """GenEval's prompts, four images each: 00000/samples/0000.png and 00000/metadata.jsonl, as its scorer expects."""
    jobs = []
    for number, place, row in _rows(path, faults):
        if not isinstance(row.get("prompt"), str):
            faults.append(f"{place}: no prompt")
            continue
        beside = {f"{number:05d}/metadata.jsonl": json.dumps(row) + "\n"}
        for sample in range(4):
            words = {**common, "prompt": row["prompt"], "mode": "t2i", "seed": seed + 4 * number + sample}
            jobs.append(Job(place, f"{number:05d}/samples/{sample:05d}", words, beside))
    return jobs


def wise_jobs(path: Path, common: dict[str, Any], seed: int, faults: list[str]) -> list[Job]:
    """WISE's prompts: <prompt_id>.png, as its scorer expects."""
    jobs = []
    for number, place, row in _rows(path, faults):
        prompt, own = row.get("Prompt"), row.get("prompt_id")
        if not isinstance(prompt, str) or not isinstance(own, int):
            faults.append(f"{place}: expected Prompt, a text, and prompt_id, a number")
            continue
        jobs.append(Job(place, str(own), {**common, "prompt": prompt, "seed": seed + number}, {}))
    return jobs


LAYOUTS: dict[str, Callable[[Path, dict[str, Any], int, list[str]], list[Job]]] = {
    "plain": read_jobs,
    "geneval": geneval_jobs,
    "wise": wise_jobs,
}


def run_jobs(
    inferencer: Inferencer,
    jobs: Sequence[Job],
    out: Path,
    batch_size: int,
    faults: list[str],
    done: Callable[[int], None] = lambda count: None,
) -> tuple[int, int]:
    """Make what `out` lacks, `batch_size` at a time: (made, there before). `done(n)`: n more are finished."""
    jobs = [_with_weights(job, inferencer.network.adapters) for job in jobs]
    finished = _finished(out)
    waiting = [job for job in jobs if finished.get(job.name) != job.key]
    done(len(jobs) - len(waiting))
    made = 0
    for start in range(0, len(waiting), batch_size):
        asked: list[tuple[Job, Request]] = []
        for job in waiting[start : start + batch_size]:
            try:
                request = request_of(job)
                inferencer.check([request])
            except UserError as fault:
                faults.append(f"{job.place}: {fault}")
                continue
            asked.append((job, request))
        for (job, _), result in zip(asked, make(inferencer, asked)):
            keep(out, job, result)
        made += len(asked)
        done(len(waiting[start : start + batch_size]))
    return made, len(jobs) - len(waiting)


def _with_weights(job: Job, adapters: Adapters) -> Job:
    """With what its adapters count, so that a result of other weights is made again. A wrong job stays as it is."""
    try:
        chosen = adapters.chosen(asked_adapters(job.words.get("lora")))
    except UserError:
        return job
    return replace(job, words={**job.words, "lora": chosen}) if adapters.weights else job


def make(inferencer: Inferencer, asked: Sequence[tuple[Job, Request]]) -> list[Made]:
    """The results of a batch of jobs, in their order."""
    names = [Path(job.name).name for job, _ in asked]
    return answers_of(inferencer, [request for _, request in asked], [interleaves(job) for job, _ in asked], names)


def answers_of(
    inferencer: Inferencer, requests: Sequence[Request], reasons: Sequence[bool], names: Sequence[str] = ()
) -> list[Made]:
    """The results of a batch of requests, in their order; those that `reason` are answered in texts and pictures.

    Their texts call the pictures `names`_0.png, ...
    """
    others = [number for number, reasoned in enumerate(reasons) if not reasoned]
    reasoning = [number for number, reasoned in enumerate(reasons) if reasoned]
    found: dict[int, Made] = {}
    for number, result in zip(others, inferencer.run([requests[number] for number in others]) if others else []):
        found[number] = Made([] if result.image is None else [result.image], result.text)
    for number, items in zip(reasoning, inferencer.reason([requests[number] for number in reasoning])):
        images = [item for item in items if not isinstance(item, str)]
        places = (f"![]({name}.png)" for name in _numbered(names[number] if names else "picture", len(images)))
        said = [item if isinstance(item, str) else next(places) for item in items]
        found[number] = Made(images, "\n\n".join(said))
    return [found[number] for number in range(len(requests))]


def interleaves(job: Job) -> bool:
    """Whether a job's answer is made of texts and pictures in turn."""
    return bool(job.words.get("mode") == "interleave")


def _numbered(name: str, images: int) -> list[str]:
    return [f"{name}_{number}" for number in range(images)]


def request_of(job: Job) -> Request:
    """Raises `UserError` for what is no request, and for an image that can't be read."""
    return Inferencer.request(**_arguments(job.words))


def _arguments(words: dict[str, Any]) -> dict[str, Any]:
    """A job's words as arguments of `Inferencer.request`."""
    words = {"prompt": "", **words}
    if isinstance(words.get("image"), dict):  # a hub dataset's struct
        words["image"] = words["image"].get("bytes") or words["image"].get("path")
    return words


def _rows(path: Path, faults: list[str], option: str = "--prompts") -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number, place, row) of a JSONL file, a JSON list or a parquet file."""
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file")
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{option} {path} can't be read as parquet: {error}") from None
        yield from ((number, f"{path} row {number}", row) for number, row in enumerate(rows))
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{option} {path} can't be read as UTF-8 text: {error}") from None
    if text.lstrip().startswith("["):
        try:
            listed = json.loads(text)
        except ValueError as error:
            raise UserError(f"{option} {path} is not a JSON list: {error}") from None
        lines = [(f"{path} item {number}", item) for number, item in enumerate(listed)]
    else:
        lines = [(f"{path} line {number}", line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    for number, (place, found) in enumerate(lines):
        try:
            row = json.loads(found) if isinstance(found, str) else found
        except (ValueError, RecursionError) as error:
            faults.append(f"{place}: not JSON ({error})")
            continue
        if isinstance(row, dict):
            yield number, place, row
        else:
            faults.append(f"{place}: expected an object with a prompt, found {row!r:.60}")


def _finished(out: Path) -> dict[str, str]:
    """Names and keys of the results that are there."""
    found = {}
    try:
        lines = (out / RESULTS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
            if all((out / name).is_file() for name in row["files"]):
                found[row["name"]] = row["key"]
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: a line that is cut off; its result is made again", out / RESULTS)
    return found


def keep(out: Path, job: Job, made: Made) -> None:
    """Write a result's pictures and its line in results.jsonl."""
    path = out / job.name
    names = _numbered(path.name, len(made.images)) if interleaves(job) else [path.name] * len(made.images)
    files = [write_image(path.with_name(f"{name}.png"), image) for name, image in zip(names, made.images)]
    _record(out, job, files, made.text)


def _record(out: Path, job: Job, files: list[Path], text: str | None) -> None:
    for name, content in job.beside.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content, encoding="utf-8")
    words = {name: value for name, value in job.words.items() if name != "image" or isinstance(value, str)}
    row = {"name": job.name, "key": job.key, "files": [str(path.relative_to(out)) for path in files]}
    line = json.dumps(row | {"text": text} | words, ensure_ascii=False) + "\n"
    with (out / RESULTS).open("ab") as results:  # shared by the processes of a run
        fcntl.flock(results, fcntl.LOCK_EX)
        results.write(line.encode())


def write_image(path: Path, image: Image.Image) -> Path:
    """A PNG under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    image.save(content, "PNG")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content.getvalue())
    beside.replace(path)
    return path
