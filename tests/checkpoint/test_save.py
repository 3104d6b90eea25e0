"""Checkpoints on disk: whole or invisible, pruned in order, and refused with one clear line when they do not fit."""

import itertools
import os
import shutil
import signal
import struct
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint import layout
from megatron_moe.config.base import UserError
from tests.helpers.distributed import RankFailure, run_ranks
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve

QUIET = {"tensorboard": False}


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("iter_*"))


def train(folder: Path, data: Path, world_size: int = 1, **flags: Any) -> Any:
    return run_ranks(world_size, train_curve, tiny_run(**data_flags(data) | QUIET | {"save": str(folder)} | flags))[0]


# ---- whole or invisible


def killed_while_saving(run: Any, moment: str) -> None:
    """Train, and die in the middle of the second checkpoint."""
    from megatron_moe.checkpoint import save

    def die(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def count_down(function: Any) -> Any:
        calls = []

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                die()
            return function(*args, **kwargs)

        return wrapped

    if moment == "tensors written":
        save.save_run = count_down(save.save_run)
    elif moment == "before the rename":
        save.publish = count_down(save.publish)
    elif moment == "before latest is moved":
        layout._write_durably = count_down(layout._write_durably)
    elif moment == "disk full":
        original = save.dist_checkpointing.save
        calls = []

        def full(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)

        save.dist_checkpointing.save = full
    train_curve(run)


@pytest.mark.parametrize("moment", ["tensors written", "before the rename", "before latest is moved", "disk full"])
def test_interrupted_save_leaves_the_one_before(moment: str, tiny_data: Path, tmp_path: Path) -> None:
    """Saved at steps 1 and 2, killed during the second; the run then goes on from 1 and ends like an unbroken one."""
    flags = data_flags(tiny_data) | QUIET | {"save": str(tmp_path / "run"), "load": str(tmp_path / "run")}
    run = tiny_run(**flags, save_interval=1)
    with pytest.raises(RankFailure, match="No space left" if moment == "disk full" else "died"):
        run_ranks(1, killed_while_saving, run, moment)
    assert layout.latest_iteration(tmp_path / "run") == 1
    assert layout.find_checkpoint(tmp_path / "run").name == "iter_0000001"
    rest = run_ranks(1, train_curve, run)[0]
    whole = train(tmp_path / "whole", tiny_data)
    assert rest.losses == whole.losses[1:]
    assert steps_in(tmp_path / "run") == ["iter_0000001", "iter_0000002", "iter_0000003"]
    assert layout.latest_iteration(tmp_path / "run") == 3


def make(folder: Path, *steps: int) -> None:
    for step in steps:
        path = layout.checkpoint_folder(folder, step)
        path.mkdir(parents=True)
        (path / "data").write_text(str(step), encoding="utf-8")


def test_publish_replaces_a_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    make(tmp_path, 5)
    unfinished = tmp_path / "iter_0000005.unfinished"
    unfinished.mkdir()
    (unfinished / "data").write_text("new", encoding="utf-8")
    assert layout.publish(unfinished, 5) == tmp_path / "iter_0000005"
    assert (tmp_path / "iter_0000005" / "data").read_text(encoding="utf-8") == "new"
    assert layout.latest_iteration(tmp_path) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000005",
        "latest_checkpointed_iteration.txt",
    ]


# ---- keep-last


def test_only_the_last_ones_are_kept(tiny_data: Path, tmp_path: Path) -> None:
    train(tmp_path, tiny_data, train_iters=4, save_interval=1, keep_last=2)
    assert steps_in(tmp_path) == ["iter_0000003", "iter_0000004"]


def test_prune_goes_by_number_and_passes_over_the_rest(tmp_path: Path) -> None:
    make(tmp_path, 9, 10, 100, 9_999_999, 10_000_000)
    (tmp_path / "iter_0000011.unfinished").mkdir()
    (tmp_path / layout.LATEST_FILE).write_text("10000000\n", encoding="utf-8")
    deleted = [path.name for path in layout.prune(tmp_path, 2)]
    assert deleted == ["iter_0000009", "iter_0000010", "iter_0000100"]
    assert steps_in(tmp_path) == ["iter_0000011.unfinished", "iter_10000000", "iter_9999999"]


def test_prune_never_takes_the_newest_saved(tmp_path: Path) -> None:
    """A run that was resumed from step 10 saves step 15, while the abandoned steps 20 and 30 lie there still."""
    make(tmp_path, 5, 10, 15, 20, 30)
    (tmp_path / layout.LATEST_FILE).write_text("15\n", encoding="utf-8")
    layout.prune(tmp_path, 2)
    assert layout.find_checkpoint(tmp_path).name == "iter_0000015"
    assert {"iter_0000010", "iter_0000015"} <= set(steps_in(tmp_path))
    assert "iter_0000005" not in steps_in(tmp_path)


# ---- what does not fit


@pytest.fixture(scope="module")
def saved(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    train(folder, tiny_data, train_iters=1)
    return folder


def refusal(run: Any) -> str:
    from megatron_moe.runtime.distributed import start
    from megatron_moe.training.loop import Trainer

    try:
        Trainer.build(run, start(run.parallel, run.virtual_stages))
    except UserError as error:
        return str(error)
    return ""


def refused(folder: Path, data: Path, world_size: int = 1, **flags: Any) -> str:
    messages = run_ranks(world_size, refusal, tiny_run(**data_flags(data) | {"load": str(folder)} | flags))
    assert len(set(messages)) == 1, messages
    assert "\n" not in messages[0]
    return messages[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hidden_size": 64}, "--hidden-size 64: the checkpoint {} was written with 32; give the same"),
        ({"num_experts": (8, 8)}, "--num-experts 0 8 0 8: the checkpoint {} was written with 0 4 0 8"),
        ({"mlp_type": "standard"}, "--mlp-type standard: the checkpoint {} was written with residual"),
        ({"swiglu": True}, "--swiglu True: the checkpoint {} was written with False"),
        ({"moe_ffn_hidden_size": 64}, "--moe-ffn-hidden-size 64: the checkpoint {} was written with 128"),
        ({"num_query_groups": 2}, "--num-query-groups 2: the checkpoint {} was written with 4"),
        ({"seq_length": 64}, "--max-position-embeddings 64: the checkpoint {} was written with 32"),
        ({"normalization": "RMSNorm"}, "--normalization RMSNorm: the checkpoint {} was written with LayerNorm"),
    ],
)
def test_another_model_names_the_flag(flags: dict[str, Any], message: str, saved: Path, tiny_data: Path) -> None:
    assert refused(saved, tiny_data, **flags).startswith(message.format(saved / "iter_0000001"))


@pytest.mark.parametrize(
    "flags",
    [
        {"ffn_hidden_size": 128},
        {"num_query_groups": 4},
        {"kv_channels": 8},
        {"max_position_embeddings": 32},
        {"moe_ffn_hidden_size": 128},
        {"seq_length": 16, "max_position_embeddings": 32},
        {"num_experts": (4, 8), "moe_layer_freq": (0, 1, 0, 1), "expert_interval": 1},
        {"hidden_dropout": 0.1, "attention_backend": "unfused"},
    ],
    ids=str,
)
def test_the_same_model_in_other_words_is_taken(flags: dict[str, Any], saved: Path, tiny_data: Path) -> None:
    assert refused(saved, tiny_data, **flags) == ""


def test_missing_folder(tiny_data: Path, tmp_path: Path) -> None:
    where = tmp_path / "nowhere"
    assert refused(where, tiny_data) == f"--load {where}: no such folder; give the --save folder of a run"


def test_folder_without_a_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    assert refused(tmp_path, tiny_data, world_size=2).startswith(f"--load {tmp_path}: holds no checkpoint")


def test_own_empty_folder_starts_afresh(tiny_data: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "new", tmp_path):
        assert len(train(folder, tiny_data, load=str(folder), train_iters=2).losses) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("7\n", "names step 7, but iter_0000007 is not there"), ("", "holds ''"), ("release\n", "holds 'release'")],
)
def test_latest_file_that_leads_nowhere(text: str, message: str, saved: Path, tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    (folder / layout.LATEST_FILE).write_text(text, encoding="utf-8")
    assert message in refused(folder, tiny_data)
    # Also where the run would start afresh in an empty folder of its own.
    assert message in refused(folder, tiny_data, save=str(folder))


def flip_a_bit(file: Path) -> None:
    """In the first number of the first tensor: `.distcp` files are zip archives one behind the other."""
    data = bytearray(file.read_bytes())
    header = data.index(b"/data/0") - data[: data.index(b"/data/0")][::-1].index(b"\x04\x03KP") - 4
    name, extra = struct.unpack_from("<HH", data, header + 26)
    data[header + 30 + name + extra] ^= 0x40
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damaged", "how"),
    [
        *itertools.product((".metadata", "*.distcp", "metadata.json", "config.yaml"), ("cut", "gone")),
        ("*.distcp", "flipped"),
    ],
)
def test_damaged_file_is_named(damaged: str, how: str, saved: Path, tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    (file, *_) = sorted((folder / "iter_0000001").glob(damaged))
    if how == "gone":
        file.unlink()
    elif how == "flipped":
        flip_a_bit(file)
    elif damaged == "config.yaml":
        file.write_bytes(b"model: [")
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    message = refused(folder, tiny_data)
    assert str(file) in message, message
    assert len(message) < 500
