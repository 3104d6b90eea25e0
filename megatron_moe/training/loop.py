"""The training loop: build, resume, step, evaluate, report, save."""

import math
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_moe.checkpoint.layout import find_checkpoint, is_hugging_face, latest_iteration
from megatron_moe.checkpoint.load import load_checkpoint
from megatron_moe.checkpoint.same_tokenizer import check_same_tokenizer
from megatron_moe.checkpoint.save import save_checkpoint
from megatron_moe.checkpoint.state import Progress
from megatron_moe.config.base import UserError
from megatron_moe.config.domain_placement import stream_part
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import save_run
from megatron_moe.data.datasets import (
    Datasets,
    build_data_iterator,
    build_datasets,
    build_eval_iterator,
    with_domain_names,
)
from megatron_moe.data.domain_stream import DomainStream
from megatron_moe.data.sample_stream import change_of_data
from megatron_moe.data.tokenizer.load import Tokenizer, load_tokenizer, with_vocab_size
from megatron_moe.model.flops import training_flops_per_token
from megatron_moe.model.gpt import build_model
from megatron_moe.moe.layout import expert_layout
from megatron_moe.moe.load import mean_shares
from megatron_moe.moe.metrics import collect_aux_losses, collect_loads, discard_metrics
from megatron_moe.moe.steps import StepClock
from megatron_moe.runtime.distributed import World
from megatron_moe.runtime.launch import another_rank_failed
from megatron_moe.runtime.seeds import set_seeds
from megatron_moe.runtime.signals import StopSignals
from megatron_moe.training.batches import BatchSchedule, total_steps
from megatron_moe.training.expert_groups import learning_rates
from megatron_moe.training.expert_lr import describe_factors, expert_factors
from megatron_moe.training.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from megatron_moe.training.reporting import Reporter
from megatron_moe.training.step import Batch, StepResult, evaluate, train_step


@dataclass
class Trainer:
    """Everything a run needs, built once. Fields are in the order in which they are built."""

    run: RunConfig
    world: World
    tokenizer: Tokenizer
    schedule: BatchSchedule
    steps: int
    model: list[Any]
    optimizer: Any
    scheduler: Any
    progress: Progress
    datasets: Datasets
    clock: StepClock

    @classmethod
    def build(cls, run: RunConfig, world: World) -> "Trainer":
        """Build model, optimizer and data, and resume if there is something to resume from.

        Raises:
            UserError: a flag, a file or a checkpoint is wrong.
        """
        tokenizer = load_tokenizer(run.data, run.model.vocab_size)
        run = with_vocab_size(run, tokenizer)
        schedule = BatchSchedule.from_run(run, run.parallel.data_parallel_size(world.size))
        steps = total_steps(run, schedule)
        resume = _resume_from(run)
        _check_save_folder(run, resume)
        if resume:
            _check_tokenizer(run, tokenizer)
        # Data before the model: a wrong path is found in a second, not after the weights are drawn.
        datasets = build_datasets(run, tokenizer, train=True, valid=run.training.eval_interval > 0)
        run = with_domain_names(run, _present(datasets.train))
        set_seeds(run.training.seed)
        model = wrap_data_parallel(run, build_model(run, initialize=not resume))
        optimizer = build_optimizer(run, model)
        scheduler = build_scheduler(run, optimizer, schedule, steps)
        progress = load_checkpoint(run, model, optimizer, scheduler) if resume else Progress()
        _keep_data(progress, _present(datasets.train).identity)
        return cls(
            run, world, tokenizer, schedule, steps, model, optimizer, scheduler, progress, datasets, StepClock(model)
        )

    def train(self, reporter: Reporter | None = None) -> signal.Signals | None:
        """Run to the last step, or until the time given is over, or until SIGTERM or SIGINT; save at the end.

        Args:
            reporter: who is told of every step. Default: one that writes the run's files on rank 0.

        Returns:
            The signal that stopped it.

        Raises:
            UserError: the numbers are no longer finite, or a checkpoint cannot be written.
        """
        started = time.monotonic()
        batches = self._training_batches()
        if reporter is None:
            reporter = Reporter(
                self.run, first_step=self.progress.step, total_steps=self.steps, active=self.world.is_main
            )
        if self.world.is_main and self.run.checkpoint.save is not None:
            save_run(self.run, Path(self.run.checkpoint.save) / "config.yaml")
        with reporter, StopSignals(another_rank_failed) as signals:
            self._announce(reporter)
            while self.progress.step < self.steps:
                self._step(batches, reporter)
                step = self.progress.step
                last = step == self.steps
                if self.run.training.eval_interval and (step % self.run.training.eval_interval == 0 or last):
                    self._evaluate(reporter)
                received, out_of_time = self._agree_to_stop(signals.received, started)
                stop = received is not None or out_of_time
                self._maybe_save(reporter, force=last or stop)
                if stop and not last:
                    self._say_stopped(reporter, received)
                    return received
        return None

    def _step(self, batches: list[Iterator[Batch]], reporter: Reporter) -> None:
        progress, began = self.progress, time.monotonic()
        count = self.schedule.micro_batches(progress.consumed_samples)
        samples = self.schedule.batch_size(progress.consumed_samples)
        self.clock.begin(progress.step)
        result = train_step(self.run, self.model, self.optimizer, batches, count)
        self.clock.finish(skipped=result.skipped)
        progress.step += 1
        progress.consumed_samples += samples
        progress.skipped_steps += result.skipped
        rates = learning_rates(self.run, self.optimizer)
        if not result.skipped:
            self.scheduler.step(increment=samples)
        reporter.advance()
        self._report(reporter, result, rates, samples, count, time.monotonic() - began)
        self._stop_if_lost(result, samples)

    def _stop_if_lost(self, result: StepResult, samples: int) -> None:
        """End a run that no longer learns; nothing is saved, and the weights are those of the last good step."""
        progress, training = self.progress, self.run.training
        first, last = progress.consumed_samples - samples, progress.consumed_samples - 1
        if result.nonfinite is None:
            progress.nonfinite_in_a_row = 0
            fixed = training.loss_scale is not None
            if result.skipped and not fixed and self.optimizer.get_loss_scale() <= training.min_loss_scale:
                raise UserError(
                    f"gradients overflow at step {progress.step} (samples {first} to {last}) although the loss scale "
                    "has fallen to --min-loss-scale"
                )
            return
        if not progress.nonfinite_in_a_row:
            progress.nonfinite_since_sample = first
        progress.nonfinite_in_a_row += 1
        if (count := progress.nonfinite_in_a_row) >= training.max_nonfinite_steps:
            since = f", {count} such steps in a row (--max-nonfinite-steps {training.max_nonfinite_steps})"
            raise UserError(
                f"{result.nonfinite} at step {progress.step}{since if count > 1 else ''}; samples "
                f"{progress.nonfinite_since_sample} to {last}; no weight was changed since step "
                f"{progress.step - count}: lower --lr, or look at the data"
            )

    def _report(
        self,
        reporter: Reporter,
        result: StepResult,
        rates: dict[str, float],
        samples: int,
        micro_batches: int,
        seconds: float,
    ) -> None:
        due = self.progress.step % self.run.logging.log_interval == 0 or self.progress.step in (1, self.steps)
        # A step that was skipped for NaN is never passed over in silence.
        if not due and result.nonfinite is None:
            # Counters are emptied every step, so that a line stands for one step.
            discard_metrics(self.model)
            return
        layout = expert_layout(self.run)
        loads, aux = [], {}
        if layout.num_moe_layers:
            loads = collect_loads(self.model, layout.experts_per_layer)
            aux = collect_aux_losses(self.run.model.num_layers, layout.num_moe_layers, micro_batches)
        tokens = samples * self.run.model.seq_length
        metrics: dict[str, Any] = {
            "step": self.progress.step,
            "consumed_tokens": self.progress.consumed_samples * self.run.model.seq_length,
            "consumed_samples": self.progress.consumed_samples,
            "lm_loss": result.loss,
            "grad_norm": result.grad_norm,
            **rates,
            "loss_scale": float(self.optimizer.get_loss_scale()),
            "skipped": int(result.skipped),
            "skipped_steps": self.progress.skipped_steps,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "tflops_per_device": tokens * training_flops_per_token(self.run) / seconds / self.world.size / 1e12,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        for name, value in aux.items():
            metrics[f"moe_{name}" if name in ("z_loss", "margin_loss") else "moe_aux_loss"] = value
        metrics |= mean_shares(loads)
        reporter.step(metrics, loads)

    def _gather_parameters(self) -> None:
        """Bring every rank's weights up to date: with --overlap-param-gather the next forward pass would do it."""
        if self.run.parallel.overlap_param_gather:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)

    def _evaluate(self, reporter: Reporter) -> None:
        self._gather_parameters()
        batches = self._iterators(
            lambda: build_eval_iterator(_present(self.datasets.valid), **self._iterator_options())
        )
        count = self.schedule.global_batch_size // (self.schedule.micro_batch_size * self.schedule.data_parallel_size)
        loss = evaluate(self.run, self.model, batches, self.run.training.eval_iters, count)
        reporter.evaluation(self.progress.step, loss, math.exp(min(loss, 700.0)))

    def _maybe_save(self, reporter: Reporter, *, force: bool) -> None:
        flags = self.run.checkpoint
        if flags.save is None:
            return
        due = flags.save_interval is not None and self.progress.step % flags.save_interval == 0
        if due or force:
            self._gather_parameters()
            folder = save_checkpoint(
                self.run, self.model, self.optimizer, self.scheduler, self.progress, self.tokenizer
            )
            reporter.say(f"saved {folder}")

    def _agree_to_stop(self, received: signal.Signals | None, started: float) -> tuple[signal.Signals | None, bool]:
        """The signal that any rank has received, and whether the time is over: all must stop at the same step."""
        limit = self.run.training.exit_duration_in_mins
        # Rank 0's clock counts: clocks differ.
        over = self.world.is_main and limit is not None and time.monotonic() - started > limit * 60.0
        reasons = torch.tensor([received or 0, over], dtype=torch.int32, device=torch.cuda.current_device())
        dist.all_reduce(reasons, op=dist.ReduceOp.MAX)
        number, out_of_time = reasons.tolist()
        return signal.Signals(number) if number else None, bool(out_of_time)

    def _say_stopped(self, reporter: Reporter, received: signal.Signals | None) -> None:
        why = received.name if received is not None else "--exit-duration-in-mins is over"
        then = "--load goes on from here" if self.run.checkpoint.save else "nothing is saved without --save"
        reporter.say(f"stopped at step {self.progress.step}: {why}; {then}")

    def _training_batches(self) -> list[Iterator[Batch]]:
        return self._iterators(
            lambda: build_data_iterator(
                _present(self.datasets.train),
                consumed_samples=self.progress.consumed_samples,
                **self._iterator_options(),
            )
        )

    def _iterator_options(self) -> dict[str, Any]:
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        part = stream_part(self.run, replica, replicas)
        return {
            "micro_batch_size": self.run.training.micro_batch_size,
            "dp_rank": part.index,
            "dp_size": part.count,
            "turns": part.turns,
            "num_workers": self.run.data.num_workers,
            "pin_memory": self.world.device.type == "cuda",
        }

    def _iterators(self, build: Any) -> list[Iterator[Batch]]:
        # With virtual stages every chunk reads the same samples through an iterator of its own.
        return [build() for _ in self.model]

    def _announce(self, reporter: Reporter) -> None:
        parallel, progress = self.run.parallel, self.progress
        reporter.say(
            f"{self.world.size} x {self.world.device.type} | tensor {parallel.tensor_model_parallel_size}, pipeline "
            f"{parallel.pipeline_model_parallel_size}, expert {parallel.expert_model_parallel_size}, context "
            f"{parallel.context_parallel_size}, data {self.schedule.data_parallel_size} | "
            f"{expert_layout(self.run).describe()} | {self.run.training.precision}"
        )
        if expert_layout(self.run).has_copies(parallel.expert_model_parallel_size):
            spread = expert_layout(self.run).describe_spread(parallel.expert_model_parallel_size)
            reporter.say(f"on each rank of layer {spread}")
        if isinstance(self.datasets.train, DomainStream):
            reporter.say(self.datasets.train.describe())
        if any(factor != 1.0 for factor in expert_factors(self.run)):
            reporter.say(describe_factors(self.run))
        if progress.step:
            reporter.say(f"resumed at step {progress.step}, after {progress.consumed_samples} samples")
        if progress.step >= self.steps:
            reporter.say(f"nothing to do: --train-iters or --train-tokens end the run at step {self.steps}")


def peak_memory_bytes() -> int:
    """Most memory this process has used so far: of the GPU, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _keep_data(progress: Progress, identity: dict[str, Any]) -> None:
    """Remember which data the position in it belongs to, and say so when it is another than before."""
    change = change_of_data(progress.data, identity) if progress.data else None
    if change is not None and dist.get_rank() == 0:
        print(
            f"other data than before: {change}; the run goes on at sample {progress.consumed_samples} of the new "
            "order, text of the run before may come again"
        )
    progress.data = identity


def _resume_from(run: RunConfig) -> bool:
    """Whether there is something to load. --load naming the run's own, still empty folder starts afresh."""
    folder = run.checkpoint.load
    return folder is not None and not (_loads_its_own(run) and latest_iteration(folder) is None)


def _check_tokenizer(run: RunConfig, tokenizer: Tokenizer) -> None:
    """Compare the tokenizer with that of what is loaded."""
    folder = run.checkpoint.load or ""
    if is_hugging_face(folder):
        from megatron_moe.checkpoint.hf.loading import check_tokenizer

        check_tokenizer(run.data, tokenizer, Path(folder))
    else:
        check_same_tokenizer(run.data, tokenizer, find_checkpoint(folder))


def _loads_its_own(run: RunConfig) -> bool:
    """Whether --load and --save are the same folder."""
    load, save = run.checkpoint.load, run.checkpoint.save
    return load is not None and save is not None and Path(load).resolve() == Path(save).resolve()


def _check_save_folder(run: RunConfig, resume: bool) -> None:
    """A run that starts afresh must not mix its files with those of another.

    Raises:
        UserError: --save holds checkpoints that this run does not go on from.
    """
    flags = run.checkpoint
    if flags.save is None or (found := latest_iteration(flags.save)) is None:
        return
    if not (resume and _loads_its_own(run) and not flags.finetune):
        raise UserError(
            f"--save {flags.save}: holds a run that has reached step {found}; go on from it with --load {flags.save}, "
            "or give another folder"
        )


def _present(dataset: Any) -> Any:
    assert dataset is not None
    return dataset
