"""DeepSeek-V3 and R1: multi-latent attention, sigmoid scores with a bias on the choice, groups of experts, a factor on
their weights, a shared expert, dense layers first.

Its class normalises the latent vectors with an epsilon of 1e-6, whatever that of the other norms is.
"""

from typing import Any, ClassVar

from megatron_moe.checkpoint.convert.blocks import Block, rename
from megatron_moe.checkpoint.hf.families import parts
from megatron_moe.checkpoint.hf.families.abilities import Abilities
from megatron_moe.checkpoint.hf.families.base import HfConfig
from megatron_moe.checkpoint.hf.families.biased_choice import BiasedChoice, choice_config, choice_flags
from megatron_moe.checkpoint.hf.families.fields import Fields, common_config, common_flags
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.run import RunConfig

LATENT_EPSILON = 1e-6


class DeepseekV3(BiasedChoice):
    """`DeepseekV3ForCausalLM`."""

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    abilities = Abilities(
        qk_norm=frozenset({True}),
        latent=True,
        dense="first",
        score="sigmoid",
        renormalised=frozenset({False, True}),
        scale=True,
        groups=True,
        bias=True,
        shared=frozenset({"none", "plain"}),
    )
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_interleave": True,
        "attention_bias": False,
        "rope_theta": 10000.0,
    }
    aliases: ClassVar[dict[str, str]] = {"n_routed_experts": "num_local_experts"}

    def reasons(self, run: RunConfig) -> tuple[str, ...]:
        """Everything of the run's model that the class does not compute; empty where it is exact."""
        found, epsilon = super().reasons(run), run.model.norm_epsilon
        if epsilon != LATENT_EPSILON:
            always = f"{self.architecture} normalises latent vectors with {LATENT_EPSILON:g}"
            found += (f"--norm-epsilon {epsilon:g}: {always}",)
        scales = (run.model.mscale, run.model.mscale_all_dim)
        # transformers' _compute_yarn_parameters takes both or none.
        if 0.0 in scales and scales != (1.0, 0.0):
            given = f"--mscale {scales[0]:g} --mscale-all-dim {scales[1]:g}"
            found += (f"{given}: {self.architecture} takes 1 and 0, or none that is 0",)
        return found

    def config(self, run: RunConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        model = run.model
        return {
            **common_config(run),
            **yarn_config(model),
            **choice_config(run),
            "q_lora_rank": model.q_lora_rank,
            "kv_lora_rank": model.kv_lora_rank,
            "qk_nope_head_dim": model.qk_head_dim,
            "qk_rope_head_dim": model.qk_pos_emb_head_dim,
            "v_head_dim": model.v_head_dim,
            "rope_interleave": True,
            "attention_bias": False,
            # Of DeepSeek's own code, which other programs follow.
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
        }

    def flags(self, config: HfConfig) -> dict[str, dict[str, Any]]:
        """The sections that make the same model; layers that predict later tokens are left out."""
        plain, yarn = without_yarn(config)
        fields = Fields({**plain, "head_dim": None}, self.defaults, self.aliases)
        fields.only("attention_bias", False, why="projections down have no biases")
        fields.only("rope_interleave", True, why="rotated channels stand in pairs")
        fields.only("rms_norm_eps", LATENT_EPSILON, why="that of the latent vectors, whatever this says")
        fields.only("num_key_value_heads", None, fields.whole("num_attention_heads"), why="one for each head")
        fields.only("scoring_func", None, "sigmoid", why="the class has no other")
        fields.only("topk_method", None, "noaux_tc", why="the class has no other")
        fields.only("moe_layer_freq", None, 1, why="the class has no other")
        model = common_flags(fields, qk_norm=True) | {
            "multi_latent_attention": True,
            "q_lora_rank": None if fields.get("q_lora_rank") is None else fields.whole("q_lora_rank"),
            "kv_lora_rank": fields.whole("kv_lora_rank"),
            "qk_head_dim": fields.whole("qk_nope_head_dim"),
            "qk_pos_emb_head_dim": fields.whole("qk_rope_head_dim", least=2),
            "v_head_dim": fields.whole("v_head_dim"),
            **yarn,
        }
        for name in ("num_query_groups", "kv_channels"):
            del model[name]
        return {"model": model, "moe": choice_flags(fields)}

    def _attention(self, run: RunConfig, layer: int, theirs: str) -> list[Block]:
        return latent_attention(run, layer, theirs)


def yarn_config(model: ModelConfig) -> dict[str, Any]:
    """What config.json says of frequencies stretched by YaRN, by the names of transformers 5 and by the older ones."""
    if model.rotary_scaling_factor is None:
        return {}
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": model.rotary_scaling_factor}
    scaling |= {name: getattr(model, name) for name in ("original_max_position_embeddings", "beta_fast", "beta_slow")}
    if model.mscale_all_dim:
        scaling |= {"mscale": model.mscale, "mscale_all_dim": model.mscale_all_dim}
    theta = float(model.rotary_base)
    return {"rope_parameters": {**scaling, "rope_theta": theta}, "rope_scaling": {**scaling, "type": "yarn"}}


def without_yarn(config: HfConfig) -> tuple[HfConfig, dict[str, Any]]:
    """The config as if its frequencies were not stretched by YaRN, and the flags that say that they are.

    Raises:
        UserError: they are stretched in a way that no flag says.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name)
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) != "yarn":
        return config, {}
    given = Fields(rope, {"beta_fast": 32, "beta_slow": 1, "truncate": True})
    given.only("truncate", True, None, why="bounds are whole channels")
    given.only("attention_factor", None, why="it follows from factor, mscale and mscale_all_dim")
    flags: dict[str, Any] = {
        "rotary_scaling_factor": given.number("factor"),
        "original_max_position_embeddings": given.whole("original_max_position_embeddings"),
        "beta_fast": given.number("beta_fast"),
        "beta_slow": given.number("beta_slow"),
    }
    if given.get("mscale") or given.get("mscale_all_dim"):
        flags |= {key: given.number(key) for key in ("mscale", "mscale_all_dim")}
    theta = {} if rope.get("rope_theta") is None else {"rope_theta": rope["rope_theta"]}
    kept = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_parameters")}
    other = config.get("rope_parameters")
    if not theta and isinstance(other, dict) and other.get("rope_theta") is not None:
        theta = {"rope_theta": other["rope_theta"]}
    return {**kept, **theta}, flags


def latent_attention(run: RunConfig, layer: int, theirs: str) -> list[Block]:
    """Projections down and up, norms of the latent vectors and the output; heads lie alike on both sides.

    Args:
        run: the model.
        layer: its number from 0.
        theirs: what their names begin with.
    """
    model, ours = run.model, f"{parts.our_layer(layer)}self_attention."
    hidden, heads, rank = model.hidden_size, model.num_attention_heads, model.q_lora_rank
    down = (model.kv_lora_rank + model.qk_pos_emb_head_dim, hidden)
    up = (heads * (model.qk_head_dim + model.v_head_dim), model.kv_lora_rank)
    matrices: dict[str, tuple[str, tuple[int, int]]] = {
        "linear_kv_down_proj": ("kv_a_proj_with_mqa", down),
        "linear_kv_up_proj": ("kv_b_proj", up),
        "linear_proj": ("o_proj", (hidden, heads * model.v_head_dim)),
    }
    blocks = parts.norm(model, f"{ours}kv_layernorm", f"{theirs}kv_a_layernorm", model.kv_lora_rank)
    if rank is None:
        matrices["linear_q_proj"] = ("q_proj", (heads * model.head_dim, hidden))
    else:
        matrices["linear_q_down_proj"] = ("q_a_proj", (rank, hidden))
        matrices["linear_q_up_proj"] = ("q_b_proj", (heads * model.head_dim, rank))
        blocks += parts.norm(model, f"{ours}q_layernorm", f"{theirs}q_a_layernorm", rank)
    for own, (name, shape) in matrices.items():
        blocks += rename(f"{ours}{own}.weight", f"{theirs}{name}.weight", shape)
    return blocks


FAMILY = DeepseekV3()
