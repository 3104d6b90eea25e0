"""Every mistake in a conversion is one line, exit code 2, and nothing half-written. Through the real command."""

import json
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.converting import convert
from tests.helpers.launch import launch

EXPORT = "to-hf --load {run} --output {tmp}/out"
IMPORT = "from-hf --hf {hf} --save {tmp}/out"
FOREIGN_WEIGHT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


@dataclass(frozen=True)
class Place:
    """Where a case may break things: copies of its own."""

    tmp: Path
    run: Path
    hf: Path

    def fill(self, text: str) -> str:
        return text.format(tmp=self.tmp, run=self.run, hf=self.hf)


@dataclass(frozen=True)
class Case:
    """A command, what is broken before, and the line it must print."""

    name: str
    words: str
    line: str
    break_it: Callable[[Place], Any] = lambda place: None


@pytest.fixture
def place(mixtral_run: Path, exported: tuple[Path, str], tmp_path: Path) -> Place:
    made = Place(tmp_path, tmp_path / "run", tmp_path / "hf")
    shutil.copytree(mixtral_run, made.run)
    shutil.copytree(exported[0], made.hf)
    return made


def change_config(**changes: Any) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        path = place.hf / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensors(**changes: Any) -> Callable[[Place], None]:
    """Rewrite the file with a tensor taken out (None) or put in."""

    def change(place: Place) -> None:
        from safetensors.torch import load_file, save_file

        path = place.hf / "model.safetensors"
        tensors = load_file(path)
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def cut(place: Place) -> None:
    path = place.hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def index_of_two(place: Place) -> None:
    (place.hf / "model.safetensors").rename(place.hf / "model-00001-of-00002.safetensors")
    weight_map = {FOREIGN_WEIGHT: "model-00002-of-00002.safetensors"}
    (place.hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def without_tokenizer(place: Place) -> None:
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "megatron_moe_tokenizer.json"):
        (place.hf / name).unlink()


def smaller_vocabulary(place: Place) -> None:
    """As when the folder of another model's tokenizer was copied in."""
    from safetensors.torch import load_file, save_file

    path = place.hf / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:800].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((place.hf / "config.json").read_text())
    config["vocab_size"] = config["megatron_moe"]["model"]["vocab_size"] = 800
    (place.hf / "config.json").write_text(json.dumps(config))


def flag_in_config(place: Place) -> None:
    """A run whose router weighs before it chooses: Mixtral's does not."""
    path = next(place.run.glob("iter_*")) / "config.yaml"
    text = path.read_text(encoding="utf-8")
    assert "moe_router_pre_softmax: null" in text
    path.write_text(text.replace("moe_router_pre_softmax: null", "moe_router_pre_softmax: true"), encoding="utf-8")


def damage_run(place: Place) -> None:
    """Flip bytes all over the largest file, as a bad disk does."""
    path = max(place.run.glob("iter_*/*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    for start in range(0, len(content), 5000):
        content[start : start + 64] = bytes(255 - byte for byte in content[start : start + 64])
    path.write_bytes(content)


CASES = [
    Case("damaged checkpoint", f"{EXPORT} --no-verify", ".distcp at byte ", damage_run),
    Case(
        "no such run",
        "to-hf --load {tmp}/none --output {tmp}/out",
        "--load {tmp}/none: no such folder; give the --save folder of a run",
    ),
    Case(
        "run without checkpoint",
        EXPORT,
        "--load {run}: holds no checkpoint (latest_checkpointed_iteration.txt is missing)",
        lambda place: (place.run / "latest_checkpointed_iteration.txt").unlink(),
    ),
    Case("no such step", f"{EXPORT} --iteration 7", "--iteration 7: {run} holds no such checkpoint; there are 2"),
    Case("target without a name", "to-hf --load {run} --output /", "--output /: has no name"),
    Case(
        "target is not empty",
        EXPORT,
        "--output {tmp}/out: is not empty; give a folder that is not there yet",
        lambda place: ((place.tmp / "out").mkdir(), (place.tmp / "out" / "a").touch()),
    ),
    Case(
        "target inside source",
        "to-hf --load {run} --output {run}/out",
        "--output {run}/out: lies in --load {run}, or around it; give a folder beside it",
    ),
    Case(
        "source inside target",
        "from-hf --hf {hf} --save {hf}/run",
        "--save {hf}/run: lies in --hf {hf}, or around it; give a folder beside it",
    ),
    Case("unknown target", f"{EXPORT} --target mixtrl", "--target mixtrl: unknown; there are mixtral, qwen3_moe, "),
    Case(
        "target that is not exact",
        f"{EXPORT} --target mixtral",
        "--target mixtral: does not compute what the model computes: weights of a token's experts do not sum to 1",
        flag_in_config,
    ),
    Case("no size", f"{EXPORT} --max-shard-size big", "--max-shard-size big: must be a size like 5GB or 500MiB"),
    Case(
        "chat template not there",
        f"{EXPORT} --chat-template {{tmp}}/none",
        "--chat-template {tmp}/none: cannot be read: No such file or directory",
    ),
    Case("unknown flag", f"{EXPORT} --ouput x", "--ouput: unknown flag; did you mean --output?"),
    Case(
        "no config.json",
        "from-hf --hf {run} --save {tmp}/out",
        "--hf {run}: holds no config.json; give the folder of a Hugging Face checkpoint",
    ),
    Case(
        "a config.json of another size",
        IMPORT,
        "{hf}/config.json: is larger than 10,000,000 bytes, so it is not what its name says",
        lambda place: (place.hf / "config.json").write_bytes(b" " * 10_000_001),
    ),
    Case(
        "another architecture",
        IMPORT,
        "--hf {hf}: config.json: model_type bert: is not read; there are mixtral, qwen3_moe, ",
        change_config(model_type="bert"),
    ),
    Case(
        "a value we have no flag for",
        IMPORT,
        "--hf {hf}: config.json: sliding_window 64: must be ",
        change_config(sliding_window=64, megatron_moe=None),
    ),
    Case("missing shard", IMPORT, "{hf}/model-00002-of-00002.safetensors: is missing, ", index_of_two),
    Case("cut file", IMPORT, "{hf}/model.safetensors: cut short: holds ", cut),
    Case(
        "missing key",
        IMPORT,
        f"{{hf}}: lacks {FOREIGN_WEIGHT}, which a model of this configuration has",
        change_tensors(**{FOREIGN_WEIGHT: None}),
    ),
    Case(
        "unknown key",
        IMPORT,
        "{hf}: holds model.layers.9.input_layernorm.weight, which no model of this configuration has",
        change_tensors(
            **{"model.layers.9.input_layernorm.weight": lambda tensors: tensors["model.norm.weight"].clone()}
        ),
    ),
    Case(
        "another shape",
        IMPORT,
        "model.norm.weight",
        change_tensors(**{"model.norm.weight": lambda tensors: tensors["model.norm.weight"][:16].clone()}),
    ),
    Case(
        "no tokenizer",
        IMPORT,
        "--hf {hf}: holds no tokenizer (tokenizer.json or tokenizer.model is missing); give one with --tokenizer PATH, "
        "or --tokenizer NullTokenizer for ids without text",
        without_tokenizer,
    ),
    Case(
        "tokenizer of another model",
        IMPORT,
        "--hf {hf}: the tokenizer has 860 ids, but the model's embedding has 800 rows; give the tokenizer that the "
        "model was trained with",
        smaller_vocabulary,
    ),
    Case(
        "weights of another run",
        "verify --load {run} --hf {hf}",
        "--hf {hf}: model.norm.weight differs from the run in 32 numbers, by up to ",
        change_tensors(**{"model.norm.weight": lambda tensors: tensors["model.norm.weight"] * 1.5}),
    ),
    Case("nothing to inspect", "inspect {tmp}/none", "{tmp}/none: no such file or folder; give a run, "),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, place: Place) -> None:
    case.break_it(place)
    before = set(place.tmp.rglob("*"))
    done = convert(*(place.fill(word) for word in case.words.split()))
    assert done.codes == [2], done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert place.fill(case.line) in line
    assert set(place.tmp.rglob("*")) == before, "nothing is left behind"


_Usage = namedtuple("_Usage", "total used free")


def full_disk() -> None:
    """Let this process find no room."""
    shutil.disk_usage = lambda path: _Usage(10**9, 10**9 - 1000, 1000)  # type: ignore[assignment]


@pytest.mark.parametrize("words", [EXPORT, IMPORT], ids=["to-hf", "from-hf"])
def test_no_room(words: str, place: Place) -> None:
    line = place.fill(words).split()
    done = launch(1, "tools/convert_checkpoint.py", *line, prepare=(full_disk,))
    assert done.codes == [2]
    assert done.stderr.count("\n") == 1
    assert f"{place.tmp}/out: needs 0.07 GB, but {place.tmp} has 0.00 GB free; make room" in done.stderr
    assert not list(place.tmp.glob("out*"))


def another_epsilon() -> None:
    """Let Mixtral's map forget a field, as a mistake in it would."""
    from megatron_moe.checkpoint.hf.families.mixtral import Mixtral

    right = Mixtral.config
    Mixtral.config = lambda self, run: right(self, run) | {"rms_norm_eps": 0.1}  # type: ignore[method-assign]


def kill_the_proof() -> None:
    """As the system does when memory is short."""
    import sys

    from megatron_moe.checkpoint.hf import verify

    def killed(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], check=False)

    verify.subprocess = SimpleNamespace(run=killed)  # type: ignore[assignment]


def other_ids() -> None:
    """Let transformers read a tokenizer that is not ours, as a mistake in its export would; reach no weight."""
    from megatron_moe.checkpoint.convert import stream
    from megatron_moe.checkpoint.hf import tokenizer

    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were converted")

    tokenizer._load = lambda folder: SimpleNamespace(encode=lambda text, **_: [0])
    stream._write_pieces = reached


def no_weight_again() -> None:
    """Let this process end where a weight is converted."""
    from megatron_moe.checkpoint.convert.stream import _Worker

    def reached(*_: Any) -> int:
        raise AssertionError("a weight was converted again")

    _Worker.__call__ = reached  # type: ignore[method-assign]


def test_proof_that_was_killed_keeps_what_is_written(place: Place) -> None:
    """And a start with other options publishes nothing of the first."""
    words = place.fill(f"{EXPORT} --workers 1").split()
    (place.tmp / "text").write_text("text of the first start")
    text = ["--license", "other", "--license-file", place.tmp / "text", "--chat-template", place.tmp / "text"]
    done = launch(1, "tools/convert_checkpoint.py", *words, *text, prepare=(kill_the_proof,))
    assert done.codes == [2], done.stderr
    line, *more = done.stderr.splitlines()
    assert not more, done.stderr
    assert "was killed by signal 9" in line
    assert line.endswith("what is written is kept: start the same again when that is mended, or with --no-verify")
    unfinished = place.tmp / "out.unfinished"
    assert list(place.tmp.glob("out*")) == [unfinished]
    assert (unfinished / "LICENSE").read_text() == (unfinished / "chat_template.jinja").read_text()
    done = launch(1, "tools/convert_checkpoint.py", *words, prepare=(other_ids,))
    assert done.codes == [2], done.stderr
    assert "other ids than SentencePieceTokenizer" in done.stderr
    assert list(place.tmp.glob("out*")) == [unfinished]
    done = launch(1, "tools/convert_checkpoint.py", *words, "--no-verify", prepare=(no_weight_again,))
    assert done.codes == [0], done.stderr
    assert list(place.tmp.glob("out*")) == [place.tmp / "out"]
    files = {path.name for path in (place.tmp / "out").iterdir()}
    assert files == {path.name for path in place.hf.iterdir()}
    for name in files - {"README.md"}:
        assert (place.tmp / "out" / name).read_bytes() == (place.hf / name).read_bytes(), name


def test_tokenizer_is_compared_before_the_weights(place: Place) -> None:
    words = place.fill(f"{EXPORT} --workers 1").split()
    done = launch(1, "tools/convert_checkpoint.py", *words, prepare=(other_ids,))
    assert done.codes == [2], done.stderr
    (line,) = done.stderr.splitlines()
    assert "other ids than SentencePieceTokenizer" in line
    assert not list(place.tmp.glob("out*"))


def test_import_whose_proof_was_killed_goes_on(place: Place) -> None:
    words = place.fill(f"{IMPORT} --workers 1").split()
    done = launch(1, "tools/convert_checkpoint.py", *words, "--tokenizer", "NullTokenizer", prepare=(kill_the_proof,))
    assert done.codes == [2], done.stderr
    assert "what is written is kept" in done.stderr
    saved = place.tmp / "out.unfinished" / "iter_0000000" / "tokenizer"
    before = {path.name for path in saved.iterdir()}
    done = launch(1, "tools/convert_checkpoint.py", *words, prepare=(no_weight_again,))
    assert done.codes == [0], done.stderr
    assert "0 missing, 0 unexpected, 0 mismatched keys" in done.stdout
    assert not list(place.tmp.glob("out.*"))
    assert {path.name for path in (place.tmp / "out" / "iter_0000000" / "tokenizer").iterdir()} != before


def no_copy() -> None:
    """Let a tokenizer be saved as another one."""
    from megatron_moe.checkpoint.hf import importing
    from megatron_moe.data.tokenizer.load import NullTokenizer

    other_ids()
    importing.load_saved_tokenizer = lambda folder: NullTokenizer(7)


def test_import_reads_its_tokenizer_back_before_the_weights(place: Place) -> None:
    words = place.fill(f"{IMPORT} --workers 1").split()
    done = launch(1, "tools/convert_checkpoint.py", *words, prepare=(no_copy,))
    assert done.codes == [2], done.stderr
    (line,) = done.stderr.splitlines()
    assert "tokenizer: a copy of it has 7 ids and ends documents with 6 instead of 860 and 4" in line
    assert not list(place.tmp.glob("out*"))


def without_transformers() -> None:
    """Let it not be found."""
    from megatron_moe.checkpoint.hf import verify

    verify.importlib = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))  # type: ignore[assignment]


@pytest.mark.parametrize("words", [EXPORT, IMPORT], ids=["to-hf", "from-hf"])
def test_without_transformers_nothing_is_begun(words: str, place: Place) -> None:
    done = launch(1, "tools/convert_checkpoint.py", *place.fill(words).split(), prepare=(without_transformers,))
    assert done.codes == [2], done.stderr
    (line,) = done.stderr.splitlines()
    assert "transformers: is not installed" in line
    assert not list(place.tmp.glob("out*"))


def test_proof_that_fails_leaves_nothing(place: Place) -> None:
    words = place.fill(f"{EXPORT} --workers 1").split()
    done = launch(1, "tools/convert_checkpoint.py", *words, prepare=(another_epsilon,))
    assert done.codes == [2], done.stderr
    (line,) = done.stderr.splitlines()
    assert f"{place.tmp}/out: logits differ by up to " in line
    assert "at most 1e-04 is allowed" in line
    assert not list(place.tmp.glob("out*"))
