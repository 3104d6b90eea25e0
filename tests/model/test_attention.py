"""SdpaAttention: equal to megatron-core's own attention, causal, linear in memory, splittable along the sequence."""

from typing import Any

import pytest
import torch

from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import tiny_run

HEADS, WIDTH, BATCH = 4, 8, 2


def build(kind: str, groups: int, dtype: torch.dtype = torch.float32, **flags: Any) -> torch.nn.Module:
    """One of the two core attentions, from the same config; needs started groups."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_moe.model.attention import SdpaAttention
    from megatron_moe.model.transformer_config import build_transformer_config

    run = tiny_run(
        num_query_groups=groups, num_experts=None, mlp_type="standard", bf16=dtype == torch.bfloat16, **flags
    )
    return {"sdpa": SdpaAttention, "upstream": DotProductAttention}[kind](
        config=build_transformer_config(run),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def start(**flags: Any) -> None:
    from megatron_moe.runtime import distributed
    from megatron_moe.runtime.seeds import set_seeds

    distributed.start(tiny_run(**flags).parallel)
    set_seeds(1)


def inputs(length: int, groups: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key and value [S, B, heads, D]."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(length, BATCH, heads, WIDTH, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, groups, groups)
    ]


def output_and_gradients(module: torch.nn.Module, qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    out = module(*qkv, None)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    gradients = torch.autograd.grad((out * weights).sum(), qkv)
    return [out.detach(), *gradients]


def errors_against_upstream(groups: int, dtype: torch.dtype) -> list[float]:
    """Largest error of output and gradients over the largest value."""
    start()
    results = [
        output_and_gradients(build(kind, groups, dtype), inputs(48, groups, dtype)) for kind in ("sdpa", "upstream")
    ]
    return [float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("groups", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # fp32: sums in another order. bf16 has 8 bits: one unit in the last place is 2^-8 of a value, and upstream rounds
    # the probabilities to bf16 where the fused kernel keeps fp32.
    [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)],
    ids=["fp32", "bf16"],
)
def test_equals_upstream(groups: int, dtype: torch.dtype, tolerance: float) -> None:
    errors = run_ranks(1, errors_against_upstream, groups, dtype)[0]
    assert len(errors) == 4
    assert max(errors) < tolerance, errors


def influence(query_changed: int) -> list[bool]:
    """Which outputs change with the key and value at one place."""
    start()
    module = build("sdpa", 2)
    qkv = inputs(16, 2)
    before = module(*qkv, None)
    with torch.no_grad():
        qkv[1][query_changed] += 1.0
        qkv[2][query_changed] += 1.0
    after = module(*qkv, None)
    return (before != after).flatten(1).any(dim=1).tolist()


def test_is_causal() -> None:
    assert run_ranks(1, influence, 9)[0] == [False] * 9 + [True] * 7


def saved_bytes(kind: str, groups: int, lengths: tuple[int, ...]) -> list[int]:
    start()
    module = build(kind, groups)
    totals = []
    for length in lengths:
        qkv, saved = inputs(length, groups), {}

        def pack(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = module(*qkv, None)
        totals.append(sum(saved.values()))
        out.sum().backward()
    return totals


@pytest.mark.parametrize("groups", [4, 2], ids=["MHA", "GQA"])
def test_memory_for_the_backward_pass_is_linear_in_the_sequence(groups: int) -> None:
    """Query, key, value and output once each, and the log-sum-exp of each row; upstream's S x S shows as a factor 4."""
    lengths = (256, 512)
    short, long = run_ranks(1, saved_bytes, "sdpa", groups, lengths)[0]
    per_token = BATCH * HEADS * (4 * WIDTH + 4) * 4
    assert short <= per_token * lengths[0]
    assert long <= 2.05 * short
    short, long = run_ranks(1, saved_bytes, "upstream", groups, lengths)[0]
    assert long > 3 * short, "this test would not see an S x S matrix"


def whole_sequence(groups: int, length: int) -> list[torch.Tensor]:
    start()
    return [tensor.numpy() for tensor in output_and_gradients(build("sdpa", groups), inputs(length, groups))]


def split_sequence(groups: int, length: int, ranks: int) -> list[Any]:
    """Output and gradients of this rank's part, with the chunks that they belong to."""
    import torch.distributed as dist

    start(context_parallel_size=ranks)
    module = build("sdpa", groups, context_parallel_size=ranks)
    rank = dist.get_rank()
    chunks = [rank, 2 * ranks - 1 - rank]

    def part(tensor: torch.Tensor) -> torch.Tensor:
        pieces = tensor.chunk(2 * ranks)
        return torch.cat([pieces[chunk] for chunk in chunks])

    qkv = [part(tensor.detach()).requires_grad_() for tensor in inputs(length, groups)]
    out = module(*qkv, None)
    weights = torch.randn(length, BATCH, out.shape[-1], generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad((out * part(weights)).sum(), qkv)
    return [chunks, [tensor.detach().numpy() for tensor in (out, *gradients)]]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("groups", [4, 2], ids=["MHA", "GQA"])
def test_context_parallel_equals_the_whole_sequence(ranks: int, groups: int) -> None:
    import numpy as np

    length = 48
    expected = run_ranks(1, whole_sequence, groups, length)[0]
    parts: list[dict[int, Any]] = [{} for _ in expected]
    for chunks, tensors in run_ranks(ranks, split_sequence, groups, length, ranks):
        for pieces, tensor in zip(parts, tensors, strict=True):
            pieces.update(zip(chunks, np.split(tensor, 2), strict=True))
    for pieces, whole in zip(parts, expected, strict=True):
        together = np.concatenate([pieces[chunk] for chunk in range(2 * ranks)])
        np.testing.assert_allclose(together, whole, rtol=0, atol=2e-6 * np.abs(whole).max())


def refusals() -> list[str]:
    start()
    module, qkv = build("sdpa", 4), inputs(8, 4)
    messages = []
    for options in ({"attention_mask": torch.ones(1)}, {"attention_mask": None, "attention_bias": torch.ones(1)}):
        try:
            module(*qkv, **options)
        except NotImplementedError as error:
            messages.append(str(error))
    return messages


def test_refuses_what_it_would_ignore() -> None:
    assert len(run_ranks(1, refusals)[0]) == 2


def decoding_errors() -> list[float]:
    """The last queries against all keys, as a cache gives them: rows of the whole result."""
    from megatron.core.transformer.enums import AttnMaskType

    start()
    module, (query, key, value) = build("sdpa", 2), inputs(12, 2)
    whole = module(query, key, value, None)
    several = module(query[-5:], key, value, None)
    one = module(query[-1:], key, value, None, attn_mask_type=AttnMaskType.no_mask)
    one_causal = module(query[-1:], key, value, None)
    return [float((part - whole[-len(part) :]).abs().max()) for part in (several, one, one_causal)]


def test_fewer_queries_than_keys_are_the_last_ones() -> None:
    assert max(run_ranks(1, decoding_errors)[0]) < 1e-6


def dropout_outputs() -> list[Any]:
    start()
    module = build("sdpa", 4, attention_dropout=0.3)
    qkv = inputs(16, 4)
    outputs = [module(*qkv, None) for _ in range(2)]
    module.eval()
    quiet = [module(*qkv, None) for _ in range(2)]
    return [bool(torch.equal(*outputs)), bool(torch.equal(*quiet))]


def test_dropout_is_on_in_training_only() -> None:
    assert run_ranks(1, dropout_outputs)[0] == [False, True]
