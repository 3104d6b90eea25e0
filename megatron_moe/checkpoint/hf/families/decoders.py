"""Whole decoders by Llama's names, which most families have; each says what its own layers have besides."""

from typing import ClassVar

from megatron_moe.checkpoint.convert.blocks import Block
from megatron_moe.checkpoint.hf.families import parts
from megatron_moe.checkpoint.hf.families.native import NativeFamily
from megatron_moe.config.run import RunConfig


class Decoder(NativeFamily):
    """Two norms in every layer, attention, and a SwiGLU MLP or experts with a router."""

    moe_block: ClassVar[str] = "mlp"
    """The module that holds router and experts."""
    expert_names: ClassVar[parts.GatedNames] = parts.LLAMA_MLP

    def blocks(self, run: RunConfig) -> list[Block]:
        """Where every weight is."""
        return parts.decoder(run, self._layer)

    def _layer(self, run: RunConfig, layer: int) -> list[Block]:
        theirs = f"model.layers.{layer}."
        blocks = parts.layer_norms(run, layer, theirs) + self._attention(run, layer, f"{theirs}self_attn.")
        if not parts.is_moe(run, layer):
            return blocks + parts.dense_mlp(run, layer, f"{theirs}mlp.")
        return blocks + self._experts(run, layer, f"{theirs}{self.moe_block}.")

    def _attention(self, run: RunConfig, layer: int, theirs: str) -> list[Block]:
        return parts.attention(run, layer, theirs)

    def _experts(self, run: RunConfig, layer: int, theirs: str) -> list[Block]:
        """The router, the experts, and what is beside them."""
        blocks = parts.router(run, layer, f"{theirs}gate.weight")
        return blocks + parts.experts_apart(run, layer, f"{theirs}experts.", self.expert_names)
