"""The report of a built tokenizer as a page of HTML."""

from typing import Any

from megatron_moe.data.html_report import Cell, Page


def report_page(report: dict[str, Any]) -> Page:
    """The page for the content of report.json."""
    options, read, heldout = report["options"], report["read"], report["heldout"]
    page = Page(
        f"Tokenizer of {options['vocab_size']:,} pieces",
        f"{options['model_type']}, character coverage {options['character_coverage']:.4f}, learned from "
        f"{read['sampled_sentences']:,} sentences ({read['sampled_bytes'] / 1e6:,.1f} MB).",
    )
    _add_reading(page, report)
    page.section("On held-out text", _heldout_text(heldout, report["heldout_files"], options))
    if heldout["documents"]:
        _add_heldout(page, heldout)
    _add_pieces(page, report["pieces"])
    page.section("Special tokens", "No text becomes one of those before the newline, even if it spells it.")
    names = [name for name in report["special_tokens"] if not name.startswith("<|reserved_")]
    page.table(["id", "token"], [[report["special_tokens"][name], repr(name)[1:-1]] for name in names])
    reserved = [index for name, index in report["special_tokens"].items() if name.startswith("<|reserved_")]
    if reserved:
        page.paragraph(f"Reserved for later: ids {reserved[0]} to {reserved[-1]}.")
    return page


def _add_reading(page: Page, report: dict[str, Any]) -> None:
    read = report["read"]
    page.section("Text")
    page.table(
        ["", "count"],
        [
            ["files", len(report["inputs"])],
            ["documents read", read["documents"]],
            ["documents held out", read["heldout_documents"]],
            ["characters read", read["characters"]],
            ["sentences read", read["sentences"]],
            ["sentences in the sample", read["sampled_sentences"]],
            ["over-long lines cut into sentences", read["cut_lines"]],
            ["sentences the trainer skipped", report["skipped_sentences"]],
            ["different characters in the sample", read["different_characters"]],
        ],
    )


def _heldout_text(heldout: dict[str, Any], files: list[str], options: dict[str, Any]) -> str:
    if not heldout["documents"]:
        return "No text was held out, so there is nothing to judge it on. Give --heldout, or more text."
    source = f"from {len(files)} files of their own" if files else ""
    if not files:
        source = f"kept out of training, one in {options['sample']['heldout_every']} by the hash of its text"
    return f"{heldout['documents']:,} documents, {heldout['characters']:,} characters, {source}."


def _add_heldout(page: Page, heldout: dict[str, Any]) -> None:
    tokenizers = heldout["tokenizers"]
    rows: list[list[Cell]] = []
    for one in tokenizers:
        share = one["byte_token_share"]
        rows.append(
            [
                one["name"],
                one["kind"],
                one["vocab_size"],
                one["characters_per_token"],
                one["bytes_per_token"],
                "no such pieces" if share is None else f"{share:.3%}",
                one["changed_documents"],
            ]
        )
    header = ["tokenizer", "kind", "pieces", "characters per token", "bytes per token", "byte tokens", "texts changed"]
    page.table(header, rows)
    page.paragraph(
        "Byte tokens are single bytes of characters without a piece. Texts changed: documents that do not come back "
        "from their ids as they were."
    )
    names = [one["name"] for one in tokenizers]
    if len(tokenizers) > 1:
        page.bars("Characters per token", names, [one["characters_per_token"] for one in tokenizers])
    groups = list(heldout["groups"])
    page.bars(
        "Characters per token by kind of text",
        groups,
        [tokenizers[0]["by_group"][group]["characters_per_token"] or 0 for group in groups],
    )
    page.table(
        ["kind of text", "documents", "characters", *(f"characters per token: {name}" for name in names)],
        [
            [
                group,
                counts["documents"],
                counts["characters"],
                *(one["by_group"][group]["characters_per_token"] or 0 for one in tokenizers),
            ]
            for group, counts in heldout["groups"].items()
        ],
    )


def _add_pieces(page: Page, pieces: dict[str, Any]) -> None:
    page.section(
        "Pieces",
        f"{pieces['learned']:,} learned pieces, {pieces['single_characters']:,} of them single characters. "
        f"{pieces['dead']:,} were not used once in {pieces['measured_on_characters']:,} characters of held-out and "
        "training text: steps on the way to longer pieces, and rare characters.",
    )
    frequent = pieces["most_frequent"][:25]
    page.bars("Most frequent pieces", [entry["piece"] for entry in frequent], [entry["count"] for entry in frequent])
    longest = pieces["longest"]
    page.table(["longest pieces", "id", "characters"], [[e["piece"], e["id"], e["characters"]] for e in longest])
    page.texts("Some pieces never used", pieces["dead_examples"])
