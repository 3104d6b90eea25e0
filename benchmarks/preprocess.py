"""Preprocessing: this package, the design of Megatron-LM's script, and bare SentencePiece, in one run.

    python tools/fetch_sample_corpus.py --output-dir data
    python benchmarks/preprocess.py --input data/train.jsonl --tokenizer-model data/bpe.model --workers 2
    python benchmarks/preprocess.py --input data/train.jsonl --vocab-size 8000          # trains a tokenizer first

`peer` is the loop of Megatron-LM's tools/preprocess_data.py, line by line, on megatron-core's own builder: a pool fed
line by line with `imap(encode, file, 32)`, `json.loads` of each, one `encode` a document, ids as lists of numbers
through the pipe to one process, `add_document` for each. `bare` is what SentencePiece can do at most: its batch
encoding of texts that are in memory already, in as many processes, whose ids go nowhere. Every side is a process of
its own, they take turns, and the best round counts. MB are bytes of the input file; CPU seconds are those of all
processes of a side, and hardly depend on what else the machine does. The pairs of `ours` and `peer` are compared.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

SIDES = ("ours", "peer", "bare")
_BATCH_BYTES = 1 << 20


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="JSON Lines with a field `text`")
    parser.add_argument("--tokenizer-model", type=Path, help="a SentencePiece .model; trained on the input by default")
    parser.add_argument("--vocab-size", type=int, default=8000, help="of the tokenizer trained here")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_ours(flags: argparse.Namespace) -> None:
    """What tools/preprocess_data.py calls."""
    from megatron_moe.config.data import DataConfig
    from megatron_moe.data.preprocess import Preprocessing, preprocess

    job = Preprocessing(data=DataConfig(tokenizer_model=str(flags.tokenizer_model)))
    preprocess([flags.input], flags.output, job, workers=flags.workers, progress=False)


class PeerEncoder:
    """`Encoder` of Megatron-LM's script for one key and no sentence splitting."""

    tokenizer: sentencepiece.SentencePieceProcessor
    eod: int

    def __init__(self, model: Path) -> None:
        self.model = model

    def initializer(self) -> None:
        """Load the tokenizer in a worker."""
        PeerEncoder.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(self.model))
        PeerEncoder.eod = _eod(PeerEncoder.tokenizer)

    def encode(self, line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
        """One line."""
        data = json.loads(line)
        ids, lengths = {}, {}
        for key in ("text",):
            document: list[int] = []
            sentences: list[int] = []
            for sentence in [data[key]]:
                sentence_ids = PeerEncoder.tokenizer.encode_as_ids(sentence)
                if len(sentence_ids) > 0:
                    document.extend(sentence_ids)
                    sentences.append(len(sentence_ids))
            if len(document) > 0:
                document.append(PeerEncoder.eod)
                sentences[-1] += 1
            ids[key], lengths[key] = document, sentences
        return ids, lengths, len(line)


def run_peer(flags: argparse.Namespace) -> None:
    """`process_json_file` of Megatron-LM's script."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    size = sentencepiece.SentencePieceProcessor(model_file=str(flags.tokenizer_model)).get_piece_size()
    encoder = PeerEncoder(flags.tokenizer_model)
    builder = IndexedDatasetBuilder(f"{flags.output}.bin", dtype=DType.optimal_dtype(size))
    started, total = time.time(), 0
    with flags.input.open(encoding="utf-8") as file:
        pool = multiprocessing.get_context("fork").Pool(flags.workers, initializer=encoder.initializer)
        for count, (document, lengths, read) in enumerate(pool.imap(encoder.encode, file, 32), start=1):
            total += read
            builder.add_document(document["text"], lengths["text"])
            if count % 1000 == 0:
                elapsed = time.time() - started
                print(f"Processed {count} documents ({count / elapsed} docs/s, {total / elapsed / 1024 / 1024} MB/s).")
        builder.finalize(f"{flags.output}.idx")
        pool.close()
        pool.join()


def run_bare(flags: argparse.Namespace) -> None:
    """Batch encoding alone; reading and parsing happen before the clock starts, see `main_side`."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_encode_share, args=(flags.tokenizer_model, worker, flags.workers))
        for worker in range(flags.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process ended with {process.exitcode}")


_texts: list[str] = []


def _encode_share(model: Path, worker: int, workers: int) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for batch in _batches(_texts[worker::workers]):
        processor.encode(batch, out_type=int, num_threads=1)


def _batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += 3 * len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _eod(processor: sentencepiece.SentencePieceProcessor) -> int:
    named = processor.piece_to_id("<eod>")
    return named if named != processor.unk_id() else processor.eos_id()


def main_side(flags: argparse.Namespace) -> None:
    """One side, once: seconds of the clock and of all its processors, after all imports."""
    sides: dict[str, Callable[[argparse.Namespace], None]] = {"ours": run_ours, "peer": run_peer, "bare": run_bare}
    if flags.side == "ours":
        import megatron_moe.data.preprocess  # noqa: F401
    elif flags.side == "peer":
        import megatron.core.datasets.indexed_dataset  # noqa: F401
    else:
        with flags.input.open("rb") as file:
            _texts.extend(json.loads(line)["text"] for line in file)
    wall, main_process, children = time.monotonic(), *_cpu_seconds()
    sides[flags.side](flags)
    wall = time.monotonic() - wall
    main_process, children = (
        now - before for now, before in zip(_cpu_seconds(), (main_process, children), strict=True)
    )
    print(json.dumps({"wall": wall, "cpu": main_process + children, "main": main_process}))


def _cpu_seconds() -> tuple[float, float]:
    """Of this process, and of the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return usages[0].ru_utime + usages[0].ru_stime, usages[1].ru_utime + usages[1].ru_stime


def _measure(side: str, flags: argparse.Namespace, output: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--input", str(flags.input), "--output", str(output)]
    command += ["--tokenizer-model", str(flags.tokenizer_model), "--workers", str(flags.workers)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _digest(prefix: Path) -> str:
    content = hashlib.sha256()
    for ending in (".bin", ".idx"):
        content.update(Path(f"{prefix}{ending}").read_bytes())
    return content.hexdigest()[:16]


def _best(rounds: list[dict[str, Any]], name: str) -> float:
    return min(measured[name] for measured in rounds)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all sides in turns and print the table."""
    flags = _parse(argv)
    if flags.side is not None:
        main_side(flags)
        return
    with tempfile.TemporaryDirectory() as folder:
        if flags.tokenizer_model is None:
            from megatron_moe.data.tokenizer.build import train_tokenizer

            flags.tokenizer_model = Path(folder, "bench.model")
            train_tokenizer([flags.input], flags.tokenizer_model, flags.vocab_size)
        rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(flags.rounds):
            for side in SIDES:
                rounds[side].append(_measure(side, flags, Path(folder, side)))
        same = _digest(Path(folder, "ours")) == _digest(Path(folder, "peer"))
    megabytes = flags.input.stat().st_size / 1e6
    print(f"{flags.input.name}: {megabytes:.1f} MB, {flags.workers} workers, best of {flags.rounds} rounds")
    print(f"{'':6}{'seconds':>9}{'MB/s':>8}{'CPU s':>9}{'MB per CPU s':>14}")
    for side in SIDES:
        wall, cpu = _best(rounds[side], "wall"), _best(rounds[side], "cpu")
        print(f"{side:6}{wall:>9.2f}{megabytes / wall:>8.1f}{cpu:>9.2f}{megabytes / cpu:>14.1f}")
    for other, name in (("peer", "ours / peer"), ("bare", "ours / bare")):
        by_wall, by_cpu = (_best(rounds[other], unit) / _best(rounds["ours"], unit) for unit in ("wall", "cpu"))
        print(f"{name}: {by_wall:.2f} by the clock, {by_cpu:.2f} by CPU seconds")
    serial = {side: megabytes / max(1e-3, _best(rounds[side], "main")) for side in ("ours", "peer")}
    print(
        "work of the main process, which more workers do not divide: at most "
        f"{serial['ours']:.0f} MB/s for ours, {serial['peer']:.0f} MB/s for the peer"
    )
    print(f"same .bin and .idx as the peer: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
