"""Deduplication: rates of signing and of decontamination beside the alternatives, and what it finds in real text.

    python tools/fetch_sample_corpus.py --output-dir data --full
    python benchmarks/dedup_rates.py --corpus data/train.jsonl
    python benchmarks/dedup_rates.py --corpus data/train.jsonl --quality
    python benchmarks/dedup_rates.py --scale 2000000

Rates are MB of UTF-8 text per second of CPU time, one process, the best of --repeats; the sides take turns, so that
whatever else the machine does falls on all of them. All signatures have 128 permutations over 5-grams of characters
(126 for datatrove, 18 bands of 7). Slow sides get a part of the text. What is not installed is left out and said.

--quality plants copies with edits among real documents, compares all pairs by the sets of their n-grams, and prints
recall by true similarity beside what the parameters promise. --scale matches that many random signatures, a tenth
of them copies, and prints seconds, peak memory and bytes, to be multiplied to the size of a corpus.
"""

import argparse
import dataclasses
import importlib
import json
import math
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_moe.data.dedup import (
    Decontamination,
    Decontaminator,
    NearDedup,
    Signatures,
    Signer,
    decide,
    match_band,
    match_exact,
    s_curve,
    signature_writer,
)
from megatron_moe.data.dedup.minhash import minhash
from megatron_moe.data.dedup.units import Grams, grams_of, pieces_of, unit_strings, units_of

Texts = Sequence[str]
_SLOW_MEGABYTES = 2.0


@dataclass
class Rate:
    """One line of the table."""

    what: str
    side: str
    megabytes_per_second: float


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a JSON Lines file with `text`")
    parser.add_argument("--megabytes", type=float, default=20, help="text to work on, taken evenly from the corpus")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quality", action="store_true", help="plant copies and measure recall and precision")
    parser.add_argument("--originals", type=int, default=3000, help="documents of which copies are planted")
    parser.add_argument("--scale", type=int, default=0, help="match so many random signatures")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables asked for."""
    args = _parse(argv)
    if args.corpus:
        texts = sample(args.corpus, args.megabytes)
        if args.quality:
            quality(texts, args.originals)
        else:
            print_rates(texts, args.repeats)
    if args.scale:
        scale(args.scale)


def sample(path: Path, megabytes: float) -> list[str]:
    """Every n-th document, so that there are about so many megabytes."""
    step = max(1, round(path.stat().st_size / (megabytes * 1e6)))
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line)["text"] for number, line in enumerate(stream) if number % step == 0]


def _size(texts: Texts) -> int:
    return sum(len(text.encode()) for text in texts)


def print_rates(texts: Texts, repeats: int) -> None:
    """The table of rates, for all the text and for its longer documents, which are more like web pages."""
    long = [text for text in texts if len(text) >= 400]
    for name, part in (("all documents", texts), ("documents of 400 characters and more", long)):
        if part:
            print(f"{name}: {len(part):,}, {_size(part) / 1e6:.1f} MB, {_size(part) / len(part):,.0f} bytes each")
            for rate in rates(part, repeats):
                print(f"  {rate.what:<16} {rate.side:<58} {rate.megabytes_per_second:8.1f} MB/s")


def rates(texts: Texts, repeats: int = 3) -> list[Rate]:
    """CPU rates of every side that is installed, ours first."""
    slow = _part(texts, _SLOW_MEGABYTES)
    grams = [grams_of(units_of(piece), 5) for piece in pieces_of(texts)]
    signer, near = Signer(NearDedup()), NearDedup()
    evaluation = _evaluation_set(texts)
    sides: list[tuple[str, str, Callable[[], object], Texts]] = [
        ("sign", "ours: text to exact key, bands and sketch", lambda: _batched(signer.sign, texts), texts),
        ("hash 5-grams", "ours: units and n-grams in numpy", lambda: _hash(texts), texts),
        (
            "sketch hashes",
            "ours: fast similarity sketching",
            lambda: [minhash(g, 128, near.seed) for g in grams],
            texts,
        ),
        ("sketch hashes", "numpy: every n-gram with every permutation", lambda: [_classic(g) for g in grams], texts),
    ]
    sides += _rensa(texts, slow, grams) + _datasketch(slow) + _datatrove(slow)
    sides += _decontamination(texts, slow, evaluation)
    best = [float("inf")] * len(sides)
    for _ in range(repeats):
        for place, (_what, _side, work, _part_of) in enumerate(sides):
            begin = time.process_time()
            work()
            best[place] = min(best[place], time.process_time() - begin)
    return [
        Rate(what, side, _size(part) / 1e6 / seconds)
        for (what, side, _, part), seconds in zip(sides, best, strict=True)
    ]


def _part(texts: Texts, megabytes: float) -> Texts:
    step = max(1, round(_size(texts) / (megabytes * 1e6)))
    return texts[::step]


def _batched(work: Callable[[Texts], object], texts: Texts) -> None:
    for begin in range(0, len(texts), 500):
        work(texts[begin : begin + 500])


def _hash(texts: Texts) -> None:
    for piece in pieces_of(texts):
        grams_of(units_of(piece), 5)


def _classic(grams: Grams) -> object:
    """128 multiply-shift permutations of each hash, least per document; 16 at a time to stay in the cache."""
    random_ = np.random.default_rng(0)
    odd = random_.integers(0, 1 << 63, size=128, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    begins = (np.cumsum(grams.counts) - grams.counts)[grams.counts > 0]
    return [
        np.minimum.reduceat((grams.hashes[:, None] * odd[None, first : first + 16]) >> np.uint64(32), begins, axis=0)
        for first in range(0, 128, 16)
        if len(begins)
    ]


Side = tuple[str, str, Callable[[], object], Texts]


def _shingles(text: str) -> list[str]:
    return [text[place : place + 5] for place in range(len(text) - 4)]


def _rensa(texts: Texts, slow: Texts, grams: Sequence[Grams]) -> list[Side]:
    rensa = _installed("rensa")
    if rensa is None:
        return []

    def from_hashes(method: Callable[..., Any]) -> None:
        for piece in grams:
            offsets = np.concatenate([[0], np.cumsum(piece.counts)]).astype(np.uint64)
            np.array(method(piece.hashes, offsets, 128, 1).to_rows(), dtype=np.uint32)

    classic, circulant = rensa.RMinHash, rensa.CMinHash
    flat, rho = classic.digest_matrix_from_flat_token_hashes, classic.digest_matrix_from_flat_token_hashes_rho

    def from_strings(method: Callable[..., Any]) -> None:
        _batched(lambda batch: method([_shingles(text) for text in batch], 128, 1), slow)

    return [
        ("sketch hashes", "rensa RMinHash from our hashes", lambda: from_hashes(flat), texts),
        ("sketch hashes", "rensa Rho from our hashes (biased, see docs)", lambda: from_hashes(rho), texts),
        ("sign", "rensa RMinHash from strings", lambda: from_strings(classic.digest_matrix_from_token_sets), slow),
        ("sign", "rensa CMinHash from strings", lambda: from_strings(circulant.digests_from_token_sets), slow),
    ]


def _datasketch(slow: Texts) -> list[Side]:
    datasketch = _installed("datasketch")
    if datasketch is None:
        return []

    def sign() -> None:
        datasketch.MinHash.bulk([[each.encode() for each in _shingles(text)] for text in slow], num_perm=128)

    return [("sign", "datasketch MinHash.bulk", sign, slow)]


def _datatrove(slow: Texts) -> list[Side]:
    module = _installed("datatrove.pipeline.dedup.minhash")
    tokenizers = _installed("datatrove.utils.word_tokenizers")
    if module is None or tokenizers is None:
        return []

    class Characters(tokenizers.WhitespaceTokenizer):  # type: ignore[misc, name-defined]
        def word_tokenize(self, text: str) -> list[str]:
            return list(text)

    with tempfile.TemporaryDirectory() as folder:
        config = module.MinhashConfig(n_grams=5, num_buckets=18, hashes_per_bucket=7)
        step = module.MinhashDedupSignature(folder, config, language=Characters())
    # datatrove 0.10.1 hands strings to xxhash, which takes only bytes since version 4.
    step._hash_func = lambda gram: xxhash.xxh64_intdigest(gram.encode())

    def sign() -> None:
        for text in slow:
            shingles = step.get_shingles(text)
            if len(shingles):
                step.get_signature(shingles)

    return [("sign", "datatrove 0.10 MinhashDedupSignature, by character", sign, slow)]


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"  not measured: {name} ({error})")
        return None


def _evaluation_set(texts: Texts) -> list[str]:
    """2,000 passages of 60 characters written backwards: alike in their characters, found in no document."""
    chooser = random.Random(0)
    long = [text for text in texts if len(text) > 100]
    picked = [chooser.choice(long) for _ in range(2000)]
    return ["".join(reversed(text[:60])) for text in picked]


def _decontamination(texts: Texts, slow: Texts, evaluation: Texts) -> list[Side]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "evaluation.txt"
        path.write_text("\n".join(text.replace("\n", "") for text in evaluation), encoding="utf-8")
        ours = Decontaminator(Decontamination(files=(str(path),)))
    known = {run for text in evaluation for run in _runs(text)}

    def plain() -> None:
        for text in slow:
            known.isdisjoint(_runs(text))

    return [
        ("decontaminate", "ours: a batch at a time", lambda: _batched(ours.find, texts), texts),
        ("decontaminate", "ours: a document at a time", lambda: [ours.find([text]) for text in texts], texts),
        ("decontaminate", "a set of strings, the usual way", plain, slow),
    ]


def _runs(text: str) -> Iterator[str]:
    kept = "".join(character for character in text if character.isalnum())
    return (kept[place : place + 13] for place in range(len(kept) - 12))


EDITS = ("replace", "delete", "insert", "shuffle a sentence", "header and footer")


def _edited(text: str, kind: str, rate: float, chooser: random.Random, filler: str) -> str:
    """A copy of a text with about this share of its characters touched."""
    if kind == "header and footer":
        extra = filler[: max(1, int(len(text) * rate * 5))]
        return extra + "\n" + text + "\n" + extra[::-1]
    if kind == "shuffle a sentence":
        parts = text.split("。")
        moved = parts.pop(chooser.randrange(len(parts)))
        return "。".join([*parts, moved])
    pieces = []
    for character in text:
        touched = chooser.random() < rate
        new = chooser.choice(filler) if touched and kind != "delete" else ""
        pieces.append((character if kind == "insert" or not touched else "") + new)
    return "".join(pieces)


def quality(texts: Texts, originals: int) -> None:
    """Recall and precision against all pairs compared by sets of n-grams."""
    near, chooser = NearDedup(), random.Random(0)
    chosen = chooser.sample([text for text in texts if 100 <= len(text) <= 3000], originals)
    filler = "".join(character for text in chosen[:200] for character in text if character > "\u4e00")
    copies = [
        _edited(text, EDITS[index % len(EDITS)], (index % 13) / 100, chooser, filler)
        for index, text in enumerate(chosen)
    ]
    documents = chosen + copies
    chooser.shuffle(documents)
    truth = _similar_pairs(documents, near.ngram)
    for verify in (True, False):
        setting = dataclasses.replace(near, verify=verify)
        pairs, dropped = _run(documents, setting)
        alike = sum(truth.get(pair, 0.0) >= near.threshold for pair in pairs)
        loosely = sum(truth.get(pair, 0.0) >= near.threshold - 0.1 for pair in pairs)
        print(
            f"{len(documents):,} documents, verify={verify}: {dropped:,} dropped, {len(pairs):,} pairs found, of which "
            f"{alike / len(pairs):.1%} have at least {near.threshold} and {loosely / len(pairs):.1%} at least "
            f"{near.threshold - 0.1:.2f}"
        )
        print("  true similarity    pairs    found   promised")
        for step in range(6, 20):
            low = step / 20
            # 1.0 itself belongs to the last line.
            inside = [(pair, value) for pair, value in truth.items() if step == min(int(value * 20 + 1e-9), 19)]
            if inside:
                found = np.mean([pair in pairs for pair, _ in inside])
                promised = np.mean([_promise(setting, value) for _, value in inside])
                print(f"  {low:.2f} to {low + 0.05:.2f}   {len(inside):9,}   {found:6.1%}   {promised:6.1%}")


def _promise(near: NearDedup, similarity: float) -> float:
    """The S-curve, times the chance that the estimate reaches the threshold (a normal approximation)."""
    candidate = s_curve(near.bands, near.rows, similarity)
    if not near.verify or similarity == 1.0:
        return candidate
    error = float(np.sqrt(similarity * (1 - similarity) / near.permutations))
    return candidate * 0.5 * (1 + math.erf((similarity - near.threshold) / error / 2**0.5))


def _similar_pairs(texts: Texts, n: int) -> dict[tuple[int, int], float]:
    """The true similarity of all pairs that share an n-gram, (later, earlier), by counting common n-grams."""
    names: dict[tuple[str, ...], int] = {}
    sets = []
    for text in texts:
        units = unit_strings(text)
        grams = {tuple(units[place : place + n]) for place in range(len(units) - n + 1)}
        sets.append(np.array([names.setdefault(gram, len(names)) for gram in grams], dtype=np.int64))
    sizes = np.array([len(each) for each in sets])
    grams_, owners = np.concatenate(sets), np.repeat(np.arange(len(sets)), sizes)
    order = np.argsort(grams_, kind="stable")
    owners = owners[order]
    begins = np.searchsorted(grams_[order], np.arange(len(names) + 1))
    pairs: dict[tuple[int, int], float] = {}
    for document, own in enumerate(sets):
        if not len(own):
            continue
        counts, first = begins[own + 1] - begins[own], begins[own]
        places = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        common = np.bincount(owners[places], minlength=len(sets))
        for other in np.flatnonzero(common[:document]).tolist():
            both = int(common[other])
            pairs[document, other] = both / (int(sizes[document]) + int(sizes[other]) - both)
    return pairs


def _run(documents: Texts, near: NearDedup) -> tuple[set[tuple[int, int]], int]:
    """The pairs whose documents some band puts together, and how many documents are dropped in the end."""
    signed = Signer(near).sign(documents)
    found = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / "all.sig"]
        with signature_writer(files[0], near) as writer:
            writer.add(signed)
        outputs = []
        for band in range(near.bands):
            outputs.append(folder / f"{band}.pairs")
            match_band(files, band, near, outputs[-1])
        report = decide(outputs, files, near, folder)
        # A bucket's pairs are only written with its first document; here all of them count, to compare with the curve.
        estimates_needed = near.threshold if near.verify else -1.0
        for band in range(near.bands):
            buckets: dict[int, list[int]] = {}
            for row in np.flatnonzero(signed.grams).tolist():
                buckets.setdefault(int(signed.bands[row, band]), []).append(row)
            for rows in buckets.values():
                for place, later in enumerate(rows):
                    for earlier in rows[:place]:
                        agree = np.mean(signed.sketch[later] == signed.sketch[earlier])
                        if (agree - 1 / 256) / (255 / 256) >= estimates_needed:
                            found.add((later, earlier))
    return found, report.exact + report.near


def scale(documents: int, shards: int = 100) -> None:
    """Seconds, peak memory and bytes of matching and deciding over random signatures, a tenth of them copies."""
    near = NearDedup()
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = []
        for shard in range(shards):
            files.append(folder / f"{shard:05d}.sig")
            with signature_writer(files[-1], near) as writer:
                writer.add(_random_signatures(generator, documents // shards, near))
        size = sum(path.stat().st_size for path in files)
        print(f"{documents:,} documents: {size / documents:.1f} bytes of signature a document, {size / 1e9:.2f} GB")
        outputs = [folder / "exact.pairs"]
        _timed("exact", documents, lambda: match_exact(files, near, outputs[0]))
        for band in range(near.bands):
            outputs.append(folder / f"{band}.pairs")
        _timed("one band", documents, lambda: match_band(files, 0, near, outputs[1]))
        for band in range(1, near.bands):
            match_band(files, band, near, outputs[band + 1])
        pairs = sum(path.stat().st_size for path in outputs)
        print(f"  pairs: {pairs / documents:.1f} bytes a document")
        _timed("decide", documents, lambda: print(f"  {decide(outputs, files, near, folder).as_dict()}"))


def _random_signatures(generator: np.random.Generator, count: int, near: NearDedup) -> Signatures:
    """A tenth are copies: half of them of the whole document, half agree in 85 % of the sketch, half of the bands."""
    exact = generator.integers(0, 1 << 64, size=(count, 2), dtype=np.uint64)
    bands = generator.integers(0, 1 << 64, size=(count, near.bands), dtype=np.uint64)
    sketch = generator.integers(0, 256, size=(count, near.permutations), dtype=np.uint8)
    copies = np.arange(count // 2, count // 2 + count // 10)
    whole, alike = copies[::2], copies[1::2]
    exact[whole], bands[whole], sketch[whole] = exact[: len(whole)], bands[: len(whole)], sketch[: len(whole)]
    same = np.arange(len(alike)) + len(whole)
    bands[alike, : near.bands // 2] = bands[same, : near.bands // 2]
    agree = generator.random((len(alike), near.permutations)) < 0.85
    sketch[alike] = np.where(agree, sketch[same], sketch[alike])
    return Signatures(exact, np.full(count, 500, np.uint32), bands, sketch)


def _timed(what: str, documents: int, work: Callable[[], None]) -> None:
    begin = time.process_time()
    work()
    seconds = time.process_time() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"  {what}: {seconds:.2f} CPU s, {seconds / documents * 1e9:.0f} ns a document; "
        f"peak of the process {peak:.0f} MiB"
    )


if __name__ == "__main__":
    main()
