"""The training run, top to bottom.

Guarantees: exactly `total_steps` optimizer steps, counted across resumes; every logged number is a mean over all ranks;
the last step is always saved. What the steps are made of is in step.py, what they read in data/, what they leave behind
in checkpoints.py and metrics.py.
"""

from __future__ import annotations

import logging
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Generator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bagel_ds.arguments.parse import duration_seconds
from bagel_ds.arguments.run_config import RunConfig, wandb_wanted
from bagel_ds.checkpoint.step_folders import mark_final, read_trainer
from bagel_ds.data.batches.loader import MicroBatch, primed
from bagel_ds.data.index.background import BackgroundIndex, index_in_background
from bagel_ds.data.inspect.packs import first_packs, pack_text
from bagel_ds.errors import UserError
from bagel_ds.machine.device import uses_cuda
from bagel_ds.machine.waiting import waiting_for
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.losses.by_part import LossParts
from bagel_ds.model.losses.normalization import LossOptions
from bagel_ds.model.recompute import recompute_mode
from bagel_ds.model.shape.activations import arena_bytes
from bagel_ds.model.shape.parts import part_of
from bagel_ds.model.vae import encode_images
from bagel_ds.model_folder.finite import CheckedWeights
from bagel_ds.train.memory_plan import outcome, plan_lines
from bagel_ds.train.metrics.log import MetricsLog, SilentMetricsLog, WandbOptions
from bagel_ds.train.metrics.meter import StepMeter
from bagel_ds.train.nonfinite import NonFiniteGuard
from bagel_ds.train.prepare import describe_parameters, prepare, trainable
from bagel_ds.train.process.out_of_memory import memory_fault
from bagel_ds.train.process.stall import StallWatch
from bagel_ds.train.process.stop import StopRequest
from bagel_ds.train.ranks import alarm
from bagel_ds.train.ranks.agreement import barrier, check_equal, is_main, local_rank, on_one_host, together
from bagel_ds.train.ranks.failure import ending_alone
from bagel_ds.train.saves.changes import keep_config, versions
from bagel_ds.train.saves.overlap import Saving
from bagel_ds.train.saves.writer import CheckpointWriter, restore_moments
from bagel_ds.train.schedule import learning_rate
from bagel_ds.train.step import StepResult, optimizer_step
from bagel_ds.zero.config.nvme import average_folder
from bagel_ds.zero.ema import EMAOptions, ShardedEMA
from bagel_ds.zero.engine import AdamOptions, ZeroEngine
from bagel_ds.zero.swap_folders import leave_folders

logger = logging.getLogger("bagel_ds")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Trainer:
    """Build with the process group initialised, under its watch; `run` trains to `total_steps` and returns."""

    def __init__(self, config: RunConfig, watch: StallWatch):
        self.config, self.args, self.watch = config, config.training, watch
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        with watch.phase(0, "setup"):
            self.prepared = prepare(config)
        watch.share(Path(self.args.checkpoint_dir))  # which is this run's by now
        self._say_plan([*config.notes, *self.prepared.notes])
        self.steps_done: int = 0
        self.skipped_before: int = 0  # updates that were not finite, before this process resumed
        self.plan_state: dict[str, Any] | None = None
        self._take_place()
        # Before minutes of loading: what is wrong with the data shows here.
        with watch.phase(self.steps_done, "data"), waiting_for("the first packs", "data workers start and read"):
            self.batches = primed(self._micro_batches())
        with watch.phase(self.steps_done, "engine"), waiting_for("the network to be built"):
            self.engine = self._build_engine()
        self.vae = self.prepared.vae.to(self.engine.device)
        self.loss_options = LossOptions(self.args.ce_weight, self.args.mse_weight, self.args.ce_loss_reweighting)
        shift = self.prepared.model.timestep_shift
        self.loss_parts = LossParts(self.prepared.data.datasets, shift, self.loss_options)
        usual = "minutes for a 7B with offload"
        with watch.phase(self.steps_done, "load"), waiting_for("weights and optimizer states", usual):
            self._load()
        self.guard = NonFiniteGuard(Path(self.args.results_dir), self.rank, self.args.max_nonfinite)

    def run(self) -> None:
        with (
            closing(self.watch) as watch,
            closing(self.engine),
            closing(self._open_metrics()) as metrics,
            closing(self.batches) as batches,
            closing(self._index_the_rest()),
            closing(self._start_saving(metrics, watch)) as saving,
            ending_alone(self._memory_fault),  # the innermost: what is above waits for other ranks when it closes
        ):
            self._show_packs()
            if self._is_last():
                self._say_that_nothing_is_left()
            data, peak = self.prepared.data, self.args.peak_device_tflops
            meter = StepMeter(self.prepared.model, peak, data.unusable_rows, self.loss_parts)
            stop = self._listen_for_stops()
            for step in range(self.steps_done, self.args.total_steps):
                with watch.phase(step, "data"):
                    window = list(islice(batches, self.args.gradient_accumulation_steps))
                with watch.phase(step, "step"):
                    result = self._step(step, window, stop, saving.finish)
                self.guard.check(step, [micro.batch for micro in window], result)
                meter.add(window, result)
                if step % self.args.log_every == 0 or self._is_last() or result.stop:
                    metrics.log(step, meter.read(self._learning_rate(step), result))
                metrics.advance()
                if result.stop:
                    stop.remove_files()
                if self.steps_done % self.args.save_every == 0 or self._is_last() or result.stop:
                    with watch.phase(step, "save"):
                        self._save(saving, must=self._is_last() or result.stop)
                if result.stop:
                    break
            if meter.host_peak:
                metrics.note(outcome(self.prepared.memory, meter.device_peak, meter.host_peak))
        self._tidy()
        logger.info("%s: %d steps", "done" if self._is_last() else "stopped", self.steps_done)

    # ------------------------------------------------------------------------------------------------- the verbs
    def _step(
        self, step: int, window: list[MicroBatch], stop: StopRequest, before_update: Callable[[], None]
    ) -> StepResult:
        batches = [micro.batch for micro in window]
        try:
            result = optimizer_step(
                self.engine,
                self._encode,
                batches,
                self._learning_rate(step),
                self.loss_options,
                lambda: stop.wanted() is not None,
                before_update,
                self.loss_parts,
            )
        except Exception as error:
            fault = self._memory_fault(error, batches)
            if fault is None:
                raise
            raise fault from None
        self.steps_done, self.plan_state = step + 1, window[-1].state
        return result

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

    def _encode(self, batch: PackedBatch) -> Tensor:
        """The pack's images as clean latent tokens; the autoencoder runs in the run's precision."""
        bf16 = self.args.precision == "bf16"
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
            patch = self.prepared.model.latent_patch_size
            return encode_images(self.vae, batch.images, batch.latent_shapes, batch.posterior_eps, patch)

    def _memory_fault(self, error: BaseException, window: Sequence[PackedBatch] = ()) -> UserError | None:
        return memory_fault(error, self.config.data.max_num_tokens, self.prepared.memory, window)

    def _is_last(self) -> bool:
        return self.steps_done == self.args.total_steps

    def _save(self, saving: Saving, must: bool) -> None:
        """Begin a checkpoint, which the next step finishes before its update; with `must` finish it here."""
        assert self.plan_state is not None
        check_equal({"the plan of the data (its files, as indexed on each host)": self.plan_state["samples"]})
        saving.save(self.steps_done, self._trainer_state(), self._is_last(), must)

    def _say_that_nothing_is_left(self) -> None:
        """The run was complete when it started; as a longer one that was stopped here it has no `step_final` yet."""
        last = self.prepared.start.folder
        logger.info("nothing is left to train: %s is the last of --total_steps %d", last, self.args.total_steps)
        if is_main() and last.resolve().parent == Path(self.args.checkpoint_dir).resolve():
            mark_final(last.resolve())

    def _tidy(self) -> None:
        """Remove the swap files and then, once no rank writes any more, leave the checkpoint_dir to others."""
        leave_folders()
        barrier()
        alarm.close()  # from here on ranks end when they are ready
        if self.prepared.claim is not None:
            self.prepared.claim.release()

    def _trainer_state(self) -> dict[str, Any]:
        return {
            "format": 1,
            "steps_done": self.steps_done,
            "skipped_updates": self.skipped_before + self.guard.skipped,
            "plan_state": self.plan_state,
            "world_size": self.world_size,
            "arguments": self.config.values(),
            "versions": versions(),
            "data": self.prepared.described_data,
        }

    # ------------------------------------------------------------------------------------------------- the set-up
    def _build_engine(self) -> ZeroEngine:
        model = self.prepared.model
        trains = trainable(self.config, model)
        # No pack has more tokens, so this is what the layer inputs take at most ("offload").
        arena = arena_bytes(model, self.config.data.max_num_tokens, DTYPES[self.args.precision].itemsize)
        recompute = recompute_mode(self.args.activation_checkpointing, arena)
        return ZeroEngine(
            lambda: Bagel(model, recompute), lambda name: part_of(name) in trains, self.prepared.ds_config
        )

    def _take_place(self) -> None:
        """Where this run stands: at its beginning, or where the training state it goes on from was saved."""
        if self.prepared.start.full:
            saved = together(lambda: read_trainer(self.prepared.start.folder))
            self.steps_done, self.plan_state = saved["steps_done"], saved["plan_state"]
            self.skipped_before = saved.get("skipped_updates", 0)
            ranks = saved["world_size"]
            logger.info("resumed after step %d (saved on %d ranks, now %d)", self.steps_done, ranks, self.world_size)

    def _load(self) -> None:
        """Weights, average and moments, from wherever this run starts."""
        opened = self.prepared.weights
        for line in opened.description:
            logger.info(line)
        adam = AdamOptions((self.args.beta1, self.args.beta2), self.args.eps)
        weights = CheckedWeights(opened.weights, str(self.prepared.start.folder))
        self.engine.start(weights, adam, loaded=lambda: together(weights.check))
        self.ema = self._start_average()
        if opened.state is not None:
            restore_moments(self.engine, opened.state, self.steps_done - self.skipped_before)

    def _start_average(self) -> ShardedEMA | None:
        if self.args.ema == 0:
            return None
        options = EMAOptions(
            decay=self.args.ema,
            every=self.args.ema_every,
            dtype=DTYPES[self.args.ema_dtype],
            folder=average_folder(self.prepared.ds_config, self.rank),
            updates_done=self.steps_done - self.skipped_before,
        )
        averages = self.prepared.weights.averages
        if averages is None:
            return together(lambda: self.engine.start_ema(options, None))
        checked = CheckedWeights(averages, f"{self.prepared.start.folder} (moving average)")
        ema = together(lambda: self.engine.start_ema(options, checked))
        together(checked.check)
        return ema

    def _index_the_rest(self) -> BackgroundIndex:
        """Index what this run will need later, once per host, in a process beside it."""
        data = self.prepared.data
        files = data.files_ahead(self.plan_state) if local_rank() == 0 else []
        return index_in_background(files, data.tokenizer, self.config.data.index_cache)

    def _start_saving(self, metrics: MetricsLog | SilentMetricsLog, watch: StallWatch) -> Saving:
        writer = CheckpointWriter(
            Path(self.args.checkpoint_dir),
            self.prepared.model_folder,
            DTYPES[self.config.exported_dtype],
            self.args.del_previous_state,
            self.args.keep_last,
            one_host=on_one_host(),
        )
        return Saving(writer, self.engine, self.ema, watch, metrics.note, self.args.save_every)

    def _listen_for_stops(self) -> StopRequest:
        folders = [Path(self.args.results_dir), Path(self.args.checkpoint_dir)]
        limit = None if self.args.stop_after is None else duration_seconds(self.args.stop_after)
        return StopRequest(folders, limit, watches_file=is_main())

    def _micro_batches(self) -> Generator[MicroBatch, None, None]:
        return together(
            lambda: self.prepared.data.micro_batches(
                self.rank,
                self.world_size,
                self.config.data.num_workers,
                self.config.data.prefetch_factor,
                pin_memory=uses_cuda(),
                start=self.plan_state,
            )
        )

    def _show_packs(self) -> None:
        """The next `debug_batches` packs of all ranks as a person reads them, also in results_dir/debug_batches.txt."""
        if not (self.args.debug_batches and is_main()):
            return
        lines: list[str] = []
        for pack in first_packs(self.prepared.data, self.args.debug_batches, self.plan_state):
            lines += [*pack_text(pack, self.args.timestep_shift), ""]
        logger.info("the next %d packs:\n\n%s", self.args.debug_batches, "\n".join(lines))
        shown = Path(self.args.results_dir, "debug_batches.txt")
        shown.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")

    def _open_metrics(self) -> MetricsLog | SilentMetricsLog:
        def open_log() -> MetricsLog | SilentMetricsLog:
            if not is_main():
                return SilentMetricsLog()
            wandb = self._wandb_options() if wandb_wanted(self.config) else None
            with waiting_for("Weights & Biases to answer" if wandb else "TensorBoard"):
                return MetricsLog(self.args.results_dir, self.steps_done, wandb, total_steps=self.args.total_steps)

        return together(open_log)

    def _wandb_options(self) -> WandbOptions:
        args = self.args
        return WandbOptions(
            project=args.wandb_project,
            name=args.wandb_name,
            run_id=args.wandb_runid,
            resume=args.wandb_resume,
            offline=args.wandb_offline,
            config=self.config.values(),
        )

    def _say_plan(self, notes: list[str]) -> None:
        """What this run is, before it starts; the effective arguments beside its results."""
        if not is_main():
            return
        for note in notes:
            logger.info(note)
        model, data = self.prepared.model, self.prepared.data
        parameters = describe_parameters(model, trainable(self.config, model))
        for line in [*parameters, *data.describe(), *plan_lines(self.prepared.memory)]:
            logger.info(line)
        packs = self.world_size * self.args.gradient_accumulation_steps
        logger.info(
            "%d rank(s), ZeRO stage %d, %s; %d packs of up to %s tokens per step",
            self.world_size,
            self.prepared.ds_config["zero_optimization"]["stage"],
            self.args.precision,
            packs,
            f"{self.config.data.max_num_tokens:,}",
        )
        keep_config(Path(self.args.results_dir), self.config.to_yaml())
