"""What reusing attention weights saves: forward and backward passes at two probabilities, in turns.

    python benchmarks/attention_reuse.py
    python benchmarks/attention_reuse.py --seq-length 512 --prob 0.25 --threads 1

The model is dense, so that attention is a large part of it. `fused` computes all attention weights in torch's fused
kernel, as --attention-weight-reuse-prob 1 does; `explicit` computes all of them with megatron-core's own
DotProductAttention (--attention-backend unfused), which keeps them, as any copied weights must be kept; `reuse` copies.
All three work on the same weights and tokens in one process and take turns pass by pass.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run
from megatron_moe.runtime.quiet import silence_third_party_warnings

UNCOUNTED = 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--prob", type=float, default=0.5, help="that a layer computes its attention weights")
    parser.add_argument("--passes", type=int, default=20, help=f"timed ones of each, after {UNCOUNTED} that are not")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


def benchmark_run(flags: argparse.Namespace, **attention: Any) -> RunConfig:
    """The run of one side."""
    model = {
        "num_layers": flags.layers,
        "hidden_size": flags.hidden_size,
        "num_attention_heads": max(1, flags.hidden_size // 64),
        "seq_length": flags.seq_length,
        "vocab_size": 8192,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    training = {"micro_batch_size": flags.micro_batch_size, "train_iters": 1, "eval_interval": 0}
    return build_run({"model": model | attention, "training": training, "parallel": {"device": "cpu"}})


def time_pass(chunk: Any, run: RunConfig, number: int) -> tuple[float, float]:
    """Seconds, and seconds of processor time, of forward and backward over random tokens."""
    import torch

    from megatron_moe.moe.inputs import pack_inputs

    rows, length = run.training.micro_batch_size, run.model.seq_length
    generator = torch.Generator().manual_seed(number)
    ids_BS = torch.randint(0, run.model.padded_vocab_size, (rows, length), generator=generator)
    places_BS = torch.arange(length).expand(rows, length)
    inputs_BSK = pack_inputs(ids_BS, torch.arange(rows) + number * rows)
    began, cpu_began = time.perf_counter(), time.process_time()
    chunk(ids_BS, places_BS, None, labels=ids_BS.roll(-1, 1), padding_mask=inputs_BSK).mean().backward()
    elapsed, cpu_elapsed = time.perf_counter() - began, time.process_time() - cpu_began
    chunk.zero_grad()
    return elapsed, cpu_elapsed


def layers_that_computed(chunk: Any) -> int:
    """Their attention weights, in the last pass."""
    return sum(getattr(layer.self_attention, "role", "plain") != "copy" for layer in chunk.decoder.layers)


def main(argv: Sequence[str] | None = None) -> None:
    """Time the three in turns and print a table."""
    flags = _parse(argv)
    silence_third_party_warnings()
    import torch

    from megatron_moe.model.gpt import build_model
    from megatron_moe.runtime.distributed import start, stop
    from megatron_moe.runtime.seeds import set_seeds

    torch.set_num_threads(flags.threads)
    runs = {
        "fused": benchmark_run(flags),
        "explicit": benchmark_run(flags, attention_backend="unfused"),
        "reuse": benchmark_run(flags, attention_weight_reuse_prob=flags.prob),
    }
    start(runs["fused"].parallel)
    set_seeds(0)
    chunks: dict[str, Any] = {name: build_model(run)[0] for name, run in runs.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    computed = dict.fromkeys(runs, 0)
    for number in range(UNCOUNTED + flags.passes):
        for name, chunk in chunks.items():
            elapsed = time_pass(chunk, runs[name], number)
            if number >= UNCOUNTED:
                times[name].append(elapsed)
                computed[name] += layers_that_computed(chunk)
    stop()
    print(
        f"{flags.layers} layers, hidden {flags.hidden_size}, sequence {flags.seq_length}, batch "
        f"{flags.micro_batch_size}, fp32, {flags.threads} CPU threads, {flags.passes} passes of each in turns"
    )
    # A pass at --prob takes longer or shorter by its draws: the mean, not the median, says what a run takes.
    means = {name: [statistics.mean(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    for name, (wall, cpu) in means.items():
        share = computed[name] / (flags.passes * flags.layers)
        print(
            f"  {name:<8} {wall * 1e3:8.1f} ms, {cpu * 1e3:8.1f} ms of processor time; {share:.1%} of the attention "
            "weights computed"
        )
    for name in ("fused", "explicit"):
        wall, cpu = (ours / theirs for ours, theirs in zip(means["reuse"], means[name], strict=True))
        print(f"  reuse / {name:<8} {wall:.3f}x the time, {cpu:.3f}x the processor time")


if __name__ == "__main__":
    main()
