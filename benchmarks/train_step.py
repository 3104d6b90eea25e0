"""A whole training step: this package's defaults against megatron-core's stock local spec, in turns.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --model moe-100m --bf16
    python benchmarks/train_step.py --model small --seq-length 1024 --micro-batch-size 2

The sides take turns (`sides.py`). `stock` is megatron-core's `GPTModel` with its local spec (DotProductAttention,
which holds the S x S matrix; SequentialMLP) and torch's AdamW without its fused kernel. Where upstream cannot build the
model (unequal expert counts, residual MLPs), `stock` is this package's layer with those parts in it, and the table says
so. On a CPU the stock side needs this package's CPU runtime as well, but nothing of what makes ours faster there.

The rate of plain matrix products (fp32, and bf16 with --bf16) is measured by our process, between the steps.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from sides import MATMUL_SIZE, MegatronSide, Turns, upstream_builds

from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run, load_recipe

UNCOUNTED = 2

TINY = load_recipe("tiny-cpu")
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny-cpu": TINY,
    "small": {
        "model": {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 512},
        "moe": {"num_experts": (8, 16), "expert_interval": 2, "mlp_type": "residual"},
        "training": {"micro_batch_size": 4},
    },
    # The same in small, with layers that upstream builds too; its experts cannot have biases
    # (`transformer/mlp.py:MLP.forward` adds them in place to what an autograd function returns as it came).
    "tiny-equal": {
        **TINY,
        "model": TINY["model"] | {"disable_bias_linear": True},
        "moe": {"num_experts": (4,), "expert_interval": 2, "moe_router_topk": 2},
    },
    # Qwen3-like layers: equal expert counts, which upstream builds too.
    "moe-100m": {
        "model": {
            "num_layers": 4,
            "hidden_size": 512,
            "num_attention_heads": 8,
            "seq_length": 512,
            "position_embedding_type": "rope",
            "normalization": "RMSNorm",
            "swiglu": True,
            "disable_bias_linear": True,
        },
        "moe": {"num_experts": (16,), "moe_ffn_hidden_size": 1024, "moe_router_topk": 2},
        "training": {"micro_batch_size": 4},
    },
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="small")
    parser.add_argument("--seq-length", type=int, help="instead of the model's")
    parser.add_argument("--micro-batch-size", type=int, help="instead of the model's")
    parser.add_argument(
        "--steps", type=int, default=8, help=f"timed steps of each side, after {UNCOUNTED} that are not"
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(argv)


def benchmark_run(flags: argparse.Namespace) -> RunConfig:
    """What both sides train."""
    sizes = {"vocab_size": 8192, "attention_dropout": 0.0, "hidden_dropout": 0.0}
    given = {"seq_length": flags.seq_length} if flags.seq_length else {}
    batch = {"micro_batch_size": flags.micro_batch_size} if flags.micro_batch_size else {}
    once = {"global_batch_size": None, "train_iters": 1, "eval_interval": 0, "bf16": flags.bf16}
    return build_run(
        MODELS[flags.model],
        {"model": sizes | given, "training": once | batch, "parallel": {"device": flags.device}},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Step both sides in turns and print a table."""
    flags = _parse(argv)
    run = benchmark_run(flags)
    turns = Turns({name: partial(MegatronSide, name, run) for name in ("ours", "stock")})
    seconds: dict[str, list[float]] = {name: [] for name in turns.facts}
    losses: dict[str, list[float]] = {name: [] for name in turns.facts}
    rates = []
    for turn in range(flags.steps + UNCOUNTED):
        for name in turns.facts:
            elapsed, loss = turns.ask(name, "step")
            losses[name].append(loss)
            if turn >= UNCOUNTED:
                seconds[name].append(elapsed)
        rates.append(turns.ask("ours", "matmul_rate"))
    memory = {name: turns.ask(name, "memory") for name in turns.facts}
    turns.end()
    _report(flags, turns.facts["ours"], seconds, losses, statistics.median(rates), memory)


def _report(
    flags: argparse.Namespace,
    facts: tuple[str, int],
    seconds: dict[str, list[float]],
    losses: dict[str, list[float]],
    rate: float,
    memory: dict[str, tuple[int, int]],
) -> None:
    from megatron_moe.model.flops import training_flops_per_token

    run = benchmark_run(flags)
    device, parameters = facts
    tokens = run.training.micro_batch_size * run.model.seq_length
    stock = "megatron-core's GPTModel" if upstream_builds(run) else "this package's layers with upstream's parts"
    print(
        f"{flags.model}: {parameters / 1e6:.1f} M parameters, {run.model.num_layers} layers, hidden "
        f"{run.model.hidden_size}, sequence {run.model.seq_length}, batch {run.training.micro_batch_size} | "
        f"{run.training.precision} | {device} | stock: {stock}"
    )
    print(f"  matrix product of {MATMUL_SIZE[device]}: {rate / 1e9:.0f} GFLOP/s")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        spread = f"{min(seconds[name]) * 1e3:.0f}-{max(seconds[name]) * 1e3:.0f}"
        speed = tokens * training_flops_per_token(run) / median
        peak, imports = memory[name]
        print(
            f"  {name:<6} {median * 1e3:8.1f} ms ({spread}) {tokens / median:10,.0f} tokens/s "
            f"{speed / 1e9:8.1f} GFLOP/s ({speed / rate:.0%} of the product's) peak {peak / 2**30:.2f} GiB "
            f"({(peak - imports) / 2**30:.2f} over the imports)"
        )
    print(f"  ratio  {medians['stock'] / medians['ours']:8.2f}x the speed")
    worst = max(abs(ours / theirs - 1) for ours, theirs in zip(losses["ours"], losses["stock"], strict=True))
    print(f"  largest relative difference of the losses of {len(losses['ours'])} steps: {worst:.1e}")


if __name__ == "__main__":
    main()
