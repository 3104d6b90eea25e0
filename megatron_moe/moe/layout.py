"""Which layer has how many experts: the one place the model, the checkpoints and the reports ask.

The rules of --num-experts, --expert-interval and --moe-layer-freq are in `MoEConfig.experts_per_layer`. No
torch here.
"""

from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig, check_expert_parallel, expert_degree
from megatron_moe.config.run import RunConfig


@dataclass(frozen=True)
class ExpertLayout:
    """Experts of every layer. Layers are numbered from 1."""

    experts_per_layer: tuple[int, ...]
    """One count for each layer in order; 0 for a dense layer."""

    @property
    def num_layers(self) -> int:
        """All layers, dense and MoE."""
        return len(self.experts_per_layer)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the MoE layers, counted from 1."""
        return tuple(number for number, count in enumerate(self.experts_per_layer, 1) if count)

    @property
    def num_moe_layers(self) -> int:
        """How many layers have experts."""
        return len(self.moe_layers)

    @property
    def counts(self) -> tuple[int, ...]:
        """Experts of every MoE layer in order."""
        return tuple(count for count in self.experts_per_layer if count)

    @property
    def total_experts(self) -> int:
        """Experts of all layers together."""
        return sum(self.experts_per_layer)

    @property
    def max_experts(self) -> int:
        """Experts of the largest layer; 0 in a dense model."""
        return max(self.experts_per_layer)

    def experts_in(self, layer_number: int) -> int:
        """Experts of a layer, counted from 1; 0 when it is dense."""
        if not 1 <= layer_number <= self.num_layers:
            raise IndexError(f"layer {layer_number} of {self.num_layers}")
        return self.experts_per_layer[layer_number - 1]

    def check_expert_parallel(self, expert_parallel_size: int) -> None:
        """Raise `ConfigError`, naming the layers, unless the size fits the count of every MoE layer."""
        check_expert_parallel(self.experts_per_layer, expert_parallel_size)

    def degree(self, layer_number: int, expert_parallel_size: int) -> int:
        """Ranks over which the experts of a MoE layer are spread; the others hold copies."""
        degree = expert_degree(self.experts_in(layer_number), expert_parallel_size)
        assert degree is not None, "check_expert_parallel comes first"
        return degree

    def has_copies(self, expert_parallel_size: int) -> bool:
        """Whether a layer has fewer experts than there are expert-parallel ranks."""
        return any(count < expert_parallel_size for count in self.counts)

    def describe_spread(self, expert_parallel_size: int) -> str:
        """Experts of every rank in short: `2: 1 of 2 experts, in 2 copies; 4,6: 2 of 8 experts`."""
        shares = {}
        for number in self.moe_layers:
            count, degree = self.experts_in(number), self.degree(number, expert_parallel_size)
            copies = expert_parallel_size // degree
            shares[number] = f"{count // degree} of {count} experts" + (f", in {copies} copies" if copies > 1 else "")
        return self._by_layers(shares)

    def describe(self) -> str:
        """The MoE layers and their experts in short: `2,4,...,20: 32 experts; 22,24: 64 experts`, or
        `dense`."""
        return self._by_layers({number: f"{self.experts_in(number)} experts" for number in self.moe_layers})

    def _by_layers(self, words: dict[int, str]) -> str:
        groups = [
            f"{_short_list([number for number, _ in group])}: {said}"
            for said, group in ((said, list(group)) for said, group in groupby(words.items(), key=itemgetter(1)))
        ]
        return "; ".join(groups) or "dense"


def expert_layout(model: ModelConfig | RunConfig, moe: MoEConfig | None = None) -> ExpertLayout:
    """The layout of a run, or of a model's two sections.

    Args:
        model: a whole run, or its model section together with `moe`.
        moe: the experts' section, when `model` is not a whole run.

    Raises:
        ConfigError: the counts or the pattern do not fit the number of layers.
    """
    if isinstance(model, RunConfig):
        return expert_layout(model.model, model.moe)
    if moe is None:
        raise TypeError("expert_layout takes a RunConfig, or a ModelConfig and a MoEConfig")
    return ExpertLayout(moe.experts_per_layer(model.num_layers))


def _short_list(numbers: list[int]) -> str:
    """`2,4,...,20` for numbers in equal steps, all of them otherwise."""
    steps = {after - before for before, after in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1:
        return f"{numbers[0]},{numbers[1]},...,{numbers[-1]}"
    return ",".join(str(number) for number in numbers)
