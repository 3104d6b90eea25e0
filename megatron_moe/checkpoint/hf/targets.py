"""Which Hugging Face class holds a model, and what model a config.json describes. Pure: nothing here opens a file.

    target = choose_hf_target(run)
    print(*target.lines, sep="\\n")
    config = target.config(run)

Classes are tried in the order of `FAMILIES`. The first that computes exactly what the model computes is taken, and if
none does, the class that travels with the checkpoint (`remote/`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_moe.checkpoint.hf.families import (
    deepseek_v3,
    glm4_moe,
    gpt2,
    granitemoeshared,
    llama,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from megatron_moe.checkpoint.hf.families.abilities import NoPlace
from megatron_moe.checkpoint.hf.families.base import Family, HfConfig
from megatron_moe.checkpoint.hf.own_flags import KEY, own_flags, read_own_flags
from megatron_moe.checkpoint.hf.remote import family as remote
from megatron_moe.config.base import ConfigError, UserError, format_value
from megatron_moe.config.model import MOST_LAYERS
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.run import CheckpointConfig, RunConfig
from megatron_moe.config.training import TrainingConfig
from megatron_moe.config.validate import validate
from megatron_moe.config.yaml_io import Values, build_run

WITH_EXPERTS: tuple[Family, ...] = (
    mixtral.FAMILY,
    qwen3_moe.FAMILY,
    granitemoeshared.FAMILY,
    qwen2_moe.FAMILY,
    glm4_moe.FAMILY,
    olmoe.FAMILY,
    deepseek_v3.FAMILY,
)
"""In the order in which they are tried."""
DENSE: tuple[Family, ...] = (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY, gpt2.FAMILY)
READ_ONLY: tuple[Family, ...] = (llama.MISTRAL,)
"""Classes that another one holds as well: they are read, and written when --target names them."""
SHOWN = 2
"""Reasons that are shown of a class that is not exact."""
FAMILIES: tuple[Family, ...] = (*WITH_EXPERTS, *DENSE, *READ_ONLY, remote.FAMILY)


@dataclass(frozen=True)
class Target:
    """The class that a model is exported to."""

    family: Family
    tried: Mapping[str, tuple[str, ...]]
    """Class -> all reasons why it is not exact, of those that were tried before."""
    losses: tuple[str, ...] = ()
    """What of the model the class does not compute; empty where it is exact."""

    @property
    def exact(self) -> bool:
        """Whether it computes what the model computes."""
        return not self.losses

    @property
    def others(self) -> dict[str, str]:
        """Class -> why it is not exact, on one line: the first reasons, and how many more there are."""
        return {
            name: "; ".join(why[:SHOWN]) + (f"; and {len(why) - SHOWN} more" if len(why) > SHOWN else "")
            for name, why in self.tried.items()
        }

    @property
    def lines(self) -> list[str]:
        """The choice and its reasons, for people."""
        lines = [f"not {name}: {why}" for name, why in self.others.items()]
        kind = "exact" if self.exact else f"NOT exact: {'; '.join(self.losses)}"
        return [*lines, f"{self.family.architecture} ({self.family.model_type}): {kind}"]

    def config(self, run: RunConfig) -> dict[str, Any]:
        """config.json without token ids and dtype. An export that lost something has none of our own flags: it comes
        back as what it has become."""
        family = self.family
        own = {KEY: own_flags(run)} if self.exact else {}
        return {"architectures": [family.architecture], "model_type": family.model_type, **family.config(run), **own}


def choose_hf_target(run: RunConfig, target: str | None = None, *, allow_lossy: bool = False) -> Target:
    """The class to export a model to.

    Args:
        run: the model.
        target: model_type of the class to take; None: the first that is exact.
        allow_lossy: take it even if it does not compute what the model computes.

    Raises:
        ConfigError: there is no such class, it is not exact, or it has no place for some of the weights; or no class
            is exact.
    """
    if target is not None:
        return _given(run, target, allow_lossy=allow_lossy)
    tried: dict[str, tuple[str, ...]] = {}
    for family in WITH_EXPERTS if run.moe.num_experts is not None else DENSE:
        found = family.reasons(run)
        if not found:
            return Target(family, tried)
        tried[family.architecture] = found
    if lacking := remote.FAMILY.reasons(run):
        nearest = min(tried, key=lambda name: len(tried[name]))
        raise ConfigError(f"no class holds this model: {'; '.join(lacking)}; nearest: {'; '.join(tried[nearest])}")
    return Target(remote.FAMILY, tried)


def _given(run: RunConfig, target: str, *, allow_lossy: bool) -> Target:
    by_type = {family.model_type: family for family in FAMILIES}
    if target not in by_type:
        raise ConfigError(f"--target {target}: unknown; there are {', '.join(by_type)}")
    family = by_type[target]
    losses = family.reasons(run)
    if not losses:
        return Target(family, {})
    no_place = [reason for reason in losses if isinstance(reason, NoPlace)]
    if no_place:
        why = "; ".join(no_place)
        best = choose_hf_target(run).family.model_type
        raise ConfigError(f"--target {target}: has no place for the weights: {why}; take {best}")
    if not allow_lossy:
        best = choose_hf_target(run).family.model_type
        raise ConfigError(
            f"--target {target}: does not compute what the model computes: {'; '.join(losses)}; take {best}, or give "
            "--allow-lossy"
        )
    return Target(family, {}, tuple(losses))


# ---- reading


def family_of(config: HfConfig) -> Family:
    """The family that a config.json names.

    Raises:
        UserError: it names none that is read.
    """
    by_type = {family.model_type: family for family in FAMILIES}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in by_type:
        raise UserError(f"config.json: model_type {kind}: is not read; there are {', '.join(by_type)}")
    family = by_type[kind]
    named = config.get("architectures") or [family.architecture]
    if not isinstance(named, list) or family.architecture not in named:
        raise UserError(f"config.json: architectures {format_value(named)}: must be {family.architecture}")
    return family


def run_of(config: HfConfig, *, own: bool = True) -> RunConfig:
    """The run whose model a config.json describes; everything but `model`, `moe` and `routing` is left at its default.

    Args:
        config: what the file says.
        own: take an export of ours back as what it was, by its key `megatron_moe`; else read it as anyone's.

    Raises:
        UserError: a field has a value that our model has no flag for, or contradicts our own flags.
    """
    family = family_of(config)
    for name in ("num_hidden_layers", "n_layer"):
        count = config.get(name)
        # Before they are counted one by one.
        if isinstance(count, int) and count > MOST_LAYERS:
            raise UserError(f"config.json: {name} {count}: must be at most {MOST_LAYERS}")
    sections = family.flags(config)
    saved = read_own_flags(config) if own else None
    if saved is None:
        return _checked(sections)
    run = _checked(saved)
    for (section, flag), (here, there) in _differences(sections, family.flags(family.config(run))).items():
        raise UserError(
            f"config.json: {KEY} says something else than the other fields, which make {section}.{flag} {shown(here)} "
            f"instead of {shown(there)}: must agree; if the fields were changed on purpose, take the key out"
        )
    return run


def shown(value: Any) -> str:
    """A flag's value in a message."""
    return "none" if value is None else format_value(value)


def _differences(first: Values, second: Values) -> dict[tuple[str, str], tuple[Any, Any]]:
    flat: Sequence[dict[tuple[str, str], Any]] = [
        {(section, flag): value for section, flags in values.items() for flag, value in flags.items()}
        for values in (first, second)
    ]
    keys = dict.fromkeys([*flat[0], *flat[1]])
    pairs = {key: (flat[0].get(key), flat[1].get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _checked(sections: Values) -> RunConfig:
    """The run of these sections, if its flags fit each other."""
    try:
        run = build_run(sections)
        # Flags of the model against each other; a table of experts comes with the weights, so it need not be drawn.
        alone = dataclasses.replace(
            run,
            parallel=ParallelConfig(device="cpu"),
            training=TrainingConfig(train_iters=1),
            checkpoint=CheckpointConfig(load="."),
        )
        validate(alone, 1)
    except ConfigError as error:
        raise UserError(f"config.json: makes no model: {error}") from error
    return run
