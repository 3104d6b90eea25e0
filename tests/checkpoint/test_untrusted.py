"""A checkpoint that somebody else made cannot run code, read other files or take memory: it is one clear line."""

import builtins
import contextlib
import importlib
import io
import os
import pickle
import pickletools
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.checkpoint.safe_archive import load_archive
from megatron_moe.checkpoint.safe_pickle import read_pickle
from megatron_moe.checkpoint.torch_metadata import read_metadata
from megatron_moe.config.base import UserError
from tests.helpers.attacks import Evil, read_index, replace_bytes, replace_object, write_index
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve

STEP = "iter_0000001"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("good")
    run_ranks(1, train_curve, tiny_run(**data_flags(tiny_data), train_iters=1, save=str(folder), tensorboard=False))
    return folder


@pytest.fixture
def run_dir(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "run"))


def in_the_index(folder: Path, marker: Path) -> None:
    write_index(folder, Evil(os.system, f"touch {marker}"))


def inside_the_index(folder: Path, marker: Path) -> None:
    metadata = read_index(folder)
    metadata.planner_data = {"x": Evil(eval, f"open({str(marker)!r}, 'w')")}
    write_index(folder, metadata)


def in_the_generators(folder: Path, marker: Path) -> None:
    replace_object(folder, "rng_state", [{"python": Evil(builtins.open, str(marker), "w")}])


def in_the_common_state(folder: Path, marker: Path) -> None:
    replace_object(folder, "common_state", [{"progress": Evil(exec, f"open({str(marker)!r}, 'w')")}])


def in_a_weight(folder: Path, marker: Path) -> None:
    replace_object(folder, "decoder.final_layernorm.weight", Evil(os.mkdir, str(marker)))


def in_an_extra_state(folder: Path, marker: Path) -> None:
    replace_object(folder, "decoder.layers.0.mlp.linear_fc1._extra_state", [Evil(os.mkdir, str(marker))])


def in_an_old_file(folder: Path, marker: Path) -> None:
    torch.save({"args": Evil(os.system, f"touch {marker}")}, folder / "common.pt")


ATTACKS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "index": (in_the_index, ".system'"),
    "inside the index": (inside_the_index, "'builtins.eval'"),
    "generators": (in_the_generators, "open'"),
    "common state": (in_the_common_state, ".exec'"),
    "weight": (in_a_weight, ".mkdir'"),
    "extra state": (in_an_extra_state, ".mkdir'"),
    "common.pt": (in_an_old_file, "common.pt: no checkpoint of this program holds such a file"),
}


def attempt(command: str, words: list[str]) -> str:
    main = importlib.import_module(f"megatron_moe.{command}").main
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main(words)
    except UserError as error:
        return str(error)
    return "it was loaded"


def command_line(command: str, run_dir: Path, data: Path, tmp_path: Path) -> list[str]:
    words = ["--load", str(run_dir)]
    if command == "pretrain":
        words += ["--config", str(run_dir / "config.yaml"), "--train-iters", "2", "--save", str(tmp_path / "new")]
    elif command == "evaluate":
        words += ["--data-path", str(data / "valid")]
    elif command == "generate":
        words += ["--prompt", "北京", "--max-new-tokens", "1"]
    else:
        prompts = tmp_path / "in.jsonl"
        prompts.write_text('{"text": "北京的老师"}\n', encoding="utf-8")
        words += ["--input", str(prompts), "--output", str(tmp_path / "out.jsonl")]
    return words


def test_the_commands_below_work_on_a_good_checkpoint(run_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    for command in ("pretrain", "generate", "score", "evaluate"):
        words = command_line(command, run_dir, tiny_data, tmp_path)
        assert run_ranks(1, attempt, command, words) == ["it was loaded"], command


@pytest.mark.parametrize("name", ATTACKS)
def test_code_in_a_checkpoint_is_refused(name: str, run_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    attack, expected = ATTACKS[name]
    attack(run_dir / STEP, marker)
    assert not marker.exists(), "the attack itself made it"
    others = {"index": ["generate", "score", "evaluate"], "generators": []}.get(name, ["generate"])
    for command in ["pretrain", *others]:
        (message,) = run_ranks(1, attempt, command, command_line(command, run_dir, tiny_data, tmp_path))
        assert expected in message, command
        assert str(run_dir / STEP) in message
        assert len(message.splitlines()) == 1
        assert not marker.exists(), command


def test_the_attacks_are_real(run_dir: Path, tmp_path: Path) -> None:
    """What torch itself does with the same files."""
    marker = tmp_path / "marker"
    in_the_index(run_dir / STEP, marker)
    read_index(run_dir / STEP)
    assert marker.exists()
    buffer = io.BytesIO()
    torch.save([Evil(os.rmdir, str(tmp_path / "folder"))], buffer)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"rmdir"):
        load_archive(buffer, "x")
    assert (tmp_path / "folder").exists()
    buffer.seek(0)
    torch.load(buffer, weights_only=False)
    assert not (tmp_path / "folder").exists()


# ---- places and sizes


def change(field: str, value: Any) -> Callable[[Any], None]:
    def spoil(metadata: Any) -> None:
        place = next(iter(metadata.storage_data.values()))
        setattr(place, field, value)

    return spoil


def grow(metadata: Any) -> None:
    entry = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    entry.size = entry.chunks[0].sizes = torch.Size([10**15])


def drop_a_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata["decoder.final_layernorm.weight"].chunks.clear()


def forget(metadata: Any) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == "decoder.final_layernorm.weight")
    del metadata.storage_data[index]


SPOILED: dict[str, tuple[Callable[[Any], None], str]] = {
    "another folder": (change("relative_path", "../../../../etc/passwd"), "is no file of the folder"),
    "an absolute path": (change("relative_path", "/etc/passwd"), "is no file of the folder"),
    "the folder above": (change("relative_path", ".."), "is no file of the folder"),
    "no such file": (change("relative_path", "__9_9.distcp"), "__9_9.distcp: No such file or directory"),
    "behind the end": (change("offset", 10**12), "is said to end at byte 10000000"),
    "terabytes": (change("length", 2**62), "is said to end at byte"),
    "a negative place": (change("offset", -1), "has no place"),
    "a transformed part": (change("transform_descriptors", ["zstd"]), "stored transformed"),
    "a tensor of terabytes": (grow, "takes 4000000000000000 bytes but only"),
    "a missing part": (drop_a_chunk, "has 32 numbers, but 0 are stored"),
    "a lost tensor": (forget, "'decoder.final_layernorm.weight' is stored nowhere"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_an_index_that_does_not_fit_its_files(name: str, run_dir: Path) -> None:
    spoil, expected = SPOILED[name]
    folder = run_dir / STEP
    read_metadata(folder)
    metadata = read_index(folder)
    spoil(metadata)
    write_index(folder, metadata)
    # Either file may be the damaged one where they do not fit each other: both are named.
    with pytest.raises(
        UserError, match=r"\.metadata: damaged, or not a checkpoint of this program: |\.distcp: "
    ) as caught:
        read_metadata(folder)
    assert expected in str(caught.value)
    assert ".metadata" in str(caught.value)


def test_a_cut_index_and_none_at_all(run_dir: Path) -> None:
    index = run_dir / STEP / ".metadata"
    whole = index.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        index.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            read_metadata(index.parent)
    index.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_metadata(index.parent)


# ---- memory


def test_pickles_that_announce_gigabytes_take_none() -> None:
    """CPython's unpickler allocates before it reads: 34 GB for the memo of the first, 100 GB for the second."""
    bombs = [
        b"\x80\x04]r\xff\xff\xff\x7f.",
        b"\x80\x05\x96" + struct.pack("<Q", 100 << 30) + b"x.",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
        b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
        b"\x80\x04" + b"I" + b"9" * 100_000 + b"\n.",
        b"\x80\x04}" + b"(" * 1_000_000,
        b"\x80\x04}" + b")\x85" + b"\x85" * 1_000_000 + b"K\x01s.",
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bomb in bombs[1:]:
        with pytest.raises(
            UserError, match=r"^x: damaged, or not a checkpoint of this program \(.{1,150}\); restore it"
        ):
            read_pickle(bomb, frozenset(), "x")
    assert read_pickle(bombs[0], frozenset(), "x") == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes"


def zipped(content: bytes, compression: int = zipfile.ZIP_STORED) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return buffer


def test_archives_that_announce_gigabytes_take_none() -> None:
    with pytest.raises(UserError, match="holds compressed data"):
        load_archive(zipped(b"\0" * 50_000_000, zipfile.ZIP_DEFLATED), "x")
    bytearray_call = pickle.dumps(Evil(bytearray, 1 << 40), protocol=2)
    assert b"bytearray" in bytearray_call
    with pytest.raises(UserError, match="bytearray"):
        load_archive(zipped(bytearray_call), "x")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18, os.urandom(1000)])
def test_what_is_no_archive(content: bytes) -> None:
    with pytest.raises(UserError, match="damaged"):
        load_archive(io.BytesIO(content), "file at byte 0")


def test_a_weight_of_another_shape_or_type(run_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    for tensor, expected in (
        (torch.zeros(4), "it is not decoder.final_layernorm.weight of shape (32,)"),
        (torch.zeros(32, dtype=torch.int64), "is torch.int64, not torch.float32"),
        ({"a": 1}, "it is not decoder.final_layernorm.weight"),
    ):
        replace_object(run_dir / STEP, "decoder.final_layernorm.weight", tensor)
        (message,) = run_ranks(1, attempt, "generate", command_line("generate", run_dir, tiny_data, tmp_path))
        assert expected in message


def test_only_the_operations_that_torch_uses_are_known(good: Path) -> None:
    """What a real index needs is read; torch's own reading of it agrees."""
    ours, theirs = read_metadata(good / STEP), read_index(good / STEP)
    assert ours.storage_data == theirs.storage_data
    assert set(ours.state_dict_metadata) == set(theirs.state_dict_metadata)
    for key, entry in theirs.state_dict_metadata.items():
        assert type(ours.state_dict_metadata[key]) is type(entry)
        if hasattr(entry, "size"):
            found: Any = ours.state_dict_metadata[key]
            assert (found.size, found.chunks) == (entry.size, entry.chunks)
            assert found.properties.dtype == entry.properties.dtype
    operations = {code.name for code, _, _ in pickletools.genops((good / STEP / ".metadata").read_bytes())}
    assert "STACK_GLOBAL" in operations


def test_replacing_bytes_reaches_the_reader(run_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    replace_bytes(run_dir / STEP, "common_state", b"nonsense")
    (message,) = run_ranks(1, attempt, "pretrain", command_line("pretrain", run_dir, tiny_data, tmp_path))
    assert "damaged (File is not a zip file)" in message


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("num_layers: 4", "num_layers: 1000000000000", "--num-layers 1000000000000: must be at most 10000"),
        ("hidden_size: 32", "hidden_size: 3200000", "describes a model of"),
        ("num_experts: [4, 8]", "num_experts: [4, 800000000]", "describes a model of"),
        ("ffn_hidden_size: null", "ffn_hidden_size: 2000000000", "describes a model of"),
        ("ffn_hidden_size: null", "ffn_hidden_size: 4000000000", "--ffn-hidden-size 4000000000: must be at most"),
    ],
)
def test_flags_that_announce_gigabytes_take_none(
    before: str, after: str, message: str, run_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Of a checkpoint of unknown origin `config.yaml` is a header as well: no model is built from it alone."""
    config = run_dir / STEP / "config.yaml"
    text = config.read_text(encoding="utf-8")
    assert before in text
    config.write_text(text.replace(before, after, 1), encoding="utf-8")
    answer = run_ranks(1, attempt, "generate", command_line("generate", run_dir, tiny_data, tmp_path))[0]
    assert message in answer
    assert "\n" not in answer.strip()
