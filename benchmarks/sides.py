"""What the benchmarks of training steps share: sides in processes of their own that take turns, and Megatron's two.

Either side is a process of its own, so that its peak memory is its own; they take turns step by step, on the same
weights and tokens, so that whatever else the machine does falls on all of them. Only one works at a time.
"""

import dataclasses
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from megatron_moe.config.run import RunConfig
from megatron_moe.runtime.quiet import silence_third_party_warnings

# A larger product where 2048 would be over before it has begun.
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


class Turns:
    """Processes that each hold one side and do what they are asked, one at a time.

    Args:
        sides: a picklable function without arguments for each side, which builds it in its process.
    """

    def __init__(self, sides: dict[str, Callable[[], Any]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._sides: dict[str, Connection] = {}
        self.facts: dict[str, Any] = {}
        for name, build in sides.items():
            self._sides[name], theirs = context.Pipe()
            context.Process(target=_serve, args=(build, theirs), daemon=True).start()
            theirs.close()
        # Nothing is timed before all are built.
        for name, connection in self._sides.items():
            self.facts[name] = connection.recv()

    def ask(self, side: str, method: str, *args: Any) -> Any:
        """What a method of a side returns."""
        self._sides[side].send((method, args))
        return self._sides[side].recv()

    def end(self) -> None:
        """End all processes."""
        for connection in self._sides.values():
            connection.send(None)


def _serve(build: Callable[[], Any], commands: Connection) -> None:
    silence_third_party_warnings()
    side = build()
    commands.send(side.facts())
    while (command := commands.recv()) is not None:
        method, args = command
        commands.send(getattr(side, method)(*args))
    side.close()


def random_batch(run: RunConfig) -> dict[str, Any]:
    """A micro-batch of random tokens, [B, S] each; the same for every side."""
    import torch

    torch.manual_seed(0)
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


def matmul_rate(device: Any, dtype: Any) -> float:
    """Floating-point operations a second of a plain product of two square matrices."""
    import torch

    size = MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    torch.mm(left, right)
    wait(device)
    began = time.perf_counter()
    torch.mm(left, right)
    wait(device)
    return 2 * size**3 / (time.perf_counter() - began)


def wait(device: Any) -> None:
    """Until the device has nothing left to do."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def upstream_builds(run: RunConfig) -> bool:
    """Whether megatron-core's own spec can express the model."""
    return run.moe.mlp_type == "standard" and len(set(run.moe.num_experts or ())) == 1


def stock_model(run: RunConfig) -> Any:
    """megatron-core's `GPTModel` with its local spec, in fp32 or half precision, weights drawn like ours."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_moe.model.init import initialize_weights
    from megatron_moe.model.transformer_config import build_transformer_config

    class StockGpt(GPTModel):
        """Takes what our step hands to every model; stock routers know nothing of their tokens."""

        def forward(self, *args: Any, padding_mask: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    ours = build_transformer_config(run)
    values = {field.name: getattr(ours, field.name) for field in dataclasses.fields(TransformerConfig) if field.init}
    config = TransformerConfig(**values | {"heterogeneous_block_specs": False})
    model = StockGpt(
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
    return model


class MegatronSide:
    """This package, or megatron-core as it comes, stepped on random tokens.

    Args:
        name: `ours` or `stock`.
        run: what is trained, without the backends, of which `stock` has upstream's.
    """

    def __init__(self, name: str, run: RunConfig) -> None:
        from megatron.core.transformer.module import Float16Module

        from megatron_moe.model.gpt import build_model
        from megatron_moe.runtime.seeds import set_seeds
        from megatron_moe.training.loop import peak_memory_bytes
        from megatron_moe.training.optimizer import build_optimizer, stock_optimizer, wrap_data_parallel

        stock = name == "stock"
        attention = "unfused" if stock else "sdpa"
        experts = "sequential" if stock else run.moe.moe_expert_backend
        self.run = dataclasses.replace(
            run,
            model=dataclasses.replace(run.model, attention_backend=attention),
            moe=dataclasses.replace(run.moe, moe_expert_backend=experts),
        )
        self.device = self._start(stock)
        self.imports_bytes = peak_memory_bytes()
        set_seeds(self.run.training.seed)
        if stock and upstream_builds(self.run):
            model = stock_model(self.run)
            chunks = [Float16Module(model.config, model) if self.run.training.bf16 else model]
        else:
            chunks = build_model(self.run)
        self.parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        self.model = wrap_data_parallel(self.run, chunks)
        self.optimizer = (stock_optimizer if stock else build_optimizer)(self.run, self.model)
        self.batch = random_batch(self.run)

    def _start(self, stock: bool) -> Any:
        """The stock side runs without what this package does to make a CPU faster."""
        import torch

        from megatron_moe.runtime import cpu
        from megatron_moe.runtime.distributed import choose_device, start, start_alone

        if not stock:
            return start(self.run.parallel).device
        device = choose_device(self.run.parallel, 0)
        if device.type == "cpu":
            cpu.install()
            start_alone("gloo")
        else:
            torch.cuda.set_device(device)
            start_alone("nccl")
        return device

    def facts(self) -> tuple[str, int]:
        """Device and number of parameters."""
        return self.device.type, self.parameters

    def use_fused_adam(self, fused: bool) -> None:
        """From the next step on."""
        from megatron_moe.training.optimizer import adam_groups

        for group in adam_groups(self.optimizer):
            group["fused"], group["foreach"] = fused, False

    def step(self) -> tuple[float, float]:
        """Seconds of one step, and its loss."""
        from megatron_moe.training.step import train_step

        wait(self.device)
        began = time.perf_counter()
        result = train_step(self.run, self.model, self.optimizer, [iter([self.batch])], 1)
        wait(self.device)
        return time.perf_counter() - began, result.loss

    def matmul_rate(self) -> float:
        """Of this process, in the compute precision."""
        from megatron_moe.model.transformer_config import DTYPES

        return matmul_rate(self.device, DTYPES[self.run.training.precision])

    def memory(self) -> tuple[int, int]:
        """Peak bytes, and what they were before the model was built."""
        from megatron_moe.training.loop import peak_memory_bytes

        return peak_memory_bytes(), self.imports_bytes

    def close(self) -> None:
        """Leave the process groups."""
        from megatron_moe.runtime.distributed import stop

        stop()
