"""Turn documents into the token files that training reads.

    python tools/preprocess_data.py --input data/train.jsonl --output-prefix data/train \\
        --tokenizer-model data/tokenizer/tokenizer.model --workers 2

writes data/train.bin and data/train.idx, to be given to training as --data-path data/train (or --train-data-path),
and data/train.report.json. Inputs are JSON Lines, Parquet, or plain text with a document a line; the first and last
also as .gz or .zst; a folder stands for all such files in it. A record that cannot be used is an error which names
the file and the line. Several --json-keys give a pair each: data/train_text, data/train_title. The prefix is taken as
it stands: unlike Megatron-LM's script, this one adds no "_text_document" to it.

A run that was stopped leaves its finished parts in data/train.parts; the same command goes on from there. What is
written is the same for any number of workers. Other commands:

    MODEL=data/tokenizer/tokenizer.model
    python tools/preprocess_data.py verify  data/train --input data/train.jsonl --tokenizer-model $MODEL
    python tools/preprocess_data.py inspect data/train --tokenizer-model $MODEL --document 17
    python tools/preprocess_data.py stats   data/train --seq-length 2048
    python tools/preprocess_data.py merge   data/part1 data/part2 --output-prefix data/all
    python tools/preprocess_data.py counts  data/train --output data/train.counts.npy

With --domain-key FIELD the value of that field is the document's domain (--num-domains in training): its number
stands in data/train.domains.npy, the names in data/train.domains.json.
"""

import sys
from collections.abc import Callable, Sequence

from megatron_moe.data.command_line import run_tool
from megatron_moe.data.preprocess import commands

COMMANDS: dict[str, Callable[[str, Sequence[str]], None]] = {
    "counts": commands.write_counts,
    "inspect": commands.inspect_pair,
    "merge": commands.merge_pairs,
    "stats": commands.print_stats,
    "verify": commands.verify_pairs,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and do what it says."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        COMMANDS[words[0]](__doc__ or "", words[1:])
    else:
        commands.preprocess_files(__doc__ or "", words)


if __name__ == "__main__":
    run_tool(main)
