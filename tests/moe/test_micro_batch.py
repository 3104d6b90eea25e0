"""`WholeMicroBatch`: one order of a micro-batch's tokens, however sequence and context parallelism have cut it up."""

from typing import Any

import pytest
import torch

from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.moe.inputs import CHANNELS, RoutingInputs, pack_inputs, unpack_inputs
from megatron_moe.moe.micro_batch import WholeMicroBatch
from tests.helpers.distributed import run_ranks

S, B = 16, 3
# The data's numbers of the samples; a micro-batch need not hold them in order.
SAMPLES = (41, 7, 1000)


def packed() -> torch.Tensor:
    """[B, S, K] of the whole micro-batch."""
    tokens_BS = torch.randint(0, 5, (B, S), generator=torch.Generator().manual_seed(0))
    return pack_inputs(tokens_BS, torch.tensor(SAMPLES), domains_BS=tokens_BS % 2)


def whole_inputs() -> RoutingInputs:
    """Of all tokens, by place and then by sample: what every rank should see."""
    packed_BSK = packed()
    rows = sorted(packed_BSK.reshape(-1, len(CHANNELS)).tolist(), key=lambda row: (row[1], row[2]))
    return RoutingInputs(*torch.tensor(rows).unbind(dim=1))


class Router:
    """What `WholeMicroBatch.of` looks at."""

    def __init__(self, inputs: RoutingInputs | None, sequence_parallel: bool, groups: Any) -> None:
        self.inputs = inputs
        self.config = type("Config", (), {"sequence_parallel": sequence_parallel})
        self.tp_cp_group, self.cp_group = groups


def on_rank(tensor: int, context: int, sequence_parallel: bool) -> dict[str, Any]:
    """What a rank gathers, and what it gets back, of features that depend on the token alone."""
    from megatron.core import parallel_state

    from megatron_moe.runtime.distributed import start
    from megatron_moe.training.step import context_parallel_slice

    start(ParallelConfig(device="cpu", tensor_model_parallel_size=tensor, context_parallel_size=context))
    inputs_BSK = context_parallel_slice({"inputs": packed()})["inputs"]
    if sequence_parallel:
        rank = parallel_state.get_tensor_model_parallel_rank()
        inputs_BSK = inputs_BSK.chunk(tensor, dim=1)[rank]
    inputs = unpack_inputs(inputs_BSK)
    groups = (parallel_state.get_tensor_and_context_parallel_group(), parallel_state.get_context_parallel_group())
    whole = WholeMicroBatch.of(Router(inputs, sequence_parallel, groups))
    number_N = inputs.sample * 100 + inputs.place
    feature_NH = (number_N[:, None] * torch.tensor([1.0, -2.0])).requires_grad_()
    gathered_MH = whole.gather(feature_NH)
    return {
        "size": whole.size,
        "inputs": [getattr(whole.inputs, channel).tolist() for channel in CHANNELS],
        "gathered": gathered_MH.tolist(),
        "gradient": gathered_MH.requires_grad,
        "own": number_N.tolist(),
        "back": (whole.mine(whole.inputs.sample) * 100 + whole.mine(whole.inputs.place)).tolist(),
        "feature back": torch.equal(whole.mine(gathered_MH), feature_NH.detach()),
        "bool": whole.gather(inputs.place % 2 == 0).tolist(),
    }


@pytest.mark.parametrize(
    ("tensor", "context", "sequence_parallel"),
    [(1, 1, False), (2, 2, True), (2, 2, False), (4, 1, True)],
    ids=["one process", "SP 2 x CP 2", "TP 2 x CP 2 without SP", "SP 4"],
)
def test_every_rank_sees_the_whole_in_one_order(tensor: int, context: int, sequence_parallel: bool) -> None:
    results = run_ranks(tensor * context, on_rank, tensor, context, sequence_parallel)
    expected = whole_inputs()
    number_M = expected.sample * 100 + expected.place
    for result in results:
        assert result["size"] == S * B
        assert result["inputs"] == [getattr(expected, channel).tolist() for channel in CHANNELS]
        assert result["gathered"] == (number_M[:, None] * torch.tensor([1.0, -2.0])).tolist()
        assert result["bool"] == (expected.place % 2 == 0).tolist()
        assert not result["gradient"]
        assert result["back"] == result["own"]
        assert result["feature back"]
    # The ranks' parts are different ones, and together all of it, once for each copy.
    copies = 1 if sequence_parallel else tensor
    assert sorted(number for result in results for number in result["own"]) == sorted(number_M.tolist() * copies)


def test_samples_in_order_leave_one_rank_as_it_is() -> None:
    """So that `the first tokens` of a micro-batch are those of a rank that holds it."""
    inputs = unpack_inputs(pack_inputs(torch.zeros(B, S, dtype=torch.long), torch.tensor([3, 4, 5])))
    whole = WholeMicroBatch(inputs, None)
    assert torch.equal(whole.mine(torch.arange(S * B)), torch.arange(S * B))
    assert torch.equal(whole.inputs.place, inputs.place)


def test_needs_inputs() -> None:
    with pytest.raises(AssertionError, match="routing inputs"):
        WholeMicroBatch.of(Router(None, False, (None, None)))
