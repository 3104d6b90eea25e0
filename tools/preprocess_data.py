"""Turn documents into the token files that training reads.

    python tools/preprocess_data.py --input data/train.jsonl --output-prefix data/train \\
        --tokenizer-model data/tokenizer.model --workers 2

writes data/train.bin and data/train.idx, to be given to training as --data-path data/train (or
--train-data-path).
The prefix is taken as it stands: unlike Megatron-LM's script, this one adds no "_text_document" to it. Every
    input
line is a JSON object; a line that is not is an error which names the file and the line.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.config.data import DataConfig
from megatron_moe.data.command_line import ToolParser, run_tool
from megatron_moe.data.preprocess import Preprocessing, preprocess


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON Lines files, .gz too, in order",
    )
    parser.add_argument(
        "--output-prefix", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx"
    )
    parser.add_argument(
        "--json-key",
        "--json-keys",
        default="text",
        metavar="KEY",
        help="field with the text (default %(default)s)",
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=("SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer"),
        default="SentencePieceTokenizer",
        help="default %(default)s",
    )
    parser.add_argument("--tokenizer-model", metavar="PATH", help=".model file, or folder of a Hugging Face tokenizer")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="for NullTokenizer only")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the end-of-document token (default: yes)",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default %(default)s)")
    return parser.parse_tool_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, tokenize, and print the totals."""
    args = _parse(argv)
    job = Preprocessing(
        data=DataConfig(tokenizer_type=args.tokenizer_type, tokenizer_model=args.tokenizer_model),
        vocab_size=args.vocab_size,
        json_key=args.json_key,
        append_eod=args.append_eod,
    )
    report = preprocess(args.input, args.output_prefix, job, workers=args.workers)
    print(
        f"{args.output_prefix}.bin/.idx: {report.documents:,} documents, {report.tokens:,} tokens, "
        f"{report.chars_per_token:.3f} characters per token, in {report.seconds:.1f} s"
    )
    if report.empty:
        print(f"left out: {report.empty:,} documents without text")


if __name__ == "__main__":
    run_tool(main)
