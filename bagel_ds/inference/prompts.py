"""The prompts that a training run draws and answers: read, checked, and dealt to its ranks.

Guarantees: what `bagel-ds generate --prompts` reads is read here, with the same defaults and seeds. Every bad line,
unreadable image and request that this network can't do is in one message. Each rank gets batches whose calls of the
network hold no more tokens than a pack of training, unless one request by itself does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.errors import UserError, all_faults
from bagel_ds.inference.generation import Request, check_requests
from bagel_ds.inference.jobs import Job, interleaves, read_jobs, request_of
from bagel_ds.inference.loading import image_transforms
from bagel_ds.inference.workload import Workload, batched, together, workload
from bagel_ds.memory.between_steps import SampleShape
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model_folder.folder import ModelFolder

OPTION = "--sample_prompts"
Batch = tuple[tuple[Job, Request], ...]


@dataclass(frozen=True)
class Prompts:
    """Jobs with their requests and what each takes; a batch's calls have at most `max_tokens`."""

    jobs: tuple[Job, ...]
    requests: tuple[Request, ...]
    works: tuple[Workload, ...]
    max_tokens: int

    def batches(self, rank: int, world_size: int) -> list[Batch]:
        """What a rank does: every n-th prompt, in batches."""
        pairs = list(zip(self.jobs, self.requests))[rank::world_size]
        return [tuple(pairs[number] for number in batch) for batch in self._dealt(rank, world_size)]

    def workloads(self, world_size: int) -> list[list[Workload]]:
        """By rank, what each batch takes."""
        return [
            [
                together([self.works[rank::world_size][number] for number in batch])
                for batch in self._dealt(rank, world_size)
            ]
            for rank in range(world_size)
        ]

    def calls(self, world_size: int) -> int:
        """Calls of the network, at most; ranks make them at the same time."""
        return max(sum(work.calls for work in works) for works in self.workloads(world_size))

    def memory(self, world_size: int, average: bool) -> SampleShape:
        """What the largest batch of any rank takes; `average`: samples come from the moving average, too."""
        batches = [batch for own in self.workloads(world_size) for batch in own]
        most = Workload(*(max(found) for found in zip(*batches)))
        return SampleShape(most.tokens, most.context, most.pixels, most.seen, average)

    def draws(self, rank: int, world_size: int) -> bool:
        """Whether a rank draws at all."""
        return any(not request.answers for request in self.requests[rank::world_size])

    def _dealt(self, rank: int, world_size: int) -> list[range]:
        return batched(self.works[rank::world_size], self.max_tokens)


def open_prompts(
    path: Path, model: BagelConfig, layout: LayoutOptions, max_tokens: int, folder: ModelFolder | None = None
) -> Prompts:
    """Raises one `UserError` for all that is wrong with the file."""
    faults: list[str] = []
    cannot_draw = None if model.visual_gen else "--visual_gen False leaves out what generates images"
    jobs, requests = [], []
    for job in read_jobs(path, {}, 0, faults, OPTION):
        try:
            request = request_of(job)
            check_requests([request], layout, cannot_draw)
            _check_training(request, model)
        except UserError as fault:
            faults.append(f"{job.place}: {fault}")
        else:
            jobs.append(job)
            requests.append(request)
    all_faults([f"{OPTION} {fault}" for fault in faults], "These prompts can't be used:")
    if not jobs:
        raise UserError(f'{OPTION} {path} holds no prompts; write one per line, such as {{"prompt": "a red teapot"}}')
    transforms = image_transforms(layout, folder)
    works = [workload(request, layout, transforms, interleaves(job)) for job, request in zip(jobs, requests)]
    return Prompts(tuple(jobs), tuple(requests), tuple(works), max_tokens)


def _check_training(request: Request, model: BagelConfig) -> None:
    """Raise `UserError` for what works with `bagel-ds generate` but not while training."""
    if request.settings.enable_taylorseer:
        raise UserError(
            "enable_taylorseer skips calls of the network, which all ranks make together; leave it out here"
        )
    if request.lora is not None:
        raise UserError("lora chooses among the adapters of bagel-ds generate; leave it out here")
    if not model.visual_und and any(not isinstance(item, str) for item in request.inputs):
        raise UserError("an image can't be read: --visual_und False leaves out the ViT")
