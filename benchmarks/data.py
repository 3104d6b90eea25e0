"""The data chain, every step beside the bare libraries and the peers' designs: cleaning here, and the other three.

    python tools/fetch_sample_corpus.py --output-dir data --sources all
    python benchmarks/data.py --corpus data                     # all of it, about a quarter of an hour
    python benchmarks/data.py --corpus data --only cleaning rules

Cleaning runs on WuDao-shaped parts of three kinds of text, each repeated to --megabytes with another last sentence, so
that near no document is a duplicate: `prose` (news and a novel, 2 KB a document, half of what WuDao's have), `short`
(reviews of 220 bytes, manuals full of code), and on the corpus as fetched, `all`, three quarters of which are poems of
220 bytes in traditional characters, where nearly every document changes. Every side is a process of its own; rates are
megabytes of input per second of processor time, all processes together, which other work on the machine hardly changes;
wall-clock time is printed for --workers 1 and 2.

  orjson + zstd     reads records and writes lines, does nothing else: what no cleaner can exceed
  PAI's design      a pool over files, json.load of the whole file, regular expressions, json.dumps
  ours              tools/clean_wudao.py with the recipes pai and wudao-default, the latter without deduplication, with
                    exact and with near deduplication

`rules` prints what each rule of wudao-default costs on each kind of text. The rest is printed by
benchmarks/dedup_rates.py, benchmarks/tokenizer.py and benchmarks/preprocess.py.
"""

import argparse
import json
import multiprocessing
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import zstandard

from megatron_moe.config.base import UserError
from megatron_moe.data.command_line import ToolParser, run_tool
from megatron_moe.data.wudao.profile import cost_table, profile_recipe
from megatron_moe.data.wudao.recipe import load_recipe

HERE = Path(__file__).resolve().parent
CLEANER = HERE.parent / "tools" / "clean_wudao.py"
PARTS = 4
KINDS = {"prose": ("新闻", "小说"), "short": ("评论", "科技")}
OTHERS = {
    "deduplication": ("Deduplication and decontamination", "dedup_rates.py", "--corpus"),
    "tokenizer": ("Building a tokenizer", "tokenizer.py", "--corpus"),
    "preprocessing": ("Preprocessing", "preprocess.py", "--input"),
}
TEXTS = (*KINDS, "all")
STEPS = ("cleaning", "rules", *OTHERS)
# Documents of a kind that the rules are measured on.
MEASURED = 5000
SETTINGS = {
    "ours, pai": ["--recipe", "pai"],
    "ours, wudao-default, no dedup": ["--dedup", "none"],
    "ours, wudao-default, exact": ["--dedup", "exact"],
    "ours, wudao-default, near": ["--dedup", "near"],
}
# Independent of the recipe under test: what Pai-Megatron-Patch is known to delete.
_PAI_DELETES = re.compile(
    "[^0-9a-zA-Z一-龥.，,\\-。%《*》/•、&＆(—)（+）：？!！“”· ]",
)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="of tools/fetch_sample_corpus.py")
    parser.add_argument(
        "--megabytes", type=int, default=64, metavar="N", help="of each repeated text (default %(default)s)"
    )
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS, help="what to clean (default: all three)")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="some of the steps")
    return parser.parse_tool_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen steps."""
    args = _parse(argv)
    train = args.corpus / "train.jsonl"
    if not train.is_file():
        raise UserError(f"--corpus {args.corpus}: holds no train.jsonl; make it with tools/fetch_sample_corpus.py")
    if "cleaning" in args.only:
        cleaning(args.corpus, args.texts, args.megabytes)
    if "rules" in args.only:
        rules(train)
    for step, (heading, script, flag) in OTHERS.items():
        if step in args.only:
            print(f"\n## {heading}\n", flush=True)
            subprocess.run([sys.executable, str(HERE / script), flag, str(train)], check=True)


def cleaning(corpus: Path, texts: Sequence[str], megabytes: int) -> None:
    """Print the table of the cleaner."""
    print(
        "## Cleaning\n\n| text | side | MB/s of a core | seconds, 1 worker | 2 workers |\n|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for text in texts:
            if text in KINDS:
                parts = write_repeated(corpus / "train.jsonl", KINDS[text], folder / text, megabytes << 20)
            else:
                parts = sorted((corpus / "wudao").glob("part-*.json"))
            size = sum(path.stat().st_size for path in parts)
            for side in ("orjson + zstd", "PAI's design", *SETTINGS):
                walls, cores = [], []
                for workers in (1, 2):
                    wall, processor = measure(
                        side, parts, workers, folder / f"{text}-{side}-{workers}".replace(" ", "-")
                    )
                    walls.append(wall)
                    cores.append(processor)
                rate = size / 1e6 / min(cores)
                print(
                    f"| {text}, {size / 1e6:.0f} MB | {side} | {rate:.1f} | {walls[0]:.1f} | {walls[1]:.1f} |",
                    flush=True,
                )


def rules(train: Path) -> None:
    """Print what each rule costs, by kind of text."""
    recipe = load_recipe("wudao-default")
    texts: dict[str, list[str]] = {}
    for record in map(orjson.loads, train.open("rb")):
        texts.setdefault(record["dataType"], []).append(record["text"])
    for kind, documents in texts.items():
        measured = documents[:MEASURED]
        print(f"\n## Rules, {kind}: {len(measured):,} documents\n", flush=True)
        print(cost_table(profile_recipe(recipe, measured), measured), flush=True)


def write_repeated(train: Path, kinds: Sequence[str], folder: Path, size: int) -> list[Path]:
    """Parts of all text of some kinds, repeated with another last sentence until they have `size` bytes together."""
    folder.mkdir()
    records = [record for record in map(orjson.loads, train.open("rb")) if record["dataType"] in kinds]
    lines: list[list[bytes]] = [[] for _ in range(PARTS)]
    written = turn = 0
    while written < size:
        for number, record in enumerate(records):
            content = f"{record['text']}\n以上文字是第{turn}次付印，第{number}篇，版权归作者所有。"
            entry = {"id": number, "dataType": record["dataType"], "title": f"{turn}-{number}", "content": content}
            line = orjson.dumps(entry)
            lines[(number + turn) % PARTS].append(line)
            written += len(line)
        turn += 1
    paths = [folder / f"part-{number}.json" for number in range(PARTS)]
    for path, part in zip(paths, lines, strict=True):
        path.write_bytes(b"[" + b",\n".join(part) + b"]\n")
    return paths


def measure(side: str, parts: Sequence[Path], workers: int, output: Path) -> tuple[float, float]:
    """Seconds by the clock and of all processors, of one run into an empty folder."""
    before, started = _children(), time.perf_counter()
    if side in SETTINGS:
        command = [sys.executable, str(CLEANER), "--input", *map(str, parts), "--output", str(output)]
        done = subprocess.run(
            [*command, "--workers", str(workers), *SETTINGS[side]], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(f"{CLEANER.name} failed: {done.stderr.strip()}")
    else:
        work = _bare if side == "orjson + zstd" else _pai_design
        output.mkdir()
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for result in [pool.apply_async(work, (path, output / f"{path.name}.bare")) for path in parts]:
                result.get()
            pool.close()
            pool.join()
    return time.perf_counter() - started, _children() - before


def _bare(path: Path, output: Path) -> None:
    records: list[dict[str, Any]] = orjson.loads(path.read_bytes())
    with output.open("wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as stream:
        for record in records:
            stream.write(orjson.dumps({"text": record["content"], "dataType": record["dataType"]}) + b"\n")


def _pai_design(path: Path, output: Path) -> None:
    with path.open(encoding="utf-8") as source, output.open("w", encoding="utf-8") as target:
        target.writelines(_pai_lines(json.load(source)))


def _pai_lines(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    for record in records:
        text = re.sub(r"https?://\S+", "", record["content"])
        text = _PAI_DELETES.sub("", re.sub(" +", " ", text)).strip()
        yield json.dumps({"instruction": "", "input": "", "text": text}, ensure_ascii=False) + "\n"


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    run_tool(main)
