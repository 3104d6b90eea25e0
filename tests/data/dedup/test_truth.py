"""The whole of near-deduplication against the truth: planted copies with edits, all pairs compared by sets."""

from pathlib import Path

import pytest

from megatron_moe.data.dedup import (
    NearDedup,
    Signer,
    decide,
    drop_path,
    match_band,
    match_exact,
    read_drops,
    s_curve,
    signature_writer,
)
from tests.data.dedup.near_copies import edited, random_documents, similar_pairs

NEAR = NearDedup()


def _dropped(folder: Path, texts: list[str], near: NearDedup) -> dict[int, int]:
    """Dropped document -> kept document, through all stages and three shards."""
    cuts = [0, len(texts) // 3, len(texts) // 2, len(texts)]
    files = []
    for number in range(3):
        files.append(folder / f"{number}.sig")
        with signature_writer(files[-1], near) as writer:
            writer.add(Signer(near).sign(texts[cuts[number] : cuts[number + 1]]))
    pairs = [folder / "exact.pairs"]
    match_exact(files, near, pairs[0])
    for band in range(near.bands):
        pairs.append(folder / f"{band}.pairs")
        match_band(files, band, near, pairs[-1])
    decide(pairs, files, near, folder)
    found = {}
    for number, file in enumerate(files):
        drops = read_drops(drop_path(folder, file))
        for row, kept in zip(drops.rows.tolist(), drops.kept.tolist(), strict=True):
            found[cuts[number] + row] = cuts[kept >> 32] + (kept & 0xFFFFFFFF)
    return found


@pytest.mark.parametrize("length", [40, 400])
def test_copies_are_found_and_others_are_kept(length: int, tmp_path: Path) -> None:
    originals = random_documents(400, length, seed=length)
    copies = [edited(text, (index % 10) / 200, seed=index) for index, text in enumerate(originals)]
    texts = originals + copies
    truth = similar_pairs(texts, NEAR.ngram)
    found = _dropped(tmp_path, texts, NEAR)
    # Every pair is an original and its copy, so clusters are pairs and nothing is found by way of a third.
    clear = [pair for pair, value in truth.items() if value >= 0.85]
    assert len(clear) > 100
    assert sum(found.get(later) == earlier for later, earlier in clear) >= 0.99 * len(clear)
    assert all(truth.get(pair, 0.0) >= 0.6 for pair in found.items())
    near_enough = sum(truth[pair] >= 0.7 for pair in found.items())
    assert near_enough >= 0.95 * len(found)


def test_without_verification_recall_is_the_s_curve(tmp_path: Path) -> None:
    near = NearDedup(verify=False)
    originals = random_documents(600, 200, seed=7)
    texts = originals + [edited(text, 0.02 + (index % 7) / 100, seed=index) for index, text in enumerate(originals)]
    truth = similar_pairs(texts, near.ngram)
    found = _dropped(tmp_path, texts, near)
    middle = {pair: value for pair, value in truth.items() if 0.4 <= value <= 0.9}
    promised = sum(s_curve(near.bands, near.rows, value) for value in middle.values())
    really = sum(found.get(later) == earlier for later, earlier in middle)
    # 4 standard deviations of so many throws at most, and 2 % for permutations that are not quite independent.
    assert len(middle) > 300
    assert abs(really - promised) < 4 * 0.5 * len(middle) ** 0.5 + 0.02 * len(middle)


def test_layout_and_boilerplate_do_not_hide_a_copy(tmp_path: Path) -> None:
    (text,) = random_documents(1, 400, seed=3)
    variants = [
        text,
        text.replace("，", ",").replace("\n", "").replace("。", ". "),
        "本文转载自网络，版权归原作者所有。\n" + text + "\n责任编辑：小王",
        text.replace("GPT", "gpt").replace("2026", "２０２６"),
        *random_documents(5, 400, seed=4),
    ]
    assert _dropped(tmp_path, variants, NEAR) == {1: 0, 2: 0, 3: 0}
