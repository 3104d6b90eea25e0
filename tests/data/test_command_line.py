"""Tools take flags in full only, and suggest the nearest one."""

import pytest

from megatron_moe.data.command_line import ToolParser, add_workers, byte_progress


def test_abbreviations_and_typing_errors_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ToolParser("doc")
    parser.add_argument("--output-prefix")
    assert parser.parse_tool_args(["--output-prefix=x"]).output_prefix == "x"
    for word in ("--output", "--output-prefx=3", "--outputprefix"):
        with pytest.raises(SystemExit) as caught:
            parser.parse_tool_args([word, "x"])
        assert caught.value.code == 2
        errors = capsys.readouterr().err
        assert errors.startswith(f"error: unknown flag {word.split('=')[0]}; did you mean --output-prefix?")
        assert errors.count("\n") == 1


def test_workers_must_be_a_number_from_one() -> None:
    parser = ToolParser("doc")
    add_workers(parser)
    assert parser.parse_tool_args([]).workers >= 1
    assert parser.parse_tool_args(["--workers", "3"]).workers == 3
    for word in ("0", "-1", "two", "1.5"):
        with pytest.raises(SystemExit):
            parser.parse_tool_args([f"--workers={word}"])


def test_the_bar_shows_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with byte_progress(2_000_000, "cleaning", shown=True) as bar:
        bar.update(1_000_000)
        bar.refresh()
    shown = capsys.readouterr().err
    assert "cleaning" in shown
    assert "B/s" in shown
    assert "1.00M/2.00M" in shown
