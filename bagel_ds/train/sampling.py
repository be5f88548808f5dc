"""Samples during training: what the run draws and answers for the prompts of --sample_prompts.

Guarantees: training goes on as if there were no samples, to the last bit. Prompts are dealt to the ranks, and every
rank makes the same number of calls of the network (`inference/joint_calls.py`), so each ZeRO stage and offload works.
Nothing gathers the whole network or copies it: for samples of the average, its shards take the weights' place.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from bagel_ds.arguments.parse import duration_text
from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.data.batches.layout import layout
from bagel_ds.inference.generation import Inferencer
from bagel_ds.inference.jobs import Job, Made, keep, make
from bagel_ds.inference.joint_calls import JointCalls
from bagel_ds.inference.loading import DTYPES, image_transforms
from bagel_ds.inference.network import Network
from bagel_ds.inference.prompts import Prompts
from bagel_ds.inputs.data import layout_options
from bagel_ds.inputs.network import open_tokenizer
from bagel_ds.model_folder.folder import ModelFolder
from bagel_ds.train.metrics.shown import Shown
from bagel_ds.train.prepare import Prepared
from bagel_ds.train.ranks.agreement import on_any_rank, to_main
from bagel_ds.zero.ema import ShardedEMA
from bagel_ds.zero.engine import ZeroEngine

logger = logging.getLogger("bagel_ds")

FOLDER = "samples"  # of results_dir
_TIMED = 3  # a call that draws or writes; those before it may only read a short text
WEIGHTS, AVERAGE = "model", "ema"


class Sample(NamedTuple):
    """What was made of one prompt from the weights ("model") or their moving average ("ema")."""

    source: str
    job: Job
    made: Made


class Sampling:
    """The samples of a run; without --sample_prompts none are due."""

    def __init__(self, config: RunConfig, prepared: Prepared, engine: ZeroEngine, ema: ShardedEMA | None):
        self._training, self._prompts = config.training, prepared.prompts
        self._engine, self._ema = engine, ema
        self._call_seconds: float | None = None  # of one call of the network, once it is known
        wanted = self._training.sample_weights
        self._sources = [WEIGHTS, AVERAGE] if wanted == "both" else [wanted]
        if self._prompts is None:
            return
        self._dtype, self._vae = DTYPES[config.training.precision], prepared.vae
        self._batches = self._prompts.batches(dist.get_rank(), dist.get_world_size())
        self._options = layout_options(config, prepared.model, prepared.vae.config)
        self._transforms = image_transforms(self._options, ModelFolder(prepared.model_folder))
        self._model, self._tokenizer = prepared.model, open_tokenizer(prepared.model_folder, prepared.model)
        self._empty = layout([], self._tokenizer.special, self._options).to(engine.device)

    def is_due(self, steps_done: int, is_last: bool) -> bool:
        return self._prompts is not None and (is_last or steps_done % self._training.sample_every == 0)

    def run(self, steps_done: int) -> list[Shown]:
        """All samples on rank 0, which also writes them below results_dir; call it on all ranks between two steps."""
        assert self._prompts is not None
        began, own = time.monotonic(), list[Sample]()
        calls = len(self._sources) * self._prompts.calls(dist.get_world_size())
        self._announce(steps_done, self._prompts, calls)
        with self._decoder_on_device():
            for source in self._sources:
                own += self._made(source, calls)
        found = to_main(own)
        if found is None:
            return []
        names = {job.name: number for number, job in enumerate(self._prompts.jobs)}
        samples = sorted((one for some in found for one in some), key=lambda one: (one.source, names[one.job.name]))
        folder = Path(self._training.results_dir, FOLDER, f"step_{steps_done}")
        _write(folder, samples)
        logger.info("made samples of step %d in %s: %s", steps_done, duration_text(time.monotonic() - began), folder)
        return [_shown(sample) for sample in samples]

    def _made(self, source: str, calls: int) -> list[Sample]:
        """This rank's samples from one set of weights."""
        engine, ema = self._engine, self._ema
        if source == AVERAGE:
            assert ema is not None, "--ema 0 and samples of the EMA are refused"
            with engine.average_in_place(ema):
                return self._made_as_is(source, calls)
        return self._made_as_is(source, calls)

    def _made_as_is(self, source: str, calls: int) -> list[Sample]:
        engine, transforms = self._engine, self._transforms
        on_call = self._stopwatch(calls)
        network = JointCalls(self._model, self._dtype, engine.forward, on_any_rank, self._empty, on_call)
        inferencer = Inferencer(
            Network(network, self._vae, self._tokenizer, self._options, *transforms, device=engine.device)
        )
        with engine.forward_only():
            samples = [
                Sample(source, job, made)
                for batch in self._batches
                for (job, _), made in zip(batch, make(inferencer, batch))
            ]
            network.finish()
        return samples

    @contextmanager
    def _decoder_on_device(self) -> Iterator[None]:
        """The autoencoder's decoder stays in host memory in between; ranks that draw nothing have none."""
        decoder = getattr(self._vae, "decoder", None)
        if decoder is None:
            yield
            return
        decoder.to(self._engine.device)
        yield
        decoder.to("cpu")

    def _announce(self, steps_done: int, prompts: Prompts, calls: int) -> None:
        expected = "" if self._call_seconds is None else f", about {duration_text(calls * self._call_seconds)}"
        logger.info(
            "samples of step %d (%s): %d prompts on %d ranks, at most %d calls of the network%s",
            steps_done,
            " and ".join(self._sources),
            len(prompts.jobs),
            dist.get_world_size(),
            calls,
            expected,
        )

    def _stopwatch(self, calls: int) -> Callable[[int], None]:
        """The first time, measures one call and logs how long all of them will take."""
        began = 0.0

        def on_call(made: int) -> None:
            nonlocal began
            if self._call_seconds is not None or made not in (_TIMED - 1, _TIMED):
                return
            if self._engine.device.type == "cuda":
                torch.cuda.synchronize(self._engine.device)
            if made < _TIMED:
                began = time.monotonic()
                return
            self._call_seconds = time.monotonic() - began
            seconds, expected = self._call_seconds, duration_text(calls * self._call_seconds)
            logger.info("a call of the network takes %.2g s: samples take about %s", seconds, expected)

        return on_call


def _write(folder: Path, samples: Sequence[Sample]) -> None:
    """Write PNG files and results.jsonl, in place of those of an earlier attempt at this step."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        for sample in samples:
            (folder / sample.source).mkdir(parents=True, exist_ok=True)
            keep(folder / sample.source, sample.job, sample.made)
    except OSError as error:
        logger.warning("samples can't be written to %s (%s); training goes on", folder, error.strerror or error)


def _shown(sample: Sample) -> Shown:
    lines = [str(sample.job.words.get("prompt", "")), sample.made.text or ""]
    text = "\n\n".join(line for line in lines if line)
    return Shown(f"{FOLDER}/{sample.source}/{sample.job.name}", text, sample.made.images)
