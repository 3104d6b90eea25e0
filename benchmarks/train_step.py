"""A whole training step: this package's defaults against megatron-core's local spec as it comes.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --hidden-size 512 --seq-length 512 --steps 10 --bf16

Both sides run in one process on the same weights and data, in turns, so that whatever else the machine does falls on
both. `stock` keeps megatron-core's DotProductAttention (which holds the S x S matrix) and torch's AdamW without its
fused kernel; `ours` is scaled_dot_product_attention and the fused kernel. Experts are the same loop on both sides.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run
from megatron_moe.runtime.quiet import silence_third_party_warnings


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--num-experts", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each side, after 2 that are not")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(argv)


def benchmark_run(flags: argparse.Namespace, attention: str) -> RunConfig:
    """The run of one side."""
    return build_run(
        {
            "model": {
                "num_layers": flags.num_layers,
                "hidden_size": flags.hidden_size,
                "num_attention_heads": max(1, flags.hidden_size // 64),
                "seq_length": flags.seq_length,
                "vocab_size": 8192,
                "attention_dropout": 0.0,
                "hidden_dropout": 0.0,
                "attention_backend": attention,
            },
            "moe": {"num_experts": tuple(flags.num_experts), "expert_interval": 2, "mlp_type": "residual"},
            "parallel": {"device": flags.device},
            "training": {"micro_batch_size": flags.micro_batch_size, "train_iters": 1, "bf16": flags.bf16},
        }
    )


class Side:
    """One of the two: a model and its optimizer, stepped on random tokens."""

    def __init__(self, run: RunConfig, *, fused_adam: bool) -> None:
        from megatron_moe.model.gpt import build_model
        from megatron_moe.training.optimizer import adam_groups, build_optimizer, wrap_data_parallel

        self.run = run
        self.model = wrap_data_parallel(run, build_model(run))
        self.optimizer = build_optimizer(run, self.model)
        if not fused_adam:
            for group in adam_groups(self.optimizer):
                group["fused"] = False

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """Seconds of one step."""
        from megatron_moe.training.step import train_step

        _wait()
        began = time.perf_counter()
        train_step(self.run, self.model, self.optimizer, [iter([batch])], 1)
        _wait()
        return time.perf_counter() - began


def random_batch(run: RunConfig) -> dict[str, torch.Tensor]:
    """A micro-batch of random tokens, [B, S] each."""
    shape = (run.training.micro_batch_size, run.model.seq_length)
    tokens = torch.randint(0, run.model.padded_vocab_size, shape)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    return {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(shape), "position_ids": positions}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> None:
    """Time both sides in turns and print medians and their ratio."""
    silence_third_party_warnings()
    flags = _parse(argv)
    from megatron_moe.model.flops import training_flops_per_token
    from megatron_moe.runtime.distributed import start, stop
    from megatron_moe.runtime.seeds import set_seeds

    ours_run, stock_run = benchmark_run(flags, "sdpa"), benchmark_run(flags, "unfused")
    world = start(ours_run.parallel)
    set_seeds(1)
    sides = {"ours": Side(ours_run, fused_adam=True), "stock": Side(stock_run, fused_adam=False)}
    batch = random_batch(ours_run)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(flags.steps + 2):
        for name, side in sides.items():
            elapsed = side.step(batch)
            if turn >= 2:
                seconds[name].append(elapsed)
    _report(ours_run, world.device.type, seconds, training_flops_per_token(ours_run))
    stop()


def _report(run: RunConfig, device: str, seconds: dict[str, list[float]], flops_per_token: float) -> None:
    tokens = run.training.micro_batch_size * run.model.seq_length
    shape: list[Any] = [
        run.model.num_layers,
        run.model.hidden_size,
        run.model.seq_length,
        run.training.micro_batch_size,
    ]
    print("{} layers, hidden {}, sequence {}, batch {}".format(*shape), f"| {run.training.precision} | {device}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        spread = f"{min(seconds[name]) * 1e3:.0f}-{max(seconds[name]) * 1e3:.0f}"
        rate = tokens * flops_per_token / median / 1e9
        print(f"  {name:<6} {median * 1e3:8.1f} ms ({spread}) {tokens / median:10,.0f} tokens/s {rate:8.1f} GFLOP/s")
    print(f"  ratio  {medians['stock'] / medians['ours']:8.2f}x")


if __name__ == "__main__":
    main()
