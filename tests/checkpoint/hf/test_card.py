"""The card says what the run was, what was measured and what was lost, and names no folder of the machine."""

from typing import Any

import pytest
import yaml

from megatron_moe.checkpoint.hf.card import CardFacts, model_card, recipe, training_facts
from megatron_moe.checkpoint.hf.served import served_by
from megatron_moe.checkpoint.hf.tokenizer import ExportedTokenizer
from megatron_moe.checkpoint.hf.verify import Proof
from megatron_moe.config.yaml_io import build_run
from tests.helpers.tiny import tiny_run

RUN = tiny_run(
    vocab_size=860,
    train_data_path=("0.3", "/secret/place/news", "0.7", "/secret/place/novels"),
    save="/secret/place/run",
    bf16=True,
)
TOKENIZER = ExportedTokenizer(
    "SentencePieceTokenizer", True, "the same ids for 200 texts compared", eos=4, bos=1, pad=3
)
PROOF = Proof(
    "MixtralForCausalLM", 7, 1234, "bfloat16", 3e-6, 4e-7, 5.5, 1e-9, 1.0, {"torch": "2", "transformers": "5"}
)
ROWS: list[dict[str, Any]] = [
    {"step": 1, "lm_loss": 7.0, "consumed_tokens": 256},
    {"step": 2, "eval_lm_loss": 6.5, "eval_perplexity": 665.1},
    {"step": 3, "lm_loss": 6.25, "consumed_tokens": 768},
]


def facts(**changes: Any) -> CardFacts:
    values: dict[str, Any] = {
        "name": "mine",
        "run": RUN,
        "step": 3,
        "architecture": "MegatronMoeForCausalLM",
        "model_type": "megatron_moe",
        "dtype": "bfloat16",
        "reasons": ["--num-experts 4 8: MixtralForCausalLM has as many experts in every layer"],
        "lost": [],
        "tokenizer": TOKENIZER,
        "command": "python tools/convert_checkpoint.py to-hf --load runs/mine --output mine",
        "proof": PROOF,
        "metrics": ROWS,
    }
    return CardFacts(**{**values, **changes})


def test_header_is_yaml_that_the_hub_reads() -> None:
    text = model_card(facts(license="apache-2.0", license_file=True))
    _, header, body = text.split("---\n", 2)
    parsed = yaml.safe_load(header)
    assert parsed["license"] == "apache-2.0"
    assert parsed["pipeline_tag"] == "text-generation"
    assert parsed["library_name"] == "transformers"
    assert {"mixture-of-experts", "megatron_moe"} <= set(parsed["tags"])
    assert "Licence: apache-2.0 (see LICENSE)." in body
    without = model_card(facts())
    assert "license" not in yaml.safe_load(without.split("---\n", 2)[1])
    assert "No licence was stated" in without


def test_what_was_trained_and_measured() -> None:
    text = model_card(facts())
    for line in (
        "| experts per layer | 0 4 0 8 |",
        "| tokens read | 768 |",
        "| training loss at step 3 | 6.2500 nats per token |",
        "| validation loss at step 2 | 6.5000 nats per token, perplexity 665.10 |",
        "| data (train) | 0.3 news 0.7 novels |",
        "| largest difference of a logit | 3.00e-06 (of logits up to 5.5) |",
        "trust_remote_code=True",
        "to-hf --load runs/mine --output mine",
        "- --num-experts 4 8: MixtralForCausalLM has as many experts in every layer",
        "Weights are in bfloat16",
    ):
        assert line in text, line
    assert "secret" not in text


def test_flags_of_the_card_make_the_same_model() -> None:
    text = model_card(facts())
    flags = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    again = build_run(
        {
            name: {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}
            for name, section in flags.items()
        }
    )
    for section in ("model", "moe", "routing", "training", "optimizer"):
        assert getattr(again, section) == getattr(RUN, section)
    assert recipe(
        tiny_run(router="hash", router_map="balanced", router_token_counts="/secret/c.npy"), ("routing",)
    ) == {"routing": {"router_map": "balanced", "router_token_counts": "c.npy"}}


def test_not_verified_is_said() -> None:
    text = model_card(facts(proof=None))
    assert "**Not verified**" in text
    assert "largest difference" not in text


def test_what_was_lost_is_said() -> None:
    lost = ["--residual-combine softmax: Qwen2MoeForCausalLM has no coefficient beside its experts"]
    text = model_card(facts(lost=lost, model_type="qwen2_moe", architecture="Qwen2MoeForCausalLM"))
    assert "## Not the trained model" in text
    assert f"- {lost[0]}" in text
    assert "trust_remote_code" not in text


def test_tokenizer_that_transformers_has_not() -> None:
    none = ExportedTokenizer("JiebaBPETokenizer", False, "transformers has no exact tokenizer for it: jieba", eos=7)
    text = model_card(facts(tokenizer=none))
    assert "AutoTokenizer" not in text
    assert "transformers has no exact tokenizer for it: jieba" in text
    assert "`tokenizer/`" in text


@pytest.mark.parametrize(("model_type", "vllm"), [("mixtral", "yes"), ("megatron_moe", "no: ")])
def test_who_serves_it(model_type: str, vllm: str) -> None:
    rows = dict(served_by(facts().run, model_type))
    assert next(value for name, value in rows.items() if name.startswith("vLLM")).startswith(vllm)
    assert all(f"| {name} | {value} |" in model_card(facts(model_type=model_type)) for name, value in rows.items())


def test_a_run_without_metrics() -> None:
    assert training_facts([]) == {}
    text = model_card(facts(metrics=[], step=0))
    assert "| step | 0 |" in text
    assert "loss at step" not in text


def test_dense_model() -> None:
    text = model_card(facts(run=tiny_run(vocab_size=860, num_experts=None, mlp_type="standard", expert_interval=1)))
    assert "A dense language model" in text
    assert "experts per layer" not in text
    assert "mixture-of-experts" not in text.split("---\n")[1]


def test_loading_a_folder_with_code_asks_nothing_on_a_terminal() -> None:
    lines = [line for line in model_card(facts(model_type="megatron_moe")).splitlines() if "from_pretrained(" in line]
    assert len(lines) == 2
    assert all("trust_remote_code=True" in line for line in lines)
