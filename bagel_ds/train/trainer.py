"""The training run, from top to bottom.

Guarantees: exactly `total_steps` optimizer steps, counted across resumes. Every logged number is over all ranks. The
last step is always saved.

`Trainer.__init__` makes the parts, `run` is the loop. What must follow each step (guard, metrics, saves) is in the list
that `_after_step` returns. A step itself is in step.py, its input in data/, what it leaves in metrics/ and saves/.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Generator, NamedTuple, Sequence

import torch
import torch.distributed as dist

from bagel_ds.arguments.parse import duration_seconds
from bagel_ds.arguments.run_config import RunConfig, wandb_wanted
from bagel_ds.checkpoint.gather import Gathering
from bagel_ds.checkpoint.step_folders import mark_final, read_trainer
from bagel_ds.data.batches.loader import MicroBatch, primed
from bagel_ds.data.index.background import BackgroundIndex, index_in_background
from bagel_ds.errors import UserError
from bagel_ds.lora.peft_files import AdapterRecord
from bagel_ds.machine.device import uses_cuda
from bagel_ds.machine.waiting import waiting_for
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.losses.breakdown import LossBreakdown
from bagel_ds.model.losses.normalization import LossOptions
from bagel_ds.model.mot import MoTLayer
from bagel_ds.model.shape.parameters import adapted_layers
from bagel_ds.train.build import DTYPES, build_engine, image_encoder, load
from bagel_ds.train.evaluation import Evaluation
from bagel_ds.train.memory_plan import outcome
from bagel_ds.train.metrics.log import MetricsLog
from bagel_ds.train.metrics.meter import StepMeter
from bagel_ds.train.metrics.profile import StepProfile, phase_of_step
from bagel_ds.train.metrics.wandb import WandbOptions
from bagel_ds.train.nonfinite import NonFiniteGuard
from bagel_ds.train.plan_log import log_packs, log_plan
from bagel_ds.train.prepare import prepare
from bagel_ds.train.process.out_of_memory import memory_fault
from bagel_ds.train.process.stall import StallWatch
from bagel_ds.train.process.stop import StopRequest
from bagel_ds.train.ranks import alarm
from bagel_ds.train.ranks.agreement import barrier, check_equal, is_main, local_rank, on_one_host, together
from bagel_ds.train.ranks.failure import ending_alone
from bagel_ds.train.sampling import Sampling
from bagel_ds.train.saves.changes import keep_config, versions
from bagel_ds.train.saves.overlap import OverlappedSaves
from bagel_ds.train.saves.save import SaveOptions
from bagel_ds.train.schedule import learning_rate
from bagel_ds.train.step import StepResult, accumulate, update
from bagel_ds.zero.swap_folders import leave_folders

logger = logging.getLogger("bagel_ds")


class Step(NamedTuple):
    """A finished step, as `_after_step` gets it."""

    number: int  # from 0
    window: Sequence[MicroBatch]
    result: StepResult
    ends_run: bool  # the last step, or a stop was requested


@dataclass
class Progress:
    """How far the run is."""

    steps_done: int = 0
    skipped_before: int = 0  # updates that were not finite, before this process resumed
    plan_state: dict[str, Any] | None = None  # place in the data

    @property
    def updates_before(self) -> int:
        return self.steps_done - self.skipped_before


class Trainer:
    """Make it once the process group exists, under its watch; `run` trains to `total_steps`."""

    def __init__(self, config: RunConfig, watch: StallWatch):
        self.config, self.args, self.watch = config, config.training, watch
        with watch.phase(0, "setup"):
            self.prepared = prepare(config)
        watch.share(Path(self.args.checkpoint_dir))  # this run has claimed it
        if is_main():
            log_plan(config, self.prepared)
            keep_config(Path(self.args.results_dir), config.to_yaml())
        self.progress = self._read_progress()
        step = self.progress.steps_done
        # Before minutes of loading, because it shows what is wrong with the data.
        with watch.phase(step, "data"), waiting_for("the first packs", "data workers start and read"):
            self.batches = primed(self._micro_batches())
        with watch.phase(step, "engine"), waiting_for("the network to be built"):
            self.engine = build_engine(config, self.prepared)
        self.encode = image_encoder(config, self.prepared, self.engine.device)
        with watch.phase(step, "load"), waiting_for("weights and optimizer states", "minutes for a 7B with offload"):
            self._load()
        self.loss_options = LossOptions(self.args.ce_weight, self.args.mse_weight, self.args.ce_loss_reweighting)
        model, data = self.prepared.model, self.prepared.data
        self.breakdown = LossBreakdown(data.datasets, model.timestep_shift, self.loss_options)
        self.meter = StepMeter(model, self.args.peak_device_tflops, data.unusable_rows, self.breakdown)
        self.evaluation = Evaluation(config, self.prepared, self.engine, self.encode)
        self.sampling = Sampling(config, self.prepared, self.engine, self.ema)
        self.guard = NonFiniteGuard(Path(self.args.results_dir), dist.get_rank(), self.args.max_nonfinite)

    def run(self) -> None:
        with ExitStack() as stack:
            enter = stack.enter_context
            watch = enter(closing(self.watch))
            enter(closing(self.engine))
            metrics = enter(closing(self._open_metrics()))
            batches = enter(closing(self.batches))
            enter(closing(self._index_the_rest()))
            saves = enter(closing(self._start_saving()))
            # The innermost context: those above wait for other ranks when they close.
            enter(ending_alone(self._memory_fault))
            self._before_first_step()
            stop = self._listen_for_stops()
            after_step = self._after_step(metrics, stop, saves)
            if self.args.profile and is_main():
                layers = [module for module in self.engine.module.modules() if isinstance(module, MoTLayer)]
                profile = StepProfile(Path(self.args.results_dir) / "profile", self.args.profile, layers)
                after_step.append(enter(closing(profile)).step)
            for number in range(self.progress.steps_done, self.args.total_steps):
                with watch.phase(number, "data"), self.meter.waiting_for_data(), phase_of_step("data"):
                    window = list(islice(batches, self.args.gradient_accumulation_steps))
                with watch.phase(number, "step"):
                    step = self._step(number, window, saves, stop)
                for follow_up in after_step:
                    follow_up(step)
                if step.ends_run:
                    break
            self._log_peaks()
        self._leave()

    # ------------------------------------------------------------------------------------------------------ the step
    def _step(self, number: int, window: list[MicroBatch], saves: OverlappedSaves, stop: StopRequest) -> Step:
        packs = _packs(window)
        if self.args.lora_dropout:  # the only random numbers of a step; a resumed run draws the same
            torch.manual_seed(hash((self.args.global_seed, number, dist.get_rank())))
        try:
            losses = accumulate(self.engine, self.encode, packs, self.loss_options, self.breakdown)
            saves.finish()  # before the update changes what is being saved
            result = update(self.engine, losses, self._learning_rate(number), stop.wanted)
        except Exception as error:
            fault = self._memory_fault(error, packs)
            if fault is None:
                raise
            raise fault from None
        self.progress.steps_done, self.progress.plan_state = number + 1, window[-1].state
        return Step(number, window, result, self._is_complete() or result.stop)

    def _learning_rate(self, step: int) -> float:
        args = self.args
        return learning_rate(
            step,
            lr=args.lr,
            min_lr=args.min_lr,
            warmup_steps=args.warmup_steps,
            total_steps=args.total_steps,
            schedule=args.lr_scheduler,
        )

    def _memory_fault(self, error: BaseException, window: Sequence[PackedBatch] = ()) -> UserError | None:
        return memory_fault(error, self.config.data.max_num_tokens, self.prepared.memory, window)

    # ------------------------------------------------------------------------------------------------ after each step
    def _after_step(
        self, metrics: MetricsLog, stop: StopRequest, saves: OverlappedSaves
    ) -> list[Callable[[Step], None]]:
        """Called in this order after each step, on every rank."""

        def check(step: Step) -> None:
            self.guard.check(step.number, _packs(step.window), step.result)

        def log(step: Step) -> None:
            self.meter.add(step.window, step.result)
            evaluates = self.evaluation.is_due(self.progress.steps_done, self._is_complete())
            if step.number % self.args.log_every == 0 or step.ends_run or evaluates:
                values = self.meter.read(self._learning_rate(step.number), step.result)
                if evaluates:
                    with self.watch.phase(step.number, "evaluate"):
                        values |= self.evaluation.run()
                    self.meter.restart()
                metrics.log(step.number, values)
            metrics.advance()

        def sample(step: Step) -> None:
            # No save is under way here: the step finished the last one, and `save` comes after this.
            if self.sampling.is_due(self.progress.steps_done, self._is_complete()):
                with self.watch.phase(step.number, "sample"):
                    metrics.show(step.number, self.sampling.run(self.progress.steps_done))
                self.meter.restart()

        def save(step: Step) -> None:
            if step.result.stop:
                stop.remove_files()
            if step.ends_run or self.progress.steps_done % self.args.save_every == 0:
                with self.watch.phase(step.number, "save"):
                    self._save(saves, now=step.ends_run)

        return [check, log, sample, save]

    def _save(self, saves: OverlappedSaves, now: bool) -> None:
        """Begin a checkpoint, which the next step finishes before its update; with `now` finish it here."""
        progress = self.progress
        assert progress.plan_state is not None
        check_equal({"the plan of the data (its files, as indexed on each host)": progress.plan_state["samples"]})
        trainer = {
            "format": 1,
            "steps_done": progress.steps_done,
            "skipped_updates": progress.skipped_before + self.guard.skipped,
            "plan_state": progress.plan_state,
            "world_size": dist.get_world_size(),
            "arguments": self.config.values(),
            "versions": versions(),
            "data": self.prepared.described_data,
        }
        save = saves.save_now if now else saves.begin
        save(progress.steps_done, trainer, self._is_complete())

    def _is_complete(self) -> bool:
        return self.progress.steps_done == self.args.total_steps

    # ------------------------------------------------------------------------------------------------- start and end
    def _read_progress(self) -> Progress:
        """Step 0, or the place of the training state that the run resumes from."""
        if not self.prepared.start.full:
            return Progress()
        saved = together(lambda: read_trainer(self.prepared.start.folder))
        done, ranks = saved["steps_done"], saved["world_size"]
        logger.info("resumed after step %d (saved on %d ranks, now %d)", done, ranks, dist.get_world_size())
        return Progress(done, saved.get("skipped_updates", 0), saved["plan_state"])

    def _load(self) -> None:
        self.ema = load(self.engine, self.config, self.prepared, self.progress.updates_before)

    def _micro_batches(self) -> Generator[MicroBatch, None, None]:
        return together(
            lambda: self.prepared.data.micro_batches(
                dist.get_rank(),
                dist.get_world_size(),
                self.config.data.num_workers,
                self.config.data.prefetch_factor,
                pin_memory=uses_cuda(),
                start=self.progress.plan_state,
            )
        )

    def _index_the_rest(self) -> BackgroundIndex:
        """Index what this run will need later, in one process per host."""
        data = self.prepared.data
        files = data.files_ahead(self.progress.plan_state) if local_rank() == 0 else []
        return index_in_background(files, data.tokenizer, self.config.data.index_cache)

    def _open_metrics(self) -> MetricsLog:
        args, first_step = self.args, self.progress.steps_done

        def open_log() -> MetricsLog:
            if not is_main():
                return MetricsLog(None, first_step)
            wandb = WandbOptions.of(self.config) if wandb_wanted(self.config) else None
            with waiting_for("Weights & Biases to answer" if wandb else "TensorBoard"):
                return MetricsLog(args.results_dir, first_step, wandb, total_steps=args.total_steps)

        return together(open_log)

    def _start_saving(self) -> OverlappedSaves:
        options = SaveOptions(
            Path(self.args.checkpoint_dir),
            self.prepared.model_folder,
            DTYPES[self.config.exported_dtype],
            self.args.del_previous_state,
            self.args.keep_last,
            gathering=None if on_one_host() else Gathering(self.engine.device),
            adapter=self._adapter(),
        )
        return OverlappedSaves(options, self.engine, self.ema, self.watch, self.args.save_every)

    def _adapter(self) -> AdapterRecord | None:
        model, fingerprint = self.prepared.model, self.prepared.weights.base
        if model.lora is None or fingerprint is None:
            return None
        return AdapterRecord(model.lora, adapted_layers(model), self.config.model.model_path, fingerprint)

    def _listen_for_stops(self) -> StopRequest:
        folders = [Path(self.args.results_dir), Path(self.args.checkpoint_dir)]
        limit = None if self.args.stop_after is None else duration_seconds(self.args.stop_after)
        return StopRequest(folders, limit, watches_file=is_main())

    def _before_first_step(self) -> None:
        if not is_main():
            return
        if self.args.debug_batches:
            log_packs(self.config, self.prepared, self.progress.plan_state)
        if self._is_complete():
            last = self.prepared.start.folder
            logger.info("nothing is left to train: %s is the last of --total_steps %d", last, self.args.total_steps)
            # A longer run that was stopped at this step has no `step_final` yet.
            if last.resolve().parent == Path(self.args.checkpoint_dir).resolve():
                mark_final(last.resolve())

    def _log_peaks(self) -> None:
        if self.meter.host_peak:
            logger.info(outcome(self.prepared.memory, self.meter.device_peak, self.meter.host_peak))

    def _leave(self) -> None:
        """Remove the swap files and, once no rank writes any more, release the checkpoint_dir."""
        leave_folders()
        barrier()
        alarm.close()  # from here on each rank may end
        if self.prepared.claim is not None:
            self.prepared.claim.release()
        logger.info("%s: %d steps", "done" if self._is_complete() else "stopped", self.progress.steps_done)


def _packs(window: Sequence[MicroBatch]) -> list[PackedBatch]:
    return [micro.batch for micro in window]
