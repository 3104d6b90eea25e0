"""Train a tokenizer on Chinese text: SentencePiece, lossless, with its Hugging Face twin and a report.

    python tools/build_tokenizer.py --input data/train.jsonl --output data/tokenizer --vocab-size 4000
    python tools/build_tokenizer.py --input cleaned/ --output tokenizer --compare other.model Qwen-folder

writes into the folder:

    tokenizer.model          for training: --tokenizer-model data/tokenizer/tokenizer.model
    tokenizer.json, ...      the same ids for transformers: AutoTokenizer.from_pretrained("data/tokenizer")
    report.json, .html       characters per token by kind of text, byte tokens, dead pieces, other tokenizers
    timings.json             seconds and memory of this run

Any text comes back from it exactly as it went in (identity normalisation, byte fallback, spaces and newlines kept).
Ids: 0-3 unk, bos, eos, pad; 4 <eod>; 5 <sep>; 6 <mask>; 7-10 <|system|> <|user|> <|assistant|> <|end|>; 11-31
reserved; then the newline, user symbols, 256 bytes and the learned pieces. No text becomes one of the ids below 32.

Training itself cannot be resumed: a killed run begins it again, but does not read the input again. SentencePiece's
memory is 34 (for 100 MB) to 58 times (for 35 MB) the sample's bytes; --split-by-unicode-script takes a fifth less.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_moe.data.command_line import ToolParser, add_workers, run_tool
from megatron_moe.data.tokenizer.build import build_tokenizer
from megatron_moe.data.tokenizer.options import BuildOptions
from megatron_moe.data.tokenizer.sample import SampleOptions
from megatron_moe.data.tokenizer.symbols import RESERVED_TOKENS, Symbols


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, build, and print what was made."""
    args = _parser().parse_tool_args(argv)
    options = BuildOptions(
        vocab_size=args.vocab_size,
        model_type=args.model_type,
        character_coverage=args.character_coverage,
        split_by_unicode_script=args.split_by_unicode_script,
        symbols=Symbols(args.reserved_tokens, tuple(args.user_symbols)),
        sample=SampleOptions(
            json_key=args.json_key,
            group_key=args.group_key,
            sentences=args.input_sentences,
            heldout_every=args.heldout_every,
            seed=args.seed,
        ),
    )
    report = build_tokenizer(
        args.input, args.output, options, heldout=args.heldout, compare=args.compare, workers=args.workers
    )
    print(_summary(report, args.output))


def _parser() -> ToolParser:
    defaults = BuildOptions()
    parser = ToolParser(__doc__)
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="JSON Lines (.jsonl), Parquet, plain text with a document a line (.txt), .gz or .zst too, or folders",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--vocab-size", type=int, default=defaults.vocab_size, metavar="N", help="pieces (default %(default)s)"
    )
    parser.add_argument(
        "--model-type",
        choices=("bpe", "unigram"),
        default=defaults.model_type,
        help="unigram has no Hugging Face export (default %(default)s)",
    )
    parser.add_argument(
        "--input-sentences",
        type=int,
        default=defaults.sample.sentences,
        metavar="N",
        help="lines sampled at random from all input. SentencePiece keeps about 35 times their bytes in memory, and "
        "more of them hardly help: from 1 to 2 million lines of the sample corpus, tokens get 0.14 %% fewer "
        "(default %(default)s)",
    )
    parser.add_argument("--json-key", default="text", metavar="KEY", help="field with the text (default %(default)s)")
    parser.add_argument(
        "--group-key",
        default=defaults.sample.group_key,
        metavar="KEY",
        help="field with the kind of text, for the report; the file's name where it is missing (default %(default)s)",
    )
    parser.add_argument(
        "--heldout-every",
        type=int,
        default=defaults.sample.heldout_every,
        metavar="N",
        help="hold one document in N out of training, chosen by its text, for the report; 0 for none "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--heldout",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="held-out text instead of a part of --input; of more than 10,000 documents a sample",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="other tokenizers for the report: a SentencePiece .model, a Hugging Face folder or tokenizer.json, a "
        "folder with GPT-2's vocab.json and merges.txt",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        metavar="SHARE",
        help="characters with pieces of their own (default 0.9995, or less so that they fill at most half of "
        "the vocabulary; 0.98 is the least)",
    )
    parser.add_argument(
        "--split-by-unicode-script",
        action="store_true",
        help="no piece holds both Han and punctuation or letters; costs 9 %% more tokens on the sample corpus",
    )
    parser.add_argument(
        "--reserved-tokens",
        type=int,
        default=RESERVED_TOKENS,
        metavar="N",
        help="control symbols kept free for later (default %(default)s, which fills the ids up to 31)",
    )
    parser.add_argument(
        "--user-symbols", nargs="+", default=[], metavar="TEXT", help="pieces that text becomes wherever it spells them"
    )
    parser.add_argument(
        "--seed", type=int, default=defaults.sample.seed, help="another one takes another sample (default %(default)s)"
    )
    add_workers(parser)
    return parser


def _summary(report: dict[str, Any], output: Path) -> str:
    read, heldout = report["read"], report["heldout"]
    lines = [
        f"{output}: {report['options']['vocab_size']} pieces from {read['documents']:,} documents, "
        f"{read['sampled_characters']:,} characters in {read['sampled_sentences']:,} sentences",
        f"character coverage {report['options']['character_coverage']:.4f}; {read['cut_lines']} over-long lines were "
        "cut into sentences, none was skipped",
    ]
    if not heldout["documents"]:
        lines.append("no text was held out to judge it on")
    for one in heldout["tokenizers"] if heldout["documents"] else []:
        share = one["byte_token_share"]
        lines.append(
            f"{one['name']}: {one['characters_per_token']:.3f} characters per token on {heldout['documents']:,} "
            f"held-out documents, {one['changed_documents']} of them changed"
            + ("" if share is None else f", {share:.2%} of the tokens are single bytes")
        )
    return "\n".join([*lines, f"see {output / 'report.html'}"])


if __name__ == "__main__":
    run_tool(main)
