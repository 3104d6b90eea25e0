"""A training step of an MoE model on a CPU: this package, stock megatron-core and `transformers`' Mixtral, in turns.

    python benchmarks/moe.py                      fp32, top-2
    python benchmarks/moe.py --bf16 --profile     bf16 with fp32 master weights, and where the time of our step goes
    python benchmarks/moe.py --topk 1

The sides take turns (`sides.py`): each is a process of its own, and only one works at a time. Same weights, same
tokens, same optimizer (AdamW, gradients clipped to 1, no decay for norms), balance loss on. A peer takes two steps a
turn, one with torch's plain AdamW and one with its fused kernel, so that it shows what the optimizer alone gives;
megatron-core builds the plain one, and `Trainer` of `transformers` the fused one. Ours takes two as well.

- `megatron-core`: its `GPTModel` with the local spec (`SequentialMLP`, a loop; `DotProductAttention`). It runs under
  this package's CPU runtime, which it needs, without what makes ours faster.
- `mixtral`: `grouped_mm` experts; with --eager also the loop. In bf16 both ways to keep fp32 weights are sides:
  `autocast` and `masters` (`mixtral_side.py`).

With top-1 Mixtral divides a token's only routing weight by itself, so that it is 1: its losses are then others.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from inside_step import OurSide
from mixtral_side import MixtralSide
from sides import MATMUL_SIZE, MegatronSide, Turns

from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run

UNCOUNTED = 2
OURS, STOCK, MIXTRAL = "ours", "megatron-core", "mixtral"
SHAPES: dict[str, dict[str, int]] = {
    "213m": {"layers": 4, "hidden": 512, "heads": 8, "ffn": 1024, "experts": 32, "length": 512, "batch": 4, "v": 8192},
    "tiny": {"layers": 2, "hidden": 64, "heads": 4, "ffn": 64, "experts": 4, "length": 64, "batch": 2, "v": 512},
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="213m")
    parser.add_argument("--topk", type=int, default=2, help="experts of a token")
    parser.add_argument("--bf16", action="store_true", help="bf16 with fp32 master weights")
    parser.add_argument("--steps", type=int, default=6, help=f"timed turns, after {UNCOUNTED} that are not")
    parser.add_argument("--eager", action="store_true", help="Mixtral's loop over experts too, once a turn")
    parser.add_argument("--profile", action="store_true", help="where the time of our step goes")
    return parser.parse_args(argv)


def benchmark_run(flags: argparse.Namespace) -> RunConfig:
    """What all sides train."""
    shape = SHAPES[flags.shape]
    model = {
        "num_layers": shape["layers"],
        "hidden_size": shape["hidden"],
        "num_attention_heads": shape["heads"],
        "seq_length": shape["length"],
        "vocab_size": shape["v"],
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    moe = {
        "num_experts": (shape["experts"],),
        "moe_ffn_hidden_size": shape["ffn"],
        "moe_router_topk": flags.topk,
        "moe_aux_loss_coeff": 0.01,
    }
    training = {"micro_batch_size": shape["batch"], "global_batch_size": None, "train_iters": 1, "eval_interval": 0}
    return build_run(
        {"model": model, "moe": moe},
        {"training": training | {"bf16": flags.bf16}, "parallel": {"device": "cpu"}, "optimizer": {"clip_grad": 1.0}},
    )


class Measured:
    """Seconds and losses of every variant, in the order of the turns."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.losses: dict[str, list[float]] = {}
        self.product_rates: dict[str, list[float]] = {}
        self.expert_rates: list[float] = []

    def add(self, side: str, variant: str, step: tuple[float, float], *, counts: bool) -> None:
        """One step of a side."""
        elapsed, loss = step
        self.losses.setdefault(side, []).append(loss)
        if counts:
            self.seconds.setdefault(variant, []).append(elapsed)

    def fastest(self, side: str) -> float:
        """Median of the side's fastest variant."""
        return min(statistics.median(self.seconds[name]) for name in self.seconds if name.startswith(side))


def measure(flags: argparse.Namespace, turns: Turns) -> Measured:
    """Let the sides take turns."""
    measured = Measured()
    for turn in range(flags.steps + UNCOUNTED):
        counts = turn >= UNCOUNTED
        for side in turns.facts:
            for optimizer in ("plain", "fused"):
                variant = side
                if side != OURS:
                    turns.ask(side, "use_fused_adam", optimizer == "fused")
                    variant = f"{side}, {optimizer} AdamW"
                measured.add(side, variant, turns.ask(side, "step"), counts=counts)
            if flags.eager and side.startswith(MIXTRAL):
                turns.ask(side, "set_experts", "eager")
                measured.add(side, f"{side} eager, fused AdamW", turns.ask(side, "step"), counts=counts)
                turns.ask(side, "set_experts", "grouped_mm")
        if counts:
            for side in (OURS, STOCK):
                measured.product_rates.setdefault(side, []).append(turns.ask(side, "matmul_rate"))
            measured.expert_rates.append(turns.ask(OURS, "expert_rate"))
    return measured


def main(argv: Sequence[str] | None = None) -> None:
    """Step all sides in turns and print a table."""
    flags = _parse(argv)
    run = benchmark_run(flags)
    sides: dict[str, Any] = {OURS: partial(OurSide, OURS, run), STOCK: partial(MegatronSide, "stock", run)}
    for half in ("autocast", "masters") if flags.bf16 else (None,):
        sides[f"{MIXTRAL} {half}" if half else MIXTRAL] = partial(MixtralSide, run, half)
    turns = Turns(sides)
    measured = measure(flags, turns)
    memory = {side: turns.ask(side, "memory") for side in turns.facts}
    profile = turns.ask(OURS, "profile") if flags.profile else None
    turns.end()
    _report(run, turns.facts, measured, memory)
    if profile is not None:
        _report_profile(profile)


def _report(run: RunConfig, facts: dict[str, Any], measured: Measured, memory: dict[str, tuple[int, int]]) -> None:
    from megatron_moe.model.flops import training_flops_per_token

    model, moe = run.model, run.moe
    tokens = run.training.micro_batch_size * model.seq_length
    counts = " / ".join(f"{parameters / 1e6:.1f}" for _, parameters in facts.values())
    print(
        f"{model.num_layers} layers, hidden {model.hidden_size}, {(moe.num_experts or (0,))[0]} SwiGLU experts of "
        f"{run.expert_ffn_size}, top-{moe.moe_router_topk}, sequence {model.seq_length}, batch "
        f"{run.training.micro_batch_size}, vocabulary {model.padded_vocab_size} | {run.training.precision} | "
        f"M parameters: {counts}"
    )
    rates = {side: max(values) for side, values in measured.product_rates.items()}
    best = max(rates.values())
    print(
        f"  product of two matrices of {MATMUL_SIZE['cpu']}, best of all turns: {rates[OURS] / 1e9:.0f} GFLOP/s in our "
        f"process, {rates[STOCK] / 1e9:.0f} in the peers'"
    )
    experts = max(measured.expert_rates)
    print(
        f"  our experts alone, forward and backward: {experts / 1e9:.0f} GFLOP/s, {experts / best:.0%} of that rate "
        f"({experts / rates[STOCK]:.0%} of the peers' rate)"
    )
    ours = statistics.median(measured.seconds[OURS])
    flops = tokens * training_flops_per_token(run)
    for name, seconds in measured.seconds.items():
        median = statistics.median(seconds)
        side = next(side for side in sorted(facts, key=len, reverse=True) if name.startswith(side))
        peak, imports = memory[side]
        print(
            f"  {name:<38} {median * 1e3:8.0f} ms ({min(seconds) * 1e3:.0f}-{max(seconds) * 1e3:.0f}) "
            f"{tokens / median:7,.0f} tokens/s {flops / median / 1e9:6.0f} GFLOP/s  ours is {median / ours:5.2f}x  "
            f"peak {peak / 2**30:.2f} GiB ({(peak - imports) / 2**30:.2f} over the imports)"
        )
    plain, fused = (
        min(statistics.median(values) for name, values in measured.seconds.items() if name.endswith(f"{kind} AdamW"))
        for kind in ("plain", "fused")
    )
    print(
        f"  ratio to the fastest peer: {plain / ours:.2f}x with its plain AdamW, {fused / ours:.2f}x with the fused one"
    )
    for side, losses in measured.losses.items():
        first = abs(losses[0] / measured.losses[OURS][0] - 1)
        print(
            f"  losses of {side}: {', '.join(f'{loss:.4f}' for loss in (*losses[:4], losses[-1]))} (the first four and "
            f"the last of {len(losses)}); the first differs from ours by {first:.1e}"
        )


def _report_profile(parts: dict[str, float]) -> None:
    whole = sum(parts.values())
    print(f"  one step of ours under torch's profiler, {whole:.0f} ms:")
    for part, milliseconds in parts.items():
        print(f"    {part:<32} {milliseconds:8.1f} ms {milliseconds / whole:6.1%}")


if __name__ == "__main__":
    main()
