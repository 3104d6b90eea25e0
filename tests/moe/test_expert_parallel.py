"""Layers with fewer experts than expert-parallel ranks: the same training as one process, copies that stay equal,
checkpoints that know each expert once."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_moe.config.run import RunConfig
from tests.helpers.checkpoints import whole_tensors
from tests.helpers.distributed import run_ranks
from tests.helpers.equivalence import (
    CONTEXT,
    EXPERT,
    EXPERT_TENSOR,
    FP32,
    PIPELINE,
    ROTARY,
    SMOOTH_ADAM,
    TENSOR,
    Deviation,
    Whole,
    deviation,
    train_whole,
)
from tests.helpers.models import CopiesDiffer
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import build_trainer, train_curve

ZERO1 = {"use_distributed_optimizer": True}
OVERLAP = ZERO1 | {"overlap_grad_reduce": True, "overlap_param_gather": True}

MODELS: dict[str, dict[str, Any]] = {
    "2, 4, 8 experts": ROTARY
    | {
        "num_experts": (2, 4, 8),
        "clip_grad": 0.1,
        "moe_router_topk": 1,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.05,
    },
    # This router looks at whole micro-batches.
    "1, 4, 8 experts": {"num_experts": (1, 4, 8), "router": "recycle", "moe_expert_capacity_factor": 1.0},
}

CELLS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "EP4, overlap": ("2, 4, 8 experts", 4, {EXPERT: 4, "overlap_grad_reduce": True}),
    "TP2 CP2 EP4 ETP1, ZeRO-1, allgather": (
        "1, 4, 8 experts",
        4,
        {TENSOR: 2, CONTEXT: 2, EXPERT: 4, EXPERT_TENSOR: 1, "moe_token_dispatcher_type": "allgather", **ZERO1},
    ),
    # Copies on the first stage only.
    "PP2 EP2, recompute": (
        "1, 4, 8 experts",
        4,
        {PIPELINE: 2, EXPERT: 2, "recompute_granularity": "full", "recompute_method": "uniform"},
    ),
    # Two copies inside of an expert-parallel group, and two such groups.
    "EP2 DP4, ZeRO-1, overlap": ("1, 4, 8 experts", 4, {EXPERT: 2, **OVERLAP}),
    "TP2 ETP2 EP4, ZeRO-1, two nodes": (
        "2, 4, 8 experts",
        8,
        {TENSOR: 2, EXPERT: 4, "moe_token_dispatcher_type": "grouped", "ranks_per_node": 4, **ZERO1},
    ),
}


class Pyramids:
    """Runs models on the token files of `tiny_data`, and each reference once."""

    def __init__(self, folder: Path) -> None:
        self._data = data_flags(folder)
        self._references: dict[str, Whole] = {}

    def run(self, model: str, **flags: Any) -> RunConfig:
        """Layers 1, 2 and 4 have experts."""
        layers = {"moe_layer_freq": (1, 1, 0, 1), "expert_interval": 1, "mlp_type": "standard"}
        return tiny_run(**{**self._data, **layers, **SMOOTH_ADAM, **MODELS[model], **flags})

    def measure(
        self, model: str, ranks: int, flags: dict[str, Any], fault: Callable[[Any], None] | None = None
    ) -> Deviation:
        """How far the run is from one process."""
        return deviation(train_whole(self.run(model, **flags), ranks, fault), self.reference(model))

    def reference(self, model: str) -> Whole:
        """One process."""
        if model not in self._references:
            self._references[model] = train_whole(self.run(model), 1)
        return self._references[model]


@pytest.fixture(scope="module")
def pyramids(tiny_data: Path) -> Pyramids:
    return Pyramids(tiny_data)


# ---- training


@pytest.mark.parametrize("name", CELLS)
def test_trains_as_one_process(name: str, pyramids: Pyramids) -> None:
    """Losses, norms, loads and weights; putting the weights together compares the copies bit for bit."""
    assert pyramids.measure(*CELLS[name]).failures(FP32) == []


def leave_copies_alone(trainer: Any) -> None:
    """Gradients of copies are not summed."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_model_config

    get_model_config(trainer.model[0]).finalize_model_grads_func = finalize_model_grads


def count_every_copy(trainer: Any) -> None:
    """The norm takes copies for parameters of their own."""
    for part in trainer.optimizer.chained_optimizers:
        for parameter in part.get_parameters():
            parameter.shared = False


def test_norm_that_counts_every_copy_is_found(pyramids: Pyramids) -> None:
    found = pyramids.measure("2, 4, 8 experts", 4, {EXPERT: 4}, count_every_copy).failures(FP32)
    assert any(line.startswith("grad norm") for line in found)


def test_copies_with_gradients_of_their_own_are_found(pyramids: Pyramids) -> None:
    with pytest.raises(CopiesDiffer, match=r"layers\.0\.mlp\.experts"):
        pyramids.measure("2, 4, 8 experts", 4, {EXPERT: 4, **ZERO1}, leave_copies_alone)


HALF: dict[str, tuple[dict[str, Any], float]] = {
    "bf16": ({"bf16": True, **ZERO1}, 4e-3),
    # So large a scale that the first step overflows: copies must leave it out together.
    "fp16": ({"fp16": True, "initial_loss_scale": 2.0**13, "hysteresis": 1}, 1e-3),
}


@pytest.mark.parametrize("precision", HALF)
def test_half_precision(precision: str, pyramids: Pyramids) -> None:
    """Copies stay equal bit for bit; the first loss is fp32's but for the rounding of activations (8 and 11 bits)."""
    flags, tolerance = HALF[precision]
    whole = train_whole(pyramids.run("2, 4, 8 experts", train_iters=10, **flags, **{EXPERT: 4}), 4)
    curve = whole.curves[0]
    assert all(other.losses == curve.losses for other in whole.curves)
    assert (0 < curve.skipped < 7) if precision == "fp16" else (curve.skipped == 0)
    assert curve.losses[0] == pytest.approx(pyramids.reference("2, 4, 8 experts").curves[0].losses[0], rel=tolerance)
    assert curve.losses[-1] < curve.losses[0]


# ---- groups


LAYOUTS = [
    {TENSOR: 2, PIPELINE: 2, EXPERT: 4, EXPERT_TENSOR: 1},
    {TENSOR: 2, EXPERT: 4, EXPERT_TENSOR: 2},
    {PIPELINE: 2, CONTEXT: 2, EXPERT: 8},
    {TENSOR: 2, CONTEXT: 2, EXPERT: 8, EXPERT_TENSOR: 1},
    {TENSOR: 4, EXPERT: 4, EXPERT_TENSOR: 2},
]
type Members = dict[str, list[int]]


def spread(layouts: list[dict[str, int]], experts: int) -> list[list[Members]]:
    """For every layout and each of 16 ranks: its groups in a layer of so many experts, without other processes."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    found: list[list[Members]] = []
    for layout in layouts:
        found.append([])
        for rank in range(16):
            dist.init_process_group("fake", rank=rank, world_size=16, store=FakeStore())
            parallel_state.initialize_model_parallel(**layout, create_gloo_process_groups=False)
            found[-1].append(members(experts))
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return found


def members(experts: int) -> Members:
    """Of this rank's groups; and `place`: its pipeline stage, and which part of which experts it holds."""
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_moe.moe.expert_parallel import layer_groups

    whole = ProcessGroupCollection.use_mpu_process_groups()
    layer, copies = layer_groups(SimpleNamespace(num_moe_experts=experts, distributed_timeout_minutes=1), whole)
    groups = {name: getattr(layer, name) for name in ("ep", "tp_ep", "expt_tp", "expt_dp")}
    groups |= {"reduced": whole.expt_dp, "copies": copies}
    ranks = {name: dist.get_process_group_ranks(group) for name, group in groups.items() if group is not None}
    return ranks | {"place": [whole.pp.rank(), layer.ep.rank(), layer.expt_tp.rank()]}


def test_groups_of_a_layer_with_copies() -> None:
    for layout in run_ranks(1, spread, LAYOUTS, 2)[0]:
        same_place = defaultdict(list)
        for rank, groups in enumerate(layout):
            same_place[tuple(groups["place"])].append(rank)
        for rank, groups in enumerate(layout):
            for name in ("ep", "tp_ep", "expt_dp", "copies"):
                assert rank in groups[name]
                assert all(layout[member][name] == groups[name] for member in groups[name])
            assert len(groups["ep"]) == 2
            assert groups["tp_ep"] == sorted(member for other in groups["ep"] for member in layout[other]["expt_tp"])
            assert groups["expt_dp"] == same_place[tuple(groups["place"])]
            # What megatron-core reduces over, for all of the copies, is everyone who holds the same experts.
            reduced = sorted(member for other in groups["copies"] for member in layout[other]["reduced"])
            assert reduced == groups["expt_dp"]


def test_layer_with_enough_experts_keeps_its_groups() -> None:
    ((layout,),) = run_ranks(1, spread, [{EXPERT: 4}], 8)
    assert [groups["ep"] for groups in layout[:5]] == [[0, 1, 2, 3]] * 4 + [[4, 5, 6, 7]]
    assert all(groups["expt_dp"] == groups["reduced"] and "copies" not in groups for groups in layout)


def messages(run: RunConfig) -> dict[str, int]:
    """What this rank sends in training, by link."""
    from megatron_moe.moe.dispatch.counters import Link, count_traffic

    with count_traffic() as traffic:
        train_curve(run)
    return {link.value: traffic.volume(link=link).messages for link in Link}


def test_tokens_stay_among_neighbours(pyramids: Pyramids) -> None:
    """Two experts on four ranks in two nodes: no token leaves its node. Four experts: on every rank some do."""
    flags = {EXPERT: 4, "moe_token_dispatcher_type": "grouped", "ranks_per_node": 2, "train_iters": 1}
    for experts, leaves in (2, False), (4, True):
        for sent in run_ranks(4, messages, pyramids.run("1, 4, 8 experts", **flags, num_experts=(experts,))):
            assert sent["same node"] > 0
            assert (sent["other node"] > 0) is leaves


def groups_of_two_layers() -> list[int]:
    """Sizes of the groups of a layer of four experts that exchanges through nodes, then of one of two, in copies."""
    import torch.distributed as dist
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_moe.config.parallel import ParallelConfig
    from megatron_moe.moe.dispatch.nodes import level_groups, node_grid
    from megatron_moe.moe.expert_parallel import layer_groups
    from megatron_moe.runtime.distributed import start

    start(ParallelConfig(device="cpu", expert_model_parallel_size=4, distributed_timeout_minutes=1))
    whole = get_default_pg_collection()
    config = SimpleNamespace(num_moe_experts=4, distributed_timeout_minutes=1)
    large = layer_groups(config, whole).collection
    levels = level_groups(large.ep, node_grid(dist.get_process_group_ranks(large.ep), 6), 1)
    config.num_moe_experts = 2
    small = layer_groups(config, whole).collection
    return [*(group.size() for group in levels), small.ep.size(), small.expt_dp.size()]


def test_ranks_of_one_node_and_of_two_make_groups_together() -> None:
    """Nodes of six: the first four ranks share one, the others lie two and two; copies of the second layer's experts
    are on ranks of both. torch waits in vain where members have made unequal numbers of groups before."""
    assert run_ranks(8, groups_of_two_layers) == [[4, 2, 4]] * 4 + [[2, 2, 2, 4]] * 4


# ---- checkpoints


def save_as_loaded(run: RunConfig, folder: str) -> None:
    """Load, and save at once under this layout."""
    from megatron_moe.checkpoint.save import save_checkpoint

    trainer = build_trainer(run)
    target = dataclasses.replace(trainer.run, checkpoint=dataclasses.replace(run.checkpoint, save=folder))
    save_checkpoint(target, trainer.model, trainer.optimizer, trainer.scheduler, trainer.progress, trainer.tokenizer)


def test_checkpoint_holds_each_expert_once(pyramids: Pyramids, tmp_path: Path) -> None:
    """Written by 8 ranks with 4, 2 and 1 copies, then by one process, then with 2, 1 and 1: the same weights and
    moments, bit for bit. megatron-core refuses to save what two ranks would write, or none."""
    model = "2, 4, 8 experts"
    folders = [tmp_path / str(index) for index in range(3)]
    layout = {TENSOR: 2, EXPERT: 8, EXPERT_TENSOR: 1, **ZERO1}
    ranks = run_ranks(8, train_curve, pyramids.run(model, **layout, save=str(folders[0]), tensorboard=False))
    expected = pyramids.reference(model).curves[0]
    assert all(rank.losses == pytest.approx(expected.losses, rel=FP32.loss) for rank in ranks)
    assert all(rank.grad_norms == pytest.approx(expected.grad_norms, rel=FP32.grad_norm) for rank in ranks)
    for count, flags, source, target in (
        (1, ZERO1, folders[0], folders[1]),
        (4, {EXPERT: 4, **ZERO1}, folders[1], folders[2]),
    ):
        run_ranks(count, save_as_loaded, pyramids.run(model, **flags, load=str(source)), str(target))
    first, *others = (run_ranks(1, whole_tensors, folder)[0] for folder in folders)
    moments = [value for key, value in first.items() if ".exp_avg." in key and "layers.0.mlp.experts" in key]
    assert moments
    assert all(value.shape[0] == 2 and value.abs().sum() > 0 for value in moments)
    for other in others:
        assert set(other) == set(first)
        assert all(torch.equal(other[key], first[key]) for key in first)
