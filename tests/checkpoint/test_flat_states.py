"""A run of a tensor's numbers as boxes; test_reshard and test_load_memory load by them."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.checkpoint.flat_states import flat_boxes


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_boxes_are_the_numbers_in_their_order(shape: list[int], data: st.DataObject) -> None:
    count = math.prod(shape)
    begin = data.draw(st.integers(0, count))
    end = data.draw(st.integers(begin, count))
    tensor = torch.arange(count).reshape(shape)
    boxes = list(flat_boxes(begin, end, shape))
    found = [
        tensor[tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))].flatten()
        for start, size in boxes
    ]
    assert torch.equal(torch.cat(found) if found else torch.arange(0), torch.arange(begin, end))
    # Few, or many small reads: two for each axis but the last.
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
