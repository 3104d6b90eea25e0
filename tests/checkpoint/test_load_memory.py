"""Loading takes the memory of what is loaded, once, and reads the bytes that a rank needs, once.

Bytes are counted exactly. Memory is the kernel's high-water mark, with margins for what an interpreter does besides:
`benchmarks/load_memory.py` measures it at the size of real checkpoints.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_moe.checkpoint.part_checks import PartsRead
from megatron_moe.checkpoint.safe_archive import FileSlice
from megatron_moe.checkpoint.stored_tensor import find_tensor, read_box
from megatron_moe.config.base import UserError
from megatron_moe.config.run import RunConfig
from megatron_moe.model.parameters import count_parameters
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import tiny_run

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "expert_model_parallel_size", "expert_tensor_parallel_size"
SPLIT = "use_distributed_optimizer"
MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 128,
    "vocab_size": 512,
    "swiglu": True,
    "num_experts": (8,),
    "expert_interval": 1,
    "mlp_type": "standard",
    "untie_embeddings_and_output_weights": True,
}
SMALL, LARGE = {"moe_ffn_hidden_size": 64}, {"moe_ffn_hidden_size": 1536}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor 2": (2, {TENSOR: 2}),
    "tensor 4, expert 4": (4, {TENSOR: 4, EXPERT: 4, EXPERT_TENSOR: 1}),
    "pipeline 4": (4, {PIPELINE: 4}),
    "tensor 2, pipeline 2": (4, {TENSOR: 2, PIPELINE: 2}),
    "four replicas": (4, {SPLIT: True}),
    "expert 2, two replicas": (4, {EXPERT: 2, SPLIT: True}),
}


class Loaded(NamedTuple):
    """What a rank counted."""

    read: int
    kept: int
    """Bytes of what it keeps of what it read."""
    peak: int | None
    """Memory that loading took at most, with what it left behind."""


def build(run: RunConfig) -> tuple[list[Any], Any, Any]:
    import torch.distributed as dist

    from megatron_moe.config.validate import validate
    from megatron_moe.model.gpt import build_model
    from megatron_moe.runtime.distributed import environment_world_size, start
    from megatron_moe.training.batches import BatchSchedule
    from megatron_moe.training.optimizer import build_optimizer, build_scheduler, wrap_data_parallel

    validate(run, environment_world_size())
    start(run.parallel, run.virtual_stages, trains=False)
    model = wrap_data_parallel(run, build_model(run, initialize=False))
    optimizer = build_optimizer(run, model)
    schedule = BatchSchedule.from_run(run, run.parallel.data_parallel_size(dist.get_world_size()))
    return model, optimizer, build_scheduler(run, optimizer, schedule, 3)


def write(run: RunConfig) -> None:
    """A checkpoint with random weights and moments."""
    from megatron_moe.checkpoint.save import save_checkpoint
    from megatron_moe.checkpoint.state import Progress
    from megatron_moe.data.tokenizer.load import NullTokenizer

    model, optimizer, scheduler = build(run)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (parameter for chunk in model for parameter in chunk.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer.reload_model_params()
    optimizer.step()
    assert run.model.vocab_size is not None
    save_checkpoint(run, model, optimizer, scheduler, Progress(step=1), NullTokenizer(run.model.vocab_size))


def high_water() -> int | None:
    """The most memory this process has had since it was last asked; None where the kernel does not tell."""
    found = [line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()]
    peak = next((int(words[1]) * 1024 for words in found if words[0] == "VmHWM:"), None)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return peak


@contextlib.contextmanager
def bytes_read() -> Iterator[list[int]]:
    """Bytes of tensors that the reader was asked for, load by load."""
    reads: list[int] = []
    check = PartsRead.check_together

    def counted(parts: PartsRead) -> None:
        reads.append(parts.nbytes)
        check(parts)

    PartsRead.check_together = counted  # type: ignore[assignment, method-assign]
    yield reads
    PartsRead.check_together = check  # type: ignore[method-assign]


def load_weights(run: RunConfig) -> Loaded:
    """Load weights alone, with everything counted."""
    from megatron_moe.checkpoint.layout import find_checkpoint
    from megatron_moe.checkpoint.load import load_model
    from megatron_moe.model.gpt import build_model
    from megatron_moe.runtime.distributed import start

    assert run.checkpoint.load is not None
    start(run.parallel, trains=False)
    model = build_model(run, inference=True, initialize=False)
    places = {parameter: parameter.data_ptr() for chunk in model for parameter in chunk.parameters()}
    high_water()
    before = high_water()
    with bytes_read() as reads:
        load_model(model, find_checkpoint(run.checkpoint.load))
    peak = high_water()
    assert all(parameter.data_ptr() == place for parameter, place in places.items())
    taken = None if peak is None or before is None else peak - before
    return Loaded(sum(reads), sum(parameter.nbytes for parameter in places), taken)


def resume(run: RunConfig) -> Loaded:
    """Load everything that a run goes on with."""
    from megatron_moe.checkpoint.load import load_checkpoint
    from megatron_moe.checkpoint.optimizer_state import updates_taken

    model, optimizer, scheduler = build(run)
    with bytes_read() as reads:
        load_checkpoint(run, model, optimizer, scheduler)
    assert updates_taken(optimizer) == 1
    kept = sum(parameter.nbytes for chunk in model for parameter in chunk.parameters())
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:
            continue
        kept += sum(state[kind].nbytes for state in part.optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq"))
        if run.parallel.use_distributed_optimizer:
            # The masters: in fp32 those of the checkpoint are the weights.
            kept += sum(master.nbytes for group in part.optimizer.param_groups for master in group["params"])
    return Loaded(sum(reads), kept, None)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("small"))
    run_ranks(2, write, tiny_run(**MODEL, **SMALL, save=folder, tokenizer_type="NullTokenizer", **{TENSOR: 2}))
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_reads_what_it_keeps_to_the_byte(name: str, small: str) -> None:
    world_size, layout = LAYOUTS[name]
    run = tiny_run(**MODEL, **SMALL, **layout, load=small)
    ranks = run_ranks(world_size, resume, run)
    for rank in ranks:
        assert rank.read == rank.kept
    if layout.get(SPLIT) and EXPERT not in layout:
        # All four replicas have the weights, and together masters and moments once.
        weights = 4 * count_parameters(run, padded_vocab=True).total
        assert sum(rank.read for rank in ranks) == 4 * weights + 3 * weights


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    run_ranks(2, write_weights, tiny_run(**MODEL, **LARGE, **{TENSOR: 2}), folder / "iter_0000001")
    (folder / "latest_checkpointed_iteration.txt").write_text("1", encoding="ascii")
    return folder


@pytest.mark.parametrize("name", ["tensor 4, expert 4", "pipeline 4"])
def test_all_ranks_together_take_one_copy(name: str, large: Path) -> None:
    """77 MB of weights: four ranks that load them, each its own, take that and not twice that (as it was)."""
    world_size, layout = LAYOUTS[name]
    ranks = run_ranks(world_size, load_weights, tiny_run(**MODEL, **LARGE, **layout, load=str(large)))
    one_copy = sum(file.stat().st_size for file in (large / "iter_0000001").glob("*.distcp"))
    assert one_copy > 70e6
    assert all(rank.read == rank.kept for rank in ranks)
    peaks = [rank.peak for rank in ranks]
    if None in peaks:
        pytest.skip("the kernel does not tell the peak (/proc/self/clear_refs)")
    # Six MB a rank for what megatron-core and torch note of each tensor.
    assert sum(peak for peak in peaks if peak) < 1.1 * one_copy + world_size * 6e6


def write_weights(run: RunConfig, folder: Path) -> None:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from megatron_moe.checkpoint import save
    from megatron_moe.checkpoint.layout import CONFIG_FILE
    from megatron_moe.checkpoint.optimizer_state import METADATA
    from megatron_moe.checkpoint.state import model_state
    from megatron_moe.config.yaml_io import save_run
    from megatron_moe.model.gpt import build_model
    from megatron_moe.runtime import replace
    from megatron_moe.runtime.distributed import start

    # Or it starts a process that outlives this one.
    replace.apply(save.REPLACEMENTS)
    start(run.parallel, trains=False)
    model = build_model(run, initialize=False)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        save_run(run, folder / CONFIG_FILE)
    dist.barrier()
    dist_checkpointing.save(model_state(model), str(folder), content_metadata=METADATA)


# ---- checksums of what no rank reads as a whole


def attempt(run: RunConfig) -> str:
    try:
        load_weights(run)
    except UserError as error:
        return str(error)
    return "loaded"


def stored_at(folder: Path, key: str) -> tuple[Path, int, int]:
    """File, and where in it the numbers of the first part of a tensor begin and end."""
    from megatron_moe.checkpoint.torch_metadata import read_metadata

    storage: Any = read_metadata(folder).storage_data
    place = next(info for index, info in storage.items() if index.fqn == key)
    path = folder / place.relative_path
    with path.open("rb") as stream:
        stored = find_tensor(FileSlice(stream, place.offset, place.length), "")
    assert stored is not None
    return path, stored.begin, stored.begin + stored.nbytes


@pytest.mark.parametrize(
    ("key", "where"),
    [
        ("decoder.layers.1.self_attention.linear_proj.weight", 0.3),
        ("decoder.layers.2.mlp.experts.experts.linear_fc1.weight", 0.999),
    ],
)
def test_a_flipped_bit_is_found_where_each_rank_reads_a_slice(
    key: str, where: float, small: str, tmp_path: Path
) -> None:
    """Written by two tensor-parallel ranks, read by four: nobody reads a part as a whole."""
    run_dir = Path(shutil.copytree(small, tmp_path / "run"))
    path, begin, end = stored_at(run_dir / "iter_0000001", key)
    content = bytearray(path.read_bytes())
    content[begin + int((end - begin) * where)] ^= 1
    path.write_bytes(content)
    answers = run_ranks(4, attempt, tiny_run(**MODEL, **SMALL, load=str(run_dir), **{TENSOR: 4}))
    wrong = [answer for answer in answers if answer != "loaded"]
    assert len(wrong) == 1, answers
    assert str(path) in wrong[0]
    assert wrong[0].endswith("damaged (its checksum differs)")


def test_boxes_that_overlap_or_leave_something_out_are_no_damage(tmp_path: Path) -> None:
    tensor = torch.randn(8, 8)
    path = tmp_path / "file"
    torch.save(tensor, path)
    with path.open("rb") as stream:
        stored = find_tensor(FileSlice(stream, 0, path.stat().st_size), "here")
        assert stored is not None
        for rows in ([(0, 5), (3, 5)], [(0, 2)]):
            parts = PartsRead()
            for begin, count in rows:
                target = torch.zeros(count, 8)
                parts.add(path, stored, (begin, 0), (count, 8), read_box(stream.fileno(), stored, (begin, 0), target))
            parts.check_alone()
            content = bytearray(path.read_bytes())
            content[stored.begin + 200] ^= 1
            path.write_bytes(content)
            with pytest.raises(UserError, match="its checksum differs"):
                parts.check_alone()
            content[stored.begin + 200] ^= 1
            path.write_bytes(content)
