"""Clean a Chinese corpus: WuDao's parts, or any JSON arrays, JSON Lines and Parquet with a text in each record.

    python tools/clean_wudao.py --input WuDaoCorpus2.0_base_200G --output cleaned --workers 16
    python tools/clean_wudao.py --input web.jsonl.gz --text-key text --recipe strict --output cleaned --dedup exact
    python tools/clean_wudao.py --show-recipe wudao-default > mine.yaml

writes cleaned/NAME.jsonl.zst, one shard for each input file or part of a large one, cleaned/report.json and
cleaned/report.html (what each rule did, with samples), cleaned/timings.json, and cleaned/quarantine.jsonl with all that
could not be read as it stands: file, byte offset (or row of Parquet), reason, and the first bytes.

A run that was killed goes on where it was when the same command is given again. The output depends on the input and
the recipe alone: not on --workers, not on --executor, not on interruptions. Of equal and similar documents the first
is kept, in the order of --input (files as given, files in folders by path).

Exit codes: 0 done; 3 done, but something is in the quarantine; 2 a mistake in flags, recipe or files; 1 a worker failed
(start again to go on); 130 interrupted.
"""

import sys
from collections.abc import Sequence

from megatron_moe.data.command_line import run_tool
from megatron_moe.data.wudao import command


def main(argv: Sequence[str] | None = None) -> None:
    """Clean; leaves with the exit code where it is not 0."""
    code = command.main(argv, __doc__)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_tool(main)
