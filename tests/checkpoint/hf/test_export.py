"""Exported folders: complete, proved, read by transformers, with a card that says what was measured."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_moe.checkpoint.hf.remote.family import CODE_FILES
from tests.helpers.converting import converted
from tests.helpers.distributed import run_ranks
from tests.inference.test_commands import call, flags, read_rows

PROMPT = "北京"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def difference(text: str) -> float:
    """The largest that a command says it found."""
    found = re.search(r"max \|difference\| (\S+),", text)
    assert found
    return float(found[1])


def test_folder_is_complete(exported: tuple[Path, str], mixtral_run: Path) -> None:
    folder, _ = exported
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "megatron_moe_tokenizer.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert not list(folder.parent.glob("exported.*")), "no unfinished folder is left"
    config = read_json(folder / "config.json")
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["dtype"] == "float32"
    assert [config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")] == [1, 4, 3]
    assert config["tie_word_embeddings"] is False
    assert config["megatron_moe"]["moe"]["moe_ffn_hidden_size"] == 24
    assert read_json(folder / "generation_config.json")["eos_token_id"] == [4, 10]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        # Without the rows that only pad it.
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [860, 32]
        assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in file.keys()  # noqa: SIM118
    text = "".join(path.read_text(encoding="utf-8") for path in folder.iterdir() if path.suffix in (".json", ".jinja"))
    assert str(mixtral_run.parent) not in text


def test_what_is_printed_and_on_the_card(exported: tuple[Path, str], mixtral_run: Path) -> None:
    folder, printed = exported
    assert "MixtralForCausalLM (mixtral): exact" in printed
    assert "0 missing, 0 unexpected, 0 mismatched keys" in printed
    assert "tokenizer: the same ids as in training" in printed
    assert 0 < difference(printed) < 1e-5
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"
    assert f"{difference(printed):.2e}" in card
    rows = [json.loads(line) for line in (mixtral_run / "metrics.jsonl").read_text().splitlines()]
    assert f"| training loss at step 2 | {rows[1]['lm_loss']:.4f} nats" in card
    assert f"| validation loss at step 2 | {rows[2]['eval_lm_loss']:.4f} nats" in card
    assert "| experts per layer | 4 4 |" in card
    assert "| tokens read | 512 |" in card


def test_transformers_goes_on_with_a_text_as_we_do(
    exported: tuple[Path, str], mixtral_run: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported[0], local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(exported[0], local_files_only=True, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt")
    theirs = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=4)[0].tolist()
    words = flags(load=mixtral_run, prompt=PROMPT, max_new_tokens=12, output=tmp_path / "out.jsonl")
    run_ranks(1, call, "generate", *words, "--greedy")
    (row,) = read_rows(tmp_path / "out.jsonl")
    # A run of two steps does not end a document.
    assert len(row["ids"]) == 12
    assert theirs == ids["input_ids"][0].tolist() + row["ids"]


@pytest.fixture(scope="module")
def pyramid(pyramid_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model that no class of transformers holds, rounded to bf16, in several files."""
    folder = tmp_path_factory.mktemp("hf") / "pyramid"
    template, licence = folder.with_suffix(".jinja"), folder.with_suffix(".txt")
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    licence.write_text("Do what you like.")
    words = ["--dtype", "bf16", "--max-shard-size", "100KB", "--workers", 2]
    words += ["--chat-template", template, "--license", "other", "--license-file", licence]
    return folder, converted("to-hf", "--load", pyramid_run, "--output", folder, *words)


def test_remote_code_in_several_files(pyramid: tuple[Path, str]) -> None:
    folder, printed = pyramid
    assert "not MixtralForCausalLM: " in printed
    assert "MegatronMoeForCausalLM (megatron_moe): exact" in printed
    assert "weights in bfloat16" in printed
    assert difference(printed) < 1e-5
    index = read_json(folder / "model.safetensors.index.json")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}
    assert read_json(folder / "config.json")["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert all((folder / name).is_file() for name in CODE_FILES)
    assert (folder / "LICENSE").read_text() == "Do what you like."
    assert (folder / "chat_template.jinja").read_text().startswith("{% for m in messages %}[")
    # Only our own template says that a turn has ended.
    assert read_json(folder / "generation_config.json")["eos_token_id"] == 4
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "trust_remote_code=True" in card
    # Two reasons for each class, in the words that the command prints, not all that there are.
    shown = [line.removeprefix("not ") for line in printed.splitlines() if line.startswith("not ")]
    assert shown
    listed = card.split("Classes that are not exact for this model:\n\n")[1].split("\n\n")[0]
    assert listed.splitlines() == [f"- {line}" for line in shown]
    assert any(re.search(r"; and \d+ more$", line) for line in shown)
    assert "| experts per layer | 0 4 0 8 |" in card


def test_lossy_target_is_said_to_be_lossy(mixtral_run: Path, tmp_path: Path) -> None:
    """A run whose router weighs before it chooses, as Mixtral's does not."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(mixtral_run, run)
    path = run / "iter_0000002" / "config.yaml"
    path.write_text(path.read_text("utf-8").replace("moe_router_pre_softmax: null", "moe_router_pre_softmax: true"))
    words = ["--target", "mixtral", "--allow-lossy"]
    printed = converted("to-hf", "--load", run, "--output", tmp_path / "out", *words)
    assert "MixtralForCausalLM (mixtral): NOT exact: " in printed
    assert difference(printed) > 1e-3
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## Not the trained model" in card
    assert "--moe-router-pre-softmax" in card
    assert "megatron_moe" not in read_json(tmp_path / "out" / "config.json")


def test_without_proof_it_says_so(mixtral_run: Path, tmp_path: Path) -> None:
    printed = converted("to-hf", "--load", mixtral_run, "--output", tmp_path / "out", "--no-verify", "--dtype", "fp16")
    assert "NOT verified (--no-verify)" in printed
    assert "**Not verified**" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        "torch.float16"
    }
