"""Which class holds which model: the choice, its reasons, and what a config.json means when it is read."""

import dataclasses
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_moe.checkpoint.hf.families.abilities import MATTERS, MATTERS_NOT
from megatron_moe.checkpoint.hf.own_flags import KEY, NOT_WRITTEN
from megatron_moe.checkpoint.hf.remote.family import RemoteCode
from megatron_moe.checkpoint.hf.targets import FAMILIES, WITH_EXPERTS, choose_hf_target, family_of, run_of
from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.validate import validate
from tests.helpers.hf_parity import Ours, llama_like, moe_like, one_process
from tests.helpers.tiny import tiny_run

SHARED = {"moe_shared_expert_intermediate_size": 56}
SIGMOID = {"moe_router_score_function": "sigmoid"}
BIAS = {**SIGMOID, "moe_router_enable_expert_bias": True}
MARGIN = {"router": "large-margin"}
ADDITIVE = {**MARGIN, "router_margin_type": "additive"}
CAPACITY = {"moe_expert_capacity_factor": 1.0}
GROUPS = {**SIGMOID, "num_experts": (8,), "moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 2}

CHOICES: dict[str, list[dict[str, Any]]] = {
    "mixtral": [{}, {"kv_channels": 24}, MARGIN, {"moe_expert_capacity_factor": 0.5}],
    "qwen3_moe": [{"qk_layernorm": True}, {"qk_layernorm": True, "moe_router_topk": 1}],
    "granitemoeshared": [SHARED, {"mlp_type": "residual", "residual_combine": "add"}],
    "qwen2_moe": [
        {"moe_router_topk": 1},
        {**SHARED, "moe_router_topk": 1},
        {**SHARED, "kv_channels": 24},
        {**SHARED, "moe_shared_expert_gate": True},
        {"add_qkv_bias": True},
        {"moe_layer_freq": (1, 0)},
        {"mlp_type": "residual", "residual_combine": "add", "moe_router_topk": 1},
        {"router": "recycle", "moe_router_topk": 1, **CAPACITY},
    ],
    "glm4_moe": [SIGMOID, {**BIAS, **SHARED, "rotary_percent": 0.5}, GROUPS, {"router": "base", "moe_router_topk": 1}],
    "olmoe": [{"qk_layernorm": True, "qk_layernorm_type": "projection"}],
    "megatron_moe": [
        {"num_experts": (4, 6)},
        {**SHARED, "qk_layernorm": True},
        {"mlp_type": "residual"},
        {"normalization": "LayerNorm"},
        {"swiglu": False},
        {"position_embedding_type": "none"},
        {"position_embedding_type": "learned_absolute"},
        {"disable_bias_linear": False},
        {"cla_share_factor": 2},
        {"rotary_percent": 0.5},
        {"router": "hash"},
        {"router": "expert-choice"},
        {"router": "token-embedding"},
        {**ADDITIVE, "router_margin_scale": 16.0},
        {"use_expert_residual_network": True},
        {"moe_router_topk_scaling_factor": 2.0, "moe_router_pre_softmax": True},
        {"moe_router_num_groups": 3, "moe_router_group_topk": 1},
        {**GROUPS, "moe_router_topk": 2, "moe_router_group_topk": 2},
        {**SIGMOID, "moe_layer_freq": (1, 0)},
        {**SIGMOID, **SHARED, "moe_shared_expert_gate": True},
        {"num_domains": 2, "domain_embedding": True},
    ],
}


@pytest.mark.parametrize(("kind", "flags"), [(kind, flags) for kind, many in CHOICES.items() for flags in many])
def test_the_first_exact_class_is_chosen_and_comes_back_as_what_it_was(kind: str, flags: dict[str, Any]) -> None:
    run = moe_like(**flags)
    validate(run, 1)
    target = choose_hf_target(run)
    assert target.exact
    assert target.family.model_type == kind
    written = json.loads(json.dumps(target.config(run)))
    back = run_of(written)
    assert (back.model, back.moe, back.routing) == (run.model, run.moe, run.routing)
    # As anyone's: perhaps with other flags, but the same class holds it exactly.
    anyones = run_of(written, own=False)
    assert family_of(written) is target.family
    assert target.family.why_not(anyones) is None
    assert target.family.flags(target.family.config(anyones)) == target.family.flags(written)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("llama", {}),
        ("qwen2", {"add_qkv_bias": True}),
        ("qwen3", {"qk_layernorm": True}),
        ("megatron_moe", {"cla_share_factor": 2}),
    ],
)
def test_dense_models_have_dense_classes(kind: str, flags: dict[str, Any]) -> None:
    target = choose_hf_target(llama_like(**flags))
    assert target.family.model_type == kind
    assert not any("Moe" in name or "Mixtral" in name for name in target.others)


def test_the_reasons_of_all_classes_before_are_told() -> None:
    target = choose_hf_target(moe_like(moe_router_topk=1, num_experts=(4, 6)))
    assert list(target.others) == [family.architecture for family in WITH_EXPERTS]
    assert target.lines[0] == (
        "not MixtralForCausalLM: --num-experts 4 6: MixtralForCausalLM has as many experts in every layer; "
        "--moe-router-topk 1: in MixtralForCausalLM the weight of a token's only expert is 1"
    )
    assert target.lines[-1] == "MegatronMoeForCausalLM (megatron_moe): exact"


def test_a_model_that_no_class_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    latent = moe_like(num_query_groups=None, multi_latent_attention=True)
    assert choose_hf_target(latent).family.model_type == "megatron_moe"
    monkeypatch.setattr(RemoteCode, "reasons", lambda self, run: ("--some-flag: it has none",))
    with pytest.raises(ConfigError, match=r"^no class holds this model: --some-flag: it has none; nearest: "):
        choose_hf_target(latent)


# ---- a target that was asked for


def test_an_exact_target_is_taken() -> None:
    assert choose_hf_target(moe_like(), "qwen2_moe").exact
    assert choose_hf_target(moe_like(), "megatron_moe").family.model_type == "megatron_moe"


def test_a_target_that_computes_something_else_needs_leave() -> None:
    run = moe_like(moe_router_topk=1)
    with pytest.raises(
        ConfigError, match=r"^--target mixtral: does not compute .* only expert is 1; take qwen2_moe, or"
    ):
        choose_hf_target(run, "mixtral")
    target = choose_hf_target(run, "mixtral", allow_lossy=True)
    assert not target.exact
    assert target.losses == ("--moe-router-topk 1: in MixtralForCausalLM the weight of a token's only expert is 1",)
    assert "NOT exact" in target.lines[-1]
    # What comes back is what it has become, not what it was.
    assert KEY not in target.config(run)


@pytest.mark.parametrize(
    "flags",
    [
        SHARED,
        BIAS,
        {"qk_layernorm": True},
        {"num_experts": (4, 6)},
        {"normalization": "LayerNorm"},
        {"swiglu": False},
        {"position_embedding_type": "learned_absolute"},
        {"router": "hash"},
        {"moe_layer_freq": (1, 0)},
        {"mlp_type": "residual"},
    ],
)
def test_weights_that_have_no_place_cannot_be_forced(flags: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"^--target mixtral: has no place for the weights: --|no place.*dense|no place.*G"
    ):
        choose_hf_target(moe_like(**flags), "mixtral", allow_lossy=True)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--target mistral7b: unknown; there are mixtral, qwen3_moe"):
        choose_hf_target(moe_like(), "mistral7b")


# ---- every flag is thought of


@pytest.mark.parametrize("section", MATTERS, ids=lambda section: section.__name__)
def test_every_flag_is_in_one_of_the_lists(section: type) -> None:
    """A new flag must be put into `abilities.MATTERS`, and be looked at, or into `MATTERS_NOT`, with the reason."""
    fields = [field.name for field in dataclasses.fields(section)]
    assert sorted([*MATTERS[section], *MATTERS_NOT[section]]) == sorted(fields)


# What DeepSeek-V3's class computes.
DEEPSEEK: dict[str, Any] = {
    "num_query_groups": None,
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "norm_epsilon": 1e-6,
    "moe_router_score_function": "sigmoid",
}
MATTERING: dict[str, dict[str, Any]] = {
    "num_layers": {"num_layers": 3},
    "hidden_size": {"hidden_size": 128},
    "ffn_hidden_size": {"ffn_hidden_size": 96, "moe_layer_freq": (0, 1)},
    "num_attention_heads": {"num_attention_heads": 8},
    "num_query_groups": {"num_query_groups": 4},
    "kv_channels": {"kv_channels": 24},
    "max_position_embeddings": {"max_position_embeddings": 500},
    "position_embedding_type": {"position_embedding_type": "none"},
    "rotary_base": {"rotary_base": 20000},
    "rotary_percent": {"rotary_percent": 0.5},
    "use_rope_scaling": {"use_rope_scaling": True},
    "rope_scaling_factor": {"use_rope_scaling": True, "rope_scaling_factor": 4.0},
    "normalization": {"normalization": "LayerNorm"},
    "norm_epsilon": {"norm_epsilon": 1e-6},
    "swiglu": {"swiglu": False},
    "squared_relu": {"swiglu": False, "squared_relu": True},
    "gelu_tanh": {"swiglu": False, "gelu_tanh": True},
    "disable_bias_linear": {"disable_bias_linear": False},
    "add_qkv_bias": {"add_qkv_bias": True},
    "untie_embeddings_and_output_weights": {"untie_embeddings_and_output_weights": False},
    "qk_layernorm": {"qk_layernorm": True},
    "qk_layernorm_type": {"qk_layernorm": True, "qk_layernorm_type": "projection"},
    "multi_latent_attention": {"num_query_groups": None, "multi_latent_attention": True},
    "q_lora_rank": {"num_query_groups": None, "multi_latent_attention": True, "q_lora_rank": 24},
    "kv_lora_rank": {"num_query_groups": None, "multi_latent_attention": True, "kv_lora_rank": 24},
    "qk_head_dim": {"num_query_groups": None, "multi_latent_attention": True, "qk_head_dim": 24},
    "qk_pos_emb_head_dim": {"num_query_groups": None, "multi_latent_attention": True, "qk_pos_emb_head_dim": 8},
    "v_head_dim": {"num_query_groups": None, "multi_latent_attention": True, "v_head_dim": 24},
    **{
        flag: DEEPSEEK | {"rotary_scaling_factor": 8.0, "mscale": 1.1, "mscale_all_dim": 0.9, flag: value}
        for flag, value in {
            "rotary_scaling_factor": 4.0,
            "original_max_position_embeddings": 100,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.8,
            "mscale_all_dim": 0.7,
        }.items()
    },
    "cla_share_factor": {"cla_share_factor": 2},
    "domain_embedding": {"num_domains": 2, "domain_embedding": True},
    "vocab_size": {"vocab_size": 300},
    "num_experts": {"num_experts": (5,)},
    "expert_interval": {"expert_interval": 2},
    "moe_layer_freq": {"moe_layer_freq": (1, 0)},
    "moe_first_dense_layers": {"moe_first_dense_layers": 1},
    "mlp_type": {"mlp_type": "residual"},
    "residual_combine": {"mlp_type": "residual", "residual_combine": "add"},
    "moe_ffn_hidden_size": {"moe_ffn_hidden_size": 72},
    "use_expert_residual_network": {"use_expert_residual_network": True},
    "expert_residual_layers": {"use_expert_residual_network": True, "expert_residual_layers": 3},
    "router": {"router": "hash"},
    "moe_router_topk": {"moe_router_topk": 3},
    "moe_router_score_function": SIGMOID,
    "moe_router_pre_softmax": {"moe_router_pre_softmax": True},
    "moe_router_topk_scaling_factor": {**SIGMOID, "moe_router_topk_scaling_factor": 2.0},
    "moe_router_num_groups": {**SIGMOID, "moe_router_num_groups": 3, "moe_router_group_topk": 1},
    "moe_router_group_topk": {**SIGMOID, "moe_router_num_groups": 3, "moe_router_group_topk": 2},
    "moe_router_load_balancing_type": {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0},
    "moe_router_enable_expert_bias": BIAS,
    "moe_shared_expert_intermediate_size": SHARED,
    "moe_shared_expert_gate": {**SHARED, "moe_shared_expert_gate": True},
    "router_margin_scale": {**ADDITIVE, "router_margin_scale": 16.0},
}
"""Flag that matters -> flags that differ in it, and in what it needs, from `moe_like()`."""


def test_every_flag_that_matters_is_tried() -> None:
    assert set(MATTERING) == set().union(*MATTERS.values())


@pytest.mark.parametrize("flag", MATTERING)
def test_a_flag_that_matters_is_refused_or_written(flag: str) -> None:
    """No class takes a model for another one: with a flag changed it is refused, or told of in config.json or in the
    map of the weights."""
    flags = MATTERING[flag]
    changed = moe_like(**flags)
    validate(changed, 1)
    section = next(name for name in ("model", "moe", "routing") if flag in vars(getattr(changed, name)))
    value = getattr(getattr(moe_like(), section), flag)
    assert getattr(getattr(changed, section), flag) != value
    # What the flag needs is on in both.
    others = {name: other for name, other in flags.items() if name != flag}
    try:
        base = moe_like(**others)
        validate(base, 1)
    except ConfigError:
        base = moe_like()
    for family in FAMILIES:
        if family.why_not(base) is None and family.why_not(changed) is None:
            same = family.config(base) == family.config(changed) and family.blocks(base) == family.blocks(changed)
            assert not same, f"{family.architecture} cannot tell {flag}"


UNIMPORTANT: dict[str, dict[str, Any]] = {
    "seq_length": {"seq_length": 40, "max_position_embeddings": 48},
    "attention_weight_reuse_prob": {"attention_weight_reuse_prob": 0.5},
    "attention_weight_reuse_span": {"attention_weight_reuse_prob": 0.5, "attention_weight_reuse_span": 2},
    "attention_dropout": {"attention_dropout": 0.3},
    "hidden_dropout": {"hidden_dropout": 0.3},
    "init_method_std": {"init_method_std": 0.01},
    "attention_backend": {"attention_backend": "unfused"},
    "moe_expert_dropout": {"moe_expert_dropout": 0.3},
    "moe_aux_loss_coeff": {"moe_aux_loss_coeff": 0.5},
    "moe_z_loss_coeff": {"moe_z_loss_coeff": 0.5},
    "moe_router_dtype": {"moe_router_dtype": "fp64"},
    "moe_input_jitter_eps": {"moe_input_jitter_eps": 0.3},
    "moe_router_noise": {"moe_router_noise": "rsample"},
    "moe_expert_capacity_factor": {"moe_expert_capacity_factor": 0.3},
    "moe_pad_expert_input_to_capacity": {**CAPACITY, "moe_pad_expert_input_to_capacity": True},
    "moe_min_capacity": {**CAPACITY, "moe_min_capacity": 4},
    "moe_token_drop_policy": {**CAPACITY, "moe_token_drop_policy": "position"},
    "moe_expert_backend": {"moe_expert_backend": "sequential"},
    "moe_token_dispatcher_type": {"moe_token_dispatcher_type": "allgather"},
    "router_margin_type": {**MARGIN, "router_margin_type": "elsayed"},
    "router_margin": {**MARGIN, "router_margin": 4.0},
    "router_margin_target": {**MARGIN, "router_margin_target": "self"},
    "router_margin_gate": {**MARGIN, "router_margin_gate": True},
    "router_margin_beta": {**MARGIN, "router_margin_beta": 0.0},
    "router_margin_beta_decay": {**MARGIN, "router_margin_beta_decay": 0.5},
    "router_margin_beta_min": {**MARGIN, "router_margin_beta_min": 5.0},
    "router_margin_loss_coeff": {**MARGIN, "router_margin_type": "elsayed", "router_margin_loss_coeff": 0.5},
}
"""Flag that does not matter -> flags that differ in it."""
REFUSED_WITH = {
    # These belong to routers and embeddings that are refused as a whole.
    "num_domains",
    "domain_names",
    "router_map",
    "router_token_counts",
    "router_domain_shares",
    "router_embedding_size",
    "router_embedding_shared",
    "router_cutoff_decay",
    "moe_domain_grouped",
    # A GPU's, and a bias whose values are weights.
    "transformer_impl",
    "moe_router_bias_update_rate",
    # Rows that only pad: another shape, tested by the vocabulary of all runs here.
    "make_vocab_size_divisible_by",
}


@pytest.fixture(scope="module")
def reference() -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Weights of `moe_like()`, and its logits."""
    with one_process():
        model = Ours(moe_like()).randomise()
        yield model.tensors(), model.logits()


def test_every_flag_that_does_not_matter_is_tried() -> None:
    assert {*UNIMPORTANT, *REFUSED_WITH} == set().union(*MATTERS_NOT.values())


@pytest.mark.parametrize("flag", UNIMPORTANT)
def test_a_flag_that_does_not_matter_changes_no_logit(
    flag: str, reference: tuple[dict[str, torch.Tensor], torch.Tensor]
) -> None:
    weights, logits = reference
    changed = moe_like(**UNIMPORTANT[flag])
    sections = [getattr(changed, name) for name in ("model", "moe", "routing")]
    defaults = [getattr(moe_like(), name) for name in ("model", "moe", "routing")]
    assert any(
        getattr(one, flag, None) != getattr(other, flag, None) for one, other in zip(sections, defaults, strict=True)
    )
    model = Ours(changed)
    own = {name: tensor for name, tensor in model.tensors().items() if name.endswith("margin_beta")}
    assert (model.load(weights | own).logits() - logits).abs().max() <= 2e-5
    target = choose_hf_target(changed)
    assert target.family.model_type == "mixtral"
    same = {"initializer_range": 0.02}
    assert target.family.config(changed) | same == choose_hf_target(moe_like()).family.config(moe_like()) | same


# ---- reading


def written(**flags: Any) -> dict[str, Any]:
    """config.json of a run of ours."""
    run = moe_like(**flags)
    return choose_hf_target(run).config(run)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config.json: model_type None: is not read; there are mixtral, "),
        ({"model_type": "dbrx"}, "config.json: model_type dbrx: is not read; there are mixtral, "),
        (
            {"model_type": "mixtral", "architectures": ["MixtralForSequenceClassification"]},
            "config.json: architectures MixtralForSequenceClassification: must be MixtralForCausalLM",
        ),
    ],
)
def test_what_is_not_read_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        run_of(config)
    assert str(error.value).startswith(message)


def test_fields_that_contradict_our_own_flags_are_refused() -> None:
    config = written() | {"rms_norm_eps": 1e-3}
    with pytest.raises(
        UserError, match=r"megatron_moe says something else .* model.norm_epsilon 0.001 instead of 1e-05"
    ):
        run_of(config)
    assert run_of(config, own=False).model.norm_epsilon == 1e-3


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ([], "must be a mapping"),
        ({"modl": {}}, "megatron_moe.modl: unknown"),
        ({"model": {"num_layer": 2}}, "num_layer: unknown key; did you mean num_layers"),
        ({"model": {"num_layers": "2"}}, "num_layers: 2: must be an integer"),
        ({"model": {"num_layers": 0}}, "makes no model: --num-layers 0: must be at least 1"),
        ({"moe": {"num_experts": [4, 4, 4]}}, "makes no model: --num-experts 4 4 4"),
    ],
)
def test_own_flags_of_another_kind_are_refused(own: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_of(written() | {KEY: own})


def test_own_flags_say_nothing_of_the_machine() -> None:
    run = moe_like(moe_expert_backend="sequential", attention_backend="unfused", moe_token_dispatcher_type="allgather")
    text = json.dumps(choose_hf_target(run).config(run))
    assert not any(name in text for name in NOT_WRITTEN)
    assert "sequential" not in text


def test_the_pyramid_comes_back_as_what_it_was() -> None:
    run = tiny_run(vocab_size=100)
    target = choose_hf_target(run)
    assert target.family.model_type == "megatron_moe"
    back = run_of(json.loads(json.dumps(target.config(run))))
    assert (back.model, back.moe, back.routing) == (run.model, run.moe, run.routing)


VALUES: dict[str, list[Any]] = {
    "num_layers": [2, 3],
    "kv_channels": [None, 24],
    "position_embedding_type": ["rope", "rope", "rope", "none"],
    "rotary_percent": [1.0, 1.0, 0.5],
    "normalization": ["RMSNorm", "RMSNorm", "RMSNorm", "LayerNorm"],
    "disable_bias_linear": [True, True, True, False],
    "add_qkv_bias": [False, False, True],
    "qk_layernorm": [False, True],
    "untie_embeddings_and_output_weights": [False, True],
    "num_experts": [(6,), (8,), (2,)],
    "moe_first_dense_layers": [0, 0, 1],
    "mlp_type": ["standard", "standard", "residual"],
    "residual_combine": ["softmax", "add"],
    "router": ["topk", "topk", "topk", "large-margin", "base", "hash", "recycle"],
    "moe_router_topk": [1, 2, 2, 4],
    "moe_router_score_function": ["softmax", "sigmoid"],
    "moe_router_pre_softmax": [None, True],
    "moe_router_topk_scaling_factor": [None, None, 2.0],
    "moe_router_num_groups": [None, None, 2],
    "moe_router_group_topk": [None, None, 1, 2],
    "moe_router_enable_expert_bias": [False, True],
    "moe_router_load_balancing_type": ["aux_loss", "aux_loss", "sinkhorn"],
    "moe_aux_loss_coeff": [0.01, 0.0],
    "moe_expert_capacity_factor": [None, 1.0],
    "moe_shared_expert_intermediate_size": [None, None, 56],
    "moe_shared_expert_gate": [False, True],
}


def legal_runs(count: int) -> Iterator[RunConfig]:
    """Models with flags drawn at random, of those that fit each other."""
    rng = random.Random(7)
    while count:
        try:
            # Few at once differ from the base, or next to nothing would fit.
            names = rng.sample(sorted(VALUES), rng.randint(1, 8))
            run = moe_like(**{name: rng.choice(VALUES[name]) for name in names})
            validate(run, 1)
        except ConfigError:
            continue
        count -= 1
        yield run


def test_any_model_has_a_class_and_comes_back() -> None:
    seen = set()
    for run in legal_runs(400):
        target = choose_hf_target(run)
        config = json.loads(json.dumps(target.config(run)))
        back = run_of(config)
        assert (back.model, back.moe, back.routing) == (run.model, run.moe, run.routing)
        anyones = run_of(config, own=False)
        assert target.family.why_not(anyones) is None
        assert {block.theirs.name for block in target.family.blocks(anyones) if block.theirs} == {
            block.theirs.name for block in target.family.blocks(run) if block.theirs
        }
        seen.add(target.family.model_type)
    assert seen >= {family.model_type for family in WITH_EXPERTS} - {"olmoe", "deepseek_v3"}
