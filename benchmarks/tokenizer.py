"""Building a tokenizer: the whole of tools/build_tokenizer.py against SentencePiece alone on the same lines.

    python tools/fetch_sample_corpus.py --output-dir data --sources all
    python benchmarks/tokenizer.py --corpus data/train.jsonl --megabytes 35 --vocab-size 50000

Both sides train with the same settings, in turns, each in processes of its own, so that its peak memory is its own.
`bare` reads a prepared text file, a sentence a line. `ours` reads JSON Lines, samples, proves that no line was
skipped, trains, exports to Hugging Face, and judges the result on text held out. CPU seconds count all processes of a
side; they are what other work on the machine disturbs least. With --lines N the exported tokenizer's ids are compared
with SentencePiece's on N lines of the corpus as well.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_moe.data.documents import read_documents
from megatron_moe.data.files import expand_inputs
from megatron_moe.data.tokenizer.build import build_tokenizer
from megatron_moe.data.tokenizer.kinds.sentence_piece import SentencePieceTokenizer
from megatron_moe.data.tokenizer.options import BuildOptions
from megatron_moe.data.tokenizer.train import TrainOptions
from megatron_moe.data.tokenizer.train_process import peak_memory

_HELDOUT_BYTES = 700_000
# The same on both sides; ours would choose it otherwise.
_COVERAGE = 0.9995


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="JSON Lines files or folders")
    parser.add_argument("--megabytes", type=float, default=35, help="text to train on, taken evenly from the corpus")
    parser.add_argument("--vocab-size", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lines", type=int, default=0, help="compare the exported ids on so many lines")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run both sides in turns and print a table."""
    args = _parse(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = prepare(args.corpus, folder, int(args.megabytes * 1e6))
        print(f"{size / 1e6:.1f} MB of text, {args.vocab_size} pieces", flush=True)
        sides: dict[str, list[dict[str, float]]] = {"bare": [], "ours": []}
        for turn in range(args.repeats):
            sides["bare"].append(apart(bare, folder, args.vocab_size))
            sides["ours"].append(apart(ours, folder, args.vocab_size, turn))
        for side, runs in sides.items():
            best = {key: min(run[key] for run in runs) for key in runs[0]}
            print(
                f"{side}: {best['cpu']:6.2f} CPU s, {best['wall']:6.2f} s, trainer's peak {best['peak'] / 2**30:.2f} "
                f"GiB = {best['peak'] / size:.1f} x the text, reader's peak {best['reader'] / 2**30:.2f} GiB"
            )
        ratios = {
            key: statistics.median(
                one[key] / other[key] for one, other in zip(sides["ours"], sides["bare"], strict=True)
            )
            for key in ("cpu", "wall")
        }
        print(f"ours / bare: {ratios['cpu']:.3f} of CPU seconds, {ratios['wall']:.3f} of the time (median of turns)")
        if args.lines:
            compare_ids(folder / "ours-0", lines_of(args.corpus), args.lines)


def prepare(corpus: Sequence[Path], folder: Path, size: int) -> int:
    """Write train.jsonl, heldout.jsonl and the bare side's train.txt; the bytes of text."""
    files = expand_inputs(corpus, "--corpus")
    total = sum(len(text.encode()) for path in files for text in read_documents(path, "text"))
    every = max(1, int(total / (size + _HELDOUT_BYTES)))
    written = 0
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "heldout.jsonl").open("w", encoding="utf-8") as heldout,
        (folder / "train.txt").open("w", encoding="utf-8", newline="\n") as plain,
    ):
        taken = (text for path in files for text in read_documents(path, "text"))
        for number, text in enumerate(taken):
            if number % every:
                continue
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            if number // every % 50 == 0:
                heldout.write(line)
                continue
            if written >= size:
                continue
            train.write(line)
            plain.writelines(part + "\n" for part in text.split("\n") if part.strip())
            written += len(text.encode())
    return written


def apart(side: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """Run one side in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(side, arguments)
        # Leaving the block alone would kill the process with what it has printed and not written yet.
        pool.close()
        pool.join()
    return result


def bare(folder: Path, vocab_size: int) -> dict[str, float]:
    """SentencePiece on the text file."""
    import sentencepiece

    options = TrainOptions(vocab_size=vocab_size, character_coverage=_COVERAGE).for_sentencepiece()
    started = time.perf_counter(), time.process_time()
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "train.txt"), model_prefix=str(folder / "bare"), **{**options, "minloglevel": 2}
    )
    used = time.process_time() - started[1]
    return {"cpu": used, "wall": time.perf_counter() - started[0], "peak": peak_memory(), "reader": 0}


def ours(folder: Path, vocab_size: int, turn: int) -> dict[str, float]:
    """The whole tool."""
    output = folder / f"ours-{turn}"
    started = time.perf_counter(), _cpu()
    build_tokenizer(
        [folder / "train.jsonl"],
        output,
        BuildOptions(vocab_size=vocab_size, character_coverage=_COVERAGE),
        heldout=[folder / "heldout.jsonl"],
        show_progress=False,
    )
    used, wall = _cpu() - started[1], time.perf_counter() - started[0]
    timings: dict[str, Any] = json.loads((output / "timings.json").read_bytes())
    print(f"  ours: {timings['seconds']}", flush=True)
    return {"cpu": used, "wall": wall, "peak": timings["trainer_peak_bytes"], "reader": timings["own_peak_bytes"]}


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def lines_of(corpus: Sequence[Path]) -> Iterator[str]:
    """Every line of every document."""
    for path in expand_inputs(corpus, "--corpus"):
        for text in read_documents(path, "text"):
            yield from text.split("\n")


def compare_ids(folder: Path, lines: Iterator[str], count: int) -> None:
    """Print on how many lines the exported tokenizer gives other ids than SentencePiece."""
    from tokenizers import Tokenizer

    exported = Tokenizer.from_file(str(folder / "tokenizer.json"))
    exported.encode_special_tokens = True
    model = SentencePieceTokenizer(folder / "tokenizer.model")
    compared = different = 0
    for _, line in zip(range(count), lines, strict=False):
        compared += 1
        different += exported.encode(line, add_special_tokens=False).ids != model.encode(line)
    print(f"ids of the export and of SentencePiece: {different} of {compared} lines differ")


if __name__ == "__main__":
    main()
