"""Experts, a whole MoE layer and slices of two models on one GPU, against the rate of a plain matrix product there.

    python benchmarks/moe_gpu.py                                  # the sizes below, on the GPU
    python benchmarks/moe_gpu.py --parts experts --tokens 65536
    python benchmarks/moe_gpu.py --device cpu --shrink            # everything once, small: what its test runs

- `experts`: all experts of a layer, forward and backward, on rows that are sorted by expert: the six grouped matrix
  products alone, this package's `grouped` experts, and megatron-core's `SequentialMLP`.
- `layer`: the whole MoE layer with its router, dispatcher and experts, ours and megatron-core's `MoELayer` with
  `SequentialMLP`. The routing is given (balanced, or by Zipf's law), so that both do the same; the gate is computed.
- `slice`: training steps with AdamW of what one GPU of an expert-parallel run computes of a recipe's model: its first
  layers, each with the experts of one rank, and a vocabulary cut in proportion to the layers, so that the output layer
  has the share of the arithmetic that it has in the whole model. A rank's experts get as many rows there as here when
  the load is even: tokens of a rank x top-k. Not in it: exchange between ranks, and the recipe's fp16, recompute and
  dropping. Its arithmetic is that of `model/flops.py`.

Sides take turns, each timed with CUDA events, median of the turns. Shares are of the rate of a bf16 product of two
square random matrices, measured in the same process. `least` is the time that this rate and the memory's allow the six
products: with few rows an expert, reading its weights takes longer than using them, and no kernel can help that.
"""

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sides import random_batch, stock_model
from torch import Tensor

from megatron_moe.config.base import UserError
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run, load_recipe
from megatron_moe.runtime.launch import run_entry_point
from megatron_moe.runtime.quiet import silence_third_party_warnings

WARM_UP = 3
DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "H800": 989e12, "A800": 312e12, "B200": 2250e12}
"""Dense bf16 operations a second on NVIDIA's data sheets (SXM), by what the card's name holds."""
SMALL = {"hidden": 64, "ffn": 128, "experts": 8, "tokens": 256, "matmul": 256, "repeats": 2, "slice_layers": 2}


@dataclasses.dataclass(frozen=True)
class Slice:
    """What one GPU holds of a recipe's model."""

    expert_ranks: int
    """Expert-parallel size whose one rank this is."""
    micro_batch_size: int
    small: dict[str, Any]
    """Sizes with --shrink, beside those of every model."""


SLICES = {
    "pai-gpt-moe-16b": Slice(8, 8, {"ffn_hidden_size": 128}),
    "qwen3-moe-30b-a3b": Slice(8, 4, {"num_query_groups": 2, "kv_channels": 16, "ffn_hidden_size": 128}),
}


class Clock:
    """Seconds of work on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call, from the first kernel to the last."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Nothing of the side before may still be under way.
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def medians(self, sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
        """Of every side, which take turns."""
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(WARM_UP + repeats):
            for name, work in sides.items():
                seconds = self.seconds(work)
                if turn >= WARM_UP:
                    taken[name].append(seconds)
        return {name: statistics.median(values) for name, values in taken.items()}


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device can do at best."""

    matmul: float
    """Operations a second of a bf16 product."""
    memory: float
    """Bytes a second, read or written."""


def measure_rates(clock: Clock, size: int, repeats: int) -> Rates:
    """A product of two square matrices, and a copy of as many bytes as fit no cache."""
    left, right = (torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2))
    source = torch.ones(size * size * 8, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    sides = {"matmul": lambda: torch.mm(left, right), "memory": lambda: target.copy_(source)}
    medians = clock.medians(sides, repeats)
    return Rates(2 * size**3 / medians["matmul"], 2 * source.numel() / medians["memory"])


# ---- loads


def routing_map(load: str, tokens: int, experts: int, topk: int, device: torch.device) -> Tensor:
    """`topk` distinct experts for each token, [N, E] of bool, the same on every device."""
    if load == "balanced":
        order = torch.arange(tokens * topk).view(tokens, topk) % experts
    else:
        generator = torch.Generator().manual_seed(1)
        chances = 1.0 / torch.randperm(experts, generator=generator).add(1)
        order = torch.multinomial(chances.expand(tokens, -1), topk, generator=generator)
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, order, True).to(device)


def layer_run(flags: argparse.Namespace, device: str) -> RunConfig:
    """A model of one MoE layer."""
    return build_run(
        {
            "model": {
                "num_layers": 1,
                "hidden_size": flags.hidden,
                "ffn_hidden_size": flags.ffn,
                "num_attention_heads": max(1, flags.hidden // 128),
                "seq_length": flags.tokens,
                "vocab_size": 128,
                "swiglu": flags.swiglu,
                "disable_bias_linear": not flags.bias,
                "attention_dropout": 0.0,
                "hidden_dropout": 0.0,
                "position_embedding_type": "rope",
            },
            "moe": {
                "num_experts": (flags.experts,),
                "moe_router_topk": flags.topk,
                "moe_router_load_balancing_type": "none",
                "moe_expert_backend": "grouped",
            },
            "training": {"micro_batch_size": 1, "train_iters": 1, "eval_interval": 0, "bf16": True},
            "parallel": {"device": device},
        }
    )


def expert_flops(flags: argparse.Namespace) -> float:
    """Forward and backward of all routed rows: three products of the size of each of the forward's."""
    return 3 * 2 * flags.tokens * flags.topk * flags.hidden * flags.ffn * (3 if flags.swiglu else 2)


def least_seconds(flags: argparse.Namespace, used: int, rates: Rates) -> float:
    """Of the six products, each of which reads its operands and writes its result once.

    Args:
        flags: sizes.
        used: experts that have rows; the weights of others need not be read.
        rates: what the device can do.
    """
    rows, width = flags.tokens * flags.topk, flags.ffn * (2 if flags.swiglu else 1)
    total = 0.0
    for inner, outer in ((flags.hidden, width), (flags.ffn, flags.hidden)):
        flops = 2 * rows * inner * outer
        weights, numbers = inner * outer, rows * (inner + outer)
        for matrices in (used, used, flags.experts):
            # Output, gradient of the input, gradient of the weights (that of unused experts is written, too).
            total += max(flops / rates.matmul, 2 * (matrices * weights + numbers) / rates.memory)
    return total


# ---- parts


def experts_part(flags: argparse.Namespace, clock: Clock, rates: Rates) -> list[str]:
    """Lines of the table of experts."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_moe.model.transformer_config import build_transformer_config
    from megatron_moe.moe.experts import expert_builder

    config = build_transformer_config(layer_run(flags, clock.device.type))
    stock = partial(
        SequentialMLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    modules = {
        name: build(flags.experts, config, pg_collection=get_default_pg_collection()).to(clock.device)
        for name, build in (("grouped", expert_builder("grouped")), ("SequentialMLP", stock))
    }
    for module in modules.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    lines = []
    for load in flags.loads:
        counts = routing_map(load, flags.tokens, flags.experts, flags.topk, clock.device).sum(0)
        rows, back = (
            torch.randn(flags.tokens * flags.topk, flags.hidden, device=clock.device).bfloat16() for _ in range(2)
        )
        probs = torch.rand(len(rows), device=clock.device)
        # SequentialMLP splits by numbers that the host must have; upstream's dispatcher hands them over so.
        given = {"grouped": counts, "SequentialMLP": counts.cpu()}
        sides: dict[str, Callable[[], object]] = {
            name: partial(_train_experts, module, rows, given[name], probs, back) for name, module in modules.items()
        }
        fc1, fc2 = modules["grouped"].linear_fc1.weight.detach(), modules["grouped"].linear_fc2.weight.detach()
        sides = {"products alone": partial(_products, rows, back, fc1, fc2, counts)} | sides
        medians = clock.medians(sides, flags.repeats)
        least = least_seconds(flags, int((counts > 0).sum()), rates)
        for name, seconds in medians.items():
            share = expert_flops(flags) / seconds / rates.matmul
            ratio = f"{medians['SequentialMLP'] / seconds:.2f}x"
            lines.append(
                f"| experts, {load} | {name} | {seconds * 1e3:.3f} | {share:.0%} | {least / seconds:.0%} | {ratio} |"
            )
    return lines


def _train_experts(module: Any, rows: Tensor, counts: Tensor, probs: Tensor, back: Tensor) -> None:
    rows = rows.detach().requires_grad_()
    module.zero_grad(set_to_none=True)
    output, _ = module(rows, counts, probs)
    output.backward(back)


def _products(rows: Tensor, back: Tensor, fc1: Tensor, fc2: Tensor, counts: Tensor) -> None:
    """Forward and backward of two linear layers without what stands between them."""
    ends = counts.cumsum(0, dtype=torch.int32)
    hidden = F.grouped_mm(rows, fc1.transpose(1, 2), offs=ends)
    inner = hidden[:, : fc2.shape[2]] if hidden.shape[1] != fc2.shape[2] else hidden
    F.grouped_mm(inner, fc2.transpose(1, 2), offs=ends)
    F.grouped_mm(back, fc2, offs=ends)
    F.grouped_mm(back.t(), inner, offs=ends)
    # As large as the gradient of `hidden`.
    F.grouped_mm(hidden, fc1, offs=ends)
    F.grouped_mm(hidden.t(), rows, offs=ends)


def layer_part(flags: argparse.Namespace, clock: Clock, rates: Rates) -> list[str]:
    """Lines of the table of whole layers."""
    from megatron_moe.model.gpt import build_model
    from megatron_moe.moe.layer import moe_layers

    run = layer_run(flags, clock.device.type)
    (ours,) = moe_layers(build_model(run)[0])
    layers: dict[str, Any] = {"ours": ours, "MoELayer": stock_model(run).decoder.layers[0].mlp}
    hidden, back = (torch.randn(flags.tokens, 1, flags.hidden, device=clock.device).bfloat16() for _ in range(2))
    # The gate's product, forward and backward, in fp32.
    flops = expert_flops(flags) + 3 * 2 * flags.tokens * flags.hidden * flags.experts
    lines = []
    for load in flags.loads:
        chosen = routing_map(load, flags.tokens, flags.experts, flags.topk, clock.device)
        for layer in layers.values():
            layer.train().router.routing = partial(_given_routing, chosen)
        sides: dict[str, Callable[[], object]] = {
            name: partial(_train_layer, layer, hidden, back) for name, layer in layers.items()
        }
        outputs = [side() for side in sides.values()]
        _check_equal(flags, layers, outputs)
        medians = clock.medians(sides, flags.repeats)
        for name, seconds in medians.items():
            ratio = f"{medians['MoELayer'] / seconds:.2f}x"
            lines.append(
                f"| layer, {load} | {name} | {seconds * 1e3:.3f} | {flops / seconds / rates.matmul:.0%} |  | {ratio} |"
            )
    return lines


def _given_routing(chosen: Tensor, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """In the place of a router's choice; weights are the gate's."""
    probs = logits.view(chosen.shape).float().softmax(-1) * chosen
    return probs, chosen


def _train_layer(layer: Any, hidden: Tensor, back: Tensor) -> Tensor:
    hidden = hidden.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    output: Tensor = layer(hidden)[0]
    output.backward(back)
    return output.detach()


def _check_equal(flags: argparse.Namespace, layers: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Both sides must do the same: equal weights by construction, so equal outputs but for bf16's rounding.

    Raises:
        UserError: they are further apart than a sum of `topk` terms, each rounded three times, can be.
    """
    ours, stock = (output.float() for output in outputs)
    apart = float((ours - stock).norm() / stock.norm())
    if not apart <= 0.02:
        raise UserError(f"outputs of {' and '.join(layers)} differ by {apart:.1%} of their norm: no comparison")


def slice_part(name: str, flags: argparse.Namespace, clock: Clock, rates: Rates) -> list[str]:
    """Lines about the steps of a slice of a recipe's model."""
    from megatron_moe.model.flops import training_flops_per_token
    from megatron_moe.model.gpt import build_model
    from megatron_moe.runtime.seeds import set_seeds
    from megatron_moe.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_moe.training.step import train_step

    run, words = slice_run(name, flags, clock.device.type)
    set_seeds(run.training.seed)
    model = wrap_data_parallel(run, build_model(run))
    optimizer = build_optimizer(run, model)
    parameters = sum(parameter.numel() for chunk in model for parameter in chunk.parameters())
    batch = random_batch(run)
    step = partial(_step, train_step, run, model, optimizer, batch)
    seconds = clock.medians({"step": step}, flags.repeats)["step"]
    tokens = run.training.micro_batch_size * run.model.seq_length
    rate = tokens * training_flops_per_token(run) / seconds
    sheet = [value for key, value in DATA_SHEET.items() if clock.device.type == "cuda" and key in device_name(clock)]
    of_sheet = f", {rate / sheet[0]:.1%} of the data sheet's {sheet[0] / 1e12:.0f} TFLOP/s" if sheet else ""
    peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if clock.device.type == "cuda" else ""
    return [
        f"{name}: {words}; {parameters / 1e6:,.0f} M parameters",
        f"  {seconds * 1e3:.1f} ms a step, {tokens / seconds:,.0f} tokens/s, {rate / 1e12:.3f} TFLOP/s: MFU "
        f"{rate / rates.matmul:.1%} of the measured product{of_sheet}{peak}",
    ]


def _step(train_step: Any, run: RunConfig, model: Any, optimizer: Any, batch: dict[str, Any]) -> None:
    train_step(run, model, optimizer, [iter([batch])], 1)


def slice_run(name: str, flags: argparse.Namespace, device: str) -> tuple[RunConfig, str]:
    """The run of a slice, and in words what it is."""
    recipe, cut = load_recipe(name), SLICES[name]
    whole = build_run(recipe)
    layers = min(flags.slice_layers, whole.model.num_layers)
    counts = [count for count in whole.moe.experts_per_layer(whole.model.num_layers)[:layers] if count]
    held = [max(1, count // cut.expert_ranks) for count in counts]
    topk = min(whole.moe.moe_router_topk, *held)
    vocabulary = int(recipe["model"]["vocab_size"]) * layers // whole.model.num_layers
    model: dict[str, Any] = {"num_layers": layers, "vocab_size": vocabulary}
    moe: dict[str, Any] = {"num_experts": tuple(held), "moe_router_topk": topk, "moe_expert_capacity_factor": None}
    batch = cut.micro_batch_size
    if flags.shrink:
        model |= {"hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}
        model |= cut.small | {"vocab_size": 256}
        moe |= {"moe_ffn_hidden_size": 64}
        batch = 2
    training = {
        "micro_batch_size": batch,
        "global_batch_size": batch,
        "train_iters": 1,
        "train_tokens": None,
        "eval_interval": 0,
        "bf16": True,
        "fp16": False,
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_num_layers": None,
    }
    parallel = {"device": device, "use_distributed_optimizer": False}
    run = build_run(recipe, {"model": model, "moe": moe, "training": training, "parallel": parallel})
    per_layer = ", ".join(f"{mine} of {count}" for mine, count in zip(held, counts, strict=True))
    words = (
        f"layers 1-{layers} of {whole.model.num_layers}, experts {per_layer} (one of {cut.expert_ranks} "
        f"expert-parallel ranks), top-{topk}, vocabulary {run.model.padded_vocab_size:,} of "
        f"{recipe['model']['vocab_size']:,}, batch {batch} x {run.model.seq_length}, bf16 with fp32 master weights, "
        "no recompute"
    )
    return run, words


# ---- command line


def device_name(clock: Clock) -> str:
    """Of the card, or of the processor."""
    if clock.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("experts", "layer", "slice"), default=("experts", "layer", "slice")
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shrink", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--topk", type=int, default=1)
    parser.add_argument("--swiglu", action="store_true", help="SwiGLU instead of GELU")
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--loads", nargs="+", choices=("balanced", "zipf"), default=("balanced", "zipf"))
    parser.add_argument("--slice-layers", type=int, default=8, help="layers of a slice")
    parser.add_argument("--matmul", type=int, default=8192, help="size of the product that rates are compared with")
    parser.add_argument("--repeats", type=int, default=20, help=f"turns, after {WARM_UP} that are not counted")
    flags = parser.parse_args(argv)
    if flags.shrink:
        vars(flags).update(SMALL)
    return flags


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    flags = parse(argv)
    silence_third_party_warnings()
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; --device cpu --shrink runs everything small")
    from megatron_moe.runtime.distributed import start, stop

    clock = Clock(start(ParallelConfig(device=flags.device)).device)
    torch.manual_seed(0)
    rates = measure_rates(clock, flags.matmul, flags.repeats)
    print(
        f"{device_name(clock)} | torch {torch.__version__} | {time.strftime('%d %B %Y')} | bf16 product of "
        f"{flags.matmul}: {rates.matmul / 1e12:.3f} TFLOP/s | memory {rates.memory / 1e9:,.1f} GB/s"
    )
    if {"experts", "layer"} & set(flags.parts):
        kind = "SwiGLU" if flags.swiglu else "GELU"
        print(
            f"hidden {flags.hidden}, {flags.experts} experts of {flags.ffn} ({kind}), {flags.tokens:,} tokens, "
            f"top-{flags.topk}, bf16, forward and backward"
        )
        print("| what | side | ms | of the product's rate | least / taken | against stock |\n|---|---|---|---|---|---|")
    for part, lines in (("experts", experts_part), ("layer", layer_part)):
        if part in flags.parts:
            print("\n".join(lines(flags, clock, rates)), flush=True)
            _free()
    for name in SLICES if "slice" in flags.parts else ():
        print("\n".join(slice_part(name, flags, clock, rates)), flush=True)
        _free()
    stop()


if __name__ == "__main__":
    run_entry_point(main)
