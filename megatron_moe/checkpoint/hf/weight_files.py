"""The weights of a Hugging Face folder by the names of its family's map, whatever names the files have.

An import streams them into a checkpoint (`importing.py`), ranks that load the folder read their slices of them
(`loading.py`), and a proof compares them with ours (`compare.py`).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.checkpoint.convert.blocks import Block, Box
from megatron_moe.checkpoint.convert.ranges import split
from megatron_moe.checkpoint.convert.safetensors_files import SafetensorsSource
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.checkpoint.hf.families.base import Family
from megatron_moe.checkpoint.hf.families.native import is_tied_output, names_in_files
from megatron_moe.checkpoint.hf.usual_names import Files, UsualNames, has_names_of_memory
from megatron_moe.config.base import UserError
from megatron_moe.config.run import RunConfig
from megatron_moe.model.parameters import count_parameters

# Times as many parameters as the files hold.
_MOST_DESCRIBED = 2
# Numbers of each of two tensors.
_COMPARED_AT_ONCE = 4 << 20


class RenamedSource:
    """A source under other names; what has none is left out, and what the files only imply is there.

    Args:
        source: the files.
        names: new name -> name in the files.
        blocks: the map of their class.
        tied: names in the files of the embedding, and of an output layer for which it stands, if they hold one.
    """

    def __init__(
        self,
        source: Files,
        names: Mapping[str, str],
        blocks: Iterable[Block] = (),
        tied: tuple[str, str] | None = None,
    ) -> None:
        self._source, self._names, self._tied = source, dict(names), tied
        self.infos: dict[str, TensorInfo] = {new: source.infos[old] for new, old in names.items()}
        dtype = next((info.dtype for info in self.infos.values() if info.dtype.is_floating_point), torch.float32)
        self._implied: dict[str, float] = {}
        for block in blocks:
            if block.implied and block.theirs is not None and block.theirs.name not in names:
                self._implied[block.theirs.name] = block.fill
                self.infos[block.theirs.name] = TensorInfo(block.theirs.size, dtype)

    def check_tied(self, share: int = 0, shares: int = 1) -> None:
        """Hold an output layer that was left out against the embedding. transformers does the same, and computes with
        the output layer where they differ, whatever config.json says (`PreTrainedModel.tie_weights`).

        Args:
            share: which of the pieces are read.
            shares: of how many; all processes together look at everything.

        Raises:
            UserError: they differ.
        """
        if self._tied is None:
            return
        embedding, output = self._tied
        info = self._source.infos[embedding]
        same = info == self._source.infos[output]
        for start, size in split(info.shape, _COMPARED_AT_ONCE)[share::shares] if same else ():
            one, two = (self._source.read(Box(name, start, size)) for name in self._tied)
            if not torch.equal(one.flatten().view(torch.uint8), two.flatten().view(torch.uint8)):
                same = False
                break
        if not same:
            raise UserError(
                f"{output}: differs from {embedding}, although tie_word_embeddings of config.json is true; set it to "
                "false, or remove the one that is not the model's"
            )

    def read(self, box: Box) -> Tensor:
        """A part of a tensor."""
        if box.name in self._implied:
            return torch.full(box.size, self._implied[box.name], dtype=self.infos[box.name].dtype)
        return self._source.read(dataclasses.replace(box, name=self._names[box.name]))

    def read_into(self, box: Box, out: Tensor) -> None:
        """A part of a tensor, into contiguous memory of its dtype and size."""
        if box.name in self._implied:
            out.fill_(self._implied[box.name])
            return
        self._source.read_into(dataclasses.replace(box, name=self._names[box.name]), out)


def open_files(folder: Path, family: Family, run: RunConfig) -> RenamedSource:
    """The weights of a folder by the names of the family's map.

    Raises:
        UserError: a file is missing or damaged.
    """
    files: Files = SafetensorsSource(folder)
    if has_names_of_memory(files):
        files = UsualNames(files, family.model_type)
    names = names_in_files(family, run, files.infos)
    held = sum(prod(files.infos[name].shape) for name in names.values())
    # Before blocks are made of it, or memory is taken for it. Of what lacks less, the map says which tensor it is.
    if (described := count_parameters(run).total) > _MOST_DESCRIBED * held:
        raise UserError(
            f"{folder / 'config.json'}: describes a model of {described} parameters, but the files beside it hold "
            f"{held} numbers; fetch the whole checkpoint again"
        )
    blocks = family.blocks(run)
    embeddings = [names.get(block.theirs.name) for block in blocks if block.theirs and _is_embedding(block)]
    outputs = [name for name in files.infos if is_tied_output(family, run, name)]
    tied = next(((one, two) for one in embeddings if one is not None for two in outputs), None)
    return RenamedSource(files, names, blocks, tied)


def _is_embedding(block: Block) -> bool:
    return block.ours is not None and block.ours.name == "embedding.word_embeddings.weight"
