"""Memory and bytes that loading takes: all ranks together, beside one copy of what they load.

    python benchmarks/load_memory.py --gigabytes 4
    python benchmarks/load_memory.py --gigabytes 1 --kind weights --layout tp4 pp4

A model is written by four ranks, then loaded by the ranks of each layout, real processes on the CPU. Counted is a
rank's resident memory, by the kernel's own high-water mark (VmHWM), less what the same process took when everything was
imported and its groups were formed, before it had a model. Files are read, not mapped: the page cache is nobody's. The
sum of the ranks' peaks is printed, which need not have come at the same moment: the node's peak is at most that.

`copy`: bytes of what is loaded, stored once. `held`: what the ranks hold together once all is loaded, which is more
than one copy where ranks keep replicas. `peak`: the most, and `peak/copy` the target of 1.1 where every weight is on
one rank. `over`: how far the peak lies over what is held, which is what loading takes for itself. Training has buffers
for gradients, which loading has nothing to do with: they are not in these numbers. `read`: bytes that the ranks read
from files (`rchar` of /proc/self/io), and the most that one of them did.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GB = 1e9
KINDS = ("weights", "optimizer", "distributed-optimizer", "hf")
WRITTEN_BY = "tp2-ep2"
LAYOUTS: dict[str, dict[str, int]] = {
    "1": {},
    "tp4": {"tensor_model_parallel_size": 4},
    "pp4": {"pipeline_model_parallel_size": 4},
    "tp2-pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "tp4-ep4": {
        "tensor_model_parallel_size": 4,
        "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": 1,
    },
    "tp2-ep2": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "ep4": {"expert_model_parallel_size": 4},
    "tp4-pp2": {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
    "tp2-pp2-ep2": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "dp4": {},
}
RANKS = {"1": 1, "tp4-pp2": 8, "tp2-pp2-ep2": 8}


@dataclass
class Marks:
    """Memory of one rank, in bytes, and what it read."""

    imports: int
    gradients: int
    peak: int
    held: int
    read: int
    seconds: float


def run_of(layout: str, parameters: float, kind: str) -> Any:
    """A model whose weights are mostly experts, with about as many parameters as asked for."""
    from megatron_moe.config.yaml_io import build_run

    layers, hidden, experts = 4, 1024, 16
    width = max(64, round((parameters - 2 * 8192 * hidden) / (layers * experts * 3 * hidden) / 64) * 64)
    return build_run(
        {
            "model": {
                "num_layers": layers,
                "hidden_size": hidden,
                "num_attention_heads": 16,
                "seq_length": 64,
                "vocab_size": 8000,
                "ffn_hidden_size": width,
                "swiglu": True,
                "position_embedding_type": "rope",
                "normalization": "RMSNorm",
                "untie_embeddings_and_output_weights": True,
            },
            "moe": {"num_experts": (experts,), "expert_interval": 1, "moe_router_topk": 2},
            "parallel": {
                "device": "cpu",
                "use_distributed_optimizer": kind == "distributed-optimizer",
                **LAYOUTS[layout],
            },
            "training": {"micro_batch_size": 1, "global_batch_size": 4, "train_iters": 10, "bf16": True},
            "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},
        }
    )


# ---------------------------------------------------------------------------------------------------- in a rank


def status() -> dict[str, int]:
    """The lines of /proc/self/status about memory, in bytes."""
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            found[name] = int(value.split()[0]) * 1024
    return found


def bytes_read() -> int:
    """Bytes this process has asked files for so far."""
    text = Path("/proc/self/io").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("rchar"))


def build(run: Any, kind: str) -> tuple[list[Any], Any, Any]:
    """Model, optimizer and schedule, as the training loop has them before it loads."""
    from megatron_moe.model.gpt import build_model
    from megatron_moe.training.batches import BatchSchedule
    from megatron_moe.training.optimizer import build_optimizer, build_scheduler, wrap_data_parallel

    if kind in ("weights", "hf"):
        return build_model(run, inference=True, initialize=False), None, None
    import torch.distributed as dist

    model = wrap_data_parallel(run, build_model(run, initialize=False))
    optimizer = build_optimizer(run, model)
    schedule = BatchSchedule.from_run(run, run.parallel.data_parallel_size(dist.get_world_size()))
    return model, optimizer, build_scheduler(run, optimizer, schedule, 10)


def write(flags: argparse.Namespace) -> None:
    """Be a rank that writes the checkpoint."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from megatron_moe.checkpoint import save
    from megatron_moe.checkpoint.layout import CONFIG_FILE, publish
    from megatron_moe.checkpoint.optimizer_state import METADATA, saved_state
    from megatron_moe.checkpoint.state import Progress, current_layout, model_state, rng_state
    from megatron_moe.config.yaml_io import save_run
    from megatron_moe.runtime import replace
    from megatron_moe.runtime.distributed import start

    # Or it starts a process that outlives this one.
    replace.apply(save.REPLACEMENTS)
    run = run_of(flags.rank_layout, flags.parameters, flags.rank_kind)
    start(run.parallel, trains=False)
    model, optimizer, scheduler = build(run, flags.rank_kind)
    # Noise of one MiB over and over: nothing here depends on the values, but zeros could be pages that are not there.
    noise = torch.randn(2**19, generator=torch.Generator().manual_seed(dist.get_rank())) * 0.02
    with torch.no_grad():
        for parameter in (parameter for chunk in model for parameter in chunk.parameters()):
            for begin in range(0, parameter.numel(), noise.numel()):
                part = parameter.view(-1)[begin : begin + noise.numel()]
                part.copy_(noise[: part.numel()])
            if optimizer is not None:
                parameter.main_grad.copy_(parameter)
    state: dict[str, Any] = {**model_state(model), "progress": asdict(Progress(step=1, layout=current_layout()))}
    if optimizer is not None:
        optimizer.step()
        state |= {**saved_state(state, optimizer), "scheduler": scheduler.state_dict(), "rng_state": rng_state()}
    unfinished = Path(flags.folder) / "iter_0000001.unfinished"
    if dist.get_rank() == 0:
        unfinished.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(unfinished), content_metadata=METADATA)
    if dist.get_rank() == 0:
        save_run(run, unfinished / CONFIG_FILE)
        publish(unfinished, 1)
    dist.barrier()


def write_hf(flags: argparse.Namespace) -> None:
    """Write a folder of Hugging Face with noise in it."""
    import torch

    from megatron_moe.checkpoint.convert.describe import our_tensors
    from megatron_moe.checkpoint.convert.engine import target_infos
    from megatron_moe.checkpoint.convert.safetensors_files import SafetensorsWriter
    from megatron_moe.checkpoint.hf.targets import choose_hf_target

    run = run_of(flags.rank_layout, flags.parameters, flags.rank_kind)
    target = choose_hf_target(run)
    infos = target_infos(target.family.blocks(run), "theirs", our_tensors(run))
    writer = SafetensorsWriter(Path(flags.folder), infos)
    writer.prepare()
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(1)) * 0.02
    for piece in writer.pieces:
        values = noise.repeat(-(-piece.numel // noise.numel()))[: piece.numel].view(piece.size)
        writer.write(piece, values.to(infos[piece.name].dtype))
    writer.finish()
    Path(flags.folder, "config.json").write_text(json.dumps(target.config(run)), encoding="utf-8")


def load(flags: argparse.Namespace) -> None:
    """Be a rank that loads it, and write down what that took."""
    import dataclasses

    import torch.distributed as dist
    from megatron.core import dist_checkpointing, optimizer  # noqa: F401

    from megatron_moe.checkpoint.hf.loading import load_weights, model_of
    from megatron_moe.checkpoint.layout import find_checkpoint
    from megatron_moe.checkpoint.load import load_checkpoint, load_model
    from megatron_moe.runtime.distributed import start
    from megatron_moe.training import loop  # noqa: F401

    run = run_of(flags.rank_layout, flags.parameters, flags.rank_kind)
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, load=flags.folder))
    training = flags.rank_kind in ("optimizer", "distributed-optimizer")
    start(run.parallel, trains=training)
    if flags.rank_kind == "hf":
        # Imports what it needs of transformers.
        model_of(Path(flags.folder))
    imports = status()["VmRSS"]
    model, optim, scheduler = build(run, flags.rank_kind)
    gradients = 0
    for chunk in model if training else ():
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            # Written to, or it might take no memory yet and could not be left out of the count.
            buffer.grad_data.fill_(0.0)
            gradients += buffer.grad_data.nbytes
    dist.barrier()
    read, began = bytes_read(), time.monotonic()
    # The high-water mark starts anew from here.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if training:
        load_checkpoint(run, model, optim, scheduler)
    elif flags.rank_kind == "hf":
        load_weights(run, model, Path(flags.folder))
    else:
        load_model(model, find_checkpoint(flags.folder))
    read, seconds, peak = bytes_read() - read, time.monotonic() - began, status()["VmHWM"]
    # What was freed may still be this process's.
    ctypes.CDLL(None).malloc_trim(0)
    marks = Marks(imports, gradients, peak, status()["VmRSS"], read, seconds)
    dist.barrier()
    Path(flags.report, f"{dist.get_rank()}.json").write_text(json.dumps(asdict(marks)), encoding="ascii")
    dist.barrier()


# ---------------------------------------------------------------------------------------------------- over the ranks


def launch(task: str, layout: str, kind: str, parameters: float, folder: str, report: str = "") -> None:
    """Start the ranks of a layout, and wait for them."""
    ranks = str(RANKS.get(layout, 4))
    command = [sys.executable, "-m", "megatron_moe.torchrun", "--nproc-per-node", ranks, __file__]
    command += ["--task", task, "--rank-layout", layout, "--rank-kind", kind, "--parameters", str(parameters)]
    command += ["--folder", folder, "--report", report]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


def stored_bytes(folder: Path, kind: str) -> int:
    """Bytes of the tensors in a checkpoint that are loaded, once."""
    if kind == "hf":
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    from torch.distributed.checkpoint import TensorStorageMetadata

    from megatron_moe.checkpoint.layout import find_checkpoint
    from megatron_moe.checkpoint.torch_metadata import read_metadata

    return sum(
        entry.size.numel() * entry.properties.dtype.itemsize
        for key, entry in read_metadata(find_checkpoint(folder)).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and (kind != "weights" or not key.startswith("optimizer."))
    )


def measure(layout: str, kind: str, parameters: float, folder: str, copy: int) -> dict[str, Any]:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as report:
        launch("load", layout, kind, parameters, folder, report)
        ranks = [Marks(**json.loads(path.read_text(encoding="ascii"))) for path in Path(report).iterdir()]
    peak = sum(mark.peak - mark.imports - mark.gradients for mark in ranks)
    held = sum(mark.held - mark.imports - mark.gradients for mark in ranks)
    return {
        "kind": kind,
        "layout": layout,
        "ranks": len(ranks),
        "copy": copy / GB,
        "held": held / GB,
        "peak": peak / GB,
        "peak/copy": peak / copy,
        "over": (peak - held) / GB,
        "read": sum(mark.read for mark in ranks) / GB,
        "most read": max(mark.read for mark in ranks) / GB,
        "seconds": max(mark.seconds for mark in ranks),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Write, load under every layout, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="about what is loaded, stored once")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument(
        "--layout", nargs="+", choices=list(LAYOUTS), default=["tp4", "pp4", "tp4-ep4", "tp2-pp2", "dp4"]
    )
    parser.add_argument("--keep", type=Path, help="write the checkpoints into this folder, and find them there again")
    for name in ("task", "rank-layout", "rank-kind", "folder", "report"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    parser.add_argument("--parameters", type=float, default=0.0, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.task:
        from megatron_moe.runtime.quiet import silence_third_party_warnings

        silence_third_party_warnings()
        return {"write": write, "write_hf": write_hf, "load": load}[flags.task](flags)
    base = flags.keep or Path(tempfile.mkdtemp())
    lines: list[dict[str, Any]] = []
    try:
        for kind in flags.kind:
            # bf16 weights; with an optimizer fp32 masters and two moments as well.
            parameters = flags.gigabytes * GB / (2 if kind in ("weights", "hf") else 14)
            folder = base / kind
            if not folder.exists():
                task, layout = ("write_hf", "1") if kind == "hf" else ("write", WRITTEN_BY)
                launch(task, layout, kind, parameters, str(folder))
            copy = stored_bytes(folder, kind)
            for layout in flags.layout:
                line = measure(layout, kind, parameters, str(folder), copy)
                if not lines:
                    print(" ".join(f"{name:>9}" if name != "kind" else f"{name:<21}" for name in line))
                lines.append(line)
                cells = [f"{cell:9.3f}" if isinstance(cell, float) else f"{cell:>9}" for cell in line.values()]
                print(f"{kind:<21}", *cells[1:], flush=True)
    finally:
        if flags.keep is None:
            shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
