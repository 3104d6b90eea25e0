"""What a checkpoint holds beside the optimizer, as megatron-core's sharded state: model, progress, generators."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.utils import unwrap_model

from megatron_moe.checkpoint.optimizer_state import METADATA
from megatron_moe.config.base import UserError
from megatron_moe.runtime.seeds import capture_states


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    """Steps that left the weights as they were: gradients overflowed (fp16), or something was not finite."""
    nonfinite_in_a_row: int = 0
    """Steps up to now whose loss or gradient norm was NaN or inf."""
    nonfinite_since_sample: int = 0
    """First sample of these steps."""
    data: dict[str, Any] = field(default_factory=dict)
    """What the order of the data depends on (`SampleStream.identity`): `consumed_samples` is a position in that."""
    layout: dict[str, int] = field(default_factory=dict)
    """Parallel sizes under which the checkpoint was written."""

    @classmethod
    def from_saved(cls, saved: dict[str, Any], folder: Path) -> "Progress":
        """Of a checkpoint's common state.

        Raises:
            UserError: it holds something that this version does not know, and so cannot go on from.
        """
        unknown = sorted(saved.keys() - {known.name for known in fields(cls)})
        if unknown:
            raise UserError(
                f"{folder}: was written by another version of megatron_moe, whose order of data or schedule this one "
                f"does not go on with ({unknown[0]}); --finetune takes its weights alone"
            )
        return cls(**saved)


def current_layout() -> dict[str, int]:
    """Sizes that decide whether per-rank states (RNG) can be taken over."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert tensor": parallel_state.get_expert_tensor_parallel_world_size(),
        # Replicas share their states, unless they hold different experts.
        "data": parallel_state.get_data_parallel_world_size(with_context_parallel=True) if _spread_experts() else 0,
    }


def _spread_experts() -> bool:
    return parallel_state.get_expert_model_parallel_world_size() > 1


def model_state(model: list[Any]) -> dict[str, Any]:
    """Sharded state of every chunk; keys do not depend on the layout."""
    # megatron-core adds this world's groups to what it is given (transformer/utils.py:ensure_metadata_has_dp_cp_group).
    metadata = dict(METADATA)
    return {
        f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(unwrap_model(model))
    }


def rng_state() -> ShardedObject:
    """This rank's generators. Data-parallel replicas share theirs, unless they hold different experts."""
    layout = current_layout()
    shape = [layout["pipeline"], layout["tensor"]]
    place = [
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    ]
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    if _spread_experts():
        shape, place, replica = [*shape, layout["data"]], [*place, replica], 0
    return ShardedObject("rng_state", capture_states(), tuple(shape), tuple(place), replica_id=replica)
