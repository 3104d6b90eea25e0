"""Signatures do not depend on batches, processes or platforms; their files come back whole or not at all."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.base import UserError
from megatron_moe.data.dedup import NearDedup, Signatures, Signer, read_signatures, signature_writer
from megatron_moe.data.dedup import signatures as signatures_module
from megatron_moe.data.dedup.signatures import SignatureFile
from tests.data.dedup.near_copies import random_documents

NEAR = NearDedup(permutations=16, bands=4, rows=3)
COLUMNS = ("exact", "grams", "bands", "sketch")


def _equal(left: Signatures, right: Signatures) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in COLUMNS)


def _write(path: Path, signatures: Signatures, near: NearDedup | None) -> Path:
    with signature_writer(path, near) as writer:
        writer.add(signatures)
    return path


def test_signatures_are_the_same_everywhere() -> None:
    # The very numbers, so that another platform, Python or numpy cannot change them unnoticed.
    signed = Signer(NearDedup()).sign(
        ["天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。", "GPT-4 与 ２０２６ 年的中文数据", "短"]
    )
    digest = hashlib.sha256()
    for name in COLUMNS:
        digest.update(getattr(signed, name).astype(getattr(signed, name).dtype.newbyteorder("<")).tobytes())
    assert signed.grams.tolist() == [12, 6, 0]
    assert digest.hexdigest() == "4de3d44cafcbe360521509019d7202180308c860ac3d1172e19de06255b1617a"


def test_the_exact_key_is_of_the_very_text() -> None:
    texts = ["你好。", "你好", "你好。\n", "", "\ud800"]
    keys = Signer(None).sign(texts).exact
    assert len({tuple(row) for row in keys.tolist()}) == 5
    high, low = (int(half) for half in keys[0])
    assert high << 64 | low == xxhash.xxh3_128_intdigest("你好。".encode())


def test_layout_case_width_and_punctuation_do_not_change_the_sketch() -> None:
    signed = Signer(NEAR).sign(
        ["第一段。\n他说：“Hello，１９９８年！”", "第一段他说hello 1998年", "第一段他说 HELLO\t1998 年…"]
    )
    assert len({tuple(row) for row in signed.sketch.tolist()}) == 1
    assert len({tuple(row) for row in signed.exact.tolist()}) == 3


@settings(max_examples=30)
@given(st.lists(st.text(max_size=50), max_size=12), st.integers(0, 12), st.integers(1, 200))
def test_batches_do_not_matter(texts: list[str], cut: int, characters: int) -> None:
    whole = Signer(NEAR).sign(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_moe.data.dedup.units._CHARACTERS_AT_ONCE", characters)
        first, second = Signer(NEAR).sign(texts[:cut]), Signer(NEAR).sign(texts[cut:])
    for name in COLUMNS:
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(first, name), getattr(second, name)]))


@pytest.mark.parametrize("near", [NEAR, None])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 40])
def test_files_bring_signatures_back(
    near: NearDedup | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signatures_module, "GROUP", 8)
    signed = Signer(near).sign(random_documents(count, 30, seed=count))
    path = _write(tmp_path / "a.sig", signed, near)
    assert _equal(read_signatures(path, near), signed)
    # The file is the same however the documents came.
    with signature_writer(tmp_path / "b.sig", near) as writer:
        for row in range(0, count, 3):
            parts = (getattr(signed, name)[row : row + 3] for name in COLUMNS)
            writer.add(Signatures(*parts))
    assert path.read_bytes() == (tmp_path / "b.sig").read_bytes()


def test_sketches_of_chosen_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures_module, "GROUP", 8)
    signed = Signer(NEAR).sign(random_documents(30, 30, seed=1))
    file = SignatureFile(_write(tmp_path / "a.sig", signed, NEAR), NEAR)
    rows = np.array([0, 7, 8, 20, 20, 29])
    assert np.array_equal(file.sketches(rows), signed.sketch[rows])


def test_a_writer_that_fails_leaves_no_file(tmp_path: Path) -> None:
    signed = Signer(NearDedup()).sign(["天地玄黄宇宙洪荒"])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        # The signatures have more columns than the file is for.
        _write(tmp_path / "a.sig", signed, NEAR)
    assert list(tmp_path.iterdir()) == []


def test_every_cut_and_every_flipped_byte_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures_module, "GROUP", 4)
    signed = Signer(NEAR).sign(random_documents(6, 20, seed=2))
    whole = _write(tmp_path / "a.sig", signed, NEAR).read_bytes()
    damaged = tmp_path / "damaged.sig"
    for length in range(0, len(whole), 5):
        damaged.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"damaged\.sig: "):
            read_signatures(damaged, NEAR)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 4
        damaged.write_bytes(bytes(changed))
        with pytest.raises(UserError, match=r"damaged\.sig: [^\n]*$"):
            read_signatures(damaged, NEAR)


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.sig", Signer(NEAR).sign(["天地玄黄宇宙洪荒"]), NEAR)
    with pytest.raises(UserError, match=r"a\.sig: was made with near .*'ngram': 5.*clean its shard again"):
        SignatureFile(path, dataclasses.replace(NEAR, ngram=6))
    with pytest.raises(UserError, match=r"a\.sig: was made with near"):
        SignatureFile(path, None)


def test_foreign_files_and_other_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.sig"
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match=r"a\.sig: is not a signatures file"):
        SignatureFile(path, NEAR)
    path.write_bytes(b'{"megatron_moe": "signatures", "version": 99} 0\n' + b"\x00" * 24)
    with pytest.raises(UserError, match=r"a\.sig: has version 99, this program reads 1"):
        SignatureFile(path, NEAR)
    with pytest.raises(UserError, match=r"none\.sig: cannot be read: No such file"):
        SignatureFile(tmp_path / "none.sig", NEAR)
