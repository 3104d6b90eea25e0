"""Documents that hold text of evaluation sets: n-grams of units, 13 by default, found by hash and compared exactly.

Units are characters of Chinese and words of English, without punctuation, space, case and width (see `units`). Every
n-gram of a batch of documents is looked up in a bitmap, what is found there in a sorted array, and what is found there
is compared unit by unit, so a collision of hashes never drops a document. The evaluation sets take 25 bytes of
memory for each of their characters, and twice that while they are read.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError
from megatron_moe.data.dedup.config import Decontamination
from megatron_moe.data.dedup.evaluation import evaluation_texts
from megatron_moe.data.dedup.units import (
    I64,
    U64,
    Units,
    grams_of,
    pieces_of,
    unit_strings,
    units_of,
)

# Entries of the prefilter per n-gram of the evaluation sets, at least: so many unrelated n-grams for one let through.
_SPARSE = 8


@dataclass(frozen=True, slots=True)
class Contamination:
    """Why a document counts as contaminated."""

    file: str
    """The evaluation file with the first run found."""
    run: str
    """The first run found, folded, words separated by spaces."""
    hits: int
    """Different runs of the document found in any evaluation set."""
    share: float
    """Places of the document at which such a run begins, of all places."""

    def __str__(self) -> str:
        return f"{self.file}: {self.run}"


@dataclass(slots=True)
class EvaluationFile:
    """What was read from one evaluation file, for the report."""

    name: str
    sha256: str
    texts: int = 0
    runs: int = 0
    short: int = 0
    """Texts with fewer units than a run: see `Decontamination.short`."""
    empty: int = 0
    """Texts without any unit, such as a lone punctuation mark: never compared."""


class HashSet:
    """64-bit hashes, ascending, with a filter in front that settles nearly all look-ups of others at once."""

    def __init__(self, hashes: U64) -> None:
        self._hashes = hashes
        bits = max(10, (len(hashes) * _SPARSE).bit_length())
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, dtype=bool)
        self._filter[hashes >> self._shift] = True

    def find(self, hashes: U64) -> tuple[I64, I64]:
        """The places of those of `hashes` that are in the set, and their places in the set."""
        passed = np.flatnonzero(self._filter[hashes >> self._shift])
        if not len(passed):
            return passed, passed
        wanted = hashes[passed]
        place = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        equal = self._hashes[place] == wanted
        return passed[equal], place[equal]


class Decontaminator:
    """Finds documents that share runs of units with evaluation sets.

    Args:
        options: the evaluation files and what counts as contaminated.

    Raises:
        UserError: a file cannot be read or holds no text.
    """

    def __init__(self, options: Decontamination) -> None:
        self.options = options
        self.files: list[EvaluationFile] = []
        self._texts: list[str] = []
        self._file_of_text: list[int] = []
        self._short: dict[tuple[str, ...], int] = {}
        hashes: list[U64] = []
        sources: list[npt.NDArray[np.int32]] = []
        for name in options.files:
            self._read(Path(name), hashes, sources)
        joined = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
        hashes_found, first = np.unique(joined, return_index=True)
        self._runs = HashSet(hashes_found)
        self._sources = np.concatenate(sources)[first] if sources else np.zeros((0, 2), np.int32)
        self._units_of_text = functools.lru_cache(maxsize=1024)(lambda text: unit_strings(self._texts[text]))

    def _read(self, path: Path, hashes: list[U64], sources: list[npt.NDArray[np.int32]]) -> None:
        """Add the runs of one file."""
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"evaluation file {path}: cannot be read: {error.strerror or error}") from error
        file = EvaluationFile(path.name, digest)
        texts = list(evaluation_texts(path, self.options.fields))
        units = units_of(texts)
        grams = grams_of(units, self.options.ngram)
        first_text = len(self._texts)
        hashes.append(grams.hashes)
        # Where the run stands: which text, and at which unit of it.
        place = np.stack([grams.document + first_text, grams.positions - units.offsets[grams.document]], axis=1)
        sources.append(place.astype(np.int32))
        file.texts, file.runs = len(texts), len(grams.hashes)
        for text, count in zip(texts, units.counts().tolist(), strict=True):
            if count == 0:
                file.empty += 1
            elif count < self.options.ngram:
                file.short += 1
                if self.options.short == "equal":
                    self._short.setdefault(tuple(unit_strings(text)), len(self.files))
        self._texts += texts
        self._file_of_text += [len(self.files)] * len(texts)
        self.files.append(file)

    def find(self, texts: Sequence[str]) -> list[Contamination | None]:
        """Why each document counts as contaminated, None for a clean one; many at once take less time."""
        result: list[Contamination | None] = [None] * len(texts)
        begin = 0
        for piece in pieces_of(texts):
            self._find(piece, begin, result)
            begin += len(piece)
        return result

    def _find(self, texts: Sequence[str], begin: int, result: list[Contamination | None]) -> None:
        units = units_of(texts)
        grams = grams_of(units, self.options.ngram)
        if self._short:
            self._find_short(texts, units, begin, result)
        passed, place = self._runs.find(grams.hashes)
        if not len(passed):
            return
        documents = grams.document[passed]
        starts = grams.positions[passed] - units.offsets[documents]
        cuts = np.flatnonzero(np.diff(documents, prepend=-1)).tolist()
        for first, last in zip(cuts, [*cuts[1:], len(documents)], strict=True):
            document = int(documents[first])
            result[begin + document] = self._judge(
                texts[document], starts[first:last].tolist(), place[first:last].tolist(), int(grams.counts[document])
            )

    def _judge(self, text: str, starts: list[int], places: list[int], runs: int) -> Contamination | None:
        """Compare what the hashes found with the evaluation texts, and apply the options."""
        strings = unit_strings(text)
        ngram = self.options.ngram
        real: list[tuple[int, int]] = []
        for start, place in zip(starts, places, strict=True):
            source, position = self._sources[place].tolist()
            if strings[start : start + ngram] == self._units_of_text(source)[position : position + ngram]:
                real.append((start, place))
        hits = len({place for _, place in real})
        share = len(real) / runs
        if not real or hits < self.options.hits or share < self.options.share:
            return None
        start, place = real[0]
        file = self.files[self._file_of_text[int(self._sources[place][0])]]
        return Contamination(file.name, _readable(strings[start : start + ngram]), hits, share)

    def _find_short(self, texts: Sequence[str], units: Units, begin: int, result: list[Contamination | None]) -> None:
        """Documents that are, as a whole, an evaluation text of fewer units than a run."""
        for document in np.flatnonzero(units.counts() < self.options.ngram).tolist():
            strings = unit_strings(texts[document])
            file = self._short.get(tuple(strings))
            if file is not None:
                result[begin + document] = Contamination(self.files[file].name, _readable(strings), 1, 1.0)


def _readable(units: Sequence[str]) -> str:
    """Units as text: no space between Han characters, one beside words."""
    pieces: list[str] = []
    for index, unit in enumerate(units):
        if index and (unit.isascii() or units[index - 1].isascii()):
            pieces.append(" ")
        pieces.append(unit)
    return "".join(pieces)
