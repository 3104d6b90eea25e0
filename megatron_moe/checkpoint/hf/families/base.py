"""What a family of Hugging Face models must say of itself.

A family is plain functions of configs: nothing here opens a file. `why_not` decides whether its class computes exactly
what our model computes; `config` writes its config.json; `flags` reads one; `blocks` says where the weights are.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from megatron_moe.checkpoint.convert.blocks import Block
from megatron_moe.config.run import RunConfig

type HfConfig = Mapping[str, Any]


class Family(Protocol):
    """One class of transformers, both ways. Keys are those that its `save_pretrained` writes to disk."""

    model_type: str
    """`mixtral`: of config.json."""
    architecture: str
    """`MixtralForCausalLM`."""
    skips_later_layers: bool
    """Whether its files may hold layers past the last one, which predict later tokens and which the class leaves."""

    def reasons(self, run: RunConfig) -> tuple[str, ...]:
        """What of the run's model the class does not compute: flag, value and what the class has instead; empty where
        it is exact. Those that concern the weights themselves are `abilities.NoPlace`."""

    def why_not(self, run: RunConfig) -> str | None:
        """The reasons on one line; None where it is exact."""

    def config(self, run: RunConfig) -> dict[str, Any]:
        """What config.json says of the model, without token ids, dtype and architectures."""

    def flags(self, config: HfConfig) -> dict[str, dict[str, Any]]:
        """The run's sections (`model`, `moe`) that make the same model, as `config/yaml_io.py:build_run` takes them.

        Raises:
            UserError: a field has a value that our model has no flag for: the field, its value, what would be read.
        """

    def blocks(self, run: RunConfig) -> list[Block]:
        """Where every weight is on both sides; covers each tensor of both exactly once.

        Biases of the choice of experts and fixed tables are weights too."""

    def stored_name(self, name: str) -> str | None:
        """The name in `blocks` of what a file calls `name`, where older files spell it otherwise; None for what they
        hold beside the weights: buffers that are computed anew."""

    def fp32_names(self, run: RunConfig) -> frozenset[str]:
        """Their tensors that stay fp32 whatever dtype is exported."""
