"""The tool's flags: errors are one line that says what to do, the exit code says whether everything was read."""

import errno
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.base import UserError
from megatron_moe.data.wudao.command import main
from megatron_moe.data.wudao.recipe import load_recipe
from tests.data.chinese_text import documents

LONG = "今天天气很好，我们一起去公园散步，看到了许多盛开的花朵。"


@pytest.fixture
def part(tmp_path: Path) -> Path:
    path = tmp_path / "corpus" / "part-1.json"
    path.parent.mkdir()
    texts = [*documents(30), LONG]
    records = [{"id": number, "title": "题", "content": text} for number, text in enumerate(texts)]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def run(part: Path, *flags: str) -> int:
    folder = part if part.is_dir() else part.parent
    return main(["--input", str(part), "--output", str(folder.parent / "out"), "--workers", "1", *flags], "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "wudao-defualt"], r"--recipe wudao-defualt: no such file or name; did you mean wudao-default\?"),
        (["--set", "lenght.least=5"], "lenght: unknown rule; did you mean length"),
        (["--input", "nowhere"], "--input nowhere: no such file or folder"),
        (["--decontaminate", "nowhere.jsonl"], r"--decontaminate nowhere\.jsonl: no such file"),
        (["--word-list", "nowhere.txt"], r"--word-list nowhere\.txt: no such file"),
        (["--title-key", "content"], "--title-key content: is --text-key too"),
        (["--output", "{part}"], "is a file; give a folder"),
        (["--input", "{folder}", "--output", "{folder}/cleaned"], r"lies in --input .*corpus, where it would be read"),
        (["--input", "{part}", "{part}"], "is given twice"),
    ],
)
def test_mistakes_are_one_line(part: Path, flags: list[str], message: str) -> None:
    flags = [flag.format(part=part, folder=part.parent) for flag in flags]
    with pytest.raises(UserError, match=message) as caught:
        run(part, *flags)
    assert "\n" not in str(caught.value)
    assert not (part.parent / "cleaned").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--range-size", "1K"], "error: --range-size 1024: must be at least 65536"),
        (["--range-size", "many"], "many: must be a number of bytes, such as 256M"),
        (["--longest-record", "8G"], "error: --longest-record 8589934592: must be between"),
        (["--slurm-args", "account"], "error: --slurm-args account: must be NAME=VALUE"),
        (["--worker", "2"], "error: unknown flag --worker; did you mean --workers?"),
    ],
)
def test_illegal_values_are_one_line(
    part: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(part, *flags)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_input_and_output_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, missing in (([], "--input"), (["--input", "x"], "--output")):
        with pytest.raises(SystemExit):
            main(flags, "")
        assert capsys.readouterr().err.startswith(f"error: {missing} is missing")


def test_a_full_disk_is_one_line(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"--output .*out: cannot be written: No space left on device; make room"):
            run(part)
    assert not list((part.parent.parent / "out").glob("*.zst"))
    assert run(part) == 0


def test_damaged_input_gives_its_rest_and_exit_code_3(part: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = part.parent
    (folder / "cut.json.gz").write_bytes(gzip.compress(part.read_bytes())[:-200])
    (folder / "empty.json").write_bytes(b"")
    (folder / "README.txt").write_text("not a record", encoding="utf-8")
    (folder / "types.jsonl").write_text(
        '{"content":5}\n{"content":"' + LONG + "第二天下了雨，大家在家里读书。" + '"}\n', encoding="utf-8"
    )
    assert run(folder, "--dedup", "none") == 3
    out = capsys.readouterr().out
    assert "not read as it stands, see quarantine.jsonl: damaged file 1, empty file 1" in out
    entries = [json.loads(line) for line in (folder.parent / "out" / "quarantine.jsonl").read_bytes().splitlines()]
    assert [(Path(entry["file"]).name, entry["reason"]) for entry in entries] == [
        ("cut.json.gz", "damaged file"),
        ("cut.json.gz", "not JSON"),
        ("empty.json", "empty file"),
        ("types.jsonl", "wrong type"),
    ]
    assert entries[3] == {
        "file": str(folder / "types.jsonl"),
        "offset": 0,
        "bytes": 13,
        "reason": "wrong type",
        "detail": "'content' is a number, not text",
        "kept": False,
        "head": "{'content': 5}",
    }
    report = json.loads((folder.parent / "out" / "report.json").read_bytes())
    assert report["quarantine"]["entries"] == 4
    assert [entry["documents"] for entry in report["outputs"]][1:] == [0, 31, 1]
    # And the same when it is asked again.
    assert run(folder, "--dedup", "none") == 3
    assert "finished before, nothing to do" in capsys.readouterr().out


def test_the_wrong_text_key_is_said(part: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(part, "--text-key", "text") == 3
    assert "nothing could be read: see quarantine.jsonl; is --text-key right?" in capsys.readouterr().err


def test_word_lists_and_settings_reach_the_recipe(part: Path) -> None:
    words = part.parent.parent / "words.txt"
    words.write_text("盛开\n花朵\n公园\n散步\n", encoding="utf-8")
    assert run(part, "--word-list", str(words), "--set", "length.least=12", "--dedup", "exact") == 0
    report = json.loads((part.parent.parent / "out" / "report.json").read_bytes())
    dropped = {rule["rule"]: rule["dropped"] for rule in report["rules"]}
    assert dropped["sensitive_words"] == 1
    assert report["recipe"]["dedup"] == "exact"


def test_recipes_are_listed_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-recipes"], "") == 0
    assert capsys.readouterr().out.split() == ["pai", "strict", "wudao-default"]
    assert main(["--show-recipe", "wudao-default"], "") == 0
    mine = tmp_path / "mine.yaml"
    mine.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(str(mine)).fingerprint == load_recipe("wudao-default").fingerprint
    with pytest.raises(UserError, match="did you mean strict"):
        main(["--show-recipe", "strikt"], "")


@pytest.mark.parametrize("recipe", ["wudao-default", "strict", "pai"])
def test_every_recipe_cleans_a_part(part: Path, recipe: str) -> None:
    assert run(part, "--recipe", recipe) == 0
    report: dict[str, Any] = json.loads((part.parent.parent / "out" / "report.json").read_bytes())
    assert report["read"]["documents"] == 31
    assert report["recipe"]["name"] == recipe
