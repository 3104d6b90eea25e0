"""Inputs are found in folders; plain, .gz and .zst read alike; a cut file is an error; a file appears only complete."""

import errno
import gzip
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_moe.config.base import UserError
from megatron_moe.data.files import (
    DAMAGED,
    atomic_file,
    atomic_write,
    base_suffix,
    expand_inputs,
    iterate_lines,
    locked_file,
    open_stream,
    require_package,
)

LINES = [f"第{number}行，一些文字。\n".encode() for number in range(20_000)]
CONTENT = b"".join(LINES)


def zst(content: bytes) -> bytes:
    return zstandard.compress(content)


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zst}


@pytest.mark.parametrize("ending", PACK)
def test_every_compression_gives_the_same_lines(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(PACK[ending](CONTENT))
    with open_stream(path) as (stream, position):
        assert list(iterate_lines(stream, path)) == LINES
        assert position() == path.stat().st_size


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_parts_joined_by_cat_read_to_the_end(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    pack = PACK[ending]
    path.write_bytes(pack(CONTENT) + pack(b"") + pack(b"the end\n"))
    with open_stream(path) as (stream, _):
        assert stream.read() == CONTENT + b"the end\n"


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("cut", [1, 5, 1000])
def test_a_cut_file_is_an_error_after_what_can_be_read(tmp_path: Path, ending: str, cut: int) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(PACK[ending](CONTENT)[:-cut])
    with open_stream(path) as (stream, _), pytest.raises(UserError, match=r"a\.jsonl.*: cannot read it to the end"):
        list(iterate_lines(stream, path))
    with open_stream(path) as (stream, _), pytest.raises(DAMAGED):
        stream.read()


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_flipped_byte_is_an_error(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    packed = bytearray(PACK[ending](CONTENT))
    packed[0] ^= 0xFF
    path.write_bytes(packed)
    with open_stream(path) as (stream, _), pytest.raises(UserError, match="cannot read it to the end"):
        list(iterate_lines(stream, path))


def test_a_zstd_bomb_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "zeros.jsonl.zst"
    path.write_bytes(zst(bytes(1 << 30)))
    assert path.stat().st_size < 1 << 17
    tracing = pytest.importorskip("tracemalloc")
    with open_stream(path) as (stream, _):
        tracing.start()
        try:
            assert len(stream.read(1 << 20)) == 1 << 20
            assert tracing.get_traced_memory()[1] < 200 << 20
        finally:
            tracing.stop()


def test_a_folder_stands_for_its_data_files_in_order(tmp_path: Path) -> None:
    wanted = ["a.jsonl", "b/part-1.json.gz", "b/part-2.PARQUET", "c.txt.zst"]
    for name in [
        *wanted,
        "report.json",
        "t/tokenizer.json",
        "quarantine.jsonl",
        ".work/x.jsonl",
        "notes.md",
        "a.jsonl.12.tmp",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert expand_inputs([tmp_path]) == [tmp_path / name for name in wanted]
    assert expand_inputs([tmp_path / "report.json", tmp_path / "b"])[0].name == "report.json"


def test_inputs_that_cannot_be_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--input .*none: no such file or folder"):
        expand_inputs([tmp_path / "none"])
    with pytest.raises(UserError, match="no data file in this folder"):
        expand_inputs([tmp_path])
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match="the file is empty"):
        expand_inputs([tmp_path])
    (tmp_path / "a.jsonl").write_text("x")
    with pytest.raises(UserError, match=r"--heldout .*a\.jsonl: is given twice"):
        expand_inputs([tmp_path, tmp_path / "a.jsonl"], "--heldout")


def test_parquet_in_a_compressed_file_is_refused_at_once(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet.gz"):
        (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"b\.parquet\.gz: Parquet cannot be read out of \.gz; unpack it"):
        expand_inputs([tmp_path])
    assert expand_inputs([tmp_path / "a.parquet"])


def test_a_held_file_is_refused_until_it_is_let_go(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with (
        locked_file(path, "busy", "--output"),
        pytest.raises(UserError, match="busy"),
        locked_file(path, "busy", "--output"),
    ):
        pass
    with locked_file(path, "busy", "--output"):
        pass
    with pytest.raises(UserError, match="--output x: cannot be written"), locked_file(path / "a", "", "--output x"):
        pass


def test_the_suffix_is_the_one_below_the_compression() -> None:
    assert base_suffix(Path("a.b.jsonl.ZST")) == ".jsonl"
    assert base_suffix(Path("a.TXT")) == ".txt"


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    atomic_write(path, "第一")
    assert path.read_text(encoding="utf-8") == "第一"

    def fail_half_way() -> None:
        with atomic_file(path) as stream:
            stream.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert path.read_text(encoding="utf-8") == "第一"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    full = pytest.raises(UserError, match=r"--output x: cannot be written: No space left.*make room")
    with full, atomic_file(tmp_path / "a", "--output x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(UserError, match=r"a\.zst: needs the package zstandard; pip install 'megatron_moe\[data\]'"):
        require_package("zstandard", "a.zst")


def test_a_cut_gzip_gives_every_byte_that_stands_before_the_cut(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(50_000)
    path = tmp_path / "part.json"
    path.write_bytes(gzip.compress(content)[:40_000])
    read = []
    with open_stream(path, ".gz") as (stream, _), pytest.raises(EOFError):
        read.extend(iter(lambda: stream.read1(1 << 20), b""))  # type: ignore[attr-defined]
    assert len(b"".join(read)) > 39_900
    assert content.startswith(b"".join(read))
