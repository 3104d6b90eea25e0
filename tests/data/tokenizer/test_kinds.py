"""GPT-2's, PAI's and CPM's tokenizers: the ids their own code gives, saved ones load again, mistakes are one line."""

import io
import json
import sys
import unicodedata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data.tokenizer.load import Tokenizer, load_saved_tokenizer, load_tokenizer, open_tokenizer
from tests.data.chinese_text import documents

tokenizers = pytest.importorskip("tokenizers")
jieba = pytest.importorskip("jieba")
TEXTS = [
    "北京的老师，读着旧书。\n  二０２６年 <|endoftext|> <eod>",
    "",
    "\u2582\u2583 a",
    "don't stop  now\n\n",
    "𠮷\0é",
]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [*documents(20), "don't stop now, they're here " * 20], vocab_size=500, show_progress=False
    )
    trained.save_model(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_bytes())
    vocabulary["<|endoftext|>"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def jieba_bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like PAI's: BPE over words without a mark of where they begin, special tokens added."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<sep>", "<|endoftext|>"], show_progress=False
    )
    # Learned from whole sentences, so that the words that jieba cuts decide which pieces a text gets.
    backend.train_from_iterator(documents(60), trainer)
    backend.decoder = tokenizers.decoders.Fuse()
    path = tmp_path_factory.mktemp("jieba") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture(scope="module")
def cpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    translated = str.maketrans(" \n", "\u2582\u2583")
    lines = [" ".join(word.translate(translated) for word in jieba.cut(text)) for text in documents(80)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=600,
        character_coverage=1.0,
        required_chars="\u2582\u2583" + "".join(map(chr, range(33, 127))),
        control_symbols=["<eod>"],
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("cpm") / "vocab.model"
    path.write_bytes(model.getvalue())
    return path


def load(kind: str, path: Path) -> Tokenizer:
    return load_tokenizer(DataConfig(tokenizer_type=kind, tokenizer_model=str(path)))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["GPT2BPETokenizer", "JiebaBPETokenizer", "CPMTokenizer"])
def tokenizer(request: pytest.FixtureRequest, gpt2: Path, jieba_bpe: Path, cpm: Path) -> Tokenizer:
    paths = {"GPT2BPETokenizer": gpt2, "JiebaBPETokenizer": jieba_bpe, "CPMTokenizer": cpm}
    return load(request.param, paths[request.param])


def test_what_every_kind_keeps(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.eod not in ids
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        assert tokenizer.decode([*ids, tokenizer.eod]) == tokenizer.decode(ids)
    together, lengths = tokenizer.encode_batch(TEXTS)
    assert together.tolist() == [index for text in TEXTS for index in tokenizer.encode(text)]
    assert lengths.tolist() == [len(tokenizer.encode(text)) for text in TEXTS]
    assert [len(array) for array in tokenizer.encode_batch([])] == [0, 0]
    assert len(tokenizer.pieces) == tokenizer.vocab_size
    for encode in (lambda: tokenizer.encode("a\ud800b"), lambda: tokenizer.encode_batch(["a", "a\ud800b"])):
        with pytest.raises(UserError, match=r"^text 'a\\ud800b': half of a surrogate pair at character 1"):
            encode()
    with pytest.raises(UserError, match="token id -1"):
        tokenizer.decode([-1])
    tokenizer.save_to(tmp_path)
    again = load_saved_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    assert (again.fingerprint, again.eod, again.pieces) == (tokenizer.fingerprint, tokenizer.eod, tokenizer.pieces)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_gpt2_gives_the_ids_of_transformers(gpt2: Path) -> None:
    from transformers import GPT2Tokenizer

    ours = load("GPT2BPETokenizer", gpt2)
    theirs = GPT2Tokenizer(vocab=str(gpt2 / "vocab.json"), merges=str(gpt2 / "merges.txt"))
    for text in [*TEXTS, *documents(30, seed=3)]:
        plain = text.replace("<|endoftext|>", "")
        assert ours.encode(plain) == theirs.encode(plain, add_special_tokens=False)
    assert ours.pieces[ours.eod] == "<|endoftext|>"


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_gpt2_gives_any_text_back(gpt2_tokenizer: Tokenizer, text: str) -> None:
    assert gpt2_tokenizer.decode(gpt2_tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def gpt2_tokenizer(gpt2: Path) -> Tokenizer:
    return load("GPT2BPETokenizer", gpt2)


def test_gpt2_files_by_their_own_flags(gpt2: Path, tmp_path: Path) -> None:
    """Megatron-LM's --vocab-file and --merge-file, wherever they lie."""
    (tmp_path / "a.json").write_bytes((gpt2 / "vocab.json").read_bytes())
    (tmp_path / "b.txt").write_bytes((gpt2 / "merges.txt").read_bytes())
    data = DataConfig(
        tokenizer_type="GPT2BPETokenizer",
        tokenizer_model=str(tmp_path / "a.json"),
        merge_file=str(tmp_path / "b.txt"),
    )
    assert load_tokenizer(data).fingerprint == load("GPT2BPETokenizer", gpt2).fingerprint


def test_pai_gives_the_ids_of_its_own_scheme(jieba_bpe: Path) -> None:
    """As JiebaBPETokenizer of Pai-Megatron-Patch does, whose file has no post-processor."""
    ours = load("JiebaBPETokenizer", jieba_bpe)
    theirs = tokenizers.Tokenizer.from_file(str(jieba_bpe))
    for text in documents(30, seed=5):
        ids = theirs.encode(list(jieba.cut(text)), is_pretokenized=True, add_special_tokens=True).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text
    # Without jieba the words run together and give other ids.
    whole = "".join(documents(30, seed=5))
    assert ours.encode(whole) != theirs.encode(whole).ids


def test_cpm_gives_the_ids_of_transformers(cpm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from what transformers changes before: compatibility forms, accents, spaces in a row."""
    module: Any = ModuleType("rjieba")
    module.cut = lambda text, hmm=True: list(jieba.cut(text, cut_all=False, HMM=hmm))
    monkeypatch.setitem(sys.modules, "rjieba", module)
    from transformers.models.cpm.tokenization_cpm import CpmTokenizer

    theirs = CpmTokenizer(str(cpm), do_lower_case=False, keep_accents=True, remove_space=False)
    ours = load("CPMTokenizer", cpm)
    translator = str.maketrans(" \n", "\u2582\u2583")
    for text in [*documents(30, seed=7), "一 二\n三"]:
        words = " ".join(word.translate(translator) for word in jieba.cut(text))
        assert theirs.convert_tokens_to_ids(theirs._tokenize(words)) == ours.encode(text)
        # The model's own normalisation, as that of CPM, makes full-width characters plain ones.
        assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFKC", text)


def test_mistakes_are_named(gpt2: Path, jieba_bpe: Path, cpm: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((gpt2 / "vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((gpt2 / "merges.txt").read_bytes())
    without_end = {piece: index for piece, index in vocabulary.items() if piece != "<|endoftext|>"}
    (tmp_path / "end.json").write_text(json.dumps(without_end), encoding="utf-8")
    (tmp_path / "gap.json").write_text(json.dumps({**vocabulary, "gap": 2**31}), encoding="utf-8")
    (tmp_path / "text.json").write_text("no JSON", encoding="utf-8")
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}', encoding="utf-8")
    (tmp_path / "few" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    cases = [
        ("GPT2BPETokenizer", tmp_path / "none", "no such file .*none; give GPT-2's vocab.json"),
        ("GPT2BPETokenizer", jieba_bpe, "--merge-file: no such file .*merges.txt; give GPT-2's merges.txt"),
        ("GPT2BPETokenizer", tmp_path / "end.json", r"has no piece <\|endoftext\|>, which ends documents"),
        ("GPT2BPETokenizer", tmp_path / "gap.json", f"pieces, but ids to {2**31}; they must follow each other"),
        ("GPT2BPETokenizer", tmp_path / "text.json", "tokenizers cannot load it"),
        ("GPT2BPETokenizer", tmp_path / "few", "lacks 255 of the 256 bytes"),
        ("JiebaBPETokenizer", tmp_path / "text.json", "tokenizers cannot load it"),
        ("JiebaBPETokenizer", cpm, "tokenizers cannot load it"),
        ("JiebaBPETokenizer", tmp_path / "none", "no such file"),
        ("CPMTokenizer", jieba_bpe, "not a SentencePiece model"),
        ("CPMTokenizer", tmp_path, "is a folder; give a .model file"),
    ]
    for kind, path, message in cases:
        with pytest.raises((ConfigError, UserError), match=message) as caught:
            load(kind, path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="--merge-file: belongs to --tokenizer-type GPT2BPETokenizer"):
        DataConfig(merge_file="merges.txt")


def test_jieba_missing_is_one_line(jieba_bpe: Path, cpm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    for kind, path in (("JiebaBPETokenizer", jieba_bpe), ("CPMTokenizer", cpm)):
        with pytest.raises(UserError, match=rf"^--tokenizer-type {kind}: needs the package jieba; pip install"):
            load(kind, path)


def test_any_kind_opens_by_its_files(gpt2: Path, jieba_bpe: Path, cpm: Path, tmp_path: Path) -> None:
    load("JiebaBPETokenizer", jieba_bpe).save_to(tmp_path)
    kinds = {gpt2: "GPT2BPETokenizer", cpm: "SentencePieceTokenizer", tmp_path: "JiebaBPETokenizer"}
    for path, kind in kinds.items():
        assert type(open_tokenizer(path, "--compare")).__name__ == kind
    with pytest.raises(UserError, match=r"^--compare .*none: no such file"):
        open_tokenizer(tmp_path / "none", "--compare")
