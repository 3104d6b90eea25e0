"""The command lines of tools/preprocess_data.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np

from megatron_moe.config.base import UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data.command_line import ToolParser, add_workers
from megatron_moe.data.files import atomic_file, expand_inputs
from megatron_moe.data.preprocess.counts import count_tokens
from megatron_moe.data.preprocess.job import MAX_DOCUMENT_BYTES, Preprocessing, PreprocessReport
from megatron_moe.data.preprocess.lengths import describe, measure
from megatron_moe.data.preprocess.merge import expand_prefixes, merge
from megatron_moe.data.preprocess.report import read_report, report_path
from megatron_moe.data.preprocess.run import preprocess
from megatron_moe.data.preprocess.show import inspect
from megatron_moe.data.preprocess.verify import verify
from megatron_moe.data.tokenizer.load import load_tokenizer


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
    parser.add_argument("--verify", action="store_true", help="compare the result with the input, see `verify`")
    parser.add_argument("--stats", action="store_true", help="print lengths and packing, see `stats`")
    _add_seq_length(parser)
    args = parser.parse_tool_args(argv)
    if args.seq_length is not None and not args.stats:
        parser.error("--seq-length: goes with --stats")
    job = _job(args)
    report = preprocess(args.input, args.output_prefix, job, workers=args.workers, shard_tokens=args.shard_tokens)
    _print_report(report)
    if args.verify:
        pairs: dict[str, list[Path]] = {key: [] for key in job.json_keys}
        for output in report.outputs:
            pairs[output.key].append(output.prefix)
        _verify(report.inputs, pairs, job, args.workers)
    if args.stats:
        for output in report.outputs:
            print(f"{output.prefix}: " + describe(measure(output.prefix, args.seq_length)))


def verify_pairs(doc: str, argv: Sequence[str]) -> None:
    """Compare what a run wrote with its input; options and files are those of its report."""
    parser = ToolParser(doc)
    parser.add_argument("prefix", type=Path, metavar="PREFIX", help="the --output-prefix of the run")
    _add_input(parser, required=False)
    _add_tokenizer(parser)
    add_workers(parser)
    args = parser.parse_tool_args(argv)
    path = report_path(args.prefix)
    report = read_report(path)
    if "totals" not in report or not isinstance(report["options"], dict):
        raise UserError(f"{path}: is no report of a run that read text; verify the pairs that were merged instead")
    options = report["options"]
    job = Preprocessing(
        data=_data(args),
        vocab_size=args.vocab_size,
        json_keys=tuple(options["json_keys"]),
        append_eod=options["append_eod"],
        split_sentences=options["split_sentences"],
        max_length=options["max_length"],
        domain_key=options.get("domain_key"),
        domains=tuple(options["domains"]) if options.get("domains") else None,
        max_document_bytes=options["max_document_bytes"],
    )
    fingerprint = load_tokenizer(job.data, job.vocab_size).fingerprint
    if fingerprint != options["tokenizer_fingerprint"]:
        raise UserError(
            f"--tokenizer-model {args.tokenizer_model}: is not the one {args.prefix} was made with (fingerprint "
            f"{fingerprint}, not {options['tokenizer_fingerprint']})"
        )
    inputs = expand_inputs(args.input or [Path(file["file"]) for file in report["inputs"]])
    pairs: dict[str, list[Path]] = {key: [] for key in job.json_keys}
    for output in report["outputs"]:
        # Beside the report, wherever both were moved.
        pairs[output["key"]].append(args.prefix.parent / Path(output["prefix"]).name)
    _verify(inputs, pairs, job, args.workers)


def _verify(inputs: Sequence[Path], pairs: dict[str, list[Path]], job: Preprocessing, workers: int) -> None:
    count = verify(inputs, pairs, job, workers)
    print(f"verified: {count:,} documents are exactly what {len(inputs):,} input files give")


def merge_pairs(doc: str, argv: Sequence[str]) -> None:
    """Put pairs together."""
    parser = ToolParser(doc)
    parser.add_argument("prefixes", type=Path, nargs="+", metavar="PREFIX", help="pairs in order, or folders of pairs")
    parser.add_argument("--output-prefix", type=Path, required=True, metavar="PREFIX", help="the new pair")
    args = parser.parse_tool_args(argv)
    merged = merge(args.prefixes, args.output_prefix)
    print(f"{args.output_prefix}.bin/.idx: {merged.documents:,} documents, {merged.sequences:,} sequences")


def inspect_pair(doc: str, argv: Sequence[str]) -> None:
    """Show what a pair holds."""
    parser = ToolParser(doc)
    parser.add_argument("prefix", type=Path, metavar="PREFIX", help="the pair, without .bin or .idx")
    _add_tokenizer(parser)
    parser.add_argument("--document", type=int, nargs="+", default=[], metavar="I", help="show these, whole (from 0)")
    parser.add_argument("--first", type=int, metavar="N", help="show the beginnings of the first N (default 3)")
    args = parser.parse_tool_args(argv)
    wants_text = args.tokenizer_model is not None or args.tokenizer_type != DataConfig.tokenizer_type
    tokenizer = load_tokenizer(_data(args), args.vocab_size) if wants_text else None
    first = args.first if args.first is not None else 0 if args.document else 3
    for line in inspect(args.prefix, tokenizer, args.document, first):
        print(line)


def print_stats(doc: str, argv: Sequence[str]) -> None:
    """Print lengths and packing of pairs."""
    parser = ToolParser(doc)
    parser.add_argument("prefixes", type=Path, nargs="+", metavar="PREFIX", help="pairs, or folders of pairs")
    _add_seq_length(parser)
    args = parser.parse_tool_args(argv)
    for prefix in expand_prefixes(args.prefixes, "stats"):
        print(f"{prefix}: " + describe(measure(prefix, args.seq_length)))


def write_counts(doc: str, argv: Sequence[str]) -> None:
    """Count token ids of pairs into a file, which --router-token-counts takes."""
    parser = ToolParser(doc)
    parser.add_argument("prefixes", type=Path, nargs="+", metavar="PREFIX", help="pairs, or folders of pairs")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".npy of one count for each id")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="ids of the tokenizer (default: what the pairs' reports say)"
    )
    args = parser.parse_tool_args(argv)
    counts = count_tokens(expand_prefixes(args.prefixes, "counts"), args.vocab_size)
    with atomic_file(args.output) as stream:
        np.save(stream, counts)
    by_domain = f" in {counts.shape[0]} domains" if counts.ndim > 1 else ""
    print(f"{args.output}: {int(counts.sum()):,} tokens of {counts.shape[-1]:,} ids{by_domain}")


def _print_report(report: PreprocessReport) -> None:
    for output in report.outputs:
        print(f"{output.prefix}.bin/.idx: {output.documents:,} documents, {output.tokens:,} tokens")
    for key, totals in report.totals.items():
        name = f"{key}: " if len(report.totals) > 1 else ""
        rate = "" if report.resumed else f" ({totals.text_bytes / 1e6 / report.seconds:.1f} MB/s)"
        print(
            f"{name}{totals.documents:,} documents, {totals.sequences:,} sequences, {totals.tokens:,} tokens, "
            f"{totals.chars_per_token:.3f} characters per token, in {report.seconds:.1f} s{rate}"
        )
        if totals.empty:
            print(f"{name}left out: {totals.empty:,} documents without text")
        if totals.cut_documents:
            print(f"{name}cut: {totals.cut_tokens:,} tokens off {totals.cut_documents:,} documents over --max-length")
    if report.resumed:
        print(f"went on from {report.resumed:,} of {report.parts:,} parts of an unfinished run")
    print(f"report: {report.file}")


def _add_seq_length(parser: ToolParser) -> None:
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="with the statistics: how well documents fill samples of N tokens"
    )


def _add_input(parser: ToolParser, required: bool = True) -> None:
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=required,
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
    parser.add_argument("--merge-file", metavar="PATH", help="GPT2BPETokenizer: its merges.txt")
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
        "--domain-key",
        metavar="KEY",
        help="field that holds a document's domain: writes PREFIX.domains.npy and PREFIX.domains.json too",
    )
    parser.add_argument(
        "--domains",
        nargs="+",
        metavar="NAME",
        help="names of the domains in the order of their numbers; others are errors (default: as they first occur)",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=MAX_DOCUMENT_BYTES,
        metavar="N",
        help="refuse longer texts: a worker needs up to 35 bytes of memory a byte of one (default %(default)s)",
    )


def _data(args: argparse.Namespace) -> DataConfig:
    return DataConfig(
        tokenizer_type=args.tokenizer_type, tokenizer_model=args.tokenizer_model, merge_file=args.merge_file
    )


def _job(args: argparse.Namespace) -> Preprocessing:
    return Preprocessing(
        data=_data(args),
        vocab_size=args.vocab_size,
        json_keys=tuple(args.json_keys),
        append_eod=args.append_eod,
        split_sentences=args.split_sentences,
        max_length=args.max_length,
        domain_key=args.domain_key,
        domains=None if args.domains is None else tuple(args.domains),
        max_document_bytes=args.max_document_bytes,
    )
