"""What families that are native classes of transformers have in common."""

import re
from collections.abc import Iterable
from typing import ClassVar

from megatron_moe.checkpoint.hf.families.abilities import Abilities, Gate, gate, reasons
from megatron_moe.checkpoint.hf.families.base import Family
from megatron_moe.config.base import UserError
from megatron_moe.config.run import RunConfig


class NativeFamily:
    """Answers `Family.why_not` from what the class can do."""

    model_type: str
    architecture: str
    abilities: ClassVar[Abilities]
    skips_later_layers: bool = False

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


def names_in_files(family: Family, run: RunConfig, stored: Iterable[str]) -> dict[str, str]:
    """Name in `Family.blocks` -> name in the files, for everything in them that the class itself reads.

    Left out, as the class does: buffers that are computed anew, a copy of the embedding where the output layer is tied
    to it, and layers past the last one, which predict later tokens.

    Args:
        family: of the files.
        run: the model that they hold.
        stored: the names in them.
    """
    names = {}
    for name in stored:
        known = family.stored_name(name)
        tied = known == "lm_head.weight" and not run.model.untie_embeddings_and_output_weights
        if known is not None and not tied and not (_past_last_layer(known, run) and family.skips_later_layers):
            names[known] = name
    return names


def _past_last_layer(name: str, run: RunConfig) -> bool:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) >= run.model.num_layers


def known_gate(run: RunConfig) -> Gate:
    """The run's gate.

    Raises:
        UserError: it has none, so nothing of it can be written.
    """
    found = gate(run)
    if isinstance(found, str):
        raise UserError(f"{found}; only --target megatron_moe holds it")
    return found


def sums_to_one(run: RunConfig) -> bool:
    """Whether the chosen experts' weights sum to 1 (`norm_topk_prob`); that of one expert is its score."""
    found = known_gate(run)
    return found.renormalised and found.topk > 1
