"""What `benchmarks/moe.py` measures inside our step: the experts alone, and where the time of the whole goes.

Every part of the forward pass is marked with a range of torch's profiler; an operator of the backward pass belongs to
the part whose forward operator has its sequence number.
"""

import time
from collections.abc import Callable
from typing import Any

from sides import MegatronSide, wait

# Everything that ends in a matrix product, also as torch calls it from within another.
PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::baddbmm_",
    "aten::_grouped_mm",
    "mkldnn::_linear_pointwise",
}
DISPATCHER_METHODS = (
    "dispatch_preprocess",
    "token_dispatch",
    "dispatch_postprocess",
    "combine_preprocess",
    "token_combine",
    "combine_postprocess",
)
BACKWARD = "autograd::engine::evaluate_function: "
REST = "rest"


class OurSide(MegatronSide):
    """Our side, which can also be looked into."""

    def expert_rate(self) -> float:
        """Floating-point operations a second of all experts alone: forward, backward, weight gradients added up."""
        import torch

        from megatron_moe.moe.layer import moe_layers

        layers = [layer for chunk in self.model for layer in moe_layers(chunk)]
        config = layers[0].config
        tokens = self.run.training.micro_batch_size * self.run.model.seq_length
        rows, experts = tokens * config.moe_router_topk, config.num_moe_experts
        chosen = torch.randint(0, experts, (rows,), generator=torch.Generator().manual_seed(0))
        counts = torch.bincount(chosen, minlength=experts).to(self.device)
        x = torch.randn(rows, config.hidden_size, dtype=config.params_dtype, device=self.device, requires_grad=True)
        weights = torch.rand(rows, device=self.device, requires_grad=True)
        gradient = torch.randn_like(x)
        wait(self.device)
        began = time.perf_counter()
        for layer in layers:
            output, _ = layer.experts(x, counts, weights)
            output.backward(gradient)
        wait(self.device)
        seconds = time.perf_counter() - began
        matrices = 3 if config.gated_linear_unit else 2
        products = 3 * matrices * rows * config.hidden_size * config.moe_ffn_hidden_size
        return len(layers) * 2 * products / seconds

    def profile(self) -> dict[str, float]:
        """Milliseconds of the parts of one step."""
        import torch

        mark_parts(self.model, self.optimizer)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile, torch.profiler.record_function(f"part:{REST}"):
            self.step()
        return shares(profile.events())


def marked(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    """The function inside a range of the profiler."""
    import torch

    def inside(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(f"part:{part}"):
            return function(*args, **kwargs)

    return inside


def mark_parts(model: list[Any], optimizer: Any) -> None:
    """Mark the parts of model chunks and of the optimizer, for good."""
    import torch
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as optimizers

    from megatron_moe.moe.layer import moe_layers

    def mark(owner: Any, name: str, part: str) -> None:
        setattr(owner, name, marked(getattr(owner, name), part))

    for chunk in model:
        mark(chunk, "zero_grad_buffer", "zeroing gradients")
        for name, module in chunk.named_modules():
            if isinstance(module, (torch.nn.RMSNorm, torch.nn.LayerNorm)):
                mark(module, "forward", "norms")
            elif name.endswith("core_attention"):
                mark(module, "forward", "attention")
            elif hasattr(module, "compute_language_model_loss"):
                mark(module, "compute_language_model_loss", "loss")
        for layer in moe_layers(chunk):
            mark(layer.router, "forward", "router")
            mark(layer.experts, "forward", "experts")
            for method in DISPATCHER_METHODS:
                mark(layer.token_dispatcher, method, "permutation")
    mark(optimizer, "step", "optimizer: copies and the rest")
    for owner in (clip_grads, optimizers):
        mark(owner, "get_grad_norm_fp32", "gradient norm")
        mark(owner, "clip_grad_by_total_norm_fp32", "gradient clipping")
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        mark(part.optimizer, "step", "AdamW")


def shares(events: Any) -> dict[str, float]:
    """Milliseconds of every part, from the events of a profile: the largest first."""
    forward: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD) and _backward_of(event) is None:
            forward.setdefault(event.sequence_nr, _range(event))
    totals: dict[str, float] = {}
    for event in events:
        root = _backward_of(event)
        part = _range(event) if root is None else forward.get(root.sequence_nr, "gradients added up")
        product = any(ancestor.name in PRODUCTS for ancestor in _ancestors(event))
        if part == "experts":
            part = "expert GEMMs" if product else "experts, but their GEMMs"
        elif product and part == REST:
            part = "other GEMMs"
        if any(ancestor.name == f"part:{REST}" for ancestor in _ancestors(event)):
            totals[part] = totals.get(part, 0.0) + event.self_cpu_time_total / 1e3
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _ancestors(event: Any) -> list[Any]:
    chain = []
    while event is not None:
        chain.append(event)
        event = event.cpu_parent
    return chain


def _range(event: Any) -> str:
    """The innermost part around an event."""
    names = (ancestor.name for ancestor in _ancestors(event))
    return next((name.removeprefix("part:") for name in names if name.startswith("part:")), REST)


def _backward_of(event: Any) -> Any:
    """The node of the backward pass that an event belongs to, or None."""
    return next((ancestor for ancestor in _ancestors(event) if ancestor.name.startswith(BACKWARD)), None)
