"""Converts a checkpoint piece by piece, in several processes: never more of it in memory than they work on.

The folder appears only complete. Until then it has another name, under which a killed conversion goes on; what no
other start can finish, as when the source is damaged or the proof failed, is removed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_moe import __version__
from megatron_moe.checkpoint.convert.blocks import Block, Box, Side
from megatron_moe.checkpoint.convert.coverage import check_coverage
from megatron_moe.checkpoint.convert.engine import Targets, assemble, check_fills
from megatron_moe.checkpoint.convert.journal import Journal, check_free, check_room, fingerprint
from megatron_moe.checkpoint.convert.tensors import TensorInfo, TensorSource
from megatron_moe.config.base import Resumable, UserError, disk_error
from megatron_moe.data.pool import run_tasks

# Pieces that one task is made of: many small ones, or a large one.
_TASK_BYTES = 32 << 20
_TASK_PIECES = 512
# A process takes seconds to start, in which one converts about as much.
_BYTES_PER_WORKER = 512 << 20
# What the processes need, imported once for all of them.
_PRELOAD = tuple(f"{__package__}.{name}" for name in ("stream", "safetensors_files", "ours_reader", "ours_writer"))
_ADVICE = "start the same again to go on, with fewer --workers if memory was short"


class TensorWriter(Protocol):
    """Writes tensors into files whose layout is known beforehand. It can be sent to another process."""

    side: Side
    """Whose tensors they are."""
    infos: dict[str, TensorInfo]
    """All of them."""

    @property
    def total_bytes(self) -> int:
        """On disk."""

    @property
    def files(self) -> list[Path]:
        """Those that pieces are written into."""

    @property
    def pieces(self) -> list[Box]:
        """Parts in which they are written; always the same."""

    @property
    def is_prepared(self) -> bool:
        """Whether the files are there."""

    def prepare(self) -> None:
        """Make the files."""

    def write(self, piece: Box, values: Tensor) -> None:
        """Write a piece."""

    def finish(self) -> None:
        """Write what belongs beside the pieces once they are all written."""


def convert(
    blocks: Sequence[Block],
    source: TensorSource,
    writer: TensorWriter,
    output: Path,
    *,
    inputs: Sequence[Path],
    finish: Callable[[Path], None],
    flag: str = "--output",
    source_name: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Convert a checkpoint into a folder.

    Args:
        blocks: the map between both sides.
        source: of the side that is read.
        writer: of the other side; its files lie in `journal.py:unfinished_folder(output)`.
        output: the folder, which appears when it is complete.
        inputs: files and folders that are read: an unfinished conversion goes on only if they did not change.
        finish: adds the files that are no tensors to the unfinished folder, where it finds none of an earlier start;
            called when all tensors are written. Its `UserError` says that the conversion is wrong, unless it is
            `Resumable`.
        flag: names `output` in messages.
        source_name: names the source in messages; by default the first of `inputs`.
        workers: processes; default: one for each core, and one alone for what is small.
        progress: show a bar on a terminal.

    Raises:
        UserError: the source does not fit the map, or is damaged; `output` is there already or cannot be written; a
            process died. What was written is kept for another start where the error is `Resumable`, and where an
            earlier start had begun.
    """
    check_free(output, flag)
    name = source_name or str(inputs[0])
    if writer.side == "ours":
        check_coverage(blocks, writer.infos, source.infos, theirs_in=name)
        check_fills(blocks, source)
    else:
        check_coverage(blocks, source.infos, writer.infos, ours_in=name, theirs_in="the files to write")
    identity = fingerprint((__version__, type(writer).__name__, list(writer.infos.items()), blocks), inputs)
    journal = Journal(output, flag, identity)
    # An earlier start's work is not thrown away for a mistake in this one.
    anew = journal.done is None or not writer.is_prepared
    removable = anew
    try:
        pieces = writer.pieces
        if anew:
            journal.start_anew()
            check_room(output, writer.total_bytes, flag)
            writer.prepare()
            journal.begin()
        else:
            assert journal.done is not None
            check_room(output, writer.total_bytes - _bytes(writer, [pieces[index] for index in journal.done]), flag)
        _write_pieces(blocks, source, writer, pieces, journal, workers, progress=progress)
        removable = True
        journal.keep_only(writer.files)
        writer.finish()
        try:
            finish(journal.folder)
        except OSError as error:
            raise disk_error(f"{flag} {output}", error) from error
        removable = False
        journal.publish()
    except UserError as error:
        if removable and not isinstance(error, Resumable):
            journal.discard()
        raise
    finally:
        # Up to here no other process may begin in the folder, so that none of its work is removed.
        journal.close()


def _write_pieces(
    blocks: Sequence[Block],
    source: TensorSource,
    writer: TensorWriter,
    pieces: Sequence[Box],
    journal: Journal,
    workers: int | None,
    *,
    progress: bool,
) -> None:
    assert journal.done is not None
    left = [index for index in range(len(pieces)) if index not in journal.done]
    total = _bytes(writer, pieces)
    todo = _bytes(writer, [pieces[index] for index in left])
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), max(1, todo // _BYTES_PER_WORKER))
    tasks = ([(index, pieces[index]) for index in group] for group in _grouped(left, pieces, writer))
    arguments = (Targets(blocks, writer.side), source, writer, workers)
    with tqdm(total=total, initial=total - todo, unit="B", unit_scale=True, disable=None if progress else True) as bar:
        for task, written in run_tasks(_Worker, arguments, tasks, workers, _ADVICE, _PRELOAD):
            journal.add([index for index, _ in task])
            bar.update(written)


def _grouped(indices: Sequence[int], pieces: Sequence[Box], writer: TensorWriter) -> Iterator[list[int]]:
    group: list[int] = []
    used = 0
    for index in indices:
        size = _bytes(writer, [pieces[index]])
        if group and (used + size > _TASK_BYTES or len(group) == _TASK_PIECES):
            yield group
            group, used = [], 0
        group.append(index)
        used += size
    if group:
        yield group


def _bytes(writer: TensorWriter, pieces: Sequence[Box]) -> int:
    return sum(piece.numel * writer.infos[piece.name].dtype.itemsize for piece in pieces)


class _Worker:
    """Puts pieces together and writes them."""

    def __init__(self, targets: Targets, source: TensorSource, writer: TensorWriter, workers: int) -> None:
        if workers > 1:
            # The processes are the parallelism.
            torch.set_num_threads(1)
        self._targets, self._source, self._writer = targets, source, writer
        # One for all pieces: the system takes as long to hand out fresh memory as to fill it.
        self._memory = torch.empty(0, dtype=torch.uint8)

    def __call__(self, task: Sequence[tuple[int, Box]]) -> int:
        written = 0
        for _, piece in task:
            dtype = self._writer.infos[piece.name].dtype
            count = piece.numel * dtype.itemsize
            if count > len(self._memory):
                self._memory = torch.empty(0, dtype=torch.uint8)
                self._memory = torch.empty(count, dtype=torch.uint8)
            values = self._memory[:count].view(dtype).view(piece.size)
            assemble(self._targets, piece, self._source, dtype, values)
            self._writer.write(piece, values)
            written += count
        return written
