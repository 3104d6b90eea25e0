"""Megatron's token files: writing and reading a `.bin`/`.idx` pair without torch.

Layout, as in megatron/core/datasets/indexed_dataset.py (`_IndexWriter`, `_IndexReader`), little-endian
throughout:

    .bin   all token ids one after the other, uint16 or int32
    .idx   9 bytes magic | uint64 version 1 | uint8 dtype code | uint64 sequences S | uint64 document marks D
           | int32[S] tokens per sequence | int64[S] byte offset of each | int64[D] first sequence of each
           document, closed by S

A document may have several sequences (sentences). For training it is one stretch of text: `IndexedFile` counts
documents. A prefix is the common path of both files without an ending.
"""

import errno
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODE_OF_DTYPE = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
DTYPE_OF_CODE = {
    code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
# Below this vocabulary size Megatron stores uint16 (`DType.optimal_dtype` in indexed_dataset.py).
_UINT16_VOCABULARY = 65500
# Sequences checked at a time: bounds memory.
_BLOCK = 1 << 22


def bin_path(prefix: str | Path) -> Path:
    """The token file of a prefix."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of a prefix."""
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype:
    """The type Megatron stores token ids in: uint16 where it is enough, otherwise int32."""
    return np.dtype(np.uint16) if vocab_size < _UINT16_VOCABULARY else np.dtype(np.int32)


@dataclass(frozen=True)
class IndexedFile:
    """A checked pair, memory-mapped.

    Attributes:
        prefix: path without ending.
        tokens: [T] every token id.
        lengths: [documents] tokens per document; those without a sequence are left out.
    """

    prefix: str
    tokens: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int32]

    @property
    def num_tokens(self) -> int:
        """Tokens in the pair."""
        return int(self.tokens.size)

    def document(self, index: int) -> npt.NDArray[np.integer]:
        """[lengths[index]] the ids of one document."""
        start = int(self.lengths[:index].sum(dtype=np.int64))
        return self.tokens[start : start + int(self.lengths[index])]


def open_indexed(prefix: str | Path, flag: str = "--data-path") -> IndexedFile:
    """Map a pair after checking that both files are there, are what they say, and fit each other.

    Args:
        prefix: path of the pair without ending.
        flag: where the prefix came from, for errors.

    Raises:
        UserError: a file is missing, cannot be read, is no Megatron index, cut short, or they do not belong together.
    """
    try:
        return _open(prefix, flag)
    except OSError as error:
        cure = "; raise it with ulimit -n, or merge files" if error.errno == errno.EMFILE else ""
        raise UserError(f"{flag} {prefix}: the pair cannot be read: {error.strerror}{cure}") from error


@dataclass(frozen=True)
class IndexHeader:
    """What an index says of itself; the file has the size that follows from it.

    Attributes:
        dtype: of the ids.
        sequences: how many there are.
        documents: how many there are.
        multimodal: a byte a sequence follows, which text training ignores.
    """

    dtype: np.dtype
    sequences: int
    documents: int
    multimodal: bool

    @property
    def offsets_start(self) -> int:
        """Where the byte offsets begin; the lengths stand before them, from `HEADER.size` on."""
        return HEADER.size + 4 * self.sequences

    @property
    def marks_start(self) -> int:
        """Where the document marks begin."""
        return HEADER.size + 12 * self.sequences


def read_header(prefix: str | Path, flag: str) -> IndexHeader:
    """The header of a pair's index.

    Raises:
        UserError: a file is missing, or the index is none, was cut short, or holds no tokens of a text.
    """
    _check_exists(prefix, flag)
    index = idx_path(prefix)
    size = index.stat().st_size
    with index.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise UserError(f"{flag} {prefix}: {index} is not a Megatron index; run tools/preprocess_data.py again")
    _, version, code, sequences, marks = HEADER.unpack(header)
    if version != 1 or code not in DTYPE_OF_CODE:
        raise UserError(f"{flag} {prefix}: {index} has version {version} and dtype code {code}; known: 1, and 1-8")
    needed = HEADER.size + 12 * sequences + 8 * marks
    if size not in (needed, needed + sequences):
        raise UserError(
            f"{flag} {prefix}: {index} holds {size} bytes but announces {needed}; it was cut short or "
            "damaged, run tools/preprocess_data.py again"
        )
    dtype = DTYPE_OF_CODE[code]
    if dtype.kind not in "iu":
        raise UserError(f"{flag} {prefix}: {index} stores {dtype}; token files hold integers")
    if sequences == 0:
        raise UserError(f"{flag} {prefix}: the pair holds no documents")
    return IndexHeader(dtype, sequences, marks - 1, multimodal=size != needed)


def _open(prefix: str | Path, flag: str) -> IndexedFile:
    index, tokens = idx_path(prefix), bin_path(prefix)
    header = read_header(prefix, flag)
    dtype, sequences, marks = header.dtype, header.sequences, header.documents + 1
    body = np.memmap(index, mode="r", offset=HEADER.size)
    lengths = body[: 4 * sequences].view("<i4")
    offsets = body[4 * sequences : 12 * sequences].view("<i8")
    document_starts = body[12 * sequences : 12 * sequences + 8 * marks].view("<i8")
    expected = _check_columns(lengths, offsets, dtype.itemsize, f"{flag} {prefix}: {index}")
    one_each = _check_marks(document_starts, sequences, f"{flag} {prefix}: {index}")
    if not one_each:
        starts, ends = document_bounds(document_starts, offsets, expected)
        lengths = ((ends - starts) // dtype.itemsize).astype(np.int64)
        if int(lengths.max(initial=0)) > np.iinfo(np.int32).max:
            raise UserError(
                f"{flag} {prefix}: a document has {int(lengths.max()):,} tokens; at most 2^31 - 1 can be read"
            )
        lengths = lengths.astype(np.int32)
    found = tokens.stat().st_size
    if found != expected:
        raise UserError(
            f"{flag} {prefix}: {tokens} holds {found} bytes but its index announces {expected}; it was cut "
            "short or belongs to another index, run tools/preprocess_data.py again"
        )
    if expected == 0:
        raise UserError(f"{flag} {prefix}: the pair holds no tokens")
    return IndexedFile(prefix=str(prefix), tokens=np.memmap(tokens, dtype=dtype, mode="r"), lengths=lengths)


def _check_columns(lengths: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], itemsize: int, where: str) -> int:
    """Bytes that the sequences take. megatron-core reads wherever the offsets point, so they must follow from the
    lengths."""
    end = 0
    for start in range(0, len(lengths), _BLOCK):
        block = lengths[start : start + _BLOCK]
        if int(block.min()) < 0:
            raise UserError(f"{where} holds a negative length; it is damaged, run tools/preprocess_data.py again")
        ends = end + np.cumsum(block, dtype=np.int64) * itemsize
        if not np.array_equal(offsets[start : start + _BLOCK] + block.astype(np.int64) * itemsize, ends):
            raise UserError(f"{where} has offsets that its lengths do not give; run tools/preprocess_data.py again")
        end = int(ends[-1])
    return end


def document_bounds(
    marks: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], end: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where each document that has a sequence begins and ends in the token file, in bytes.

    Args:
        marks: first sequence of each document, closed by their number.
        offsets: where each sequence begins.
        end: where the last one ends.
    """
    marks = marks[np.diff(marks, prepend=-1) > 0]
    bounds = np.append(offsets[marks[:-1]], end)
    return bounds[:-1], bounds[1:]


def _check_marks(starts: npt.NDArray[np.int64], sequences: int, where: str) -> bool:
    """Documents must begin at 0, go on in order and end with the last sequence.

    Returns:
        Whether each is one sequence.
    """
    ordered = one_each = True
    for start in range(0, len(starts), _BLOCK):
        steps = np.diff(starts[start : start + _BLOCK + 1])
        ordered &= bool(np.all(steps >= 0))
        one_each &= bool(np.all(steps == 1))
    if not len(starts) or starts[0] != 0 or starts[-1] != sequences or not ordered:
        raise UserError(f"{where} divides its sequences into documents wrongly; run tools/preprocess_data.py again")
    return one_each


def _check_exists(prefix: str | Path, flag: str) -> None:
    for path in (idx_path(prefix), bin_path(prefix)):
        if path.is_file():
            continue
        hint = "write it with tools/preprocess_data.py"
        if str(prefix).endswith((".bin", ".idx")) and Path(prefix).is_file():
            hint = f"give the prefix without its ending: {str(prefix)[:-4]}"
        raise UserError(f"{flag} {prefix}: no file {path}; {hint}")
