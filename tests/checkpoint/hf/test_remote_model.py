"""The class that travels with a checkpoint, as users of transformers work with it: generation, loading, fine-tuning."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe.checkpoint.hf.remote.configuration_megatron_moe import MegatronMoeConfig
from megatron_moe.checkpoint.hf.remote.family import AUTO_MAP, CODE_FILES, FAMILY, copy_code
from megatron_moe.config.base import UserError
from tests.helpers.hf_parity import one_process, real_ids
from tests.helpers.remote_code import CASES, Exported, OurModel, case, export, load, our_greedy

type Get = Callable[[str], Exported]
# One of every kind of attention, router and position.
KINDS = (
    "pyramid residual",
    "hunyuan-large",
    "projection norm, shared",
    "norm and gated shared expert",
    "pangu-sigma",
    "token embedding",
    "expert choice",
    "sinkhorn, squared relu",
    "latent pyramid",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Get]:
    """A case's random model and folder, made when it is first asked for."""
    import transformers.dynamic_module_utils as modules

    root, found = tmp_path_factory.mktemp("remote"), dict[str, Exported]()

    def get(name: str) -> Exported:
        if name not in found:
            found[name] = export(case(name), root / f"model{len(found)}")
        return found[name]

    # Code is copied there before it is imported: not into the home folder of whoever runs the tests.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, one_process():
        patch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield get
    torch.set_num_threads(threads)


def domains(one: Exported) -> dict[str, torch.Tensor]:
    return {"domain_ids": torch.tensor([1, 2])} if one.run.model.num_domains else {}


# ---- generation


@pytest.mark.parametrize("name", CASES)
def test_greedy_text_is_ours(name: str, exported: Get) -> None:
    """With a cache, without one, with one of fixed size, and behind padding: the tokens that our generation adds."""
    one, count = exported(name), 10
    ids = real_ids()[:, :12]
    asked = domains(one)
    rows = asked["domain_ids"].tolist() if asked else None
    expected = our_greedy(OurModel(one.run).load(one.ours), ids.tolist(), count, rows)
    model = load(one.folder)
    padding = torch.zeros(2, 3, dtype=torch.long)
    padded = torch.cat((padding, ids), dim=1)
    mask = torch.cat((padding, torch.ones_like(ids)), dim=1)
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, **asked}
    ways = {
        "cache": model.generate(ids, **options),
        "no cache": model.generate(ids, use_cache=False, **options),
        "static cache": model.generate(ids, cache_implementation="static", **options),
        "padded": model.generate(padded, attention_mask=mask, **options),
        "padded, static": model.generate(padded, attention_mask=mask, cache_implementation="static", **options),
    }
    for way, tokens in ways.items():
        assert torch.equal(tokens[:, -count:], expected), way


def test_domains_may_differ_by_token_and_last(exported: Get) -> None:
    one = exported("pangu-sigma")
    model, ids = load(one.folder), real_ids()[:, :9]
    by_token = torch.tensor([[0] * 4 + [2] * 5, [1] * 9])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = ids
    for _ in range(6):
        longer = torch.cat((by_token, by_token[:, -1:].expand(-1, expected.shape[1] - 9)), dim=1)
        expected = torch.cat((expected, model(expected, domain_ids=longer).logits[:, -1:].argmax(-1)), dim=1)
    for cached in (True, False):
        assert torch.equal(model.generate(ids, domain_ids=by_token, use_cache=cached, **options), expected)
    logits = [model(ids, domain_ids=torch.tensor(rows)).logits for rows in ([0, 0], [[0], [0]], [1, 1])]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    with pytest.raises(ValueError, match=r"3 domains apart.*news, novel, forum"):
        model(ids)


def test_beams(exported: Get) -> None:
    """Beam search reorders the cache, of which layers without keys have no part."""
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    for name in ("hunyuan-large", "pangu-sigma"):
        one = exported(name)
        model, ids = load(one.folder), real_ids()[:, :8]
        asked = options | domains(one)
        assert torch.equal(model.generate(ids, **asked), model.generate(ids, use_cache=False, **asked))


def test_only_layers_with_keys_fill_the_cache(exported: Get) -> None:
    model = load(exported("hunyuan-large").folder)
    cache = model(real_ids()).past_key_values
    lengths = [cache.get_seq_length(layer) for layer in range(4)]
    assert lengths == [real_ids().shape[1], 0, real_ids().shape[1], 0]


def test_text_goes_in_piece_by_piece(exported: Get) -> None:
    for name in ("hunyuan-large", "pyramid residual"):
        one = exported(name)
        model, ids = load(one.folder), real_ids()
        first = model(ids[:, :20], use_cache=True)
        rest = model(ids[:, 20:], past_key_values=first.past_key_values)
        logits = torch.cat((first.logits, rest.logits), dim=1)
        assert float((logits.detach() - one.logits).abs().max()) < 1e-5


# ---- the interface of transformers


def test_logits_to_keep_labels_and_outputs(exported: Get) -> None:
    one = exported("pyramid residual")
    model, ids = load(one.folder, attn_implementation="eager"), real_ids()
    full = model(ids, labels=ids, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    places = torch.tensor([1, 7])
    for wanted, expected in ((3, full.logits[:, -3:]), (places, full.logits[:, places]), (0, full.logits)):
        found = model(ids, logits_to_keep=wanted).logits
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-5)
    labels = ids[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(full.logits[:, :-1].flatten(0, 1), labels)
    coefficient = one.run.moe.moe_aux_loss_coeff
    assert coefficient > 0
    assert full.aux_loss > 0
    assert torch.allclose(full.loss, loss + coefficient * full.aux_loss)
    assert torch.allclose(model(ids, labels=ids).loss, loss)
    assert [tuple(state.shape) for state in full.hidden_states] == [(2, 48, 32)] * 5
    assert [tuple(weights.shape) for weights in full.attentions] == [(2, 4, 48, 48)] * 4
    # A pyramid: as many logits as the layer has experts.
    assert [tuple(logits.shape) for logits in full.router_logits] == [(96, 4), (96, 8)]
    as_tuple = model(ids, return_dict=False)
    assert torch.allclose(as_tuple[0], full.logits, atol=1e-5)
    with pytest.raises(ValueError, match="eager"):
        load(one.folder)(ids, output_attentions=True)


def test_balancing_loss_is_that_of_training(exported: Get) -> None:
    """megatron-core's, of which ours in training is the gradient."""
    from megatron.core.transformer.moe.moe_utils import (
        compute_routing_scores_for_aux_loss,
        switch_load_balancing_loss_func,
    )

    for name in ("pyramid residual", "sigmoid and bias"):
        model = load(exported(name).folder)
        topk = model.config.num_experts_per_tok
        output = model(real_ids(), output_router_logits=True)
        expected = 0.0
        for logits in output.router_logits:
            chosen, scores = compute_routing_scores_for_aux_loss(logits, topk, model.config.score_function)
            tokens, experts = logits.shape
            expected += float(
                switch_load_balancing_loss_func(
                    scores, chosen.sum(dim=0), tokens, topk, experts, moe_aux_loss_coeff=1.0
                )
            )
        assert float(output.aux_loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_attention_is_what_was_asked_for(name: str, exported: Get) -> None:
    """Through the common interface, with whatever arguments come: how serving engines put theirs in place."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    one, seen = exported(name), []

    def recorded(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((module.layer_idx, kwargs.pop("note", None)))
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("recorded", recorded)
    expected = load(one.folder)(real_ids(), **domains(one)).logits
    eager = load(one.folder, attn_implementation="eager")(real_ids(), **domains(one)).logits
    assert float((eager - expected).abs().max()) < 1e-4
    model = load(one.folder)
    assert model.config._attn_implementation == "sdpa"
    model.config._attn_implementation = "recorded"
    mask = torch.ones_like(real_ids())
    logits = model(real_ids(), attention_mask=mask, note="kept", **domains(one)).logits
    assert seen == [(layer, "kept") for layer in range(one.run.model.num_layers)]
    assert float((logits - expected).abs().max()) < 1e-4


def test_auto_classes_and_new_models(exported: Get) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    one = exported("residual added, untied")
    whole = load(one.folder)
    base = AutoModel.from_pretrained(one.folder, trust_remote_code=True)
    assert torch.equal(whole.lm_head(base(real_ids()).last_hidden_state), whole(real_ids()).logits)
    for name in KINDS:
        config = AutoConfig.from_pretrained(exported(name).folder, trust_remote_code=True)
        config.initializer_range = 0.05
        fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        logits = fresh(real_ids(), **domains(exported(name))).logits
        assert 0.0 < float(logits.std()) < 2.0
        weights = {key: value for key, value in fresh.named_parameters() if value.ndim == 3}
        for key, value in weights.items():
            assert float(value.std()) == pytest.approx(0.05, rel=0.2), key


def test_saving_writes_the_same_again(exported: Get, tmp_path: Path) -> None:
    """Names in memory are names on disk; the code and what points to it go along."""
    for name in KINDS:
        one, folder = exported(name), tmp_path / name
        load(one.folder).save_pretrained(folder)
        again = load_file(folder / "model.safetensors")
        assert set(again) == set(one.theirs)
        assert all(
            torch.equal(again[key], value) and again[key].dtype == value.dtype for key, value in one.theirs.items()
        )
        assert {path.name for path in folder.glob("*.py")} == set(CODE_FILES)
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == AUTO_MAP
        flags = FAMILY.flags(json.loads((one.folder / "config.json").read_text()))
        assert FAMILY.flags(config) == flags
        # What is left out has the class's default.
        defaults = MegatronMoeConfig().to_dict()
        short = {key: value for key, value in config.items() if key not in defaults or value != defaults[key]}
        assert len(short) < len(config)
        assert FAMILY.flags(short) == flags


def test_half_precision_keeps_what_decides(exported: Get) -> None:
    model = load(exported("sigmoid and bias").folder, dtype=torch.bfloat16)
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in model.state_dict().items() if ".router." in name}
    assert kinds == {"weight": torch.bfloat16, "expert_bias": torch.float32}
    choice = load(exported("expert choice").folder, dtype=torch.bfloat16)
    assert choice.model.layers[1].mlp.router.cutoffs.dtype == torch.float32
    table = load(exported("hash").folder, dtype=torch.bfloat16).model.layers[1].mlp.router.token_map
    assert table.dtype == torch.int32
    # Converted later, they are not rounded either.
    bias = load(exported("sigmoid and bias").folder).model.layers[1].mlp.router.expert_bias
    assert not torch.equal(bias, bias.bfloat16().float())
    later = load(exported("sigmoid and bias").folder).to(torch.bfloat16)
    assert torch.equal(later.model.layers[1].mlp.router.expert_bias, bias)
    for one in (model, choice, later):
        logits = one(real_ids()).logits
        assert logits.dtype == torch.bfloat16
        assert bool(logits.isfinite().all())


def test_one_product_for_all_experts_is_the_same(exported: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, and its gradients; `grouped_mm` runs on a CPU too."""
    for name in ("pyramid residual", "sigmoid and bias", "expert choice"):
        one = exported(name)
        results = []
        for grouped in (False, True):
            model, seen = still(load(one.folder)), []

            def has_kernel(rows: torch.Tensor, *weights: Any, grouped: bool = grouped, seen: list[int] = seen) -> bool:
                seen.append(len(rows))
                return grouped

            monkeypatch.setattr(sys.modules[type(model).__module__], "has_grouped_kernel", has_kernel)
            loss = model(real_ids(), labels=real_ids()).loss
            loss.backward()
            assert len(seen) == sum(count > 0 for count in model.config.experts_per_layer)
            results.append((loss, {key: value.grad for key, value in model.named_parameters()}))
        (loss, gradients), (expected_loss, expected) = results
        assert float(loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=1e-6)
        for key, gradient in gradients.items():
            size = float(expected[key].abs().max())
            assert float((gradient - expected[key]).abs().max()) <= 1e-5 * max(size, 1e-3), key


def test_mixed_precision_routes_in_fp32(exported: Get) -> None:
    for name in ("pyramid residual", "sigmoid and bias", "token embedding"):
        model = load(exported(name).folder)
        plain = model(real_ids(), labels=real_ids(), output_router_logits=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(real_ids(), labels=real_ids(), output_router_logits=True)
        mixed.loss.backward()
        assert {logits.dtype for logits in mixed.router_logits} == {torch.float32}
        # Those of the first layer with experts see inputs that differ by rounding alone.
        first, expected = mixed.router_logits[0], plain.router_logits[0]
        assert float((first - expected).detach().abs().max()) < 0.1 * float(expected.detach().abs().max())
        assert float(mixed.loss) == pytest.approx(float(plain.loss), rel=0.1)


# ---- what must not pass


def damaged(one: Exported, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(one.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nothing_is_drawn_at_random(exported: Get, tmp_path: Path) -> None:
    """transformers would print a report, and go on with random experts."""
    one = exported("pyramid residual")
    experts = "model.layers.1.mlp.routed_experts.up_proj"
    with pytest.raises(ValueError, match=f"lacks 1 tensors, the first is {experts}"):
        load(damaged(one, tmp_path / "missing", lambda tensors: tensors.pop(experts)))
    with pytest.raises(ValueError, match=r"also holds 1 tensors, the first is model\.extra"):
        load(damaged(one, tmp_path / "extra", lambda tensors: tensors.update({"model.extra": torch.ones(2)})))

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.up_proj"] = tensors.pop(experts)

    with pytest.raises(ValueError, match="lacks 1 tensors"):
        load(damaged(one, tmp_path / "renamed", rename))
    table = "model.layers.1.mlp.router.token_map"
    with pytest.raises(ValueError, match=f"the first is {table}"):
        load(damaged(exported("hash"), tmp_path / "table", lambda tensors: tensors.pop(table)))

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[experts] = tensors[experts][:2].contiguous()

    with pytest.raises(RuntimeError, match="mismatched"):
        load(damaged(one, tmp_path / "cut", cut))


def test_wrong_inputs_are_named(exported: Get) -> None:
    model = load(exported("hash").folder)
    with pytest.raises(ValueError, match="not both"):
        model()
    embeddings = model.get_input_embeddings()(real_ids())
    with pytest.raises(ValueError, match="chosen by token id; give input_ids"):
        model(inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="300 token ids: must be 259; with router_type hash"):
        model.resize_token_embeddings(300)
    assert model.resize_token_embeddings(259) is model.get_input_embeddings()
    plain = load(exported("pyramid residual").folder)
    embeddings = plain.get_input_embeddings()(real_ids())
    assert torch.equal(plain(inputs_embeds=embeddings).logits, plain(real_ids()).logits)
    plain.resize_token_embeddings(270)
    assert plain(real_ids()).logits.shape[-1] == 270


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "tanh", "hidden_act is 'tanh'; must be one of"),
        ("hidden_act", "silu", "hidden_act silu: must be silu where gated_mlp is true"),
        ("norm_type", "batchnorm", "norm_type"),
        ("experts_per_layer", [0, 4], "experts_per_layer has 2 counts"),
        ("experts_per_layer", [0, 4, 0, 2.5], "experts_per_layer"),
        ("rotary_base", 0.5, "rotary_base 0.5: must be a whole number"),
        ("vocab_size", "many", "vocab_size many: must be a whole number"),
        ("attention_bias", False, "attention_bias false"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("num_attention_heads", 0, "config.json"),
        ("num_domains", 10**30, "num_domains 10*: must be at most 4096"),
        ("expert_residual_layers", 10**30, "expert_residual_layers 10*: must be at most 10000"),
        ("qk_norm", "latent", "qk_norm latent: must be null, head or projection"),
        ("rotary_yarn", {"factor": 4.0}, "rotary_yarn .*: must be null"),
        ("kv_lora_rank", 8, "attention_bias true: must be false"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(field: str, value: Any, message: str) -> None:
    config = {"model_type": "megatron_moe", **FAMILY.config(case("pyramid residual"))}
    with pytest.raises(UserError, match=message) as error:
        FAMILY.flags(config | {field: value})
    assert "\n" not in str(error.value)


def test_code_is_copied(tmp_path: Path) -> None:
    copy_code(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(CODE_FILES)


# ---- fine-tuning


def still(model: Any) -> Any:
    """Without dropout, in training."""
    for part in model.modules():
        for name in ("attention_dropout", "hidden_dropout", "dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    model.config.hidden_dropout = 0.0
    return model.train()


@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing_changes_nothing(name: str, exported: Get) -> None:
    one = exported(name)
    results = []
    for reentrant in (None, False, True):
        model = load(one.folder).train()
        calls: list[int] = []
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        # Dropout too: its numbers are drawn again as they were.
        torch.manual_seed(0)
        loss = model(real_ids(), labels=real_ids(), **domains(one)).loss
        loss.backward()
        assert len(calls) == (1 if reentrant is None else 2)
        results.append((loss, {key: value.grad for key, value in model.named_parameters()}))
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        for key, gradient in gradients.items():
            assert torch.equal(gradient, results[0][1][key]), key


def test_gradients_are_ours(exported: Get) -> None:
    """Of the same loss, through the map of the weights."""
    from tests.helpers.remote_code import converted

    for name in ("pyramid residual", "sigmoid and bias", "token embedding", "expert residual network"):
        one = exported(name)
        ours = OurModel(one.run).load(one.ours)
        ids = real_ids()
        loss = torch.nn.functional.cross_entropy(
            ours.logits_with_gradient(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        loss.backward()
        with torch.no_grad():
            for parameter in ours.chunk.parameters():
                parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
        expected = converted(FAMILY.blocks(one.run), "theirs", ours.tensors())
        model = still(load(one.folder))
        model(ids, labels=ids).loss.backward()
        for key, parameter in model.named_parameters():
            size = float(expected[key].abs().max())
            assert float((parameter.grad - expected[key]).abs().max()) <= 1e-4 * max(size, 1e-3), key


def text_rows(count: int, length: int = 32) -> list[dict[str, list[int]]]:
    """Bytes of Python's language reference."""
    text = "".join(topics[name] for name in sorted(topics)).encode()
    rows = [list(text[place * length : (place + 1) * length]) for place in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def test_learns_by_a_plain_loop(exported: Get, tmp_path: Path) -> None:
    model = load(exported("expert residual network").folder).train()
    rows = torch.tensor([row["input_ids"] for row in text_rows(32)])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(12):
        loss = model(rows[step % 4 :: 4], labels=rows[step % 4 :: 4], output_router_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    model.save_pretrained(tmp_path / "tuned")
    assert torch.equal(load(tmp_path / "tuned")(rows).logits, model.eval()(rows).logits)


def test_learns_with_trainer(exported: Get, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments, default_data_collator

    model = load(exported("pyramid residual").folder)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=text_rows(64), data_collator=default_data_collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    again = load(Path(trainer.state.best_model_checkpoint or tmp_path / "checkpoint-12"))
    ids = real_ids()
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("name", ["hunyuan-large", "token embedding", "pyramid residual"])
def test_spread_over_devices(name: str, exported: Get, tmp_path: Path) -> None:
    """A layer is never split; what layers share follows them. Without a second device, parts lie on the disk."""
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    one = exported(name)
    automatic = load(one.folder, device_map="auto")
    assert set(automatic._no_split_modules) == {"MegatronMoeDecoderLayer"}
    assert torch.equal(automatic(real_ids()).logits, load(one.folder)(real_ids()).logits)
    placed = {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)}
    placed |= dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
    placed |= {"model.embed_positions": "cpu"} if name != "hunyuan-large" else {}
    placed |= {"model.routing_embedding": "disk"} if name == "token embedding" else {}
    model = load(one.folder, device_map=placed, offload_folder=str(tmp_path / "offload"))
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(model(real_ids()).logits, load(one.folder)(real_ids()).logits)
