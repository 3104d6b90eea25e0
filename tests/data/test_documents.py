"""Bad lines are named by file and number; .gz files read like plain ones."""

import gzip
from pathlib import Path

import pytest

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
