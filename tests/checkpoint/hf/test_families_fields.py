"""Fields of config.json: all are read, refused or known not to matter; older spellings; errors of one line."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint.hf.families import gpt2
from megatron_moe.checkpoint.hf.families.base import Family
from megatron_moe.checkpoint.hf.families.fields import NOT_READ
from megatron_moe.checkpoint.hf.families.native import names_in_files
from megatron_moe.checkpoint.hf.targets import WITH_EXPERTS, choose_hf_target, run_of
from megatron_moe.config.base import UserError
from tests.checkpoint.hf.test_families import their_config
from tests.helpers.hf_parity import moe_like

FAMILIES: dict[str, Family] = {family.model_type: family for family in WITH_EXPERTS[:5]}


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    """A whole config.json of a tiny model of a class."""
    config = json.loads(their_config(kind).to_json_string(use_diff=False))
    return {name: value for name, value in (config | changes).items() if value != "left out"}


class Recording(Mapping[str, Any]):
    """A mapping that remembers which keys were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values_, self.asked = values, set[str]()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self.values_[key]

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return key in self.values_

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_field_of_the_class_is_thought_of(kind: str) -> None:
    """A field that a new version of the class brings must be read, refused, or put among those that do not matter."""
    from transformers import PreTrainedConfig

    config = Recording(config_of(kind))
    FAMILIES[kind].flags(config)
    # How wide a window is, and where it begins, matters where there is one.
    windows = {"sliding_window", "max_window_layers"}
    left = set(config) - config.asked - NOT_READ - set(PreTrainedConfig().to_dict()) - windows
    assert not left, f"{kind}: not looked at: {sorted(left)}"


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ALL_EXPERTS = "or the only expert's weight is 1"

REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok 1: must be a whole number of at least 2"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act gelu: must be silu or swish (--swiglu"),
    ("mixtral", {"sliding_window": 64}, "sliding_window 64: must be null, or not less than max_position_embeddings"),
    ("mixtral", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.rope_type yarn: must"),
    ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type linear: must be default"),
    ("mixtral", {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}, "rope_scaling.low_freq_factor 2.0: must be 1, as"),
    ("mixtral", {"rope_scaling": LLAMA3 | {"factor": 0.5}}, "rope_scaling.factor 0.5: must be a number of at least 1"),
    ("mixtral", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one mapping for all layers"),
    ("mixtral", {"rope_parameters": {"rope_theta": 12345.6}}, "rope_theta 12345.6: must be a whole number"),
    (
        "mixtral",
        {"quantization_config": {"quant_method": "fp8"}},
        "quantization_config {'quant_method': 'fp8'}: must be",
    ),
    ("mixtral", {"per_layer_config": {"1": {"num_local_experts": 2}}}, "layers with sizes of their own are not read"),
    ("mixtral", {"hidden_size": "64"}, "hidden_size 64: must be a whole number of at least 1"),
    ("mixtral", {"hidden_size": True}, "hidden_size true: must be a whole number of at least 1"),
    ("mixtral", {"num_hidden_layers": 0}, "num_hidden_layers 0: must be a whole number of at least 1"),
    ("mixtral", {"rms_norm_eps": float("nan")}, "rms_norm_eps nan: must be a number greater than 0"),
    ("mixtral", {"tie_word_embeddings": "no"}, "tie_word_embeddings no: must be true or false"),
    ("mixtral", {"num_attention_heads": 7, "num_key_value_heads": 7}, "hidden_size 64: must be a multiple of num_att"),
    ("mixtral", {"num_key_value_heads": 3}, "makes no model: --num-query-groups 3: must divide"),
    ("mixtral", {"num_local_experts": 1}, "makes no model: --moe-router-topk 2: must be at most the smallest"),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window 64: must be null, or not less"),
    ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention"]}, "full_attention in every layer"),
    ("qwen2_moe", {"norm_topk_prob": True, "num_experts_per_tok": 1}, ALL_EXPERTS),
    ("qwen2_moe", {"mlp_only_layers": [0, 1]}, "mlp_only_layers [0, 1]: must be fewer: no layer has experts"),
    ("qwen2_moe", {"mlp_only_layers": [2]}, "mlp_only_layers [2]: must be a list of layers from 0 to 1"),
    ("qwen2_moe", {"num_experts": 0}, "num_experts 0: must be a whole number of at least 1"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size 0: must be a whole"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias true: must be false (queries, keys and values may"),
    ("qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 1}, ALL_EXPERTS),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window 64: must be null"),
    ("granitemoeshared", {"embedding_multiplier": 12.0}, "embedding_multiplier 12.0: must be 1 or 1.0 (there is no"),
    ("granitemoeshared", {"logits_scaling": 6.0}, "logits_scaling 6.0: must be 1"),
    ("granitemoeshared", {"residual_multiplier": 0.22}, "residual_multiplier 0.22: must be 1"),
    ("granitemoeshared", {"attention_multiplier": 0.0156}, "attention_multiplier 0.0156: must be 0.25, 1 / sqrt"),
    ("granitemoeshared", {"attention_multiplier": "left out"}, "attention_multiplier 1.0: must be 0.25"),
    ("granitemoeshared", {"num_experts_per_tok": 1}, "num_experts_per_tok 1: must be a whole number of at least 2"),
    ("granitemoeshared", {"attention_bias": True}, "attention_bias true: must be false"),
    ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob false: must be true: sigmoid weights of several experts"),
    ("glm4_moe", {"num_experts_per_tok": 1}, ALL_EXPERTS),
    ("glm4_moe", {"n_group": 4, "topk_group": 2}, "topk_group 2: must be num_experts_per_tok 2 / 2"),
    ("glm4_moe", {"n_group": 2, "topk_group": 4}, "topk_group 4: must be at most n_group 2"),
    ("glm4_moe", {"first_k_dense_replace": 2}, "first_k_dense_replace 2: must be less than num_hidden_layers 2"),
    ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts 0: must be a whole number of at least 1"),
    (
        "glm4_moe",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.0}},
        "partial_rotary_factor 0.0: m",
    ),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSALS)
def test_what_has_no_flag_is_refused_in_one_line(kind: str, changes: dict[str, Any], message: str) -> None:
    assert run_of(config_of(kind))
    with pytest.raises(UserError) as error:
        run_of(config_of(kind, **changes))
    assert str(error.value).startswith("config.json: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "older", "flag", "value"),
    [
        ("mixtral", {"rope_parameters": "left out", "rope_theta": 5e5}, "rotary_base", 500000),
        ("mixtral", {"rope_parameters": "left out"}, "rotary_base", 1000000),
        ("qwen3_moe", {"rope_parameters": "left out", "rope_scaling": None}, "rotary_base", 10000),
        ("mixtral", {"rope_scaling": LLAMA3 | {"rope_theta": 7.0}}, "rope_scaling_factor", 8.0),
        ("mixtral", {"rope_scaling": LLAMA3 | {"rope_theta": 7.0}}, "rotary_base", 7),
        ("mixtral", {"num_key_value_heads": None}, "num_query_groups", 4),
        ("mixtral", {"head_dim": None}, "kv_channels", 16),
        ("mixtral", {"sliding_window": 128}, "num_layers", 2),
        ("glm4_moe", {"rope_parameters": "left out"}, "rotary_percent", 0.5),
        ("glm4_moe", {"rope_parameters": {"rope_theta": 1e4}, "partial_rotary_factor": 1.0}, "rotary_percent", 1.0),
    ],
)
def test_older_spellings_and_nulls_are_read(kind: str, older: dict[str, Any], flag: str, value: Any) -> None:
    assert getattr(run_of(config_of(kind, **older)).model, flag) == value


def test_experts_are_counted_under_either_name() -> None:
    for name, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        config = config_of("qwen3_moe", **{other: "left out", name: 7})
        assert run_of(config).moe.num_experts == (7,)


ROPES = [
    {},
    {"rotary_base": 500000},
    {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "max_position_embeddings": 20000},
    {"moe_router_score_function": "sigmoid", "rotary_percent": 0.5},
    {"moe_router_score_function": "sigmoid"},
]


@pytest.mark.parametrize("flags", ROPES)
def test_transformers_reads_new_and_old_names_as_the_same(
    flags: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both spellings are written; either alone, and both together, make the same rotation, without a word."""
    from transformers import AutoConfig
    from transformers import logging as transformers_logging

    transformers_logging.enable_propagation()
    run = moe_like(**flags)
    config = choose_hf_target(run).config(run)
    older = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
    found = []
    for part, left in enumerate([set(), older, {"rope_parameters"}]):
        folder = tmp_path / str(part)
        folder.mkdir()
        chosen = {name: value for name, value in config.items() if name not in left}
        (folder / "config.json").write_text(json.dumps(chosen))
        with caplog.at_level(logging.WARNING):
            found.append(AutoConfig.from_pretrained(folder).rope_parameters)
    assert not [record.getMessage() for record in caplog.records]
    first = {
        "rope_theta": float(run.model.rotary_base),
        "rope_type": "llama3" if "use_rope_scaling" in flags else "default",
    }
    assert found[0].items() >= first.items()
    assert found[0].get("partial_rotary_factor", 1.0) == run.model.rotary_percent
    assert found[1] == found[0]
    assert found[2] == found[0]
    saved = AutoConfig.from_pretrained(tmp_path / "0")
    saved.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    back = run_of(again)
    assert (back.model, back.moe) == (run.model, run.moe)


PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    # To the last one: half of `total_size` in the index of its safetensors files, which are bf16.
    "Mixtral-8x7B": (
        "46.702792704",
        {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        },
    ),
    "Qwen1.5-MoE-A2.7B": (
        "14.3",
        {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "decoder_sparse_step": 1,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 8192,
            "max_window_layers": 21,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "Qwen3-30B-A3B": (
        "30.5",
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "GLM-4.5-Air": (
        "106",
        {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "attention_bias": True,
            "eos_token_id": [151329, 151336],
            "first_k_dense_replace": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "max_position_embeddings": 131072,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 96,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 46,
            "num_key_value_heads": 8,
            "num_nextn_predict_layers": 1,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "routed_scaling_factor": 1.0,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "use_qk_norm": False,
            "vocab_size": 151552,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_and_have_as_many_weights_as_is_said(name: str) -> None:
    """Their config.json as older versions of transformers wrote it, and the billions of parameters that are
    published."""
    said, config = PUBLISHED[name]
    run = run_of(config)
    target = choose_hf_target(run)
    assert target.family.model_type == config["model_type"]
    weights = sum(block.theirs.numel for block in target.family.blocks(run) if block.theirs)
    assert str(weights / 1e9).startswith(said)


def test_what_the_class_does_not_read_is_left_out() -> None:
    """Layers that predict later tokens, buffers of older versions, and a copy of the embedding in a tied model."""
    family = FAMILIES["glm4_moe"]
    run = run_of(config_of("glm4_moe", tie_word_embeddings=True))
    wanted = {block.theirs.name for block in family.blocks(run) if block.theirs}
    extra = {
        "model.layers.2.mlp.gate.weight",
        "model.layers.2.eh_proj.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "lm_head.weight",
    }
    assert set(names_in_files(family, run, wanted | extra)) == wanted
    # A layer of the model itself, which config.json counts one too few of, is not.
    deeper = "model.layers.3.mlp.gate.weight"
    assert set(names_in_files(family, run, wanted | extra | {deeper})) == {*wanted, deeper}
    mixtral = FAMILIES["mixtral"]
    run = run_of(config_of("mixtral"))
    later = "model.layers.2.block_sparse_moe.gate.weight"
    assert set(names_in_files(mixtral, run, [later, "lm_head.weight"])) == {later, "lm_head.weight"}


def test_a_weight_under_two_names_is_refused() -> None:
    run = run_of({"model_type": "gpt2"})
    with pytest.raises(UserError, match=r"wte.weight: is transformer.wte.weight a second time"):
        names_in_files(gpt2.FAMILY, run, ["transformer.wte.weight", "wte.weight"])


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("mixtral", "rope_theta", float("nan")),
        ("mixtral", "rope_theta", float("inf")),
        ("mixtral", "architectures", 5),
        ("qwen3_moe", "num_hidden_layers", 10**12),
        ("qwen2_moe", "layer_types", 5),
        ("megatron_moe", "num_hidden_layers", 10**12),
        ("megatron_moe", "domain_names", 5),
        ("megatron_moe", "attention_dropout", "much"),
        ("megatron_moe", "routed_scaling_factor", "much"),
        ("megatron_moe", "n_group", [2]),
        ("megatron_moe", "router_aux_loss_coef", "much"),
    ],
)
def test_a_value_of_another_kind_is_one_line(kind: str, field: str, value: Any) -> None:
    ours = {"model_type": kind, "experts_per_layer": [4] * 4}
    # There rope_theta would stand a second time.
    config = ours if kind == "megatron_moe" else config_of(kind, rope_parameters="left out")
    with pytest.raises(UserError, match=rf"config.json: {field} .*must be ") as caught:
        run_of({**config, field: value})
    assert len(str(caught.value).splitlines()) == 1
