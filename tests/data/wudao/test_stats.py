"""Numbers and samples of tasks add up to the same whatever order and batches they come in."""

import json
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.data.wudao.stats import (
    MOST_TYPES,
    OTHER_TYPES,
    SAMPLES,
    Amount,
    CleanStats,
    Tally,
    difference,
    named_lengths,
)


def stats_of(name: str, numbers: range) -> CleanStats:
    stats = CleanStats(name)
    for number in numbers:
        stats.number = number
        stats.changed("control", f"前{number}后\x07", f"前{number}后")
        if number % 3 == 0:
            stats.dropped("length", f"{number} characters", f"短{number}")
    return stats


def as_json(stats: CleanStats) -> str:
    return json.dumps(stats.as_dict(), sort_keys=True)


def test_tasks_merge_to_the_same_in_any_order() -> None:
    parts = [stats_of(f"part-{number}", range(50)) for number in range(6)]
    merged = []
    for seed in range(3):
        random.Random(seed).shuffle(parts)
        total = CleanStats()
        for part in parts:
            total.merge(CleanStats.from_dict(json.loads(json.dumps(part.as_dict()))))
        merged.append(as_json(total))
    assert merged[0] == merged[1] == merged[2]
    rule = json.loads(merged[0])["rules"]["length"]
    assert rule["dropped"] == 6 * 17
    assert rule["reasons"] == {"# characters": 6 * 17}
    assert len(rule["drops"]) == SAMPLES
    # Lowest hashes of all, so from several tasks and not the first documents of one.
    assert len({sample["document"].split()[0] for _, sample in rule["drops"]}) > 2


@given(st.text(max_size=400), st.text(max_size=400), st.text(max_size=400))
def test_the_shown_difference_holds_the_first_difference(start: str, before: str, after: str) -> None:
    old, new = difference(start + before, start + after)
    assert max(len(old), len(new)) <= 242
    if before != after:
        assert old != new


def test_a_tally_gives_the_amount_of_any_rows() -> None:
    texts = ["", "一", "一二三", "abcd" * 4, "中" * 1_000]
    tally = Tally()
    tally.add(texts[:2], ["百科", None])
    tally.add(texts[2:], ["百科", 7, "新闻"])
    everything = tally.amount()
    assert (everything.documents, everything.characters, everything.bytes) == (5, 1_020, 3_028)
    assert named_lengths(everything.lengths)["2-3"] == 1
    assert everything.by_type == {"百科": [2, 3], "": [2, 17], "新闻": [1, 1_000]}
    stored = Tally(tally.types, np.array(tally.columns))
    dropped = stored.amount(np.array([1, 4], np.uint32))
    left = Amount()
    left.merge(everything)
    left.merge(dropped, -1)
    kept = stored.amount(np.array([0, 2, 3], np.uint32))
    assert (left.documents, left.characters, left.bytes, left.lengths) == (3, 19, 25, kept.lengths)
    assert stored.amount(np.zeros(0, np.uint32)).documents == 0


def test_types_without_end_are_counted_together() -> None:
    tally = Tally()
    tally.add(["文"] * 3_000, [f"type {number}" for number in range(3_000)])
    amount = tally.amount()
    assert len(amount.by_type) == MOST_TYPES + 1
    assert amount.by_type[OTHER_TYPES] == [2_000, 2_000]
    other = Tally()
    other.add(["文", "文"], ["type 5", "new"])
    amount.merge(other.amount())
    assert amount.by_type["type 5"] == [2, 2]
    assert amount.by_type[OTHER_TYPES] == [2_001, 2_001]
