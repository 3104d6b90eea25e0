"""Batches: every sequence once, the same shapes on every replica."""

import pytest

from megatron_moe.inference.batching import pad_rows, plan_batches

LENGTHS = [3, 9, 5, 9, 1, 7, 2]


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_sequence_once_and_equal_shapes(replicas: int, size: int) -> None:
    plans = [plan_batches(LENGTHS, size, replica, replicas) for replica in range(replicas)]
    assert len({tuple((b.rows, b.shortest, b.longest) for b in plan) for plan in plans}) == 1
    taken = sorted(index for plan in plans for batch in plan for index in batch.indices)
    assert taken == list(range(len(LENGTHS)))
    for plan in plans:
        for batch in plan:
            assert len(batch.indices) <= batch.rows <= size
            assert all(batch.shortest <= LENGTHS[index] <= batch.longest for index in batch.indices)


def test_one_replica_fills_its_batches_longest_first() -> None:
    plan = plan_batches(LENGTHS, 3, 0, 1)
    assert [[LENGTHS[index] for index in batch.indices] for batch in plan] == [[9, 9, 7], [5, 3, 2], [1]]


def test_rows_are_padded_on_the_right() -> None:
    assert pad_rows([[4, 5], [6]], 3, 3).tolist() == [[4, 5, 0], [6, 0, 0], [0, 0, 0]]
