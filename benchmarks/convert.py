"""Conversion to Hugging Face's format and back, against copying the same bytes: seconds and memory.

    python benchmarks/convert.py --output DIR                    # 10 GB, takes 40 GB of disk while it runs
    python benchmarks/convert.py --output DIR --gigabytes 1 --hidden-size 1024 --rounds 3

Makes a checkpoint of random bf16 weights in Mixtral's shapes (experts as wide as in 8x7B with --hidden-size 4096, and
as many layers as it takes) with the package's streaming writer. Then `to-hf` (ours to safetensors), `from-hf` (back),
and `copy` take turns; the best round counts. `copy` is `cp -r` of ours and then fsync of every file, with which
conversions end too. Before each, the files it reads are put out of the page cache (posix_fadvise), or read into it with
--warm, which needs more memory than twice the checkpoint to mean anything. What comes back is compared with what was
there, byte by byte.

Seconds are those of a whole process, with its imports. Memory is that of all processes of a side, sampled 20 times a
second from outside: `PSS` adds up each process's share of the pages (a library that all use counts once); `RSS` adds up
the largest resident size of each process, whenever it had it, libraries counted in each. The page cache is in neither.
The bound is 1.2 x the largest tensor of the Hugging Face folder x workers + 1 GB.
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run

SIDES = ("copy", "to-hf", "from-hf")
_VOCABULARY = 32000
_CHUNK = 16 << 20


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to work in; removed afterwards")
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--warm", action="store_true", help="files that are read lie in the page cache")
    parser.add_argument("--side", choices=[*SIDES, "make"], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def mixtral(gigabytes: float, hidden: int) -> RunConfig:
    """A run with as many layers as it takes."""
    width = hidden * 7 // 2
    layer = 2 * (8 * 3 * hidden * width + hidden * hidden * 5 // 2)
    layers = max(1, round((gigabytes * 1e9 - 4 * _VOCABULARY * hidden) / layer))
    model = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 128,
        "num_query_groups": max(1, hidden // 512),
        "vocab_size": _VOCABULARY,
        "make_vocab_size_divisible_by": 128,
        "swiglu": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
        "disable_bias_linear": True,
        "seq_length": 128,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    moe = {"num_experts": (8,), "moe_router_topk": 2, "moe_ffn_hidden_size": width}
    training = {"micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1, "bf16": True}
    return build_run({"model": model, "moe": moe, "training": training, "parallel": {"device": "cpu"}})


def make(run: RunConfig, folder: Path) -> None:
    """Write the checkpoint."""
    import torch

    from megatron_moe.checkpoint.convert.describe import describe
    from megatron_moe.checkpoint.convert.ours_writer import OursWriter

    writer = OursWriter(folder, describe(run), "random numbers")
    numbers = torch.randn(1 << 26).bfloat16()
    writer.prepare()
    for index, piece in enumerate(writer.pieces):
        # Another place for each: no two tensors are equal.
        begin = index * 8191 % (len(numbers) - piece.numel) if piece.numel < len(numbers) else 0
        values = numbers[begin : begin + piece.numel].to(writer.infos[piece.name].dtype)
        writer.write(piece, values.view(piece.size))
    writer.finish()


def to_hf(run: RunConfig, folder: Path, output: Path, workers: int) -> None:
    """What `tools/convert_checkpoint.py to-hf` does with the tensors, without its proof."""
    from megatron_moe.checkpoint.convert.engine import target_infos
    from megatron_moe.checkpoint.convert.journal import unfinished_folder
    from megatron_moe.checkpoint.convert.ours_reader import OursSource
    from megatron_moe.checkpoint.convert.safetensors_files import SafetensorsWriter
    from megatron_moe.checkpoint.convert.stream import convert
    from megatron_moe.checkpoint.hf.families.mixtral import FAMILY
    from megatron_moe.checkpoint.layout import find_checkpoint

    source, blocks = OursSource(find_checkpoint(folder)), FAMILY.blocks(run)
    writer = SafetensorsWriter(unfinished_folder(output), target_infos(blocks, "theirs", source.infos))
    convert(blocks, source, writer, output, inputs=[folder], finish=lambda _: None, workers=workers)


def from_hf(run: RunConfig, folder: Path, output: Path, workers: int) -> None:
    """What `from-hf` does with the tensors."""
    from megatron_moe.checkpoint.convert.describe import describe
    from megatron_moe.checkpoint.convert.journal import unfinished_folder
    from megatron_moe.checkpoint.convert.ours_writer import OursWriter
    from megatron_moe.checkpoint.convert.safetensors_files import SafetensorsSource
    from megatron_moe.checkpoint.convert.stream import convert
    from megatron_moe.checkpoint.hf.families.mixtral import FAMILY

    writer = OursWriter(unfinished_folder(output), describe(run), "random numbers")
    source = SafetensorsSource(folder)
    convert(FAMILY.blocks(run), source, writer, output, inputs=[folder], finish=lambda _: None, workers=workers)


def copy(folder: Path, output: Path) -> None:
    """`cp -r`, and wait until it is on the disk, as a conversion does."""
    subprocess.run(["cp", "-r", str(folder), str(output)], check=True)
    for path in output.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@dataclass
class Measured:
    """What a side took."""

    seconds: float
    pss: int
    rss: int


class _Memory(threading.Thread):
    """Samples a process and all that it starts."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self._root, self._over = root, threading.Event()
        self.pss = 0
        self._largest: dict[int, int] = {}

    @property
    def rss(self) -> int:
        """Largest resident sizes, added up."""
        return sum(self._largest.values())

    def run(self) -> None:
        """Until `stop`."""
        while not self._over.wait(0.05):
            total = 0
            for pid in _tree(self._root):
                try:
                    total += _field(f"/proc/{pid}/smaps_rollup", "Pss:")
                    self._largest[pid] = _field(f"/proc/{pid}/status", "VmHWM:")
                except (OSError, StopIteration):
                    # It has ended.
                    continue
            self.pss = max(self.pss, total)

    def stop(self) -> None:
        """End it."""
        self._over.set()
        self.join()


def _tree(root: int) -> list[int]:
    found, position = [root], 0
    while position < len(found):
        for task in Path(f"/proc/{found[position]}/task").glob("*/children"):
            try:
                found += [int(word) for word in task.read_text().split()]
            except OSError:
                continue
        position += 1
    return found


def _field(path: str, name: str) -> int:
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _prepare_cache(folder: Path, *, warm: bool) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        with path.open("rb", buffering=0) as stream:
            if warm:
                while stream.read(_CHUNK):
                    pass
            else:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _measure(side: str, flags: argparse.Namespace, source: Path) -> Measured:
    _prepare_cache(source, warm=flags.warm)
    command = [sys.executable, __file__, "--side", side, "--output", str(flags.output)]
    command += ["--gigabytes", str(flags.gigabytes), "--hidden-size", str(flags.hidden_size)]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, "--workers", str(flags.workers)])
    memory = _Memory(process.pid)
    memory.start()
    code = process.wait()
    seconds = time.perf_counter() - begin
    memory.stop()
    if code:
        sys.exit(f"{side} failed")
    return Measured(seconds, memory.pss, memory.rss)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _compare(left: Path, right: Path) -> None:
    names = sorted(path.relative_to(left) for path in left.rglob("*") if path.is_file())
    if names != sorted(path.relative_to(right) for path in right.rglob("*") if path.is_file()):
        sys.exit("from-hf: what came back has other files")
    for name in names:
        if not filecmp.cmp(left / name, right / name, shallow=False):
            sys.exit(f"from-hf: {name} came back different")


def main(argv: Sequence[str] | None = None) -> None:
    """Run all sides, or the one that this process is for."""
    flags = _parse(argv)
    run = mixtral(flags.gigabytes, flags.hidden_size)
    ours, theirs, back, copied = (flags.output / name for name in ("ours", "hf", "back", "copy"))
    if flags.side == "make":
        make(run, ours)
    elif flags.side == "copy":
        copy(ours, copied)
    elif flags.side == "to-hf":
        to_hf(run, ours, theirs, flags.workers)
    elif flags.side == "from-hf":
        from_hf(run, theirs, back, flags.workers)
    else:
        _run_all(flags, run, ours, theirs, back, copied)


def _run_all(flags: argparse.Namespace, run: RunConfig, ours: Path, theirs: Path, back: Path, copied: Path) -> None:
    if flags.output.exists():
        sys.exit(f"--output {flags.output}: is there already")
    flags.output.mkdir(parents=True)
    try:
        _measure("make", flags, flags.output)
        size = _bytes(ours)
        largest = 2 * run.model.hidden_size * max(_VOCABULARY, run.expert_ffn_size)
        bound = 1.2 * largest * flags.workers + 1e9
        state = "in the page cache" if flags.warm else "not in the page cache"
        print(
            f"{size / 1e9:.2f} GB, {run.model.num_layers} layers of {run.model.hidden_size}, {flags.workers} workers; "
            f"files read are {state}",
            flush=True,
        )
        best: dict[str, Measured] = {}
        for _ in range(flags.rounds):
            for side in SIDES:
                target = {"copy": copied, "to-hf": theirs, "from-hf": back}[side]
                shutil.rmtree(target, ignore_errors=True)
                found = _measure(side, flags, theirs if side == "from-hf" else ours)
                before = best.get(side, found)
                best[side] = Measured(
                    min(found.seconds, before.seconds), max(found.pss, before.pss), max(found.rss, before.rss)
                )
                if side == "copy":
                    shutil.rmtree(copied)
            _compare(ours, back)
        for side, found in best.items():
            print(
                f"{side:8} {found.seconds:7.1f} s  {size / 1e9 / found.seconds:5.2f} GB/s  "
                f"{found.seconds / best['copy'].seconds:5.2f} x copy  PSS {found.pss / 1e9:.2f} GB  "
                f"RSS {found.rss / 1e9:.2f} GB"
            )
        print(f"largest tensor {largest / 1e9:.2f} GB, so the bound is {bound / 1e9:.2f} GB")
        print("what came back is equal byte for byte")
    finally:
        shutil.rmtree(flags.output, ignore_errors=True)


if __name__ == "__main__":
    main()
