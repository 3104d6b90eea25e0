"""Tools take flags in full only, and suggest the nearest one."""

import pytest

from megatron_moe.data.command_line import ToolParser


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
