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
from tests.helpers.sharing import (
    FULL,
    OF_MOE,
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


def in_an_expert() -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    start()
    layer = build_layer(**DROPOUT)
    second = layer.experts.local_experts[0].linear_fc2
    activation = torch.ones(2000, second.weight.shape[1], requires_grad=True)
    states = get_cuda_rng_tracker().get_states()
    out, _ = second(activation)
    (gradient,) = torch.autograd.grad(out.sum(), activation)
    mask = (gradient / second.weight.sum(dim=0)).detach()
    get_cuda_rng_tracker().set_states(states)
    again, _ = second(activation)
    before = torch.get_rng_state()
    second(activation)
    untouched = torch.equal(before, torch.get_rng_state())
    x = hidden_states()
    plain = build_layer()
    plain.load_state_dict(layer.state_dict())
    trained, quiet, wanted = layer(x)[0], layer.eval()(x)[0], plain(x)[0]
    return {
        "mask": mask,
        "masked": torch.allclose(out, F.linear(activation * mask, second.weight), atol=1e-4),
        "same state, same mask": torch.equal(out, again),
        "default generator untouched": untouched,
        "evaluation is plain": torch.equal(quiet, wanted),
        "training is not": not torch.equal(trained, wanted),
    }


def test_drops_that_share_and_scales_the_rest() -> None:
    found = run_ranks(1, in_an_expert)[0]
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
    second = moe_layers(build_model(run)[0].train())[0].experts.local_experts[0].linear_fc2
    return second._dropout(torch.ones(50, 40))


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


def test_refused_where_there_is_no_place_for_it() -> None:
    run = tiny_run(**DROPOUT, device="cuda", transformer_impl="transformer_engine")
    with pytest.raises(ConfigError, match=r"--moe-expert-dropout 0\.3: needs --transformer-impl local"):
        validate(run, 1)
