"""Bad lines are named by file and number; .gz files read like plain ones."""

import gzip
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megatron_moe.config.base import UserError
from megatron_moe.data.documents import check_input_files, read_documents

BAD_LINES = {
    b"": "empty line",
    b"{not json}": "not JSON",
    b'"text"': "expected a JSON object with the field 'text', got str",
    b'{"content": "a"}': "no field 'text' (--json-key); fields here: 'content'",
    b'{"text": 3}': "field 'text' must be a string, got int",
    b'{"text": "\\ud83d"}': "half of a surrogate pair at character 0",
    b'{"text": "\xff"}': "not UTF-8",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: repr(line)[:30])
def test_a_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(UserError) as caught:
        list(read_documents(path, "text"))
    message = str(caught.value)
    assert message.startswith(f"{path} line 2: ")
    assert BAD_LINES[line] in message
    assert "\n" not in message


def test_a_part_of_wudao_is_sent_to_the_cleaner(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.json"
    path.write_text('[{"id": 1, "content": "a"},\n{"id": 2, "content": "b"}]\n')
    with pytest.raises(
        UserError, match=r"part-00000\.json line 1: a JSON array; tools/clean_wudao\.py makes JSON Lines"
    ):
        list(read_documents(path, "content"))


def test_gzip_reads_like_plain(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress('{"text": "第一段"}\n{"text": "第二段"}'.encode()))
    assert list(read_documents(path, "text")) == ["第一段", "第二段"]


def test_a_cut_gzip_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-12])
    with pytest.raises(UserError, match="cannot read it to the end"):
        list(read_documents(path, "text"))


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--input .*none\.jsonl: no such file"):
        check_input_files([tmp_path / "none.jsonl"])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="the file is empty"):
        check_input_files([tmp_path / "empty.jsonl"])


def test_parquet_and_plain_text_read_like_json_lines(tmp_path: Path) -> None:
    texts = ["第一段\n第二段", "", "another"]
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": texts}), tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet", "text")) == texts
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress("第一段\nanother".encode()))
    assert list(read_documents(tmp_path / "a.txt.zst", "text")) == ["第一段\n", "another"]


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'content' \(--json-key\); columns here: 'text'"):
        list(read_documents(tmp_path / "a.parquet", "content"))
    with pytest.raises(UserError, match=r"a\.parquet row 1: field 'text' must be a string, got NoneType"):
        list(read_documents(tmp_path / "a.parquet", "text"))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cut\.parquet: not Parquet, or damaged"):
        list(read_documents(tmp_path / "cut.parquet", "text"))
