"""The model card, README.md of an exported folder: everything in it was measured or is a flag of the run. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_moe import __version__
from megatron_moe.checkpoint.hf.served import REMOTE_TYPE, served_by
from megatron_moe.checkpoint.hf.tokenizer import ExportedTokenizer
from megatron_moe.checkpoint.hf.verify import TOLERANCE, Proof
from megatron_moe.config.run import RunConfig
from megatron_moe.config.schema import run_sections, section_fields
from megatron_moe.model.parameters import count_parameters
from megatron_moe.moe.layout import expert_layout

_SECTIONS = ("model", "moe", "routing", "training", "optimizer")
_MOST_PREFIXES = 20


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card is made of."""

    name: str
    run: RunConfig
    step: int
    architecture: str
    model_type: str
    dtype: str
    reasons: Sequence[str]
    """Why no class that was asked before is exact."""
    lost: Sequence[str]
    """What the class does not compute as our model does; empty for an exact one."""
    tokenizer: ExportedTokenizer
    command: str
    proof: Proof | None
    """None: nobody has looked."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """Rows of metrics.jsonl up to the step."""
    license: str | None = None
    license_file: bool = False


def model_card(facts: CardFacts) -> str:
    """The text of README.md."""
    parts = [
        _header(facts),
        f"# {facts.name}\n\n{_summary(facts)}",
        _loss_of_exactness(facts),
        f"## Use\n\n{_usage(facts)}",
        f"## Architecture\n\n{_architecture(facts)}",
        f"## Training\n\n{_training(facts)}",
        f"## Conversion\n\n{_conversion(facts)}",
        f"## Served by\n\n{_table(('program', 'loads it'), served_by(facts.run, facts.model_type))}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def training_facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last training loss and the last evaluation, each with its step, and the tokens that were read."""
    found: dict[str, Any] = {}
    for row in rows:
        if "lm_loss" in row:
            found["loss"] = (row["step"], row["lm_loss"])
            found["tokens"] = row.get("consumed_tokens", found.get("tokens"))
        if "eval_lm_loss" in row:
            found["evaluation"] = (row["step"], row["eval_lm_loss"], row.get("eval_perplexity"))
    return found


def recipe(run: RunConfig, sections: Sequence[str] = _SECTIONS) -> dict[str, dict[str, Any]]:
    """The flags that make the model and its training and are not at their default, by section."""
    values: dict[str, dict[str, Any]] = {}
    for name in sections:
        section = getattr(run, name)
        for field, spec in section_fields(run_sections(RunConfig)[name]).items():
            value = getattr(section, field)
            if value == spec.default:
                continue
            if field == "router_token_counts":
                # A file of the machine that the run was trained on; the checkpoint holds what was made of it.
                value = Path(value).name
            values.setdefault(name, {})[field] = list(value) if isinstance(value, tuple) else value
    return values


def _header(facts: CardFacts) -> str:
    tags = ["megatron", "megatron_moe", facts.model_type]
    if any(expert_layout(facts.run).experts_per_layer):
        tags.append("mixture-of-experts")
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if facts.license is not None:
        header = {"license": facts.license} | header
    header["tags"] = list(dict.fromkeys(tags))
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _summary(facts: CardFacts) -> str:
    counts = count_parameters(facts.run)
    experts = [count for count in expert_layout(facts.run).experts_per_layer if count]
    kind = "mixture-of-experts language model" if experts else "dense language model"
    active = f", {counts.activated:,} of them used for a token" if experts else ""
    text = (
        f"A {kind} with {counts.total:,} parameters{active}, trained with megatron_moe and exported as "
        f"`{facts.architecture}`. Weights are in {facts.dtype}."
    )
    if facts.license is None:
        return f"{text} No licence was stated when it was exported."
    return f"{text} Licence: {facts.license}{' (see LICENSE)' if facts.license_file else ''}."


def _loss_of_exactness(facts: CardFacts) -> str:
    if not facts.lost:
        return ""
    lines = "\n".join(f"- {reason}" for reason in facts.lost)
    return (
        f"## Not the trained model\n\n`{facts.architecture}` was asked for with `--allow-lossy`. It does not compute "
        f"what the trained model computes:\n\n{lines}"
    )


def _usage(facts: CardFacts) -> str:
    remote = facts.model_type == REMOTE_TYPE
    trust = ", trust_remote_code=True" if remote else ""
    lines = ["```python", "from transformers import AutoModelForCausalLM" + (", AutoTokenizer" * facts.tokenizer.exact)]
    lines += ["", f'model = AutoModelForCausalLM.from_pretrained("{facts.name}", dtype="auto"{trust})']
    if facts.tokenizer.exact:
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("{facts.name}"{trust})',
            'inputs = tokenizer("...", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        ]
    lines.append("```")
    note = facts.tokenizer.note
    if facts.tokenizer.exact:
        text = (
            f"Tokenizer: {note}. For text of unknown origin give it `split_special_tokens=True`, or it may spell them."
        )
    else:
        text = f"Tokenizer: {note}. megatron_moe's own file is in `tokenizer/`."
    if facts.run.model.num_domains is not None and remote:
        text += f" The model tells {facts.run.model.num_domains} domains apart: give `domain_ids`, one for each text."
    return "\n".join([*lines, "", text])


def _architecture(facts: CardFacts) -> str:
    run, model, moe = facts.run, facts.run.model, facts.run.moe
    layers = expert_layout(run).experts_per_layer
    rows: list[tuple[str, Any]] = [
        ("layers", model.num_layers),
        ("hidden size", model.hidden_size),
        ("attention", f"{model.num_attention_heads} heads of {model.head_dim}, {model.query_groups} key/value heads"),
        ("positions", f"{model.position_embedding_type}, up to {model.max_positions}"),
        ("norm", model.normalization),
        ("vocabulary", model.vocab_size),
    ]
    if not any(layers):
        rows.append(("MLP width", model.ffn_size))
    else:
        if 0 in layers:
            rows.append(("MLP width of dense layers", model.ffn_size))
        rows += [
            ("experts per layer", " ".join(map(str, layers))),
            ("expert width", run.expert_ffn_size),
            (
                "experts for a token",
                f"{moe.moe_router_topk}, router {moe.router}, {moe.moe_router_score_function} scores",
            ),
        ]
        if moe.mlp_type == "residual":
            rows.append(("beside the experts", f"an MLP of an expert's width, combined by {moe.residual_combine}"))
        if moe.moe_shared_expert_intermediate_size is not None:
            gated = "gated" if moe.moe_shared_expert_gate else "added"
            rows.append(("shared expert", f"width {moe.moe_shared_expert_intermediate_size}, {gated}"))
    counts = count_parameters(run)
    rows += [
        (f"parameters: {name.replace('_', ' ')}", f"{count:,}") for name, count in counts.components().items() if count
    ]
    return _table(("", ""), rows)


def _training(facts: CardFacts) -> str:
    known = training_facts(facts.metrics)
    rows: list[tuple[str, Any]] = [("step", facts.step)]
    if known.get("tokens") is not None:
        rows.append(("tokens read", f"{known['tokens']:,}"))
    if "loss" in known:
        rows.append((f"training loss at step {known['loss'][0]}", f"{known['loss'][1]:.4f} nats per token"))
    if "evaluation" in known:
        step, loss, perplexity = known["evaluation"]
        shown = "" if perplexity is None else f", perplexity {perplexity:.2f}"
        rows.append((f"validation loss at step {step}", f"{loss:.4f} nats per token{shown}"))
    rows += [(f"data ({split})", names) for split, names in _data_names(facts.run)]
    lines = []
    for section, flags in recipe(facts.run).items():
        lines += [f"{section}:", *(f"  {name}: {_inline(value)}" for name, value in flags.items())]
    text = "\n".join(lines)
    return f"{_table(('', ''), rows)}\n\nFlags that are not at their default:\n\n```yaml\n{text}\n```"


def _inline(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("...\n").strip()


def _data_names(run: RunConfig) -> list[tuple[str, str]]:
    """The data's names, without the folders of the machine it lay on; weights stay."""
    found = []
    for split in ("data_path", "train_data_path", "valid_data_path"):
        words = getattr(run.data, split)
        if words:
            names = [Path(word).name for word in words[:_MOST_PREFIXES]]
            more = f" and {len(words) - _MOST_PREFIXES} more" if len(words) > _MOST_PREFIXES else ""
            found.append((split.removesuffix("_data_path").replace("data_path", "split"), " ".join(names) + more))
    return found


def _conversion(facts: CardFacts) -> str:
    text = f"Made by megatron_moe {__version__}:\n\n```\n{facts.command}\n```"
    if facts.reasons and not facts.lost:
        text += "\n\nClasses that are not exact for this model:\n\n" + "\n".join(f"- {line}" for line in facts.reasons)
    proof = facts.proof
    if proof is None:
        return f"{text}\n\n**Not verified**: the conversion was told not to compare the folder with the trained model."
    rows = [
        (
            "loaded as",
            f"{proof.model_class}, transformers {proof.versions['transformers']}, torch {proof.versions['torch']}",
        ),
        ("missing, unexpected, mismatched keys", "0, 0, 0"),
        ("texts, tokens", f"{proof.documents}, {proof.tokens}"),
        ("largest difference of a logit", f"{proof.max_difference:.2e} (of logits up to {proof.largest_logit:.1f})"),
        ("mean difference", f"{proof.mean_difference:.2e}"),
        ("KL divergence", f"{proof.kl:.1e} nats per token"),
        ("same most likely token", f"{proof.same_top:.2%}"),
    ]
    if facts.lost:
        bound = "The differences are those of another model; see above."
    else:
        bound = f"More than {TOLERANCE:.0e} would have failed the conversion."
    return (
        f"{text}\n\nCompared with the trained model, whose weights were rounded to {proof.dtype}, both computing in "
        f"float32, the folder loaded in a process of its own. {bound}\n\n{_table(('', ''), rows)}"
    )


def _table(head: tuple[str, str], rows: Sequence[tuple[str, Any]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)])
