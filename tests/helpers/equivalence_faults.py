"""Faults that are put into the trainer on purpose: the comparison with one process must find each.

Each is an error that parallel training makes when a piece of it is missing. What must find it is named. No quantity
suffices alone: one expert's gradient doubled moves the norm by 6e-6 and the loss by 5e-7, but its weights by half of
their change; replicas of a weight that drift apart are found when the weights are put together.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.equivalence import Comparison
from tests.helpers.equivalence_cells import cells
from tests.helpers.models import CopiesDiffer


def change_gradients(trainer: Any, change: Callable[[], None], *, after: bool) -> None:
    """Call `change` in every step before or after gradients are reduced over the ranks."""
    from megatron.core.utils import get_model_config

    config = get_model_config(trainer.model[0])
    finalize = config.finalize_model_grads_func

    def finalize_and_change(*args: Any, **kwargs: Any) -> Any:
        if not after:
            change()
        result = finalize(*args, **kwargs)
        if after:
            change()
        return result

    config.finalize_model_grads_func = finalize_and_change


def parameters(trainer: Any, text: str) -> list[Any]:
    """Parameters of this rank with that text in their names; there must be some."""
    found = [p for chunk in trainer.model for name, p in chunk.named_parameters() if text in name]
    assert found, f"no parameter has {text} in its name"
    return found


def double_an_expert(trainer: Any) -> None:
    """The first expert of the first layer with experts, first matrix: found by the weights and by the norm."""
    from megatron.core import parallel_state

    # Of all experts of the rank together.
    chosen = parameters(trainer, ".experts.linear_fc1.weight")[0]

    def double() -> None:
        chosen.main_grad[0].mul_(2)

    if parallel_state.get_expert_model_parallel_rank() == 0:
        change_gradients(trainer, double, after=True)


def double_all_experts(trainer: Any) -> None:
    """As if gradients were summed over the ranks that hold an expert twice."""
    chosen = parameters(trainer, ".experts.")
    change_gradients(trainer, lambda: [p.main_grad.mul_(2) for p in chosen] and None, after=True)


def drop_a_rank(trainer: Any) -> None:
    """The gradients of the last rank's samples are lost."""
    if trainer.world.rank == trainer.world.size - 1:
        change_gradients(trainer, lambda: [chunk.zero_grad_buffer() for chunk in trainer.model] and None, after=False)


def norm_without_experts(trainer: Any) -> None:
    """Only the first of megatron-core's two optimizers, which holds what is not an expert, is asked."""
    trainer.optimizer.get_grad_norm = trainer.optimizer.chained_optimizers[0].get_grad_norm


def norm_by_tensor_rank(trainer: Any) -> None:
    """Megatron-LM #5916: an expert's biases on all but the first tensor-parallel rank taken for copies."""
    for part in trainer.optimizer.chained_optimizers:
        part.expert_tp_group = part.tp_group


def experts_not_reduced(trainer: Any) -> None:
    """Replicas of an expert keep the gradients of their own tokens."""
    for chunk in trainer.model:
        chunk.expert_parallel_bucket_groups.clear()


def copies_not_summed(trainer: Any) -> None:
    """A layer has fewer experts than ranks: the copies keep the gradients of their own neighbours' tokens."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_model_config

    get_model_config(trainer.model[0]).finalize_model_grads_func = finalize_model_grads


def norm_with_copies(trainer: Any) -> None:
    """Every copy of an expert counts in the norm."""
    for parameter in parameters(trainer, ".experts."):
        parameter.shared = False


def residual_not_reduced(trainer: Any) -> None:
    """The coefficient that weighs experts against the residual MLP sees this rank's part of the sequence only."""
    for parameter in parameters(trainer, "coefficient"):
        parameter.sequence_parallel = False


def bias_on_every_rank(trainer: Any) -> None:
    """Upstream under expert tensor parallelism: an expert's output bias is added once per rank."""
    from megatron_moe.moe.experts import functions

    functions._with_share_of_bias = lambda weights, math: weights


def tied_embeddings_apart(trainer: Any) -> None:
    """First and last stage each update their copy of the embeddings by their own gradient."""
    # The package exports a function of the module's name.
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    module._allreduce_word_embedding_grads = lambda *args, **kwargs: None


def lose_a_micro_batch(trainer: Any) -> None:
    """The step makes one micro-batch too few."""
    schedule = trainer.schedule
    count = type(schedule).micro_batches
    type(schedule).micro_batches = lambda self, consumed: count(self, consumed) - 1


def stale_weights(trainer: Any) -> None:
    """With a distributed optimizer: updated weights are not sent to the other ranks."""
    for part in trainer.optimizer.chained_optimizers:
        part.start_param_sync_for_bucket_group_subset = lambda: None


def no_fault(trainer: Any) -> None:
    """The fault is in the flags."""


ZERO1 = {"use_distributed_optimizer": True}


@dataclass(frozen=True)
class Fault:
    """An error, where it is made, and what finds it."""

    damage: Callable[[Any], None]
    layout: str
    found_by: str
    flags: dict[str, Any] = field(default_factory=dict)
    model: str = "pyramid-residual"


FAULTS: dict[str, Fault] = {
    "one expert doubled": Fault(double_an_expert, "EP2", "weights"),
    "one expert doubled, one process": Fault(double_an_expert, "one process", "weights"),
    "all experts doubled": Fault(double_all_experts, "EP4", "grad norm"),
    "a rank's samples dropped": Fault(drop_a_rank, "DP2", "grad norm"),
    "a rank's part of the sequence dropped": Fault(drop_a_rank, "CP2", "grad norm"),
    "norm without experts": Fault(norm_without_experts, "EP2", "grad norm"),
    "norm without experts, ZeRO-1": Fault(norm_without_experts, "EP2 DP4", "grad norm", ZERO1),
    "norm by tensor rank": Fault(norm_by_tensor_rank, "TP2 EP2 ETP1", "grad norm"),
    "experts not reduced": Fault(experts_not_reduced, "EP2 DP4", "copies differ"),
    "copies of experts not summed": Fault(copies_not_summed, "EP4", "copies differ", model="few experts"),
    "norm with copies of experts": Fault(norm_with_copies, "EP4", "grad norm", model="few experts"),
    "residual not reduced": Fault(residual_not_reduced, "TP2", "copies differ"),
    "bias on every rank": Fault(bias_on_every_rank, "ETP2", "weights"),
    "tied embeddings apart": Fault(tied_embeddings_apart, "PP2", "copies differ"),
    "a micro-batch lost": Fault(lose_a_micro_batch, "PP2", "loss"),
    "stale weights": Fault(stale_weights, "DP2", "copies differ", ZERO1),
    "auxiliary loss doubled": Fault(no_fault, "DP2", "weights", {"moe_aux_loss_coeff": 0.02}),
}


def what_is_found(name: str, comparison: Comparison) -> list[str]:
    """What the comparison says of a run with that fault; nothing would mean that it was not found."""
    fault = FAULTS[name]
    (cell,) = cells("faults", name, fault.flags, [fault.layout], fault.model)
    try:
        return comparison.measure(cell, fault.damage).failures(cell.tolerance)
    except CopiesDiffer as error:
        return [str(error)]
