"""Requests of the page: they wait in a line, and one thread does them in turn.

Guarantees: a request that can't be done is refused before it waits; one that fails says why and leaves the others
alone; a stopped one ends at its next step. Results are kept in memory only, the newest `KEPT` of them.
"""

from __future__ import annotations

import io
import logging
import queue
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bagel_ds.errors import UserError
from bagel_ds.inference.generation import Request
from bagel_ds.web.models import TITLES, Models

logger = logging.getLogger("bagel_ds")

WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"
KEPT = 32  # finished jobs
MOST_WAITING = 16


class _Stopped(Exception):
    """The user has stopped the job."""


@dataclass
class Panel:
    """What one set of weights made of a request: texts, and pictures as PNG files."""

    title: str
    items: list[str | bytes] = field(default_factory=list)


@dataclass(eq=False)
class Job:
    """One request, done with each of `weights` in turn."""

    request: Request
    mode: str | None
    weights: tuple[str, ...]
    state: str = WAITING
    steps: tuple[int, int] = (0, 0)  # done, and all of the picture under way
    panels: list[Panel] = field(default_factory=list)
    error: str = ""
    stopping: bool = False


class Work:
    """The line of jobs and the thread that does them."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self._jobs: dict[str, Job] = {}
        self._line: queue.Queue[Job] = queue.Queue()
        threading.Thread(target=self._run, daemon=True, name="work").start()

    def add(self, words: Mapping[str, Any]) -> str:
        """A new job's name. `words`: arguments of `Inferencer.request`, and `weights`, a list. Raises `UserError`."""
        words = dict(words)
        weights = words.pop("weights", None) or [self.models.names[0]]
        if not isinstance(weights, list) or any(name not in self.models.names for name in weights):
            raise UserError(f"weights {weights!r}: expected a list of {', '.join(self.models.names)}")
        if not isinstance(seed := words.get("seed", 0), int) or not 0 <= seed < 2**63:
            raise UserError(f"seed {seed!r}: expected a whole number from 0 to {2**63 - 1}")
        mode = words.get("mode")
        request = self.models.default.request(**{"prompt": "", **words})
        self.models.default.check([request])
        if sum(job.state == WAITING for job in list(self._jobs.values())) >= MOST_WAITING:
            raise UserError(f"{MOST_WAITING} requests are waiting already; try again when some are done")
        name, job = secrets.token_hex(8), Job(request, mode, tuple(weights))
        self._jobs[name] = job
        finished = [old for old, one in list(self._jobs.items()) if one.state in (DONE, FAILED, STOPPED)]
        for old in finished[: max(0, len(finished) - KEPT)]:
            self._jobs.pop(old, None)
        self._line.put(job)
        return name

    def job(self, name: str) -> Job:
        """Raises `UserError` for one that is unknown or no longer kept."""
        job = self._jobs.get(name)
        if job is None:
            raise UserError("this request is no longer known: the server was restarted, or it was long ago; ask again")
        return job

    def ahead(self, job: Job) -> int:
        """How many jobs are done before this one."""
        if job.state != WAITING:
            return 0
        jobs = list(self._jobs.values())
        return sum(one.state in (WAITING, RUNNING) for one in jobs[: jobs.index(job)])

    def _run(self) -> None:
        while True:
            job = self._line.get()
            try:
                job.state = RUNNING
                self._do(job)
                job.state = DONE
            except _Stopped:
                job.state = STOPPED
            except UserError as fault:
                job.error, job.state = str(fault), FAILED
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                job.error = (
                    "the GPU's memory is full. Draw a smaller picture, compare no two sets of weights, or start again "
                    "with --max_gpu_memory, which keeps layers in host memory"
                )
                job.state = FAILED
            except Exception as error:  # the page must go on working, and the traceback stands in the terminal
                logger.exception("a request failed")
                job.error, job.state = f"{type(error).__name__}: {error}", FAILED

    def _do(self, job: Job) -> None:
        def on_step(done: int, total: int) -> None:
            job.steps = done, total
            if job.stopping:
                raise _Stopped

        for name in job.weights:
            if job.stopping:
                raise _Stopped
            job.steps = 0, 0
            items = self.models.of(name).items(job.request, job.mode, on_step)
            job.panels.append(Panel(TITLES[name], [one if isinstance(one, str) else _png(one) for one in items]))


def _png(image: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
