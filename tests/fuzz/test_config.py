"""Config files and command lines of any kind: a run, or one clear line; no hang, and no gigabytes from a few bytes."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.flags import parse_run
from megatron_moe.config.run import RunConfig
from megatron_moe.config.schema import run_sections, section_fields
from megatron_moe.config.yaml_io import build_run, dump_run, load_run, parse_values
from tests.helpers.fuzzing import Guard, check_message, damaged, examples, in_child
from tests.helpers.tiny import tiny_run

SECTIONS = run_sections(RunConfig)
FIELDS = [(name, field) for name, section in SECTIONS.items() for field in section_fields(section)]
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)

CRAFTED = {
    "a billion laughs": (LAUGHS, "line 2: aliases"),
    "laughs in a value": (
        LAUGHS.replace("a: &a", "model: {num_layers: &a").replace("]\n", "]}\n", 1),
        "line 2: aliases",
    ),
    "a loop": ("model: &m {num_layers: *m}", "line 1: aliases"),
    "a hundred thousand brackets": ("[" * 100_000, "line 1: nested too deeply"),
    "deep indentation": ("\n".join(" " * depth + "a:" for depth in range(400)), "line 9: nested too deeply"),
    "a long number": ("model: {num_layers: " + "9" * 100_000 + "}", "line 1: a number of 100000 characters"),
    "base 60": ("model: {num_layers: " + ":".join(["59"] * 80_000) + "}", "line 1: a number of 239999 characters"),
    "no date": ("model: {num_layers: 2024-13-45}", "line 1: '2024-13-45' is no timestamp"),
    "no integer": ("model: {num_layers: !!int x}", "line 1: 'x' is no integer"),
    "no bool": ("model: {num_layers: !!bool x}", "line 1: 'x' is no bool"),
    "no character": ('a: "\\UFFFFFFFF"', "not YAML: "),
    "half a character": ('data: {tokenizer_model: "\\ud800"}', "line 1: '\\ud800' is no text"),
    "a call": ("model: !!python/object/apply:os.system [touch marker]", "line 1: could not determine a constructor"),
    "a class": ("!!python/name:os.system", "line 1: could not determine a constructor"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, expected = CRAFTED[name]
    with pytest.raises(ConfigError) as caught:
        parse_values(text, "run.yaml", SECTIONS)
    assert expected in str(caught.value)
    check_message(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_large_file_is_no_config(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("# " + "x" * (8 << 20), encoding="utf-8")
    with pytest.raises(ConfigError, match="is larger than 8 MiB"):
        load_run(path)


def values() -> st.SearchStrategy[object]:
    plain = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), st.binary(max_size=4)
    )
    return st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    )


def documents() -> st.SearchStrategy[str]:
    """YAML of the right form with anything as values."""
    entry = st.tuples(st.sampled_from(FIELDS), values())

    def write(entries: list[tuple[tuple[str, str], object]]) -> str:
        tree: dict[str, dict[str, object]] = {}
        for (section, field), value in entries:
            tree.setdefault(section, {})[field] = value
        return yaml.safe_dump(tree, allow_unicode=True)

    return st.lists(entry, min_size=1, max_size=3).map(write)


def test_config_files(tmp_path: Path) -> None:
    in_child(fuzz_files, tmp_path)


def fuzz_files(guard: Guard, folder: Path) -> None:
    valid = dump_run(tiny_run()).encode()
    path = folder / "config.yaml"
    guard.limit_memory()
    accepted: list[RunConfig] = []

    @examples(150)
    @given(st.one_of(damaged(valid, header=2000), st.text(max_size=60).map(encode), documents().map(encode)))
    def check(content: bytes) -> None:
        guard.start(content)
        path.write_bytes(content)
        try:
            run = load_run(path)
        except ConfigError as error:
            check_message(error)
            return
        accepted.append(run)
        path.write_text(dump_run(run), encoding="utf-8")
        assert repr(load_run(path)) == repr(run)

    check()
    assert len(accepted) > 10


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def test_command_lines(tmp_path: Path) -> None:
    in_child(fuzz_flags, tmp_path)


def fuzz_flags(guard: Guard, folder: Path) -> None:
    guard.limit_memory()
    names = st.sampled_from(["--" + field.replace("_", "-") for _, field in FIELDS])
    word = st.one_of(
        names,
        st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=10),
        st.integers().map(str),
        st.floats().map(str),
        st.sampled_from(["9" * 900, "1e999", "-1", "--"]),
    )
    (folder / "any.yaml").write_text("model: {num_layers: 3}\n", encoding="utf-8")

    @examples(150)
    @given(st.lists(word, max_size=5))
    def check(words: list[str]) -> None:
        guard.start(repr(words))
        try:
            parse_run(words, prog="pretrain", description="")
        except UserError as error:
            check_message(error)
        except SystemExit as stop:
            code = stop.code
            assert code in (0, 2), code

    check()
    assert build_run() == RunConfig()
