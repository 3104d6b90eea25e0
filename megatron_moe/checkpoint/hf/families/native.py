"""What families that are native classes of transformers have in common."""

from typing import ClassVar

from megatron_moe.checkpoint.hf.families.abilities import Abilities, reasons
from megatron_moe.config.run import RunConfig


class NativeFamily:
    """Answers `Family.why_not` from what the class can do."""

    model_type: str
    architecture: str
    abilities: ClassVar[Abilities]

    def reasons(self, run: RunConfig) -> tuple[str, ...]:
        """Everything of the run's model that the class does not compute; empty where it is exact."""
        return reasons(run, self.abilities, self.architecture)

    def why_not(self, run: RunConfig) -> str | None:
        """The same on one line; None where it is exact."""
        return "; ".join(self.reasons(run)) or None

    def stored_name(self, name: str) -> str | None:
        """The name in `blocks` of what a file calls `name`; rotary frequencies of older files are left out."""
        return None if name.endswith("rotary_emb.inv_freq") else name

    def fp32_names(self, run: RunConfig) -> frozenset[str]:
        """Their tensors that stay fp32 whatever dtype is exported: none."""
        del run
        return frozenset()
