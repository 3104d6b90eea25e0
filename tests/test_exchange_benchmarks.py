"""The benchmarks of the exchange and of a GPU's experts run to their end in small; what they measure is no test's
business. They run in ranks of the fork server, which has imported everything."""

import contextlib
import importlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import run_ranks

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str) -> Any:
    """A benchmark as a module. As a script it finds its neighbours; here they must be put in its reach."""
    sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


def run_benchmark(name: str, words: list[str]) -> str:
    """What it prints on this rank."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        benchmark(name).main(words)
    return output.getvalue()


def rows(output: str) -> list[list[str]]:
    """Cells of Markdown tables, heads included."""
    return [line[2:-2].split(" | ") for line in output.splitlines() if line.startswith("| ")]


def test_exchange_prints_every_dispatcher_and_that_they_agree() -> None:
    words = ["--dispatchers", "allgather", "alltoall", "grouped-2", "grouped-4", "--topk", "2", "--steps", "1"]
    words += ["--layers", "1", "--hidden", "32", "--ffn", "32", "--experts", "8", "--seq-length", "16", "--batch", "1"]
    output, *others = run_ranks(4, run_benchmark, "exchange", [*words, "--vocab", "64"])
    assert others == ["", "", ""]
    assert "4 ranks of gloo, one thread each" in output
    head, *table = rows(output)
    told = {row[0]: dict(zip(head, row, strict=True)) for row in table}
    # Two levels: an exchange of counts, tokens and results in each; forward and, but for the counts, backward.
    assert {name: int(row["collectives"]) for name, row in told.items()} == {
        "allgather": 7,
        "alltoall": 7,
        "grouped-2": 10,
        "grouped-4": 5,
    }
    # The same mathematics on all sides, or the ratio means nothing.
    assert float(output.splitlines()[-1].split()[-1]) < 1e-5
    # An all-gather's bytes are known. For each of three others, 16 tokens of 32 fp32 numbers, with 8 probabilities and
    # 8 bytes of the map each; their gradients but for the map's; the results of 16 tokens, and their gradients.
    megabytes = 3 * (2 * (2048 + 16 * 8 * 4) + 16 * 8 + 2 * 2048) / 1e6
    assert float(told["allgather"]["MB for others"]) == pytest.approx(megabytes, rel=1e-3)
    assert float(told["allgather"]["of which to other nodes"]) == pytest.approx(megabytes * 2 / 3, rel=1e-3)


def bytes_of_rank_one() -> list[tuple[int, int]]:
    """Of the second of four ranks on nodes of two: bytes inside of its node and to the other."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    recorder, group = benchmark("exchange").Recorder(per_node=2), torch.distributed.group.WORLD
    return [
        recorder._bytes(
            "all_to_all_single", {"group": group, "input": torch.zeros(rows, 3), "input_split_sizes": splits}
        )
        for rows, splits in ((10, [1, 2, 3, 4]), (0, [0, 0, 0, 0]), (8, None))
    ]


def test_exchange_counts_bytes_by_receiver() -> None:
    assert run_ranks(1, bytes_of_rank_one) == [[(12, 84), (0, 0), (24, 48)]]


def test_moe_gpu_runs_small_on_a_cpu() -> None:
    (output,) = run_ranks(1, run_benchmark, "moe_gpu", ["--device", "cpu", "--shrink"])
    head, *lines = output.splitlines()
    assert head.startswith("CPU, ")
    assert "torch " in head
    sides = [(row[0], row[1]) for row in rows(output)[1:]]
    assert sides == [
        (f"{what}, {load}", side)
        for what, names in (
            ("experts", ("products alone", "grouped", "SequentialMLP")),
            ("layer", ("ours", "MoELayer")),
        )
        for load in ("balanced", "zipf")
        for side in names
    ]
    slices = [line for line in lines if " M parameters" in line]
    assert "experts 4 of 32 (one of 8 expert-parallel ranks), top-1" in slices[0]
    assert "experts 16 of 128, 16 of 128 (one of 8 expert-parallel ranks), top-8" in slices[1]
    assert sum("MFU" in line for line in lines) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_moe_gpu_without_a_gpu_says_what_to_do() -> None:
    with pytest.raises(AssertionError, match="--device cpu --shrink runs everything small"):
        run_ranks(1, run_benchmark, "moe_gpu", ["--device", "cuda"])


def arithmetic() -> tuple[list[float], ...]:
    """Loads, and the bound of the six products, by the benchmark's functions."""
    module = benchmark("moe_gpu")
    flags = module.parse(["--hidden", "10", "--ffn", "100", "--experts", "4", "--tokens", "1000", "--topk", "2"])
    loads = [module.routing_map(load, 1000, 4, 2, torch.device("cpu")).sum(0).tolist() for load in ("balanced", "zipf")]
    slow_memory = module.least_seconds(flags, 3, module.Rates(matmul=1e30, memory=1.0))
    slow_product = module.least_seconds(flags, 3, module.Rates(matmul=1.0, memory=1e30))
    return (*loads, [slow_memory, slow_product, module.expert_flops(flags)])


def test_loads_and_least_time() -> None:
    (answer,) = run_ranks(1, arithmetic)
    balanced, zipf, (slow_memory, slow_product, flops) = answer
    assert balanced == [500] * 4
    # Two of four distinct experts with chances 1, 1/2, 1/3, 1/4: the first gets most, nobody nothing.
    assert sum(zipf) == 2000
    assert max(zipf) > 1.5 * min(zipf) > 0
    assert slow_product == flops == 6 * 2 * 2000 * 10 * 100
    # bf16: each of two matrices is read twice for three experts and its gradient written for four; every product also
    # touches one wide and one narrow row for each of 2,000.
    assert slow_memory == 2 * (2 * 1000 * (3 + 3 + 4) + 6 * 2000 * 110)
