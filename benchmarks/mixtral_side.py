"""`transformers`' Mixtral as a side of `benchmarks/moe.py`: same shape, same weights, same tokens, torch's AdamW.

The weights are those of megatron-core's model, so the first loss must be the same. Two ways to half precision:
`autocast`, what `Trainer(bf16=True)` does (fp32 parameters, torch.autocast around the forward pass), and `masters`,
what Megatron does (bf16 parameters and gradients, fp32 master weights that are copied back); neither is pure bf16.

Shape legend: V = vocabulary, H = hidden size, F = width of an expert, A = heads, D = their width.
"""

import time
from typing import Any

from sides import matmul_rate, random_batch, stock_model, wait

from megatron_moe.config.run import RunConfig


def mixtral_config(run: RunConfig) -> Any:
    """The `MixtralConfig` of a run's model."""
    from transformers import MixtralConfig

    model, moe = run.model, run.moe
    experts = run.moe.num_experts or ()
    return MixtralConfig(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=run.expert_ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.query_groups,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_positions,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(model.rotary_base)},
        num_local_experts=experts[0],
        num_experts_per_tok=moe.moe_router_topk,
        # Megatron adds the losses of the layers, of shares that sum to 1; transformers takes one loss over all layers,
        # of shares that sum to k.
        router_aux_loss_coef=moe.moe_aux_loss_coeff * model.num_layers / moe.moe_router_topk,
        output_router_logits=True,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def copy_weights(source: Any, target: Any) -> None:
    """megatron-core's weights into Mixtral; every weight of either has its counterpart."""
    import torch

    theirs = dict(source.named_parameters())
    ours = dict(target.named_parameters())
    config = target.config
    heads, width = config.num_attention_heads, config.head_dim

    def move(name: str, tensor: Any) -> None:
        ours.pop(name).copy_(tensor)

    with torch.no_grad():
        move("model.embed_tokens.weight", theirs.pop("embedding.word_embeddings.weight"))
        move("model.norm.weight", theirs.pop("decoder.final_layernorm.weight"))
        if not config.tie_word_embeddings:
            move("lm_head.weight", theirs.pop("output_layer.weight"))
        for layer in range(config.num_hidden_layers):
            old, new = f"decoder.layers.{layer}.", f"model.layers.{layer}."
            qkv_A3DH = theirs.pop(f"{old}self_attention.linear_qkv.weight").view(heads, 3, width, -1)
            for place, name in enumerate("qkv"):
                move(f"{new}self_attn.{name}_proj.weight", qkv_A3DH[:, place].flatten(0, 1))
            for before, after in (
                ("self_attention.linear_proj", "self_attn.o_proj"),
                ("input_layernorm", "input_layernorm"),
                ("pre_mlp_layernorm", "post_attention_layernorm"),
                ("mlp.router", "mlp.gate"),
            ):
                move(f"{new}{after}.weight", theirs.pop(f"{old}{before}.weight"))
            for before, after in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
                stack = ours.pop(f"{new}mlp.experts.{after}")
                for expert in range(config.num_local_experts):
                    stack[expert].copy_(theirs.pop(f"{old}mlp.experts.local_experts.{expert}.{before}.weight"))
    left = [*theirs, *ours]
    if left:
        raise RuntimeError(f"no counterpart for {', '.join(left)}")


class MixtralSide:
    """Mixtral and torch's AdamW, stepped on random tokens.

    Args:
        run: what is trained.
        half: `autocast`, `masters`, or None for fp32.
    """

    def __init__(self, run: RunConfig, half: str | None) -> None:
        import torch
        from transformers import MixtralForCausalLM

        from megatron_moe.runtime import cpu
        from megatron_moe.runtime.distributed import choose_device, start_alone, stop
        from megatron_moe.runtime.seeds import set_seeds
        from megatron_moe.training.loop import peak_memory_bytes

        self.run, self.half = run, half
        self.device = choose_device(run.parallel, 0)
        if self.device.type == "cpu":
            cpu.install()
        start_alone("gloo" if self.device.type == "cpu" else "nccl")
        set_seeds(run.training.seed)
        self.model = MixtralForCausalLM(mixtral_config(run)).to(self.device).train()
        self.imports_bytes = peak_memory_bytes()
        copy_weights(stock_model(run), self.model)
        stop()
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.set_experts("grouped_mm")
        named = [(name, parameter.detach().clone()) for name, parameter in self.model.named_parameters()]
        if half == "masters":
            self.masters = [tensor.requires_grad_() for _, tensor in named]
            self.model.to(torch.bfloat16)
        else:
            self.masters = list(self.model.parameters())
        flags = run.optimizer
        norms = ["norm" in name for name, _ in named]
        del named
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [tensor for tensor, is_norm in zip(self.masters, norms, strict=True) if is_norm is kind],
                    "weight_decay": 0.0 if kind else flags.weight_decay,
                }
                for kind in (False, True)
            ],
            lr=flags.lr,
            betas=(flags.adam_beta1, flags.adam_beta2),
            eps=flags.adam_eps,
        )
        batch = random_batch(run)
        self.tokens, self.labels = batch["tokens"].to(self.device), batch["labels"].to(self.device)

    def set_experts(self, implementation: str) -> None:
        """`grouped_mm` or `eager`, from the next step on."""
        self.model.set_experts_implementation(implementation)

    def facts(self) -> tuple[str, int]:
        """Device and number of parameters."""
        return self.device.type, self.parameters

    def use_fused_adam(self, fused: bool) -> None:
        """From the next step on."""
        for group in self.optimizer.param_groups:
            group["fused"], group["foreach"] = fused, False

    def step(self) -> tuple[float, float]:
        """Seconds of one step, and its loss without the routers'."""
        import torch

        wait(self.device)
        began = time.perf_counter()
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half == "autocast"):
            output = self.model(input_ids=self.tokens, labels=self.labels, shift_labels=self.labels)
        output.loss.backward()
        if self.half == "masters":
            for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                master.grad = parameter.grad.float()
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, self.run.optimizer.clip_grad)
        self.optimizer.step()
        if self.half == "masters":
            with torch.no_grad():
                for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                    parameter.copy_(master)
                    master.grad = None
        loss = float((output.loss - self.model.config.router_aux_loss_coef * output.aux_loss).detach())
        wait(self.device)
        return time.perf_counter() - began, loss

    def matmul_rate(self) -> float:
        """Of this process, in the compute precision."""
        import torch

        return matmul_rate(self.device, torch.bfloat16 if self.half else torch.float32)

    def memory(self) -> tuple[int, int]:
        """Peak bytes, and what they were before there was an optimizer and a step."""
        from megatron_moe.training.loop import peak_memory_bytes

        return peak_memory_bytes(), self.imports_bytes

    def close(self) -> None:
        """Nothing to leave: the process groups went with megatron-core's model."""
