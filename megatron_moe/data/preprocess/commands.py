"""The command lines of tools/preprocess_data.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args, get_type_hints

from megatron_moe.config.data import DataConfig
from megatron_moe.data.command_line import ToolParser, add_workers
from megatron_moe.data.preprocess.job import MAX_DOCUMENT_BYTES, Preprocessing, PreprocessReport
from megatron_moe.data.preprocess.run import preprocess


def preprocess_files(doc: str, argv: Sequence[str]) -> None:
    """Tokenize files, and print the totals."""
    parser = ToolParser(doc)
    _add_input(parser)
    parser.add_argument(
        "--output-prefix", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx"
    )
    _add_job(parser)
    add_workers(parser)
    parser.add_argument(
        "--shard-tokens",
        type=int,
        metavar="N",
        help="tokens a pair may have; further ones go to PREFIX-00001-of-00004 and so on (default: one pair)",
    )
    args = parser.parse_tool_args(argv)
    report = preprocess(
        args.input, args.output_prefix, _job(args), workers=args.workers, shard_tokens=args.shard_tokens
    )
    _print_report(report)


def _print_report(report: PreprocessReport) -> None:
    for output in report.outputs:
        print(f"{output.prefix}.bin/.idx: {output.documents:,} documents, {output.tokens:,} tokens")
    for key, totals in report.totals.items():
        name = f"{key}: " if len(report.totals) > 1 else ""
        rate = totals.text_bytes / 1e6 / report.seconds
        print(
            f"{name}{totals.documents:,} documents, {totals.sequences:,} sequences, {totals.tokens:,} tokens, "
            f"{totals.chars_per_token:.3f} characters per token, in {report.seconds:.1f} s ({rate:.1f} MB/s)"
        )
        if totals.empty:
            print(f"{name}left out: {totals.empty:,} documents without text")
        if totals.cut_documents:
            print(f"{name}cut: {totals.cut_tokens:,} tokens off {totals.cut_documents:,} documents over --max-length")
    if report.resumed:
        print(f"went on from {report.resumed:,} of {report.parts:,} parts of an unfinished run")
    print(f"report: {report.file}")


def _add_input(parser: ToolParser) -> None:
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="JSON Lines, Parquet or plain text files, .gz or .zst too, or folders of them, in order",
    )


def _add_tokenizer(parser: ToolParser) -> None:
    parser.add_argument(
        "--tokenizer-type",
        choices=get_args(get_type_hints(DataConfig)["tokenizer_type"]),
        default=DataConfig.tokenizer_type,
        help="default %(default)s",
    )
    parser.add_argument("--tokenizer-model", metavar="PATH", help=".model file, or folder of a Hugging Face tokenizer")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="for NullTokenizer only")


def _add_job(parser: ToolParser) -> None:
    parser.add_argument(
        "--json-keys",
        "--json-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="fields with text, a pair for each; several are named PREFIX_KEY (default: text)",
    )
    _add_tokenizer(parser)
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the end-of-document token (default: yes)",
    )
    parser.add_argument(
        "--split-sentences",
        action="store_true",
        help="a sequence for each sentence (ended by 。！？!? or a newline) instead of one for each document",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens a document may have, its end among them; the rest is cut off and counted (default: no limit)",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=MAX_DOCUMENT_BYTES,
        metavar="N",
        help="refuse longer texts: a worker needs about 20 bytes of memory a byte of one (default %(default)s)",
    )


def _data(args: argparse.Namespace) -> DataConfig:
    return DataConfig(tokenizer_type=args.tokenizer_type, tokenizer_model=args.tokenizer_model)


def _job(args: argparse.Namespace) -> Preprocessing:
    return Preprocessing(
        data=_data(args),
        vocab_size=args.vocab_size,
        json_keys=tuple(args.json_keys),
        append_eod=args.append_eod,
        split_sentences=args.split_sentences,
        max_length=args.max_length,
        max_document_bytes=args.max_document_bytes,
    )
