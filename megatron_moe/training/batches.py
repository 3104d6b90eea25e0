"""How large the global batch is at which point of a run, and how far a run goes."""

import math
from dataclasses import dataclass

from megatron_moe.config.base import ConfigError
from megatron_moe.config.run import RunConfig


@dataclass(frozen=True)
class BatchSchedule:
    """Global batch size as a function of the samples consumed so far (Megatron-LM's --rampup-batch-size)."""

    micro_batch_size: int
    data_parallel_size: int
    global_batch_size: int
    start: int
    increment: int
    ramp_samples: int

    @classmethod
    def from_run(cls, run: RunConfig, data_parallel_size: int) -> "BatchSchedule":
        """The schedule of a run.

        Raises:
            ConfigError: a batch size is not a multiple of micro batch x data-parallel size.
        """
        training = run.training
        training.micro_batches(data_parallel_size)
        target = training.batch_size(data_parallel_size)
        start, increment, samples = training.rampup_batch_size or (target, 1, 0)
        schedule = cls(training.micro_batch_size, data_parallel_size, target, start, increment, samples)
        schedule._check()
        return schedule

    def _check(self) -> None:
        per_pass = self.micro_batch_size * self.data_parallel_size
        ramp = f"--rampup-batch-size {self.start} {self.increment} {self.ramp_samples}"
        if self.start > self.global_batch_size or (self.start < self.global_batch_size and self.increment < 1):
            raise ConfigError(f"{ramp}: must rise to --global-batch-size {self.global_batch_size}")
        if (self.global_batch_size - self.start) % self.increment:
            raise ConfigError(
                f"{ramp}: --global-batch-size {self.global_batch_size} must be reached in steps of {self.increment}"
            )
        for name, size in (("START", self.start), ("INCREMENT", self.increment)):
            if self.start != self.global_batch_size and size % per_pass:
                raise ConfigError(f"{ramp}: {name} must be a multiple of micro batch x data-parallel size = {per_pass}")

    def batch_size(self, consumed_samples: int) -> int:
        """Samples of the step that begins after `consumed_samples`."""
        if self.start == self.global_batch_size or consumed_samples >= self.ramp_samples:
            return self.global_batch_size
        steps = (self.global_batch_size - self.start) // self.increment
        reached = consumed_samples * steps // self.ramp_samples
        return min(self.start + reached * self.increment, self.global_batch_size)

    def micro_batches(self, consumed_samples: int) -> int:
        """Micro-batches of that step on every data-parallel rank."""
        return self.batch_size(consumed_samples) // (self.micro_batch_size * self.data_parallel_size)

    def samples_after(self, steps: int) -> int:
        """Samples that `steps` steps consume from the start of a run."""
        consumed = 0
        for step in range(steps):
            if consumed >= self.ramp_samples:
                return consumed + (steps - step) * self.global_batch_size
            consumed += self.batch_size(consumed)
        return consumed


def total_steps(run: RunConfig, schedule: BatchSchedule) -> int:
    """Steps of the whole run by --train-iters or --train-tokens, whichever ends first.

    Raises:
        ConfigError: neither is given.
    """
    limits = []
    if run.training.train_iters is not None:
        limits.append(run.training.train_iters)
    if run.training.train_tokens is not None:
        samples = math.ceil(run.training.train_tokens / run.model.seq_length)
        steps = consumed = 0
        while consumed < min(samples, schedule.ramp_samples):
            consumed += schedule.batch_size(consumed)
            steps += 1
        limits.append(steps + max(0, math.ceil((samples - consumed) / schedule.global_batch_size)))
    if not limits:
        raise ConfigError("--train-iters: give it, or --train-tokens")
    return min(limits)
