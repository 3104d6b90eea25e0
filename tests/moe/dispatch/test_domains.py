"""--moe-domain-grouped: nothing leaves a domain's ranks, and nothing else changes.

One layer on 4 and 8 ranks against the dispatchers that know no domains, on the same tokens; whole runs against one
process; a batch that breaks the promise.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_moe.config.domain_placement import cut_into_domains, domain_shares
from megatron_moe.config.run import RunConfig
from tests.helpers.distributed import run_ranks
from tests.helpers.equivalence import FP32, SMOOTH_ADAM, Whole, deviation, train_whole
from tests.helpers.launch import launch
from tests.helpers.models import perturb
from tests.helpers.peers import sent_to
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve

FLAGS: dict[str, Any] = SMOOTH_ADAM | {
    "router": "random-routed",
    "num_domains": 2,
    "moe_token_dispatcher_type": "grouped",
    "moe_domain_grouped": True,
    "num_experts": (8, 16),
}
S, B, H = 16, 2, 32


class Passed(NamedTuple):
    """What one rank has after a pass through a layer and back."""

    output: np.ndarray
    gradients: dict[str, np.ndarray]
    sent: dict[int, int]
    """Bytes to every other rank."""
    crossings: int
    """Of these, messages between nodes as the package counts them."""


def pass_through(run: RunConfig, dispatchers: list[dict[str, Any]]) -> list[Passed]:
    """The last layer of a model under several dispatchers, with tokens of this rank's own domains."""
    import dataclasses

    from megatron_moe.config.validate import validate
    from megatron_moe.model.gpt import build_model
    from megatron_moe.moe.dispatch.counters import Link, count_traffic
    from megatron_moe.moe.inputs import pack_inputs
    from megatron_moe.moe.layer import moe_layers
    from megatron_moe.runtime.distributed import environment_rank, environment_world_size, start
    from megatron_moe.runtime.seeds import set_seeds

    rank, ranks = environment_rank(), environment_world_size()
    validate(run, ranks)
    start(run.parallel)
    own = next(cut for cut in cut_into_domains(domain_shares(run), ranks) if rank in cut.ranks)
    random = torch.Generator().manual_seed(rank)
    domains_BS = torch.randint(own.domains.start, own.domains.stop, (B, S), generator=random)
    mixed_BS = torch.randint(0, run.model.num_domains or 1, (B, S), generator=random)
    tokens_BS = torch.randint(0, 100, (B, S), generator=random)
    hidden_SBH = torch.randn(S, B, H, generator=random)
    weigh_SBH = torch.randn(S, B, H, generator=random)
    results = []
    for flags in dispatchers:
        flags = dict(flags)
        domains = mixed_BS if flags.pop("mixed", False) else domains_BS
        inputs = pack_inputs(tokens_BS, torch.arange(B) + B * rank, domains_BS=domains)
        chosen = dataclasses.replace(run, moe=dataclasses.replace(run.moe, **flags))
        set_seeds(1)
        model = build_model(chosen)
        perturb(model, scale=0.3)
        layer = moe_layers(model[0])[-1].train()
        x = hidden_SBH.clone().requires_grad_()
        with sent_to() as sent, count_traffic() as traffic:
            output, _ = layer(x, padding_mask=inputs)
            (output * weigh_SBH).sum().backward()
        gradients = {name: weight.grad.numpy() for name, weight in layer.named_parameters() if weight.grad is not None}
        assert x.grad is not None
        gradients["input"] = x.grad.numpy()
        crossings = traffic.volume(link=Link.OTHER_NODE).messages
        results.append(Passed(output.detach().numpy(), gradients, dict(sent), crossings))
    return results


DISPATCHERS: dict[str, dict[str, Any]] = {
    "domains": {},
    "grouped": {"moe_domain_grouped": False},
    "alltoall": {"moe_domain_grouped": False, "moe_token_dispatcher_type": "alltoall"},
    "mixed": {"moe_domain_grouped": False, "mixed": True},
}
"""`mixed`: the grouped dispatcher on tokens of all domains on every rank, as sequences lie without the flag."""
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "4 ranks, 2 domains": (4, {}),
    "4 ranks, 4 domains": (4, {"num_domains": 4}),
    "8 ranks, 4 domains, nodes of 2": (8, {"num_domains": 4, "ranks_per_node": 2}),
    "8 ranks, 2 domains, nodes of 2": (8, {"num_domains": 2, "ranks_per_node": 2}),
    "8 ranks, expert tensor 2": (8, {"expert_tensor_parallel_size": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_leaves_the_ranks_of_a_domain(case: str) -> None:
    """Zero bytes to any other rank, in both directions of the layer; dispatchers without domains send some. Outputs and
    gradients: the same rows through the same experts, so they differ by the order in which a weight's gradient adds its
    rows up: 5e-6 of the largest value."""
    ranks, flags = CASES[case]
    expert_ranks = ranks // flags.get("expert_tensor_parallel_size", 1)
    run = tiny_run(**FLAGS | flags, vocab_size=100, expert_model_parallel_size=expert_ranks, global_batch_size=16)
    results = run_ranks(ranks, pass_through, run, list(DISPATCHERS.values()))
    width = ranks // expert_ranks
    cuts = cut_into_domains(domain_shares(run), expert_ranks)
    outside: dict[str, int] = dict.fromkeys(DISPATCHERS, 0)
    inside: dict[str, int] = dict.fromkeys(DISPATCHERS, 0)
    for rank, passes in enumerate(results):
        (own,) = (cut for cut in cuts if rank // width in cut.ranks)
        for name, passed in zip(DISPATCHERS, passes, strict=True):
            for other, count in passed.sent.items():
                (inside if other // width in own.ranks else outside)[name] += count
        expected = passes[2]
        for passed in passes[:2]:
            for found, wanted in [(passed.output, expected.output)] + [
                (passed.gradients[name], wanted) for name, wanted in expected.gradients.items()
            ]:
                assert np.abs(found - wanted).max() <= 5e-6 * max(np.abs(wanted).max(), 1e-3)
    assert outside["domains"] == 0
    assert outside["grouped"] > 0, "without domains the counts at least go everywhere"
    assert outside["alltoall"] > 0
    rows = len(results) * S * B * (run.model.num_domains - 1) / run.model.num_domains
    # Of 4 bytes a number, there and back, forward and backward. Domains are drawn, so about as many.
    assert outside["mixed"] > 0.5 * rows * 4 * H * 4, "what the placement of sequences saves"
    if run.parallel.ranks_per_node == max(len(cut.ranks) for cut in cuts):
        crossings, *others = (sum(passed.crossings for passed in column) for column in zip(*results, strict=True))
        assert crossings == 0, "a domain's ranks are those of a node"
        assert min(others) > 0
    alone = all(len(cut.ranks) == 1 for cut in cuts) and width == 1
    assert (inside["domains"] == 0) == alone, "a domain on several ranks has something to exchange"


SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "a rank for each domain": (2, {"expert_model_parallel_size": 2}),
    "2 ranks a domain, ZeRO-1, recompute": (
        4,
        {
            "expert_model_parallel_size": 4,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "recompute_granularity": "selective",
            "recompute_modules": ("moe",),
        },
    ),
    "copies of the group, interleaved pipeline": (
        8,
        {
            "expert_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "micro_batch_size": 1,
        },
    ),
    "tensor 2, experts whole": (
        4,
        {"expert_model_parallel_size": 4, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    "context 2, experts halved": (
        4,
        {"expert_model_parallel_size": 2, "context_parallel_size": 2, "expert_tensor_parallel_size": 2},
    ),
}
RUN = FLAGS | {"eval_interval": 3, "eval_iters": 2, "domain_embedding": True}


@pytest.fixture(scope="module")
def one_process(tiny_data: Path) -> Whole:
    return train_whole(tiny_run(**data_flags(tiny_data), **RUN), 1)


@pytest.mark.parametrize("layout", SIZES)
def test_a_run_equals_one_process(layout: str, tiny_data: Path, one_process: Whole) -> None:
    """One process reads the same samples and has no domain's ranks. Tolerances are those of the equivalence grid."""
    ranks, flags = SIZES[layout]
    whole = train_whole(tiny_run(**data_flags(tiny_data), **RUN, **flags), ranks)
    assert deviation(whole, one_process).failures(FP32) == []
    assert one_process.curves[0].evaluations
    for curve in whole.curves:
        assert curve.evaluations == pytest.approx(one_process.curves[0].evaluations, rel=FP32.loss)


def test_unequal_domains_equal_one_process(tiny_data: Path) -> None:
    """Three quarters of the experts and of every step for one domain."""
    flags = data_flags(tiny_data) | RUN | {"router_domain_shares": (3, 1), "eval_interval": 0}
    reference = train_whole(tiny_run(**flags), 1)
    whole = train_whole(tiny_run(**flags, expert_model_parallel_size=4), 4)
    assert deviation(whole, reference).failures(FP32) == []
    loads = reference.curves[0].loads[0]
    assert sum(loads[2][:6]) == 3 * sum(loads[2][6:])


def give_others_domain() -> None:
    """On rank 3 of 4: read the other domain's sequences."""
    import os

    from megatron_moe.config.domain_placement import StreamPart, Turns
    from megatron_moe.training import loop

    if os.environ["RANK"] == "3":
        loop.stream_part = lambda *args: StreamPart(Turns(0, 1, 2), 0, 2)


@pytest.mark.parametrize("experts", [2, 4])
def test_a_sequence_of_another_domain_ends_the_run(experts: int, tiny_data: Path, tmp_path: Path) -> None:
    """One line, on all ranks, with one rank a domain and with two."""
    words = (
        "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --num-experts 4 8 --expert-interval 2 "
        "--router random-routed --num-domains 2 --moe-token-dispatcher-type grouped --moe-domain-grouped "
        f"--expert-model-parallel-size {experts} --micro-batch-size 2 --global-batch-size 8 --train-iters 2 "
        f"--eval-interval 0 --lr 1e-2 --device cpu --train-data-path {tiny_data}/train --tokenizer-model "
        f"{tiny_data}/bpe.model --data-cache-path {tmp_path}"
    )
    done = launch(4, "megatron_moe.pretrain", *words.split(), prepare=(give_others_domain,))
    assert done.stderr == (
        "error: --moe-domain-grouped: rank 3 holds experts of domain 1 and was given tokens of others, 64 of domain 0 "
        "among 64 tokens; give every rank sequences of its own domains\n"
    )
    assert done.codes[3] == 2
    assert all(done.codes)


def test_a_run_goes_on_under_another_layout_and_is_scored_under_any(
    tiny_data: Path, tmp_path: Path, one_process: Whole
) -> None:
    """Two steps on four ranks, the third on one; inference gives every rank texts of any domain."""
    flags = data_flags(tiny_data) | RUN | {"save": str(tmp_path / "run")}
    run_ranks(4, train_curve, tiny_run(**flags, expert_model_parallel_size=4, train_iters=2))
    (curve,) = run_ranks(1, train_curve, tiny_run(**flags, load=flags["save"]))
    expected = one_process.curves[0]
    assert curve.losses == pytest.approx(expected.losses[2:], rel=FP32.loss)
    assert curve.loads == expected.loads[2:]
    assert curve.evaluations == pytest.approx(expected.evaluations, rel=FP32.loss)
    losses = [run_ranks(ranks, score, str(tmp_path / "run"), str(tiny_data / "valid"), ranks) for ranks in (1, 2)]
    assert losses[1] == pytest.approx([losses[0][0]] * 2, rel=FP32.loss)


def score(folder: str, prefix: str, experts: int) -> float:
    """Loss of a saved model on a token file with documents of all domains."""
    from megatron_moe.inference.evaluation import evaluate_files
    from megatron_moe.inference.evaluation_data import open_data
    from megatron_moe.inference.model import load_for_inference

    model = load_for_inference(folder, tiny_run(expert_model_parallel_size=experts).parallel)
    return evaluate_files(model, open_data([prefix], model.vocab_size))[0].loss
