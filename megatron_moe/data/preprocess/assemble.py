"""Finished parts to finished pairs: one after the other in the order of the input, or cut into shards."""

import contextlib
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError
from megatron_moe.config.model import MOST_DOMAINS
from megatron_moe.data.domains import DTYPE, DomainsWriter
from megatron_moe.data.indexed_writer import IndexedWriter, Readable
from megatron_moe.data.preprocess.job import Output, Totals
from megatron_moe.data.preprocess.workspace import Workspace

# Tokens in a file, from its position on; tokens of each sequence; sequences of each document (None: one).
_Block = tuple[Readable, npt.NDArray[np.int32], npt.NDArray[np.int32] | None]
# Documents in memory at a time.
_BLOCK = 1 << 16
# Bytes.
_COPY = 1 << 20


@dataclass(frozen=True)
class Part:
    """A finished piece as far as one field is concerned.

    Attributes:
        name: the piece.
        field: the number of the field.
        totals: its counts.
        checksums: crc32 of each of its columns.
        domains: names of the domains in it, in the order of their numbers there.
    """

    name: str
    field: int
    totals: Totals
    checksums: dict[str, int]
    domains: tuple[str, ...] = ()


def assemble(
    workspace: Workspace, parts: Sequence[Part], prefix: Path, key: str, dtype: np.dtype, shard_tokens: int | None
) -> list[Output]:
    """Write the pair of one field, or its shards.

    Args:
        workspace: where the parts lie.
        parts: in the order of the input.
        prefix: of the pair; shards add `-00000-of-00004` to it.
        key: the field.
        dtype: of the ids.
        shard_tokens: begin another shard with the document that would bring this one over so many tokens.

    Raises:
        UserError: a part is damaged, or there is no room.
    """
    if shard_tokens is None:
        names = iter([prefix])
    else:
        count = sum(1 for _ in _shards(workspace, parts, shard_tokens))
        names = iter([shard_prefix(prefix, index, count) for index in range(count)])
    outputs = []
    names_of_domains = domain_names(parts)
    source = _Source(workspace, parts, dtype)
    with contextlib.closing(source):
        for limit in _shards(workspace, parts, shard_tokens) if shard_tokens else [None]:
            name = next(names)
            with DomainsWriter(name, workspace.folder) as domains:
                with IndexedWriter(name, dtype, scratch=workspace.folder) as writer:
                    source.write(writer, limit)
                    domains.discard_old()
                if names_of_domains:
                    for ids in source.domains(writer.documents):
                        domains.add(ids)
                    domains.publish(names_of_domains)
            outputs.append(Output(name, key, writer.documents, writer.sequences, writer.tokens))
    return outputs


def domain_names(parts: Sequence[Part]) -> list[str]:
    """Names of the domains in all parts, in the order in which they occur."""
    names = list(dict.fromkeys(name for part in parts for name in part.domains))
    if len(names) > MOST_DOMAINS:
        raise UserError(f"--domain-key: {len(names):,} different values; at most {MOST_DOMAINS:,} can be told apart")
    return names


def shard_prefix(prefix: Path, index: int, count: int) -> Path:
    """The name of one of several shards: their number stands in it, so that no old one is taken for a part of a set."""
    return Path(f"{prefix}-{index:05d}-of-{count:05d}")


def _shards(workspace: Workspace, parts: Sequence[Part], shard_tokens: int) -> Iterator[int]:
    """Documents in each shard."""
    documents = tokens = 0
    for part in parts:
        for _, _, sizes in _columns(workspace, part):
            ends = np.cumsum(sizes, dtype=np.int64)
            start = 0
            while start < len(sizes):
                taken = int(ends[start - 1]) if start else 0
                # Documents that still fit; a shard has at least one.
                fitting = int(np.searchsorted(ends, taken + shard_tokens - tokens, side="right")) - start
                fitting = max(fitting, 0 if documents else 1)
                documents += fitting
                start += fitting
                tokens += (int(ends[start - 1]) if start else 0) - taken
                if start < len(sizes):
                    yield documents
                    documents = tokens = 0
    if documents:
        yield documents


class _Source:
    """The documents of all parts, read forward."""

    def __init__(self, workspace: Workspace, parts: Sequence[Part], dtype: np.dtype) -> None:
        self._workspace = workspace
        self._itemsize = dtype.itemsize
        self._blocks = self._all(parts)
        # What a shard's end has left of a block.
        self._rest: _Block | None = None
        self._domains = self._all_domains(parts)
        self._rest_domains = np.empty(0, DTYPE)

    def write(self, writer: IndexedWriter, limit: int | None) -> None:
        """Append the next `limit` documents, or all there are."""
        while limit is None or limit > 0:
            block = self._rest or next(self._blocks, None)
            self._rest = None
            if block is None:
                return
            tokens, lengths, documents = block
            count = len(lengths) if documents is None else len(documents)
            if limit is not None and count > limit:
                sequences = limit if documents is None else int(documents[:limit].sum())
                self._rest = tokens, lengths[sequences:], None if documents is None else documents[limit:]
                lengths, documents = lengths[:sequences], None if documents is None else documents[:limit]
                count = limit
            writer.add_stored(tokens, lengths, documents)
            limit = None if limit is None else limit - count

    def domains(self, count: int) -> Iterator[npt.NDArray[np.uint16]]:
        """Of the next `count` documents, by the numbers of all parts together."""
        while count:
            if not len(self._rest_domains):
                self._rest_domains = next(self._domains)
            yield self._rest_domains[:count]
            count, self._rest_domains = max(0, count - len(self._rest_domains)), self._rest_domains[count:]

    def close(self) -> None:
        """Close the files that are being read."""
        self._blocks.close()
        self._domains.close()

    def _all_domains(self, parts: Sequence[Part]) -> Generator[npt.NDArray[np.uint16]]:
        numbers = {name: number for number, name in enumerate(domain_names(parts))}
        for part in parts:
            if not part.totals.documents:
                continue
            renumbered = np.array([numbers[name] for name in part.domains], DTYPE)
            with _opened_column(self._workspace, part, "domains") as file:
                left = part.totals.documents
                while left:
                    count = min(left, _BLOCK)
                    left -= count
                    yield renumbered[np.frombuffer(file.read(DTYPE.itemsize * count), DTYPE)]

    def _all(self, parts: Sequence[Part]) -> Generator[_Block]:
        for part in parts:
            with _opened_column(self._workspace, part, "bin", part.totals.tokens * self._itemsize) as tokens:
                for lengths, documents, _ in _columns(self._workspace, part):
                    yield tokens, lengths, documents


def _columns(
    workspace: Workspace, part: Part
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32] | None, npt.NDArray[np.int64]]]:
    """Tokens of each sequence, sequences of each document (None: one), and tokens of each document; in blocks."""
    left = part.totals.documents
    with contextlib.ExitStack() as files:
        lengths_file = files.enter_context(_opened_column(workspace, part, "lengths"))
        documents_file = None
        if "documents" in part.checksums:
            documents_file = files.enter_context(_opened_column(workspace, part, "documents"))
        while left:
            count = min(left, _BLOCK)
            left -= count
            documents = None if documents_file is None else _read(documents_file, count)
            lengths = _read(lengths_file, count if documents is None else int(documents.sum()))
            if documents is None:
                yield lengths, None, lengths.astype(np.int64)
            else:
                ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
                last = np.cumsum(documents)
                yield lengths, documents, ends[last] - ends[last - documents]


class _Checked:
    """A file that is read forward, and the crc32 of what was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.checksum = 0

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self.checksum = zlib.crc32(content, self.checksum)
        return content


@contextlib.contextmanager
def _opened_column(workspace: Workspace, part: Part, column: str, size: int | None = None) -> Iterator[_Checked]:
    """A column of a part, which must be as it was written.

    Args:
        workspace, part, column: which.
        size: bytes it must have; its checksum is compared after all of it was read. None: compared at once, before
            anybody relies on the numbers in it.
    """
    path = workspace.column(part.name, part.field, column)
    expected = part.checksums[column]
    cure = f"delete {workspace.folder} and start again"
    try:
        with path.open("rb") as file:
            if size is None:
                before = _Checked(file)
                while before.read(_COPY):
                    pass
                if before.checksum != expected:
                    raise UserError(f"{path}: damaged, not what was written; {cure}")
                file.seek(0)
            elif size != path.stat().st_size:
                raise UserError(f"{path}: damaged, {path.stat().st_size} bytes instead of {size}; {cure}")
            checked = _Checked(file)
            yield checked
            if checked.checksum != expected:
                raise UserError(f"{path}: damaged, not what was written; {cure}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {cure}") from error


def _read(file: _Checked, count: int) -> npt.NDArray[np.int32]:
    return np.frombuffer(file.read(4 * count), "<i4")
