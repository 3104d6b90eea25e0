"""Units and their hashes against the plain loop over characters, on any text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.data.dedup import units as units_module
from megatron_moe.data.dedup.units import grams_of, pieces_of, unit_strings, units_of

# Any code point, lone surrogates too, and many of those that matter here.
anything = st.text(st.characters(codec=None), max_size=60)
mixed = st.text(st.sampled_from("中文〇々かㄅ한ก가 \n，。“１A a9①ﬀİ㍿𠮷\U0003134f\ue000\u0301-_"), max_size=40)
texts = st.lists(anything | mixed, max_size=6)


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("第一段：“你好”，２０２６年。", ["第", "一", "段", "你", "好", "2026", "年"]),
        ("Hello, World! it's GPT-4", ["hello", "world", "it", "s", "gpt", "4"]),
        ("ＡＢＣ１２３", ["abc123"]),
        ("二〇〇八年【」㐂𠮷", ["二", "〇", "〇", "八", "年", "㐂", "𠮷"]),
        ("用PyTorch训练", ["用", "pytorch", "训", "练"]),
        ("カナ한글", ["カ", "ナ", "한", "글"]),
        ("สวัสดี", list("สวัสดี")),
        ("Ωμέγα страна", ["ωμέγα", "страна"]),
        ("。\n \t", []),
        ("", []),
    ],
)
def test_units_are_single_han_and_folded_words(text: str, units: list[str]) -> None:
    assert unit_strings(text) == units


@given(texts)
def test_hashes_agree_with_the_plain_units(batch: list[str]) -> None:
    units = units_of(batch)
    plain = [unit_strings(text) for text in batch]
    assert units.counts().tolist() == [len(each) for each in plain]
    flat = [unit for each in plain for unit in each]
    # Equal units, equal hashes; different units, different hashes.
    assert len(set(zip(flat, units.hashes.tolist(), strict=True))) == len(set(flat)) == len(set(units.hashes.tolist()))


@given(texts, st.integers(1, 14))
def test_grams_agree_with_the_plain_units(batch: list[str], n: int) -> None:
    grams = grams_of(units_of(batch), n)
    plain = []
    for document, text in enumerate(batch):
        units = unit_strings(text)
        plain += [(document, tuple(units[place : place + n])) for place in range(len(units) - n + 1)]
    assert grams.document.tolist() == [document for document, _ in plain]
    assert grams.counts.tolist() == [sum(each == document for each, _ in plain) for document in range(len(batch))]
    runs = [run for _, run in plain]
    assert len(set(zip(runs, grams.hashes.tolist(), strict=True))) == len(set(runs)) == len(set(grams.hashes.tolist()))


def test_hashes_of_grams_are_spread_over_all_bits() -> None:
    # Texts that differ in one character only, in its lowest bits: bad mixing would show in the upper bits.
    batch = [f"天地玄黄宇宙洪荒日月盈昃辰{chr(0x4E00 + last)}" for last in range(4096)]
    last = np.ascontiguousarray(grams_of(units_of(batch), 5).hashes.reshape(4096, -1)[:, -1])
    ones = np.unpackbits(last.view(np.uint8).reshape(4096, 8), axis=1).mean(axis=0)
    # Half of the bits are set, within 5 standard errors of 4,096 throws of a coin.
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / 64
    counts = np.bincount((last >> np.uint64(57)).astype(np.int64), minlength=128)
    assert ((counts - 32) ** 2 / 32).sum() < 127 + 5 * np.sqrt(2 * 127)


@given(st.lists(st.text(max_size=30), max_size=20))
def test_pieces_hold_all_texts_in_order(batch: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units_module, "_CHARACTERS_AT_ONCE", 40)
        pieces = list(pieces_of(batch))
    assert [text for piece in pieces for text in piece] == batch
    assert all(sum(map(len, piece[:-1])) < 40 for piece in pieces)
