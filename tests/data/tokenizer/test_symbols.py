"""Special tokens: documented ids, and user symbols that can be told from text."""

import re
from pathlib import Path

import pytest

from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer import symbols
from megatron_moe.data.tokenizer.symbols import Symbols
from tools import build_tokenizer


def test_ids_do_not_move_with_options() -> None:
    plain, more = Symbols().ids(), Symbols(user=("<|tool|>", "①")).ids()
    assert [plain[name] for name in ("<unk>", "<s>", "</s>", "<pad>", "<eod>", "<sep>", "<mask>")] == list(range(7))
    assert [plain[name] for name in symbols.CONTROL_SYMBOLS[3:]] == [7, 8, 9, 10]
    assert plain["\n"] == 32
    assert more == {**plain, "<|tool|>": 33, "①": 34}
    assert Symbols().count == 32 + 1 + 256
    none = Symbols(reserved=0)
    assert none.ids()["\n"] == 11
    assert {name: none.ids()[name] for name in symbols.CONTROL_SYMBOLS} == {
        name: plain[name] for name in symbols.CONTROL_SYMBOLS
    }


def test_the_documented_ids_are_the_real_ones() -> None:
    ids = Symbols().ids()
    rows = re.findall(r"^\| ([\d, -]+) \| (.+?) \| ", symbols.__doc__ or "", re.MULTILINE)
    named = {}
    for numbers, names in rows:
        tokens = [name.replace("\\|", "|") for name in re.findall(r"`([^`]+)`", names)]
        first = int(re.split("[,-]", numbers)[0])
        named.update({name: first + place for place, name in enumerate(tokens)})
    assert len(named) == 12
    assert all(ids[name] == number for name, number in named.items())
    assert "4 <eod>; 5 <sep>; 6 <mask>; 7-10 <|system|> <|user|> <|assistant|> <|end|>; 11-31" in (
        build_tokenizer.__doc__ or ""
    ).replace("\n", " ")


@pytest.mark.parametrize(
    ("user", "message"),
    [
        (("",), "must be text without spaces"),
        (("a b",), "must be text without spaces"),
        (("a\u2581",), "must be text without spaces"),
        (("\u2585",), "must be text without spaces"),
        (("\n",), "must be text without spaces"),
        (("<eod>",), "is there already"),
        (("<0x41>",), "is there already"),
        (("<|reserved_3|>",), "is there already"),
        (("①", "①"), "is there already"),
        (("\ud800",), "halves of surrogate pairs"),
    ],
)
def test_user_symbols_that_cannot_be(user: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=rf"^--user-symbols .*{message}"):
        Symbols(user=user)


@pytest.mark.parametrize("reserved", [-1, 5000])
def test_reserved_tokens_have_limits(reserved: int) -> None:
    with pytest.raises(UserError, match=rf"^--reserved-tokens {reserved}: must be from 0 to 4096"):
        Symbols(reserved=reserved)


def test_the_template_names_the_tokens() -> None:
    for name in (symbols.END_OF_TURN, symbols.ASSISTANT):
        assert name in symbols.CHAT_TEMPLATE
    assert Path(build_tokenizer.__file__).name == "build_tokenizer.py"
