"""A Hugging Face folder goes straight into the ranks of a layout: each reads its share, and all compute what
transformers computes."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_moe.checkpoint.hf.importing import import_hf
from megatron_moe.checkpoint.hf.loading import model_of, open_weights
from megatron_moe.checkpoint.hf.options import ImportOptions
from megatron_moe.config.base import UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.config.run import RunConfig
from tests.helpers.distributed import run_ranks
from tests.helpers.launch import launch
from tests.helpers.tiny import data_flags

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "expert_model_parallel_size", "expert_tensor_parallel_size"
IDS = [[(7 * place + 3 * row) % 860 for place in range(24)] for row in range(3)]
SIZES: dict[str, Any] = {
    # No rows are added to the embedding, so that every byte of the model is one of the file.
    "vocab_size": 896,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
MOE = {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}


def write_folder(folder: Path, model: Any, data: Path) -> np.ndarray:
    """Save a model of transformers with random norms, and the tokenizer of the tiny data; returns its logits."""
    from megatron_moe.checkpoint.hf.tokenizer import export_tokenizer
    from megatron_moe.data.tokenizer.load import load_tokenizer

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        logits = model(torch.tensor(IDS)).logits
    model.save_pretrained(folder, max_shard_size="200KB")
    export_tokenizer(load_tokenizer(DataConfig(tokenizer_model=str(data / "bpe.model"))), folder, 128)
    return np.asarray(logits.numpy())


class Given(NamedTuple):
    """A folder, and what transformers computes with it."""

    folder: Path
    logits: np.ndarray


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Given:
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    return Given(folder, write_folder(folder, MixtralForCausalLM(MixtralConfig(**SIZES, **MOE)), tiny_data))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Given:
    """A checkpoint of ours would stack its layers; and its embedding stands for the output layer as well."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"tie_word_embeddings": True, "vocab_size": 870}, intermediate_size=96)
    return Given(folder, write_folder(folder, LlamaForCausalLM(config), tiny_data))


class Rank(NamedTuple):
    """What a rank computed, read and holds."""

    logits: np.ndarray
    read: int
    largest_read: int
    held: int


def compute(folder: str, layout: dict[str, Any]) -> Rank:
    """Load for inference under a layout; the bytes of tensors that are read are counted."""
    from megatron_moe.checkpoint.convert.safetensors_files import SafetensorsSource
    from megatron_moe.config.parallel import ParallelConfig
    from megatron_moe.inference.model import load_saved
    from megatron_moe.inference.options import LoadOptions
    from megatron_moe.inference.saved_model import open_checkpoint
    from megatron_moe.runtime.distributed import environment_world_size

    reads: list[int] = []
    read_into = SafetensorsSource.read_into

    def counted(source: Any, box: Any, out: torch.Tensor) -> None:
        reads.append(out.nbytes)
        read_into(source, box, out)

    SafetensorsSource.read_into = counted  # type: ignore[method-assign]
    parallel = ParallelConfig(device="cpu", **layout)
    model = load_saved(open_checkpoint(LoadOptions(load=folder), parallel, environment_world_size()))
    held = sum(parameter.nbytes for parameter in model._chunk.parameters())
    return Rank(model.logits(IDS).numpy(), sum(reads), max(reads), held)


LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one process": (1, {}),
    "tensor 2, expert 2": (4, {TENSOR: 2, EXPERT: 2, EXPERT_TENSOR: 1}),
    "pipeline 2": (2, {PIPELINE: 2}),
    "expert 4": (4, {EXPERT: 4}),
    "tensor 2, pipeline 2": (4, {TENSOR: 2, PIPELINE: 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_computes_what_transformers_does_and_each_rank_reads_its_share(name: str, moe: Given) -> None:
    world_size, layout = LAYOUTS[name]
    ranks = run_ranks(world_size, compute, str(moe.folder), layout)
    for rank in ranks:
        np.testing.assert_allclose(rank.logits[..., :896], moe.logits, atol=2e-5)
        assert rank.read == rank.held, "what a rank holds, and nothing else"
        assert rank.largest_read <= 896 * 64 * 4, "no more at once than the largest tensor"
    everything = sum(path.stat().st_size for path in moe.folder.glob("*.safetensors"))
    if "expert" not in name:
        # Norms and routers are on every tensor-parallel rank.
        assert sum(rank.read for rank in ranks) == pytest.approx(everything, rel=0.03)


@pytest.mark.parametrize("name", ["one process", "tensor 2, pipeline 2"])
def test_stacked_layers_and_one_embedding_for_both_ends(name: str, dense: Given) -> None:
    world_size, layout = LAYOUTS[name]
    for rank in run_ranks(world_size, compute, str(dense.folder), layout):
        np.testing.assert_allclose(rank.logits[..., :870], dense.logits, atol=2e-5)
        # 26 rows pad the vocabulary; they are on the last tensor-parallel rank.
        assert rank.held - 26 * 64 * 4 <= rank.read <= rank.held


def with_output_layer(given: Path, folder: Path, change: float) -> Path:
    """The same folder, but a file of it holds an output layer too, whose last number is changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(given, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shard = folder / index["weight_map"]["model.embed_tokens.weight"]
    tensors = load_file(shard)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += change
    save_file(tensors, shard, metadata={"format": "pt"})
    index["weight_map"]["lm_head.weight"] = shard.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def loaded_or_refused(folder: str, layout: dict[str, Any]) -> str:
    try:
        compute(folder, layout)
    except UserError as error:
        return str(error)
    return "loaded"


def test_an_output_layer_beside_the_embedding_that_stands_for_it(dense: Given, tmp_path: Path) -> None:
    """transformers computes with the output layer where it differs, whatever config.json says."""
    copy = with_output_layer(dense.folder, tmp_path / "copy", 0.0)
    (rank,) = run_ranks(1, compute, str(copy), {})
    np.testing.assert_allclose(rank.logits[..., :870], dense.logits, atol=2e-5)
    other = with_output_layer(dense.folder, tmp_path / "other", 1e-3)
    line = "lm_head.weight: differs from model.embed_tokens.weight, although tie_word_embeddings of config.json is true"
    assert run_ranks(1, loaded_or_refused, str(other), {})[0].startswith(line)
    with pytest.raises(UserError, match=line):
        list(import_hf(ImportOptions(hf=str(other), save=str(tmp_path / "run"), verify=False)))
    assert not list(tmp_path.glob("run*"))


def test_ranks_share_the_pieces_of_the_output_layer(dense: Given, tmp_path: Path) -> None:
    folder = with_output_layer(dense.folder, tmp_path / "other", 1e-3)
    source, _ = open_weights(model_of(folder), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_moe.checkpoint.hf.weight_files._COMPARED_AT_ONCE", 64 * 100)
        # Nine pieces, the last of which differs.
        source.check_tied(1, 2)
        with pytest.raises(UserError, match="differs"):
            source.check_tied(0, 2)


# ---- pretrain --load HF_FOLDER --finetune


def words(folder: Path, data: Path, *more: object) -> list[str]:
    flags = {"train-data-path": data / "train", "train-iters": 2, "micro-batch-size": 2, "global-batch-size": 4}
    pairs = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    start = ["--load", str(folder), "--finetune", "--device", "cpu", "--seq-length", "32", "--eval-interval", "0"]
    return [*start, *pairs, "--lr", "1e-3", "--lr-decay-style", "constant", "--progress", "off", *map(str, more)]


def tuned(argv: list[str]) -> list[float]:
    from tests.helpers.training import train_curve

    run = run_of(argv)
    assert run.data.tokenizer_model is not None
    assert run.data.tokenizer_model.startswith(argv[1])
    return train_curve(run).losses


def test_finetuning_starts_from_the_folder_under_any_layout(moe: Given, tiny_data: Path) -> None:
    """No flag of the model and no tokenizer is given."""
    alone = run_ranks(1, tuned, words(moe.folder, tiny_data))[0]
    sizes = {"tensor-model": 2, "expert-model": 2, "expert-tensor": 1}
    split = [word for name, size in sizes.items() for word in (f"--{name}-parallel-size", size)]
    spread = run_ranks(4, tuned, words(moe.folder, tiny_data, *split, "--use-distributed-optimizer"))
    for losses in spread:
        assert losses == pytest.approx(alone, rel=1e-5)
    half = run_ranks(2, tuned, words(moe.folder, tiny_data, "--pipeline-model-parallel-size", 2, "--bf16"))[0]
    assert half == pytest.approx(alone, rel=1e-2)
    assert half != alone


def run_of(argv: list[str]) -> RunConfig:
    from megatron_moe.config.flags import parse_run
    from megatron_moe.pretrain import flags_of_loaded

    return parse_run(argv, prog="pretrain", description="", loaded=flags_of_loaded)[0]


def refused(argv: list[str]) -> str:
    from megatron_moe.pretrain import main

    try:
        main(argv)
    except UserError as error:
        return str(error)
    return "it ran"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--hidden-size 128", "--hidden-size 128: config.json of {folder} says 64; give the same, or another --load"),
        ("--normalization LayerNorm", "--normalization LayerNorm: config.json of {folder} says RMSNorm; give"),
        ("--num-experts 8", "--num-experts 8 8 8 8: config.json of {folder} says 4 4 4 4; give the same"),
        ("--moe-router-topk 1", "--moe-router-topk 1: config.json of {folder} says 2; give the same"),
        ("--no-finetune", "--load {folder}: is a Hugging Face checkpoint, which holds weights alone; add --finetune"),
        ("--save {folder}", "--save {folder}: is the Hugging Face folder itself; give another one"),
    ],
    ids=lambda value: value.split()[0],
)
def test_what_contradicts_the_folder_is_one_line(more: str, message: str, moe: Given, tiny_data: Path) -> None:
    with pytest.raises(UserError) as caught:
        run_of(words(moe.folder, tiny_data, *more.format(folder=moe.folder).split()))
    assert str(caught.value).startswith(message.format(folder=moe.folder))
    assert len(str(caught.value).splitlines()) == 1


def test_another_tokenizer_than_the_folders(moe: Given, tiny_data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(moe.folder, tmp_path / "hf"))
    (folder / "other").mkdir()
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    turned = {700: 701, 701: 700}
    content["model"]["vocab"] = {piece: turned.get(at, at) for piece, at in content["model"]["vocab"].items()}
    (folder / "other" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder / "other" / "tokenizer.json"]
    line = run_ranks(1, refused, words(folder, tiny_data, *flags))[0]
    assert line.startswith(f"--tokenizer-model {folder}/other/tokenizer.json: id 700 is"), line


def test_no_tokenizer_in_the_folder(moe: Given, tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(moe.folder, folder, ignore=shutil.ignore_patterns("*token*", "chat*"))
    with pytest.raises(UserError, match=f"--load {folder}: holds no tokenizer; name one with --tokenizer-model"):
        run_of(words(folder, tiny_data))
    model = data_flags(tiny_data)["tokenizer_model"]
    assert run_ranks(1, refused, words(folder, tiny_data, "--tokenizer-model", model))[0] == "it ran"


def cut(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    path.write_bytes(path.read_bytes()[:-10])


def missing(folder: Path) -> None:
    next(folder.glob("model-00002*")).unlink()


def another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}), encoding="utf-8")


def larger_than_the_files(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 10**6}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "cut short"),
        (missing, "is missing, model.safetensors.index.json names it"),
        (another_shape, "this configuration needs [40, 64]"),
        (larger_than_the_files, "but the files beside it hold"),
    ],
)
def test_a_damaged_folder_is_one_line(damage: Any, message: str, moe: Given, tiny_data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(moe.folder, tmp_path / "hf"))
    damage(folder)
    with pytest.raises(UserError) as caught:
        run_of(words(folder, tiny_data))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_generate_reads_a_folder_and_has_no_steps_in_it(moe: Given, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = ["--load", moe.folder, "--prompt", "北京", "--max-new-tokens", 2, "--greedy", "--device", "cpu"]
    split = ["--tensor-model-parallel-size", 2]
    done = launch(2, "megatron_moe.generate", *command, *split, "--output", out)
    assert done.codes == [0, 0], done.stderr
    assert len(json.loads(out.read_text(encoding="utf-8"))["ids"]) == 2
    done = launch(1, "megatron_moe.generate", *command, "--iteration", 3)
    assert done.codes == [2]
    assert done.stderr.splitlines() == [
        f"error: --iteration 3: {moe.folder} is a Hugging Face checkpoint, which has no steps"
    ]


def break_reading_on_rank_one() -> None:
    """The file becomes shorter between the look at its header and the read, on one rank."""
    import os

    from megatron_moe.checkpoint.convert.safetensors_files import SafetensorsSource

    def broken(source: Any, box: Any, out: torch.Tensor) -> None:
        raise UserError(f"{box.name}: cut short while it was read")

    if os.environ["RANK"] == "1":
        SafetensorsSource.read_into = broken  # type: ignore[method-assign, assignment]


def test_what_one_rank_cannot_read_ends_all(moe: Given) -> None:
    words = ["--load", moe.folder, "--prompt", "北京", "--device", "cpu", "--expert-model-parallel-size", 2]
    done = launch(2, "megatron_moe.generate", *words, prepare=(break_reading_on_rank_one,))
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].endswith("cut short while it was read")
    assert done.codes[1] == 2
    assert done.codes[0] != 0
