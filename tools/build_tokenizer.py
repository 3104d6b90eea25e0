"""Train a SentencePiece BPE tokenizer on Chinese text.

    python tools/build_tokenizer.py --input data/train.jsonl --output-prefix data/tokenizer --vocab-size 4000

writes data/tokenizer.model, to be given to training as --tokenizer-model. Any text comes back from it exactly
as it went in (identity normalisation, byte fallback, newlines kept). Ids 0-3 are unk, bos, eos and pad, 4 is
<eod>.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_moe.data.command_line import ToolParser, run_tool
from megatron_moe.data.tokenizer.build import build_tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, train, and print what was made."""
    parser = ToolParser(__doc__)
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON Lines (.jsonl, .jsonl.gz), or plain text (.txt, .txt.gz)",
    )
    parser.add_argument("--output-prefix", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.model")
    parser.add_argument("--vocab-size", type=int, default=50000, metavar="N", help="pieces (default %(default)s)")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="field of a line (default %(default)s)")
    parser.add_argument(
        "--character-coverage",
        type=float,
        metavar="SHARE",
        help="characters with pieces of their own (default 0.9995, or less so that they fill at most half of "
        "the vocabulary)",
    )
    args = parser.parse_tool_args(argv)
    report = build_tokenizer(
        args.input,
        args.output_prefix,
        args.vocab_size,
        json_key=args.json_key,
        character_coverage=args.character_coverage,
    )
    print(
        f"{args.output_prefix}.model: {report.vocab_size} pieces from {report.documents:,} documents, "
        f"{report.characters:,} characters, in {report.seconds:.1f} s\n"
        f"character coverage {report.character_coverage:.4f}; {report.cut_lines} over-long lines were cut "
        f"into sentences, none was skipped"
    )


if __name__ == "__main__":
    run_tool(main)
