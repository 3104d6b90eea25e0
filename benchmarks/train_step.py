"""A whole training step: this package's defaults against megatron-core's stock local spec, in turns.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --model moe-100m --bf16
    python benchmarks/train_step.py --model small --seq-length 1024 --micro-batch-size 2

Either side is a process of its own, so that its peak memory is its own; they take turns step by step, on the same
weights and tokens, so that whatever else the machine does falls on both. `stock` is megatron-core's `GPTModel` with
its local spec (DotProductAttention, which holds the S x S matrix; SequentialMLP) and torch's AdamW without its fused
kernel. Where upstream cannot build the model (unequal expert counts, residual MLPs), `stock` is this package's layer
with those parts in it, and the table says so. On a CPU the stock side needs this package's CPU runtime as well.

The rate of plain matrix products (fp32, and bf16 with --bf16) is measured by the same processes, between the steps.
"""

import argparse
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run, load_recipe
from megatron_moe.runtime.quiet import silence_third_party_warnings

# A larger product where 2048 would be over before it has begun.
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
UNCOUNTED = 2

MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny-cpu": load_recipe("tiny-cpu"),
    "small": {
        "model": {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 512},
        "moe": {"num_experts": (8, 16), "expert_interval": 2, "mlp_type": "residual"},
        "training": {"micro_batch_size": 4},
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


def benchmark_run(flags: argparse.Namespace, attention: str) -> RunConfig:
    """The run of one side."""
    sizes = {"vocab_size": 8192, "attention_dropout": 0.0, "hidden_dropout": 0.0, "attention_backend": attention}
    given = {"seq_length": flags.seq_length} if flags.seq_length else {}
    batch = {"micro_batch_size": flags.micro_batch_size} if flags.micro_batch_size else {}
    once = {"global_batch_size": None, "train_iters": 1, "eval_interval": 0, "bf16": flags.bf16}
    return build_run(
        MODELS[flags.model],
        {"model": sizes | given, "training": once | batch, "parallel": {"device": flags.device}},
    )


def upstream_builds(run: RunConfig) -> bool:
    """Whether megatron-core's own spec can express the model."""
    return run.moe.mlp_type == "standard" and len(set(run.moe.num_experts or ())) == 1


def stock_model(run: RunConfig) -> list[Any]:
    """megatron-core's `GPTModel` with its local spec, weights drawn like ours."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    from megatron_moe.model.init import initialize_weights
    from megatron_moe.model.transformer_config import build_transformer_config

    ours = build_transformer_config(run)
    values = {field.name: getattr(ours, field.name) for field in dataclasses.fields(TransformerConfig) if field.init}
    config = TransformerConfig(**values | {"heterogeneous_block_specs": False})
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=run.model.padded_vocab_size,
        max_sequence_length=run.model.max_positions,
        share_embeddings_and_output_weights=not run.model.untie_embeddings_and_output_weights,
        position_embedding_type=run.model.position_embedding_type,
        rotary_base=run.model.rotary_base,
    )
    initialize_weights(model, seed=run.training.seed, std=run.model.init_method_std, num_layers=run.model.num_layers)
    if torch.cuda.is_available():
        model.cuda(torch.cuda.current_device())
    return [Float16Module(config, model) if config.bf16 else model]


class Side:
    """One of the two: a model and its optimizer, stepped on random tokens."""

    def __init__(self, name: str, flags: argparse.Namespace) -> None:
        import torch

        from megatron_moe.model.gpt import build_model
        from megatron_moe.runtime.distributed import start
        from megatron_moe.runtime.seeds import set_seeds
        from megatron_moe.training.loop import peak_memory_bytes
        from megatron_moe.training.optimizer import adam_groups, build_optimizer, wrap_data_parallel

        stock = name == "stock"
        self.run = benchmark_run(flags, "unfused" if stock else "sdpa")
        self.device = start(self.run.parallel).device
        self.imports_bytes = peak_memory_bytes()
        set_seeds(self.run.training.seed)
        chunks = stock_model(self.run) if stock and upstream_builds(self.run) else build_model(self.run)
        self.parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        self.model = wrap_data_parallel(self.run, chunks)
        self.optimizer = build_optimizer(self.run, self.model)
        if stock:
            for group in adam_groups(self.optimizer):
                group["fused"] = False
        torch.manual_seed(0)
        self.batch = random_batch(self.run)

    def step(self) -> tuple[float, float]:
        """Seconds of one step, and its loss."""
        from megatron_moe.training.step import train_step

        self._wait()
        began = time.perf_counter()
        result = train_step(self.run, self.model, self.optimizer, [iter([self.batch])], 1)
        self._wait()
        return time.perf_counter() - began, result.loss

    def matmul_rate(self) -> float:
        """Floating-point operations a second of a plain product of two square matrices in the compute precision."""
        import torch

        from megatron_moe.model.transformer_config import DTYPES

        size = MATMUL_SIZE[self.device.type]
        left, right = (
            torch.randn(size, size, dtype=DTYPES[self.run.training.precision], device=self.device) for _ in range(2)
        )
        torch.mm(left, right)
        self._wait()
        began = time.perf_counter()
        torch.mm(left, right)
        self._wait()
        return 2 * size**3 / (time.perf_counter() - began)

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()


def random_batch(run: RunConfig) -> dict[str, Any]:
    """A micro-batch of random tokens, [B, S] each."""
    import torch

    shape = (run.training.micro_batch_size, run.model.seq_length)
    tokens = torch.randint(0, run.model.padded_vocab_size, shape)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "loss_mask": torch.ones(shape),
        "position_ids": positions,
        "samples": torch.arange(shape[0]),
    }


def _serve(name: str, flags: argparse.Namespace, commands: Connection) -> None:
    """A side's process: do what is asked, one thing at a time."""
    silence_third_party_warnings()
    from megatron_moe.runtime.distributed import stop
    from megatron_moe.training.loop import peak_memory_bytes

    side = Side(name, flags)
    commands.send((side.device.type, side.parameters))
    while (command := commands.recv()) != "end":
        if command == "memory":
            commands.send((peak_memory_bytes(), side.imports_bytes))
        else:
            commands.send(side.step() if command == "step" else side.matmul_rate())
    stop()


def _ask(connection: Connection, command: str) -> Any:
    connection.send(command)
    return connection.recv()


def main(argv: Sequence[str] | None = None) -> None:
    """Step both sides in turns and print a table."""
    flags = _parse(argv)
    context = multiprocessing.get_context("spawn")
    sides: dict[str, Connection] = {}
    facts = {}
    for name in ("ours", "stock"):
        sides[name], theirs = context.Pipe()
        context.Process(target=_serve, args=(name, flags, theirs), daemon=True).start()
        theirs.close()
        # One after the other, so that neither builds while the other is timed.
        facts[name] = sides[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    rates = []
    for turn in range(flags.steps + UNCOUNTED):
        for name, side in sides.items():
            elapsed, loss = _ask(side, "step")
            losses[name].append(loss)
            if turn >= UNCOUNTED:
                seconds[name].append(elapsed)
        rates.append(_ask(sides["ours"], "matmul"))
    memory = {name: _ask(side, "memory") for name, side in sides.items()}
    for side in sides.values():
        side.send("end")
    _report(flags, facts["ours"], seconds, losses, statistics.median(rates), memory)


def _report(
    flags: argparse.Namespace,
    facts: tuple[str, int],
    seconds: dict[str, list[float]],
    losses: dict[str, list[float]],
    rate: float,
    memory: dict[str, tuple[int, int]],
) -> None:
    from megatron_moe.model.flops import training_flops_per_token

    run = benchmark_run(flags, "sdpa")
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
