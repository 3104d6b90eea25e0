"""Made-up Chinese documents unlike each other, copies of them with edits, and the plain way to compare two texts."""

import random
from collections.abc import Sequence

from megatron_moe.data.dedup.units import unit_strings

# 3,000 frequent characters' worth of code points; a few come far more often than others, as in a language.
_HAN = [chr(0x4E00 + 7 * step) for step in range(2900)]
_WORDS = ["GPT", "2026", "MoE", "data", "Ｗｅｂ", "3.14"]


def random_documents(count: int, length: int, seed: int) -> list[str]:
    """Documents of about so many characters, with punctuation, a few words and paragraphs."""
    chooser = random.Random(seed)
    return [_document(chooser, chooser.randint(length // 2, length * 3 // 2)) for _ in range(count)]


def _document(chooser: random.Random, length: int) -> str:
    pieces = []
    for _ in range(length):
        draw = chooser.random()
        if draw < 0.90:
            pieces.append(_HAN[int(len(_HAN) * chooser.random() ** 2)])
        elif draw < 0.97:
            pieces.append(chooser.choice("，。；：“”、"))
        elif draw < 0.98:
            pieces.append("\n")
        else:
            pieces.append(f" {chooser.choice(_WORDS)} ")
    return "".join(pieces)


def edited(text: str, rate: float, seed: int) -> str:
    """The text with this share of its characters replaced, deleted, or followed by a new one."""
    chooser = random.Random(seed)
    pieces = []
    for character in text:
        if chooser.random() >= rate:
            pieces.append(character)
            continue
        kind = chooser.randrange(3)
        if kind == 0:
            pieces.append(chooser.choice(_HAN))
        elif kind == 1:
            pieces.append(character + chooser.choice(_HAN))
    return "".join(pieces)


def gram_set(text: str, n: int) -> set[tuple[str, ...]]:
    """The set of n-grams of units, as strings."""
    units = unit_strings(text)
    return {tuple(units[place : place + n]) for place in range(len(units) - n + 1)}


def jaccard(left: set[tuple[str, ...]], right: set[tuple[str, ...]]) -> float:
    """The similarity of two sets."""
    return len(left & right) / max(len(left | right), 1)


def similar_pairs(texts: Sequence[str], n: int) -> dict[tuple[int, int], float]:
    """The similarity of all pairs of texts that share an n-gram: (later, earlier) -> similarity."""
    sets = [gram_set(text, n) for text in texts]
    holders: dict[tuple[str, ...], list[int]] = {}
    for index, grams in enumerate(sets):
        for gram in grams:
            holders.setdefault(gram, []).append(index)
    pairs = {(right, left) for found in holders.values() for left in found for right in found if left < right}
    return {(right, left): jaccard(sets[left], sets[right]) for right, left in pairs}
