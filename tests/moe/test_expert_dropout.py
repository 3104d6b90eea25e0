"""`--moe-expert-dropout`: inside the expert, in training only, other masks on other ranks of an expert group."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.config.base import ConfigError
from megatron_moe.config.validate import validate
from tests.helpers.distributed import run_ranks
from tests.helpers.experts import expert
from tests.helpers.sharing import (
    FULL,
    OF_MOE,
    H,
    assert_resumes_bit_for_bit,
    build_layer,
    hidden_states,
    one_process,
    resume,
    start,
)
from tests.helpers.tiny import tiny_run

SHARE = 0.3
DROPOUT = {"moe_expert_dropout": SHARE}


def drawn_by(experts: Any, rows: int) -> Tensor:
    """What the next rows of the first expert are multiplied by, [rows, F]."""
    if hasattr(experts, "local_experts"):
        second = experts.local_experts[0].linear_fc2
        return second._dropout(torch.ones(rows, second.weight.shape[1]))
    return experts._mask(torch.empty(rows, H)) / (1 - SHARE)


def in_an_expert(backend: str) -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    start()
    layer = build_layer(**DROPOUT, moe_expert_backend=backend)
    rows = torch.randn(2000, H, requires_grad=True)
    one = expert(layer.experts, 0)
    wanted = [rows, *layer.experts.parameters()]

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        out, _ = layer.experts(rows, torch.tensor([len(rows), 0, 0, 0]), torch.ones(len(rows)))
        return out, torch.autograd.grad(out.square().sum(), wanted, materialize_grads=True, allow_unused=True)

    states = get_cuda_rng_tracker().get_states()
    out, gradients = run()
    get_cuda_rng_tracker().set_states(dict(states))
    again, _ = run()
    get_cuda_rng_tracker().set_states(dict(states))
    mask = drawn_by(layer.experts, len(rows))
    first, second = one.linear_fc1, one.linear_fc2
    masked = F.linear(F.gelu(F.linear(rows, first.weight, first.bias)) * mask, second.weight, second.bias)
    expected = torch.autograd.grad(masked.square().sum(), wanted, materialize_grads=True, allow_unused=True)
    before = torch.get_rng_state()
    run()
    untouched = torch.equal(before, torch.get_rng_state())
    x = hidden_states()
    plain = build_layer(moe_expert_backend=backend)
    plain.load_state_dict(layer.state_dict())
    trained, quiet, without = layer(x)[0], layer.eval()(x)[0], plain(x)[0]
    return {
        "mask": mask,
        "masked": torch.allclose(out, masked, atol=1e-4),
        # Relative to the largest value of each: sums over 2000 rows.
        "gradients": all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(gradients, expected, strict=True)),
        "same state, same mask": torch.equal(out, again),
        "default generator untouched": untouched,
        "evaluation is plain": torch.equal(quiet, without),
        "training is not": not torch.equal(trained, without),
    }


@pytest.mark.parametrize("backend", ["grouped", "sequential"])
def test_drops_that_share_and_scales_the_rest(backend: str) -> None:
    found = run_ranks(1, in_an_expert, backend)[0]
    mask: Tensor = found.pop("mask")
    kept = mask > 0.5
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - SHARE)), rtol=1e-3, atol=0)
    assert kept.float().mean().item() == pytest.approx(1 - SHARE, abs=0.01)
    # Every channel of every token for itself: no row or column is kept or dropped as a whole.
    for way in (0, 1):
        assert 0.3 < kept.float().mean(dim=way).min() < kept.float().mean(dim=way).max() < 0.99
    assert found == dict.fromkeys(found, True)


def drawn(sizes: dict[str, int]) -> Tensor:
    """The mask of this rank's first expert."""
    from megatron_moe.model.gpt import build_model
    from megatron_moe.moe.layer import moe_layers
    from megatron_moe.runtime import distributed
    from megatron_moe.runtime.seeds import set_seeds

    run = tiny_run(vocab_size=100, **DROPOUT, **sizes)
    distributed.start(run.parallel)
    set_seeds(1)
    return drawn_by(moe_layers(build_model(run)[0].train())[0].experts, 50)


@pytest.mark.parametrize(
    ("sizes", "equal"),
    [({"expert_model_parallel_size": 2}, False), ({"tensor_model_parallel_size": 2}, False), ({}, True)],
    ids=["EP 2", "ETP 2", "DP 2"],
)
def test_ranks_of_an_expert_group_draw_other_masks(sizes: dict[str, int], equal: bool) -> None:
    """Replicas draw alike, as for all dropout."""
    first, second = run_ranks(2, drawn, sizes)
    assert torch.equal(first, second) == equal


def test_recompute_draws_the_same_masks(tiny_data: Path) -> None:
    plain = one_process(tiny_data, DROPOUT)
    for recompute in (FULL, OF_MOE):
        again = one_process(tiny_data, DROPOUT | recompute)
        assert again.losses == pytest.approx(plain.losses, rel=1e-6)
        assert again.grad_norms == pytest.approx(plain.grad_norms, rel=1e-5)
    other = one_process(tiny_data, {"moe_expert_dropout": SHARE, "seed": 1})
    assert other.losses != pytest.approx(plain.losses, rel=1e-4)


def test_resumes_bit_for_bit(tiny_data: Path, tmp_path: Path) -> None:
    assert_resumes_bit_for_bit(resume(tiny_data, tmp_path, DROPOUT))


@pytest.mark.parametrize("engine", [{"transformer_impl": "transformer_engine"}, {"moe_expert_backend": "te"}], ids=str)
def test_refused_where_there_is_no_place_for_it(engine: dict[str, str]) -> None:
    run = tiny_run(**DROPOUT, device="cuda", **engine)
    with pytest.raises(
        ConfigError, match=r"--moe-expert-dropout 0\.3: needs --moe-expert-backend grouped or sequential"
    ):
        validate(run, 1)
