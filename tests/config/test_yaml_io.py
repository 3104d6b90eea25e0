"""Config files: what is read, what is refused, and that writing and reading give the same values."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.base import ConfigError
from megatron_moe.config.flags import parse_run
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.schema import run_sections, section_fields
from megatron_moe.config.yaml_io import (
    Values,
    build_run,
    dump_run,
    dump_sections,
    load_run,
    load_saved_run,
    load_values,
    parse_values,
    save_run,
)

SECTIONS = run_sections(RunConfig)


def _parse(text: str) -> Values:
    return parse_values(text, "a.yaml", SECTIONS)


def test_only_what_is_given_is_set() -> None:
    values = _parse("model:\n  num_layers: 6\nmoe:\n  num_experts: [4, 4, 8]\ndata:\n")
    assert values == {"model": {"num_layers": 6}, "moe": {"num_experts": (4, 4, 8)}, "data": {}}
    run = build_run(values)
    assert run.model.num_layers == 6
    assert run.moe == MoEConfig(num_experts=(4, 4, 8))


def test_empty_file_is_all_defaults() -> None:
    assert build_run(_parse("")) == RunConfig()


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "1E-5", "'1e-5'"])
def test_spellings_of_a_float(text: str) -> None:
    """YAML 1.1 reads 1e-5 as text."""
    assert _parse(f"model: {{norm_epsilon: {text}}}")["model"]["norm_epsilon"] == 1e-5


def test_an_integer_for_a_float_becomes_one() -> None:
    value = _parse("optimizer: {clip_grad: 1}")["optimizer"]["clip_grad"]
    assert value == 1.0
    assert type(value) is float


def test_later_layers_win_field_by_field() -> None:
    run = build_run({"model": {"num_layers": 2, "hidden_size": 64}}, {"model": {"num_layers": 3}})
    assert (run.model.num_layers, run.model.hidden_size) == (3, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {num_layer: 3}", "a.yaml: model.num_layer: unknown key; did you mean num_layers?"),
        ("checkpoint: {xyzzy: 3}", "a.yaml: checkpoint.xyzzy: unknown key; the section has save, load,"),
        ("modle: {num_layers: 3}", "a.yaml: modle: unknown section; did you mean model?"),
        ("num_layers: 3", "a.yaml: num_layers: unknown section; it belongs under model:"),
        ("1: 3", "a.yaml: 1: unknown section; sections are model, moe,"),
        ("model: {num_layers: true}", "a.yaml: model.num_layers: True: must be an integer"),
        ("model: {num_layers: 3.0}", "a.yaml: model.num_layers: 3.0: must be an integer"),
        ("model: {num_layers: '3'}", "a.yaml: model.num_layers: 3: must be an integer"),
        ("model: {num_layers: null}", "a.yaml: model.num_layers: null: must be an integer"),
        ("model: {swiglu: 1}", "a.yaml: model.swiglu: 1: must be true or false"),
        ("model: {norm_epsilon: small}", "a.yaml: model.norm_epsilon: small: must be a finite number"),
        ("model: {norm_epsilon: .nan}", "a.yaml: model.norm_epsilon: nan: must be a finite number"),
        ("model: {norm_epsilon: true}", "a.yaml: model.norm_epsilon: True: must be a finite number"),
        (
            "model: {normalization: Norm}",
            "a.yaml: model.normalization: Norm: must be one of LayerNorm, RMSNorm",
        ),
        ("moe: {num_experts: 4}", "a.yaml: moe.num_experts: 4: must be a list of integers"),
        ("moe: {num_experts: [4, x]}", "a.yaml: moe.num_experts: [4, 'x']: must be a list of integers"),
        ("data: {split: 100}", "a.yaml: data.split: 100: must be text (in quotes)"),
        ("model: 3", "a.yaml: model: a section must be a mapping (key: value), not int"),
        ("- model", "a.yaml: the file must be a mapping (key: value), not list"),
        ("model: {num_layers: 3, num_layers: 4}", "a.yaml, line 1: key num_layers given twice"),
        ("model:\n  a: b: c", "a.yaml, line 2: mapping values are not allowed here"),
        ("model: !!python/object:os.system {}", "a.yaml, line 1: could not determine a constructor"),
        ("{[1]: 2}", "a.yaml, line 1: found unhashable key"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _parse(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.yaml: cannot be read: No such file"):
        load_values(tmp_path / "missing.yaml", SECTIONS)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"binary.yaml: cannot be read: not UTF-8 text"):
        load_run(binary)


def test_a_run_comes_back_from_its_file(tmp_path: Path) -> None:
    run, _ = parse_run(
        [
            *(
                "--recipe",
                "pai-gpt-moe-16b",
                "--lr",
                "1.7e-05",
                "--data-path",
                "0.3",
                "数据/甲",
                "0.7",
                "b c",
            ),
            *("--save", "no", "--wandb-name", "1e5", "--tokenizer-model", "a: b #c"),
        ],
        prog="pretrain",
        description="",
    )
    save_run(run, tmp_path / "config.yaml")
    assert load_run(tmp_path / "config.yaml") == run
    again, _ = parse_run(["--config", str(tmp_path / "config.yaml")], prog="pretrain", description="")
    assert again == run


def test_a_run_saved_before_there_were_routing_flags_comes_back(tmp_path: Path) -> None:
    run = RunConfig(moe=MoEConfig(num_experts=(4,)))
    text = dump_run(run)
    start, end = text.index("\nrouting:\n") + 1, text.index("\nparallel:\n") + 1
    (tmp_path / "config.yaml").write_text(text[:start] + text[end:])
    assert load_saved_run(tmp_path / "config.yaml") == run
    (tmp_path / "config.yaml").write_text(text[:start])
    with pytest.raises(ConfigError, match="lacks the section parallel; it was cut short"):
        load_saved_run(tmp_path / "config.yaml")


def test_a_run_over_thousands_of_files_comes_back(tmp_path: Path) -> None:
    """As many as a command line holds: a run whose own file is refused could not be resumed."""
    paths = tuple(
        word for file in range(5000) for word in ("1.5", f"/data/corpus/part_{file:05d}_text_document".ljust(200, "x"))
    )
    run = build_run({"data": {"data_path": paths}})
    save_run(run, tmp_path / "config.yaml")
    assert load_run(tmp_path / "config.yaml") == run


def test_the_file_explains_every_value() -> None:
    text = dump_run(RunConfig())
    assert "  # Number of transformer layers.\n  num_layers: 4\n" in text
    for name, section in SECTIONS.items():
        assert f"\n{name}:\n" in "\n" + text
        for field in section_fields(section):
            assert f"\n  {field}: " in text
    assert all(len(line) <= 110 for line in text.splitlines())


def test_lists_are_on_one_line() -> None:
    run = RunConfig(moe=MoEConfig(num_experts=(32,) * 70))
    assert f"  num_experts: [{', '.join(['32'] * 70)}]\n" in dump_run(run)


@dataclass(frozen=True, kw_only=True)
class EveryKind:
    """One field of every kind that a section may have."""

    whole: int
    real: float
    switch: bool
    text: str
    choice: Literal["none", "on", "1e5"]
    counts: tuple[int, ...]
    words: tuple[str, ...]
    rates: tuple[float, ...]
    maybe_whole: int | None
    maybe_real: float | None
    maybe_switch: bool | None
    maybe_text: str | None
    maybe_words: tuple[str, ...] | None


REAL = st.floats(allow_nan=False, allow_infinity=False)
STRATEGIES: dict[str, st.SearchStrategy[Any]] = {
    "whole": st.integers(),
    "real": REAL,
    "switch": st.booleans(),
    "text": st.text(),
    "choice": st.sampled_from(["none", "on", "1e5"]),
    "counts": st.lists(st.integers()).map(tuple),
    "words": st.lists(st.text()).map(tuple),
    "rates": st.lists(REAL).map(tuple),
    "maybe_whole": st.none() | st.integers(),
    "maybe_real": st.none() | REAL,
    "maybe_switch": st.none() | st.booleans(),
    "maybe_text": st.none() | st.text() | st.sampled_from(["null", "~", "no", "1:30", "0x1f", "2001-01-01", "="]),
    "maybe_words": st.none() | st.lists(st.text()).map(tuple),
}


@settings(deadline=None)
@given(st.builds(EveryKind, **STRATEGIES))
def test_round_trip_is_exact(section: EveryKind) -> None:
    text = dump_sections({"kinds": section})
    values = parse_values(text, "a.yaml", {"kinds": EveryKind})
    again = EveryKind(**values["kinds"])
    assert again == section
    # 1 == 1.0 == True: the types must agree as well.
    assert repr(dataclasses.astuple(again)) == repr(dataclasses.astuple(section))


def test_annotations_that_cannot_be_flags() -> None:
    @dataclass
    class TwoTypes:
        field: int | str = 1

    @dataclass
    class Pair:
        field: tuple[int, int] = (1, 2)

    @dataclass
    class Mapping:
        field: dict[str, int] | None = None

    for section in (TwoTypes, Pair, Mapping):
        with pytest.raises(TypeError, match=r"field: .*flag"):
            section_fields(section)
