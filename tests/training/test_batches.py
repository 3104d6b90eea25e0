"""Batch ramp-up: properties that hold for every schedule, and the steps that a run takes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.base import ConfigError
from megatron_moe.training.batches import BatchSchedule, total_steps
from tests.helpers.tiny import tiny_run


@st.composite
def schedules(draw: st.DrawFn) -> BatchSchedule:
    micro, replicas = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    per_pass = micro * replicas
    start = draw(st.integers(1, 5)) * per_pass
    increment = draw(st.integers(1, 4)) * per_pass
    target = start + increment * draw(st.integers(0, 5))
    return BatchSchedule(micro, replicas, target, start, increment, draw(st.integers(0, 500)))


@given(schedules(), st.integers(0, 600))
def test_every_batch_can_be_shared_out(schedule: BatchSchedule, consumed: int) -> None:
    size = schedule.batch_size(consumed)
    per_pass = schedule.micro_batch_size * schedule.data_parallel_size
    assert size == schedule.micro_batches(consumed) * per_pass
    assert schedule.start <= size <= schedule.global_batch_size
    assert (size - schedule.start) % schedule.increment == 0


@given(schedules(), st.integers(0, 600), st.integers(0, 50))
def test_batches_only_grow(schedule: BatchSchedule, consumed: int, more: int) -> None:
    assert schedule.batch_size(consumed) <= schedule.batch_size(consumed + more)


@given(schedules())
def test_ramp_begins_at_its_start_and_ends_at_the_global_batch(schedule: BatchSchedule) -> None:
    if schedule.ramp_samples:
        assert schedule.batch_size(0) == schedule.start
    assert schedule.batch_size(schedule.ramp_samples) == schedule.global_batch_size
    assert schedule.batch_size(10**9) == schedule.global_batch_size


@given(schedules())
def test_every_size_of_the_ramp_lasts_as_long(schedule: BatchSchedule) -> None:
    sizes = [schedule.batch_size(consumed) for consumed in range(schedule.ramp_samples)]
    steps = (schedule.global_batch_size - schedule.start) // schedule.increment
    if steps:
        shares = [sizes.count(schedule.start + step * schedule.increment) for step in range(steps)]
        assert max(shares) - min(shares) <= 1


def simulate(schedule: BatchSchedule, steps: int) -> list[int]:
    """Samples consumed after each step."""
    consumed, after = 0, []
    for _ in range(steps):
        consumed += schedule.batch_size(consumed)
        after.append(consumed)
    return after


@given(schedules(), st.integers(0, 80))
def test_samples_after_equals_a_simulation(schedule: BatchSchedule, steps: int) -> None:
    assert schedule.samples_after(steps) == sum([0, *simulate(schedule, steps)][-1:])


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 4), st.integers(0, 100), st.integers(1, 20_000))
def test_train_tokens_ends_with_the_first_step_that_reaches_it(
    start: int, increment: int, rises: int, ramp: int, tokens: int
) -> None:
    target = start + increment * rises
    run = tiny_run(
        micro_batch_size=1,
        global_batch_size=target,
        rampup_batch_size=(start, increment, ramp),
        train_iters=None,
        train_tokens=tokens,
    )
    schedule = BatchSchedule.from_run(run, 1)
    steps = total_steps(run, schedule)
    consumed = [0, *simulate(schedule, steps)]
    assert consumed[-1] * run.model.seq_length >= tokens
    assert consumed[-2] * run.model.seq_length < tokens


def test_the_earlier_of_two_ends_counts() -> None:
    for iterations, tokens, expected in ((3, 10**6, 3), (100, 8 * 32 * 5, 5), (100, 8 * 32 * 5 + 1, 6)):
        run = tiny_run(train_iters=iterations, train_tokens=tokens)
        assert total_steps(run, BatchSchedule.from_run(run, 1)) == expected


def test_no_end_is_an_error() -> None:
    run = tiny_run(train_iters=None)
    with pytest.raises(ConfigError, match="--train-iters"):
        total_steps(run, BatchSchedule.from_run(run, 1))


@pytest.mark.parametrize(
    ("ramp", "replicas", "message"),
    [
        ((16, 2, 100), 1, "must rise to --global-batch-size 8"),
        ((2, 0, 100), 1, "must rise to --global-batch-size 8"),
        ((2, 4, 100), 1, "must be reached in steps of 4"),
        ((2, 2, 100), 2, "START must be a multiple of micro batch x data-parallel size = 4"),
        ((4, 2, 100), 2, "INCREMENT must be a multiple of micro batch x data-parallel size = 4"),
        (None, 3, "--global-batch-size 8: must be a multiple of --micro-batch-size 2 x data-parallel size 3 = 6"),
    ],
)
def test_impossible_ramps_are_errors(ramp: tuple[int, ...] | None, replicas: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BatchSchedule.from_run(tiny_run(rampup_batch_size=ramp), replicas)
    assert message in str(caught.value)
