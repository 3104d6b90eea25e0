"""Shards of JSON Lines, written and read back: zstd, gzip or plain, the same bytes for the same lines."""

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import orjson

from megatron_moe.data.files import atomic_file, open_stream, require_package

Compression = Literal["zst", "gz", "none"]

# zstd's own default, and the fastest for the intermediate shards, which are soon read once and deleted.
_ZSTD_LEVEL = 3
_ZSTD_QUICK = 1
_GZIP_LEVEL = 6
_CHUNK = 1 << 20
_LONGEST_SAMPLE = 240


def shard_file(name: str, compression: Compression) -> str:
    """The file name of a shard."""
    return f"{name}.jsonl" if compression == "none" else f"{name}.jsonl.{compression}"


@contextmanager
def shard_writer(path: Path, where: str | None = None, quick: bool = False) -> Iterator[Callable[[bytes], object]]:
    """A shard to write, which gets its name when it is complete.

    Args:
        path: its ending says how it is compressed.
        where: how errors name it, see `atomic_file`.
        quick: compress less, faster.
    """
    with atomic_file(path, where) as stream:
        if path.suffix == ".zst":
            compressor = require_package("zstandard", path).ZstdCompressor(_ZSTD_QUICK if quick else _ZSTD_LEVEL)
            with compressor.stream_writer(stream, closefd=False) as packed:
                yield packed.write
        elif path.suffix == ".gz":
            # Without name and time of writing, which would make equal shards differ.
            with gzip.GzipFile("", "wb", _GZIP_LEVEL, stream, mtime=0) as packed:
                yield packed.write
        else:
            yield stream.write


def shard_lines(path: Path) -> Iterator[bytes]:
    """The lines of a shard, each with its newline."""
    with open_stream(path) as (stream, _):
        rest = b""
        while data := stream.read(_CHUNK):
            lines = (rest + data).split(b"\n")
            rest = lines.pop()
            for line in lines:
                yield line + b"\n"


def shown(line: bytes) -> str:
    """The beginning of the text in a line of a shard, whatever its field is called: the longest of all."""
    texts = [value for value in orjson.loads(line).values() if isinstance(value, str)]
    return max(texts, key=len, default="")[:_LONGEST_SAMPLE]
