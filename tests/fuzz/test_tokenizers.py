"""Damaged tokenizer files: refused with one line, or a tokenizer that works; no code of a folder is run."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.base import UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data.tokenizer.load import HuggingFaceTokenizer, Tokenizer, load_saved_tokenizer, load_tokenizer
from tests.data.chinese_text import documents
from tests.helpers.fuzzing import Guard, apply, check_message, damaged, examples, in_child

TEXTS = ["北京的老师 hello\n", " \u2581a", "x" * 50, "ﬁａｂ㌔", ""]


def use(tokenizer: Tokenizer) -> None:
    """What preprocessing, training and generation do with it."""
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        tokenizer.decode(ids)
    assert len(tokenizer.pieces) == tokenizer.vocab_size
    assert len(tokenizer.fingerprint) == 16


def sentencepiece_models() -> list[bytes]:
    """One without normalisation, as this project trains them, and one with a table of it, as others do."""
    models = []
    for kind, rule in (("bpe", "identity"), ("unigram", "nmt_nfkc")):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents(60)),
            model_writer=model,
            model_type=kind,
            normalization_rule_name=rule,
            vocab_size=380,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=3,
        )
        models.append(model.getvalue())
    return models


def test_sentencepiece_models(tmp_path: Path) -> None:
    in_child(fuzz_sentencepiece, tmp_path)


def fuzz_sentencepiece(guard: Guard, folder: Path) -> None:
    path = folder / "tokenizer.model"
    accepted: list[int] = []
    models = sentencepiece_models()
    guard.limit_memory()
    # Pieces and their scores stand first, so changes of single bytes there leave a readable file most often.
    byte = st.tuples(st.just("byte"), st.integers(20, 6000), st.integers(0, 255))
    bytes_of = [st.lists(byte, min_size=1, max_size=3).map(lambda changes, m=m: apply(m, changes)) for m in models]

    @examples(120)
    @given(st.one_of(*bytes_of, *(damaged(model, header=len(model)) for model in models)))
    def check(content: bytes) -> None:
        guard.start(content)
        path.write_bytes(content)
        try:
            tokenizer = load_tokenizer(DataConfig(tokenizer_model=str(path)))
        except UserError as error:
            check_message(error)
            return
        accepted.append(tokenizer.vocab_size)
        use(tokenizer)

    check()
    assert len(accepted) > 5


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    raw = tokenizers.ByteLevelBPETokenizer()
    raw.train_from_iterator(documents(5), vocab_size=280, special_tokens=["<|end|>"], show_progress=False)
    folder = tmp_path_factory.mktemp("hf")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw._tokenizer, eos_token="<|end|>")
    fast.save_pretrained(folder)
    return folder


def test_a_folder_of_hugging_face_runs_no_code(hugging_face: Path, tmp_path: Path) -> None:
    """Neither by `auto_map` nor by a class of its own, and without asking on the terminal."""
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n"
    code += "class Evil(PreTrainedTokenizerFast): pass\n"
    for key, value in (("auto_map", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}), ("tokenizer_class", "Evil")):
        folder = tmp_path / key
        folder.mkdir()
        config = json.loads((hugging_face / "tokenizer_config.json").read_text(encoding="utf-8"))
        config |= {key: value, "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "tokenizer.json").write_bytes((hugging_face / "tokenizer.json").read_bytes())
        (folder / "config.json").write_text(
            json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}), encoding="utf-8"
        )
        (folder / "evil.py").write_text(code, encoding="utf-8")
        try:
            use(HuggingFaceTokenizer(folder))
        except UserError as error:
            check_message(error)
        assert not marker.exists()


def replace_one(tree: Any, path: list[int], value: Any) -> Any:
    """A JSON tree with another value at one of its places."""
    tree = json.loads(json.dumps(tree))
    node, parent, key = tree, None, None
    for step in path:
        if not isinstance(node, (dict, list)) or not node:
            break
        keys = list(node) if isinstance(node, dict) else range(len(node))
        parent, key = node, keys[step % len(keys)]
        node = parent[key]
    if parent is not None:
        parent[key] = value
    return tree


ODD = [
    None,
    -1,
    2**31,
    2**32,
    2**63,
    10**30,
    0.5,
    "",
    "x",
    "<|end|>",
    [],
    {},
    [[]],
    True,
    "\u0000",
    "(((((",
    "a" * 1000,
]


def test_hugging_face_folders(hugging_face: Path, tmp_path: Path) -> None:
    in_child(fuzz_hugging_face, tmp_path, str(hugging_face))


def fuzz_hugging_face(guard: Guard, folder: Path, source: str) -> None:
    names = ("tokenizer.json", "tokenizer_config.json")
    valid = {name: (Path(source) / name).read_bytes() for name in names}
    trees = {name: json.loads(content) for name, content in valid.items()}
    HuggingFaceTokenizer(Path(source))
    guard.limit_memory()
    accepted: list[int] = []
    values = st.one_of(st.sampled_from(ODD), st.text(max_size=4), st.integers())

    def variants(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        changed = st.builds(
            lambda path, value: json.dumps(replace_one(trees[name], path, value)).encode(),
            st.lists(st.integers(0, 300), min_size=1, max_size=5),
            values,
        )
        content = st.one_of(changed, changed, changed, damaged(valid[name], header=600))
        return content.map(lambda content: (name, content))

    @examples(60)
    @given(st.one_of(*map(variants, names)))
    def check(change: tuple[str, bytes]) -> None:
        name, content = change
        guard.start(content)
        for other in names:
            (folder / other).write_bytes(content if other == name else valid[other])
        try:
            tokenizer = HuggingFaceTokenizer(folder)
        except UserError as error:
            check_message(error)
            return
        accepted.append(tokenizer.vocab_size)
        use(tokenizer)

    check()
    assert len(accepted) > 5


def test_gpt2_and_jieba_files(hugging_face: Path, tmp_path: Path) -> None:
    in_child(fuzz_library_files, tmp_path, str(hugging_face))


def fuzz_library_files(guard: Guard, folder: Path, source: str) -> None:
    """`vocab.json`, `merges.txt` and PAI's `tokenizer.json`, one of them damaged."""
    tree = json.loads((Path(source) / "tokenizer.json").read_bytes())
    ids = {**tree["model"]["vocab"], "<|endoftext|>": len(tree["model"]["vocab"])}
    renamed = json.loads(json.dumps(tree).replace("<|end|>", "<|endoftext|>"))
    merges = "".join(" ".join(pair) + "\n" for pair in tree["model"]["merges"])
    valid = {
        "vocab.json": json.dumps(ids).encode(),
        "merges.txt": f"#version: 0.2\n{merges}".encode(),
        "tokenizer.json": json.dumps(renamed).encode(),
    }
    kinds = {"vocab.json": "GPT2BPETokenizer", "merges.txt": "GPT2BPETokenizer", "tokenizer.json": "JiebaBPETokenizer"}
    for name, content in valid.items():
        (folder / name).write_bytes(content)
    for kind in set(kinds.values()):
        use(load_tokenizer(DataConfig(tokenizer_type=kind, tokenizer_model=str(folder))))  # type: ignore[arg-type]
    guard.limit_memory()
    accepted: list[str] = []

    def variants(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        content = damaged(valid[name], header=600)
        if name == "tokenizer.json":
            changed = st.builds(
                lambda path, value: json.dumps(replace_one(renamed, path, value)).encode(),
                st.lists(st.integers(0, 300), min_size=1, max_size=5),
                st.sampled_from(ODD),
            )
            content = st.one_of(changed, changed, content)
        return content.map(lambda content: (name, content))

    @examples(90)
    @given(st.one_of(*map(variants, valid)))
    def check(change: tuple[str, bytes]) -> None:
        name, content = change
        guard.start(content)
        for other in valid:
            (folder / other).write_bytes(content if other == name else valid[other])
        data = DataConfig(tokenizer_type=kinds[name], tokenizer_model=str(folder))  # type: ignore[arg-type]
        try:
            tokenizer = load_tokenizer(data)
        except UserError as error:
            check_message(error)
            return
        accepted.append(name)
        use(tokenizer)

    check()
    assert len(accepted) > 5


def test_descriptions_of_saved_tokenizers(tmp_path: Path) -> None:
    valid = json.dumps({"tokenizer_type": "NullTokenizer", "vocab_size": 64}).encode()
    fields = st.fixed_dictionaries(
        {},
        optional={
            "tokenizer_type": st.sampled_from(
                [
                    "NullTokenizer",
                    "SentencePieceTokenizer",
                    "HuggingFaceTokenizer",
                    "GPT2BPETokenizer",
                    "JiebaBPETokenizer",
                    "CPMTokenizer",
                    *ODD,
                ]
            ),
            "tokenizer_model": st.sampled_from(
                ["tokenizer.model", "tokenizer.json", ".", "..", "../x", "/etc/passwd", *ODD]
            ),
            "vocab_size": st.sampled_from([64, 1, 2**40, *ODD]),
        },
    )

    @examples(150)
    @given(st.one_of(damaged(valid), fields.map(lambda tree: json.dumps(tree).encode())))
    def check(content: bytes) -> None:
        (tmp_path / "megatron_moe_tokenizer.json").write_bytes(content)
        try:
            tokenizer = load_saved_tokenizer(tmp_path)
        except UserError as error:
            check_message(error)
            return
        assert 0 < tokenizer.vocab_size < 2**31

    check()


@pytest.mark.parametrize("model", ["../tokenizer.model", "/etc/passwd", "..", "sub/tokenizer.model", 3])
def test_a_saved_tokenizer_lies_in_its_folder(model: object, tmp_path: Path) -> None:
    tree = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": model}
    (tmp_path / "megatron_moe_tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(UserError, match="which is not saved there"):
        load_saved_tokenizer(tmp_path)
