"""How one model is spread over processes, and on which device they run."""

from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.base import ConfigError, require_positive


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel groups. world = tensor x pipeline x context x data; the experts of a layer are
    spread over expert x expert-tensor ranks inside tensor x context x data."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run. `auto` takes CUDA when there is a GPU, else the CPU with gloo."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each matrix."""
    pipeline_model_parallel_size: int = 1
    """Ranks that hold consecutive groups of layers."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Interleaved pipeline: layers of one virtual stage. Default: not interleaved."""
    context_parallel_size: int = 1
    """Ranks that share each sequence."""
    expert_model_parallel_size: int = 1
    """Ranks over which the experts of a layer are spread. A layer with fewer experts has one on each rank and every
    expert several times over; its experts must divide this size."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices. Default: --tensor-model-parallel-size."""
    sequence_parallel: bool = False
    """Split norms and dropouts along the sequence over the tensor-parallel ranks. Always on for a model with
    experts under tensor parallelism (megatron-core requires it)."""
    use_distributed_optimizer: bool = False
    """ZeRO-1: shard the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather parameters while the forward pass runs (needs --use-distributed-optimizer)."""
    ranks_per_node: int | None = None
    """Processes of one node, for --moe-token-dispatcher-type grouped. Default: as the launcher says
    (LOCAL_WORLD_SIZE); a smaller one imitates several nodes on one machine."""
    distributed_timeout_minutes: int = 10
    """After this long without an answer from another rank a collective fails instead of hanging."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "num_layers_per_virtual_pipeline_stage",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "ranks_per_node",
            "distributed_timeout_minutes",
        )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError("--sequence-parallel: needs --tensor-model-parallel-size of at least 2")
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ConfigError("--overlap-param-gather: needs --use-distributed-optimizer and --overlap-grad-reduce")
        if self.num_layers_per_virtual_pipeline_stage is not None and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"--num-layers-per-virtual-pipeline-stage {self.num_layers_per_virtual_pipeline_stage}: "
                "needs --pipeline-model-parallel-size of at least 2"
            )

    @property
    def expert_tensor_size(self) -> int:
        """Expert-tensor-parallel size after the default is applied."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model in `world_size` processes.

        Raises:
            ConfigError: the sizes do not fit the world.
        """
        model = self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        sizes = (
            f"--tensor-model-parallel-size {self.tensor_model_parallel_size} x "
            f"--pipeline-model-parallel-size {self.pipeline_model_parallel_size} x "
            f"--context-parallel-size {self.context_parallel_size}"
        )
        if world_size % model:
            raise ConfigError(f"{sizes} = {model}: must divide the number of processes, which is {world_size}")
        expert = self.expert_tensor_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size
        if world_size % expert:
            raise ConfigError(
                f"--expert-tensor-parallel-size {self.expert_tensor_size} x --expert-model-parallel-size "
                f"{self.expert_model_parallel_size} x --pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size} = {expert}: must divide the number of processes, "
                f"which is {world_size}"
            )
        return world_size // model
