"""Write the parts of docs/ that the code knows: all flags, the rules for cleaning text, the upstream symbols replaced.

    python tools/make_flag_docs.py
    python tools/make_flag_docs.py --check

writes docs/flags.md and docs/rules.md whole, and the table between the marks in docs/architecture.md. With --check
nothing is written; the command fails if a file is not up to date.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from megatron_moe import evaluate, generate, score
from megatron_moe.config import aliases
from megatron_moe.config.base import UserError, field_help, format_value
from megatron_moe.config.flags import LaunchOptions, ServeOptions, StartingPoint
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.schema import FieldSpec, run_sections, section_fields
from megatron_moe.data.command_line import ToolParser, run_tool
from megatron_moe.data.wudao.recipe import load_recipe
from megatron_moe.data.wudao.recipe_file import recipe_names
from megatron_moe.data.wudao.rules import RULES, Rule
from megatron_moe.runtime.replace import Replacement

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- replaced symbols, made by tools/make_flag_docs.py -->", "<!-- end replaced symbols -->"


def flags_page() -> str:
    """docs/flags.md."""
    pretrain = {"start": StartingPoint, "launch": LaunchOptions, **run_sections(RunConfig)}
    lines = [
        "# Flags",
        "",
        "Made by `python tools/make_flag_docs.py` from the dataclasses in `megatron_moe/config/` and",
        "`megatron_moe/inference/options.py`; `--help` of each command says the same. Do not edit.",
        "",
        "A switch `--x` has a counterpart `--no-x`. `none` unsets a flag that has no default. A flag goes over what",
        "`--config FILE.yaml` says, and that over what `--recipe NAME` says. An unknown flag is an error.",
        "",
        "## python -m megatron_moe.pretrain",
        *_sections(pretrain),
    ]
    for module in (generate, score, evaluate):
        own = {name: section for name, section in module.SECTIONS.items() if section is not ParallelConfig}
        lines += [
            f"## python -m {module.__name__}",
            "",
            "Takes the flags of the section parallel above as well, but for those that only concern training.",
            "",
            *_sections({**own, "launch": ServeOptions}),
        ]
    return "\n".join([*lines, *_alias_tables()]) + "\n"


def _sections(sections: Mapping[str, type]) -> Iterator[str]:
    for name, section in sections.items():
        yield from ("", f"### {name}", "")
        yield from _table(("flag", "value", "default", "meaning"), map(_flag_row, section_fields(section).values()))
    yield ""


def _flag_row(spec: FieldSpec) -> tuple[str, ...]:
    words = {int: "N", float: "X", str: "TEXT"}
    if spec.scalar is bool:
        value = ""
    else:
        value = ", ".join(spec.choices) if spec.choices else words[spec.scalar]
        value += " ..." if spec.many else ""
    if spec.default is MISSING:
        default = "required"
    elif spec.scalar is bool and spec.default is not None:
        default = "on" if spec.default else ""
    else:
        default = "" if spec.default is None else f"`{format_value(spec.default)}`"
    return f"`{spec.flag}`", value, default, spec.help


def _alias_tables() -> Iterator[str]:
    yield from ("## Other spellings", "")
    yield "Flags of PAI/EasyNLP Rapidformer, Megatron-DeepSpeed and older Megatron-LM that are understood:"
    yield ""
    rows = [(f"`{theirs}`", f"`{ours}`") for theirs, ours in aliases.RENAMED.items()]
    rows += [(f"`{theirs}`", f"`{' '.join(ours)}`") for theirs, ours in aliases.EXPANDED.items()]
    for flag, values in aliases.VALUES.items():
        rows += [(f"`{flag} {value}`", f"`{' '.join(ours)}`") for value, ours in values.items()]
    yield from _table(("theirs", "ours"), rows)
    yield from ("", "Flags of theirs that are refused by name, with what to do instead:", "")
    refused = [(f"`{flag}`", reason) for flag, reason in aliases.REFUSED.items()]
    for flag, reasons in aliases.REFUSED_VALUES.items():
        refused += [(f"`{flag} {value}`", reason) for value, reason in reasons.items()]
    yield from _table(("flag", "what to do"), refused)


def rules_page() -> str:
    """docs/rules.md: the rules of tools/clean_wudao.py."""
    lines = [
        "# Rules for cleaning text",
        "",
        "Made by `python tools/make_flag_docs.py` from the classes in `megatron_moe/data/wudao/rules/`. Do not edit.",
        "",
        "A recipe lists rules with their options ([data.md](data.md) shows how); they stand here in the order in which",
        "they work best. In the columns: the built-in recipes that have the rule, and what differs from its defaults",
        "there. `advertising` and `sensitive_words` stand in `strict` and `wudao-default`; they work once they have",
        "a list.",
        "",
    ]
    recipes = {name: load_recipe(name) for name in recipe_names()}
    inside = {name: {rule.name: rule for rule in recipe.rules} for name, recipe in recipes.items()}
    rows = [
        (f"[`{rule.name}`](#{rule.name})", *(_rule_in(rules.get(rule.name), rule) for rules in inside.values()))
        for rule in RULES
    ]
    lines += [*_table(("rule", *(f"`{name}`" for name in recipes)), rows), ""]
    for rule in RULES:
        lines += [f"## {rule.name}", "", inspect.cleandoc(rule.__doc__ or ""), ""]
        lines += [f"Source: {rule.source}."]
        lines += [f"What it takes from clean text: {rule.destroys}."] if rule.destroys else []
        helps = field_help(rule)
        options = [(f"`{field.name}`", _option(field.default), helps.get(field.name, "")) for field in fields(rule)]
        lines += ["", *_table(("option", "default", "meaning"), options), ""] if options else [""]
    return "\n".join(lines)


def _rule_in(rule: Rule | None, kind: type[Rule]) -> str:
    if rule is None:
        return ""
    changed = [
        f"{field.name} {_option(getattr(rule, field.name))}"
        for field in fields(kind)
        if getattr(rule, field.name) != field.default
    ]
    return ", ".join(changed) or "yes"


def _option(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`" if value not in (None, "", ()) else "empty"


def replaced_symbols() -> list[tuple[str, Replacement]]:
    """Every upstream symbol that is replaced, and when."""
    from megatron_moe.runtime.quiet import silence_third_party_warnings

    silence_third_party_warnings()
    from megatron_moe import torchrun
    from megatron_moe.checkpoint import flat_states, safe_reader, save
    from megatron_moe.moe import expert_bias
    from megatron_moe.runtime import cpu

    anywhere = [
        ("`megatron_moe.torchrun` starts", torchrun.stopped_is_final()),
        ("a model is built", expert_bias.REPLACEMENT),
        *(("a checkpoint is written", replacement) for replacement in save.REPLACEMENTS),
        *(("a checkpoint is read", replacement) for replacement in safe_reader.REPLACEMENTS),
        *(("a run is resumed", replacement) for replacement in flat_states.REPLACEMENTS),
    ]
    return anywhere + [("on a CPU", replacement) for replacement in cpu.replacements()]


def replacement_table() -> list[str]:
    """The symbols as a table; those with one reason stand together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for when, replacement in replaced_symbols():
        reasons.setdefault((when, replacement.reason), []).append(f"`{replacement.name}`")
    rows = [(when, "<br>".join(names), reason) for (when, reason), names in reasons.items()]
    return list(_table(("when", "symbol", "because"), rows))


def _table(header: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def architecture_page(text: str) -> str:
    """docs/architecture.md with its table renewed.

    Raises:
        UserError: the marks are missing.
    """
    if BEGIN not in text or END not in text:
        raise UserError(f"docs/architecture.md: lacks the marks {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    return "\n".join([before + BEGIN, "", *replacement_table(), "", END]) + rest.split(END)[1]


def pages() -> dict[Path, str]:
    """Path -> what it should hold."""
    architecture = DOCS / "architecture.md"
    return {
        DOCS / "flags.md": flags_page(),
        DOCS / "rules.md": rules_page(),
        architecture: architecture_page(architecture.read_text(encoding="utf-8")),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pages, or check them."""
    parser = ToolParser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not up to date")
    args = parser.parse_tool_args(argv)
    for path, text in pages().items():
        name = path.relative_to(DOCS.parent)
        if path.exists() and path.read_text(encoding="utf-8") == text:
            print(f"{name}: up to date")
            continue
        if args.check:
            raise UserError(f"{name}: not up to date; run python tools/make_flag_docs.py")
        path.write_text(text, encoding="utf-8")
        print(f"{name}: written")


if __name__ == "__main__":
    run_tool(main)
