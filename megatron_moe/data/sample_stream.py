"""The samples of a blend as one stream without end: what a run reads at sample i, for every i.

Sample i depends on the files, the seed, --seq-length, --split and the weights alone, not on how many samples a run
asks for, on batch sizes or on a layout. Every epoch of a file holds each of its samples once. Samples are cut at the
same places in every epoch; the text after the last full one, less than --seq-length + 1 tokens, is not read (as with
one epoch of megatron-core's GPTDataset).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch.utils.data import Dataset

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.data.sample_index import SampleDomains
from megatron_moe.data.sample_order import BlendOrder, EpochOrder

Sample = dict[str, torch.Tensor]
# Samples after which a blend's pattern repeats: keeps every share to a millionth, takes 6 MB.
PATTERN_LENGTH = 1 << 20


class Place(NamedTuple):
    """Where a sample of the stream comes from."""

    file: int
    """Which file of the blend."""
    epoch: int
    """How many times all samples of the file have come before."""
    sample: int
    """Which sample of the file's index."""


class SampleStream(Dataset[Sample]):
    """Endless samples of one split: index it with any number from 0 on; it has no length.

    A sample is what megatron-core's GPTDataset makes of it, and `samples`, its number here; and `domains` [S] where the
    files have them.

    Args:
        epochs: one epoch of each file.
        weights: shares of the files; only their ratios matter.
        seed: chooses the order of samples in every epoch but the first, which the index holds.
        identity: what the stream depends on, by name, for `change_of_data`.
        domains: of each file.
        domain_names: in the order of their numbers.
    """

    def __init__(
        self,
        epochs: Sequence[GPTDataset],
        weights: Sequence[float],
        seed: int,
        identity: Mapping[str, Any],
        domains: Sequence[SampleDomains] | None = None,
        domain_names: tuple[str, ...] | None = None,
    ) -> None:
        self._epochs = epochs
        self._domains = domains
        self.domain_names = domain_names
        self._orders = [EpochOrder(len(epoch), seed, file) for file, epoch in enumerate(epochs)]
        self._blend = blend_order(weights) if len(epochs) > 1 else None
        self.identity = dict(identity)

    @property
    def epoch_sizes(self) -> list[int]:
        """Samples that every file holds."""
        return [order.size for order in self._orders]

    def locate(self, position: int) -> Place:
        """Where sample `position` comes from."""
        file, turn = self._blend.locate(position) if self._blend else (0, position)
        return Place(file, *self._orders[file].locate(turn))

    def __getitem__(self, position: int) -> Sample:
        place = self.locate(position)
        sample = self._epochs[place.file][place.sample] | {"samples": torch.tensor(position)}
        if self._domains is not None:
            sample["domains"] = torch.from_numpy(self._domains[place.file][place.sample])
        return sample


def blend_order(weights: Sequence[float], length: int = PATTERN_LENGTH) -> BlendOrder:
    """Turns of files by megatron-core's rule: whoever is furthest behind its share comes next.

    Within the pattern this is what its BlendedDataset reads (megatron/core/datasets/helpers.cpp,
    `build_blending_indices`).

    Raises:
        ConfigError: a share is too small for the pattern, or there are too many files.
    """
    require_helpers()
    from megatron.core.datasets import helpers

    if len(weights) > np.iinfo(np.int16).max:
        raise ConfigError(f"--data-path: {len(weights)} files; a blend takes at most {np.iinfo(np.int16).max}")
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    for file, share in enumerate(shares):
        # The rule serves every file early on, so a pattern would give such a file more than its share.
        if share * length < 1:
            raise ConfigError(
                f"--data-path: file {file + 1} of the blend has weight {weights[file]:g} of {total:g}, less than one "
                f"sample in {length}; give it more, leave it out, or merge it with another file"
            )
    files, turns = np.zeros(length, np.int16), np.zeros(length, np.int64)
    helpers.build_blending_indices(files, turns, shares, len(shares), length, False)
    return BlendOrder(files, turns)


def require_helpers() -> None:
    """megatron-core's compiled index builder, which its wheels hold, and which it can compile from source only in a
    checkout (megatron/core/datasets/utils.py, `compile_helpers`; the wheel has no Makefile).

    Raises:
        UserError: it cannot be imported.
    """
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"megatron-core: its compiled helpers_cpp cannot be imported ({error}); install a wheel "
            "for this Python: "
            "pip install --force-reinstall --no-deps --only-binary :all: 'megatron-core>=0.19,<0.20'"
        ) from error


def change_of_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """How the data of a resumed run differs from that of the run before; None if it is the same stream.

    Args:
        before, now: `SampleStream.identity` of both.
    """
    for name, new in now.items():
        # What stands in a checkpoint is not trusted to have every name, or a list where one is due.
        old = before.get(name)
        if old == new:
            continue
        if isinstance(old, list) and isinstance(new, list):
            pairs = zip(old, new, strict=True) if len(old) == len(new) else [(len(old), len(new))]
            old, new = next(pair for pair in pairs if pair[0] != pair[1])
        return f"{name} ({_show(old)} before, {_show(new)} now)"
    return None


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[:100]
