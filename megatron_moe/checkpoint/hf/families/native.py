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
    stored = list(stored)
    # Without such a matrix a layer past the last one is of a deeper model than config.json says.
    predicting = {_layer(name) for name in stored if name.endswith(".eh_proj.weight")}
    names: dict[str, str] = {}
    for name in stored:
        known = family.stored_name(name)
        if known is None or (is_left_out(family, run, name) and _layer(known) in {None, *predicting}):
            continue
        if known in names:
            raise UserError(f"{name}: is {names[known]} a second time; the files are of two models: fetch them again")
        names[known] = name
    return names


def is_left_out(family: Family, run: RunConfig, name: str) -> bool:
    """Whether the class itself may leave out what its files hold under this name (`names_in_files`)."""
    known = family.stored_name(name)
    if known is None or is_tied_output(family, run, name):
        return True
    layer = _layer(known)
    return family.skips_later_layers and layer is not None and layer >= run.model.num_layers


def is_tied_output(family: Family, run: RunConfig, name: str) -> bool:
    """Whether the files hold under this name an output layer that the embedding stands for: `RenamedSource.check_tied`
    holds it against that."""
    return family.stored_name(name) == "lm_head.weight" and not run.model.untie_embeddings_and_output_weights


def _layer(name: str) -> int | None:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return None if found is None else int(found[1])


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
