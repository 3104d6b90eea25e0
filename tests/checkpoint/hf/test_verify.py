"""The proof finds what is wrong: another number, a key too few or too many, code that is not ours."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe.checkpoint.hf import verify
from megatron_moe.checkpoint.hf.families.base import Family
from megatron_moe.checkpoint.hf.families.deepseek_v3 import FAMILY as DEEPSEEK
from megatron_moe.checkpoint.hf.families.glm4_moe import FAMILY as GLM4
from megatron_moe.checkpoint.hf.fresh_process import measure
from megatron_moe.checkpoint.hf.own_code import needs_code, with_own_code
from megatron_moe.checkpoint.hf.remote.family import AUTO_MAP, CODE_FILES, copy_code
from megatron_moe.checkpoint.hf.verify import NotProved, _judge, keeping_what_is_written
from megatron_moe.config.base import Resumable, UserError
from tests.helpers.converting import converted
from tests.helpers.hf_parity import moe_like

IDS = [[1, 5, 9, 33, 800, 2, 7], [4, 4, 8]]


def answer_about(folder: Path, logits: list[str], dtype: str = "float32") -> dict[str, Any]:
    """What the fresh process would answer, asked here: transformers takes seconds to import."""
    request = {
        "folder": str(folder),
        "remote_code": False,
        "ids": IDS,
        "domains": None,
        "logits": logits,
        "dtype": dtype,
        "threads": 1,
        "debug": True,
    }
    return measure(request)


@pytest.fixture(scope="module")
def logits(exported: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of the exported folder itself, as those of our model."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("logits")
    model = AutoModelForCausalLM.from_pretrained(exported[0], dtype=torch.float32)
    paths = []
    for row, ids in enumerate(IDS):
        path = folder / f"{row}.npy"
        np.save(path, model(input_ids=torch.tensor([ids])).logits[0].detach().numpy())
        paths.append(str(path))
    return paths


@pytest.fixture
def copy(exported: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported[0], tmp_path / "hf"))


def judged(answer: dict[str, Any], dtype: str = "float32") -> Any:
    return _judge(answer, "hf", dtype, 1e-4)


def test_the_same_model_is_at_no_distance(exported: tuple[Path, str], logits: list[str]) -> None:
    proof = judged(answer_about(exported[0], logits))
    assert proof.max_difference < 1e-5
    assert proof.same_top == 1.0
    assert proof.tokens == 10
    assert proof.model_class == "MixtralForCausalLM"


def test_rounding_is_seen(exported: tuple[Path, str], logits: list[str]) -> None:
    with pytest.raises(UserError, match=r"verify hf: logits differ by up to .* at most 1e-04 is allowed"):
        judged(answer_about(exported[0], logits, "bfloat16"))


def test_one_expert_of_another_layer_is_seen(copy: Path, logits: list[str]) -> None:
    tensors = load_file(copy / "model.safetensors")
    names = [f"model.layers.{layer}.block_sparse_moe.experts.2.w2.weight" for layer in (0, 1)]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]].clone(), tensors[names[0]].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"logits differ by up to"):
        judged(answer_about(copy, logits))


def test_missing_and_unexpected_keys(copy: Path, logits: list[str]) -> None:
    tensors = load_file(copy / "model.safetensors")
    moved = tensors.pop("model.norm.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight is needed by the class but not in the folder"):
        judged(answer_about(copy, logits))
    # Both: what is missing comes first, though the names are alike.
    save_file(tensors | {"model.norm2.weight": moved}, copy / "model.safetensors", metadata={"format": "pt"})
    answer = answer_about(copy, logits)
    assert answer["unexpected_keys"] == ["model.norm2.weight"]
    with pytest.raises(UserError, match=r"model\.norm2\.weight is in the folder but not read by the class"):
        judged(answer | {"missing_keys": []})


def test_answers_that_are_no_proof() -> None:
    row = {"tokens": 1, "finite": True, "max": 0.0, "mean": 0.0, "largest_logit": 1.0, "kl": 0.0, "same_top": 1.0}
    answer: dict[str, Any] = {
        "class": "X",
        "versions": {"torch": "2", "transformers": "5"},
        "missing_keys": [],
        "unexpected_keys": [],
        "mismatched_keys": [],
        "rows": [row],
    }
    assert judged(answer).max_difference == 0.0
    with pytest.raises(UserError, match="logits differ"):
        judged(answer | {"rows": [row, row | {"max": float("nan")}]})
    with pytest.raises(UserError, match=r"some logits are not finite; the weights overflow in float16"):
        judged(answer | {"rows": [row | {"finite": False}]}, "float16")
    with pytest.raises(UserError, match=r"logits have the shape \[1, 9\], those of our model \[1, 8\]"):
        judged(answer | {"rows": [{"shapes": [[1, 8], [1, 9]]}]})
    with pytest.raises(UserError, match=r"has another shape than the class needs \(and 1 others\)"):
        judged(answer | {"mismatched_keys": ["a", "b"]})


def test_only_a_difference_speaks_against_what_is_written() -> None:
    """What could not be run is told apart by the kind of the error, not by its words."""
    with (
        pytest.raises(NotProved, match="transformers cannot load it: ImportError: no; what is written is kept"),
        keeping_what_is_written(),
    ):
        judged({"error": "ImportError: no"})
    keys: dict[str, Any] = {"missing_keys": ["a"], "unexpected_keys": [], "mismatched_keys": []}
    with pytest.raises(UserError, match="a is needed by the class") as raised, keeping_what_is_written():
        judged(keys)
    assert not isinstance(raised.value, Resumable)


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        (GLM4, {}),
        (DEEPSEEK, {"multi_latent_attention": True, "num_query_groups": None, "qk_layernorm": True}),
    ],
    ids=["glm4_moe", "deepseek_v3"],
)
def test_what_stays_fp32_is_no_parameter(family: Family, flags: dict[str, Any]) -> None:
    """Both sides of the proof round all parameters: what an export keeps in fp32 must be none of them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    run = moe_like(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, **flags)
    config = AutoConfig.for_model(family.model_type, **family.config(run))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = family.fp32_names(run)
    assert len(names) == run.model.num_layers
    assert names <= dict(model.named_buffers()).keys()
    assert names.isdisjoint(dict(model.named_parameters()))


def test_fresh_process_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(verify, "_SCRIPT", script)
    with pytest.raises(NotProved, match=r"was killed by signal 9 \(out of memory\?\); make room in memory"):
        verify._ask(tmp_path, IDS, None, [], "float32", False, tmp_path, False)


def test_command(mixtral_run: Path, exported: tuple[Path, str]) -> None:
    printed = converted("verify", "--load", mixtral_run, "--hf", exported[0])
    assert "41 tensors of" in printed
    assert "hold the same numbers" in printed
    assert "0 missing, 0 unexpected, 0 mismatched keys" in printed


def test_code_of_others_is_not_run(tmp_path: Path) -> None:
    """Whatever the folder's code says, the staged one has ours."""
    assert not needs_code({"model_type": "mixtral", "auto_map": {"AutoModel": "evil.Model"}})
    assert needs_code({"model_type": "megatron_moe"})
    folder = tmp_path / "hf"
    folder.mkdir()
    copy_code(folder)
    (folder / "model.safetensors").write_bytes(b"weights")

    def config(**changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps({"model_type": "megatron_moe", "auto_map": AUTO_MAP, **changes}))

    def staged(name: str) -> str | None:
        note = with_own_code(folder, tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == {"config.json", "model.safetensors", *CODE_FILES}
        assert (tmp_path / name / "model.safetensors").read_bytes() == b"weights"
        assert json.loads((tmp_path / name / "config.json").read_text())["auto_map"] == AUTO_MAP
        assert "EVIL" not in (tmp_path / name / CODE_FILES[1]).read_text()
        return note

    config()
    assert staged("same") is None
    config(auto_map={**AUTO_MAP, "AutoModel": "other.Model"})
    assert staged("map") == "auto_map of config.json is not the one of this version"
    config()
    (folder / "more.py").write_text("EVIL")
    assert staged("more") == "more.py is not the one of this version"
    (folder / "more.py").unlink()
    (folder / CODE_FILES[1]).write_text("EVIL")
    assert staged("evil") == "modeling_megatron_moe.py is not the one of this version"
    (folder / CODE_FILES[1]).unlink()
    assert staged("none") == "modeling_megatron_moe.py is missing"


def test_folder_with_other_code_is_compared_by_ours(pyramid_run: Path, tmp_path: Path) -> None:
    """The folder's code would write a file, here and in the fresh process."""
    converted("to-hf", "--load", pyramid_run, "--output", tmp_path / "hf", "--no-verify")
    path = tmp_path / "hf" / CODE_FILES[1]
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + path.read_text())
    printed = converted("verify", "--load", pyramid_run, "--hf", tmp_path / "hf")
    assert "note: modeling_megatron_moe.py is not the one of this version; it was not run" in printed
    assert "0 missing, 0 unexpected, 0 mismatched keys" in printed
    assert not (tmp_path / "ran").exists()
