"""The class that travels with a checkpoint computes what our model computes, in a fresh process and for every feature;
and comes back as what it was."""

import ast
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_moe.checkpoint.hf.remote.family import AUTO_MAP, CODE_FILES, FAMILY
from megatron_moe.config.model import LATENT_FLAGS, YARN_FLAGS, ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.routing import RoutingConfig
from tests.helpers.hf_parity import TOLERANCE, one_process, real_ids
from tests.helpers.remote_code import (
    CASES,
    DOMAINS,
    Exported,
    OurModel,
    case,
    converted,
    domains_for,
    domains_of_rows,
    export,
    imported,
)
from tests.helpers.tiny import tiny_run

# Loads every folder as anybody does, with nothing of this package, and compares. Run with `python -I`.
FRESH = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
assert not any(name.startswith("megatron") for name in sys.modules)
results = {}
for name, folder in json.loads(sys.argv[1]).items():
    asked = torch.load(f"{folder}/asked.pt")
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    with torch.no_grad():
        logits = model(**asked["inputs"]).logits
    results[name] = {"difference": float((logits - asked["logits"]).abs().max()), "code": type(model).__module__}
    results[name] |= {what: sorted(map(str, found)) for what, found in info.items()}
    # The proof rounds all parameters on both sides.
    results[name]["fp32 but no buffers"] = sorted(asked["fp32"] - dict(model.named_buffers()).keys())
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Exported]]:
    folder = tmp_path_factory.mktemp("remote")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with one_process():
        found = {}
        for number, name in enumerate(CASES):
            found[name] = one = export(case(name), folder / f"model{number}")
            inputs = {"input_ids": real_ids()}
            if one.run.model.num_domains:
                inputs["domain_ids"] = domains_of_rows()
            asked = {"inputs": inputs, "logits": one.logits, "fp32": set(FAMILY.fp32_names(one.run))}
            torch.save(asked, one.folder / "asked.pt")
        yield found
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fresh(exported: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one fresh process says of all folders."""
    folders = {name: str(one.folder) for name, one in exported.items()}
    caches = {"HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, json.dumps(folders)],
        env={**os.environ, **caches},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_computes_the_same(name: str, exported: dict[str, Exported], fresh: dict[str, Any]) -> None:
    """The largest difference measured is 1.1e-05, where logits go up to 8; most cases differ by nothing."""
    found = fresh[name]
    assert found.pop("code").startswith("transformers_modules.")
    assert float(exported[name].logits.std()) > 0.5, "so small that anything would be equal"
    assert found.pop("difference") <= TOLERANCE
    assert not any(found.values()), found


@pytest.mark.parametrize("name", CASES)
def test_comes_back_as_what_it_was(name: str, exported: dict[str, Exported]) -> None:
    one = exported[name]
    run = imported(one.folder)
    assert FAMILY.config(run) == FAMILY.config(one.run)
    ours = converted(FAMILY.blocks(run), "ours", one.theirs)
    again = converted(FAMILY.blocks(run), "theirs", ours)
    assert set(again) == set(one.theirs)
    for tensor in again:
        assert torch.equal(again[tensor], one.theirs[tensor]), tensor
    # Nor does our own model change.
    assert torch.equal(OurModel(run).load(ours).logits(domains_BS=domains_for(run)), one.logits)


def test_tables_travel_as_integers(exported: dict[str, Exported]) -> None:
    for name, shape in (("hash", (259, 2)), ("pangu-sigma", (3, 259, 1))):
        table = exported[name].theirs["model.layers.3.mlp.router.token_map"]
        assert table.dtype == torch.int32
        assert tuple(table.shape) == shape
        assert int(table.max()) > 0


def test_what_decides_on_experts_stays_fp32(exported: dict[str, Exported]) -> None:
    names = FAMILY.fp32_names(exported["sigmoid and bias"].run) | FAMILY.fp32_names(exported["expert choice"].run)
    stored = exported["sigmoid and bias"].theirs.keys() | exported["expert choice"].theirs.keys()
    assert names == {name for name in stored if name.endswith(("expert_bias", "cutoffs"))}
    assert len(names) == 6


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + str(node.module)


def test_the_files_stand_by_themselves(exported: dict[str, Exported]) -> None:
    folder = exported["dense"].folder
    assert {path.name for path in folder.glob("*.py")} == set(CODE_FILES)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} == set(AUTO_MAP)
    for name in CODE_FILES:
        found = list(imported_modules(ast.parse((folder / name).read_text())))
        allowed = {"torch", "transformers", "collections", "inspect", "math", "typing", ""}
        assert {module.split(".")[0] for module in found} <= allowed
        # No other model's class: those change from version to version.
        assert not any(module.startswith("transformers.models") for module in found)


# Flag -> a value that is not the model's below: each must change config.json, or another model would be exported.
EXPRESSED: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 16,
    "max_position_embeddings": 64,
    "position_embedding_type": "none",
    "rotary_base": 500,
    "rotary_percent": 0.5,
    "use_rope_scaling": True,
    "rope_scaling_factor": 2.0,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "swiglu": True,
    "squared_relu": True,
    "gelu_tanh": True,
    "disable_bias_linear": True,
    "add_qkv_bias": True,
    "untie_embeddings_and_output_weights": True,
    "qk_layernorm": True,
    "qk_layernorm_type": "projection",
    "multi_latent_attention": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 8,
    "qk_head_dim": 12,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 12,
    "rotary_scaling_factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 0.5,
    "mscale_all_dim": 0.5,
    "cla_share_factor": 2,
    "num_domains": 4,
    "domain_names": ("a", "b", "c"),
    "domain_embedding": True,
    "vocab_size": 200,
    "num_experts": (8, 4),
    "expert_interval": 4,
    "moe_layer_freq": (0, 1, 1, 1),
    "moe_first_dense_layers": 2,
    "mlp_type": "standard",
    "residual_combine": "add",
    "moe_ffn_hidden_size": 40,
    "use_expert_residual_network": True,
    "expert_residual_layers": 2,
    "router": "base",
    "moe_router_topk": 2,
    "moe_router_score_function": "sigmoid",
    "moe_router_pre_softmax": True,
    "moe_router_topk_scaling_factor": 0.5,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.1,
    "moe_router_enable_expert_bias": True,
    "moe_router_dtype": "fp64",
    "moe_shared_expert_intermediate_size": 24,
    "moe_shared_expert_gate": True,
    "router_margin_scale": 2.0,
    "router_domain_shares": (1, 2, 1),
    "router_embedding_size": 8,
    "router_embedding_shared": False,
    # Of fine-tuning.
    "attention_dropout": 0.2,
    "hidden_dropout": 0.2,
    "moe_expert_dropout": 0.2,
    "init_method_std": 0.1,
}
LATENT = {"position_embedding_type": "rope", "multi_latent_attention": True}
NEEDS: dict[str, dict[str, Any]] = {
    "multi_latent_attention": {"position_embedding_type": "rope"},
    **dict.fromkeys((*LATENT_FLAGS, "rotary_scaling_factor"), LATENT),
    **dict.fromkeys(YARN_FLAGS, LATENT | {"rotary_scaling_factor": 8.0}),
    "rotary_base": {"position_embedding_type": "rope"},
    "rotary_percent": {"position_embedding_type": "rope"},
    "use_rope_scaling": {"position_embedding_type": "rope"},
    "rope_scaling_factor": {"position_embedding_type": "rope", "use_rope_scaling": True},
    "add_qkv_bias": {"disable_bias_linear": True},
    "qk_layernorm_type": {"qk_layernorm": True, "normalization": "RMSNorm"},
    "domain_names": DOMAINS,
    "domain_embedding": DOMAINS,
    "moe_layer_freq": {"expert_interval": 1, "num_experts": (4,)},
    "expert_interval": {"num_experts": (4,)},
    "moe_first_dense_layers": {"num_experts": (4,)},
    "num_layers": {"num_experts": (4,)},
    "expert_residual_layers": {"use_expert_residual_network": True},
    "moe_router_pre_softmax": {"moe_router_topk": 2},
    "moe_router_num_groups": {"moe_router_num_groups": 4, "moe_router_group_topk": 1},
    "moe_router_group_topk": {"moe_router_topk": 2, "moe_router_num_groups": 2, "moe_router_group_topk": 2},
    "moe_router_enable_expert_bias": {"moe_router_score_function": "sigmoid"},
    "moe_shared_expert_intermediate_size": {"mlp_type": "standard"},
    "moe_shared_expert_gate": {"mlp_type": "standard", "moe_shared_expert_intermediate_size": 12},
    "router_margin_scale": {"router": "large-margin", "router_margin_type": "additive"},
    "router_domain_shares": {"router": "random-routed", **DOMAINS},
    "router_embedding_size": {"router": "token-embedding"},
    "router_embedding_shared": {"router": "token-embedding"},
}
# Training, or where and how it is computed: changes nothing of what the model computes outside of training.
WITHOUT_EFFECT = {
    "seq_length",
    "attention_weight_reuse_prob",
    "attention_weight_reuse_span",
    "make_vocab_size_divisible_by",
    "transformer_impl",
    "attention_backend",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_input_jitter_eps",
    "moe_router_noise",
    "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity",
    "moe_min_capacity",
    "moe_token_drop_policy",
    "moe_expert_backend",
    "moe_token_dispatcher_type",
    "moe_domain_grouped",
    "router_margin_type",
    "router_margin",
    "router_margin_target",
    "router_margin_gate",
    "router_margin_beta",
    "router_margin_beta_decay",
    "router_margin_beta_min",
    "router_margin_loss_coeff",
    "router_map",
    "router_token_counts",
    "router_cutoff_decay",
}


@pytest.mark.parametrize("flag", EXPRESSED)
def test_what_changes_the_model_changes_its_config(flag: str) -> None:
    base = {"vocab_size": 259, **NEEDS.get(flag, {})}
    changed = base | {flag: EXPRESSED[flag]}
    assert FAMILY.config(tiny_run(**changed)) != FAMILY.config(tiny_run(**base))


def test_every_flag_is_expressed_or_without_effect() -> None:
    """A new flag belongs into one of the two lists, and if it changes the model, into the class."""
    sections = (ModelConfig, MoEConfig, RoutingConfig)
    assert {field.name for section in sections for field in dataclasses.fields(section)} == (
        EXPRESSED.keys() | WITHOUT_EFFECT
    )
    assert not EXPRESSED.keys() & WITHOUT_EFFECT
