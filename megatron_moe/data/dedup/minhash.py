"""MinHash signatures by fast similarity sketching: one hash of each n-gram fills many permutations at once.

Classic MinHash hashes every n-gram with every permutation: 128 times the work. One-permutation hashing throws each
n-gram into one of 128 bins and keeps the least value of each bin, but leaves bins empty in short documents, and filling
them by copying from others makes the estimate worse. Fast similarity sketching (Dahlgaard, Knudsen and Thorup, FOCS
2017, arXiv 1704.04370) throws the n-grams again, with another hash, as often as bins are empty: whatever the length,
the share of equal bins is an unbiased estimate of the Jaccard similarity, with the variance of classic MinHash or less.

What is changed: after `ROUNDS` throws a bin still empty takes the least value of all n-grams under a hash of its own
(classic MinHash for that bin); the paper does so after as many throws as bins. The proof does not depend on when.
Only integers modulo 2^64 are used, so signatures are equal on every platform and for every split into batches.
"""

import functools

import numpy as np

from megatron_moe.data.dedup.units import I64, U64, Grams, mix

# Throws before the bins still empty are filled one by one; measured best for documents of 10 to 100 n-grams.
ROUNDS = 12
# Upper bits of a value say which throw it is from, so an earlier throw always wins.
_TAG_BITS = np.uint64(5)
_EMPTY = np.uint64((1 << 64) - 1)


@functools.cache
def odd_numbers(seed: int, count: int) -> U64:
    """Odd 64-bit numbers, the splitmix64 sequence of the seed."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mix(steps + np.uint64(seed)) | np.uint64(1)


def minhash(grams: Grams, permutations: int, seed: int) -> U64:
    """The signature of each document, shape [documents, permutations]; meaningless where it has no n-gram.

    Args:
        grams: the hashed n-grams of the documents; one that comes twice counts once.
        permutations: a power of two.
        seed: which hash functions.
    """
    documents = len(grams.counts)
    multipliers = odd_numbers(seed, ROUNDS + permutations)
    shift = np.uint64(64 - (permutations.bit_length() - 1))
    flat = np.full(documents * permutations, _EMPTY, dtype=np.uint64)
    signature = flat.reshape(documents, permutations)
    hashes, document = grams.hashes, grams.document
    open_documents = grams.counts > 0
    for throw in range(ROUNDS):
        values = hashes * multipliers[throw]
        bins = (values >> shift).astype(np.int64)
        bins += document * permutations
        values >>= _TAG_BITS
        values |= np.uint64(throw) << (np.uint64(64) - _TAG_BITS)
        np.minimum.at(flat, bins, values)
        rows = np.flatnonzero(open_documents)
        open_documents[rows] = (signature[rows] == _EMPTY).any(axis=1)
        if not open_documents.any():
            return signature
        again = open_documents[document]
        hashes, document = hashes[again], document[again]
    _fill_rest(signature, grams, np.flatnonzero(open_documents), multipliers[ROUNDS:])
    return signature


def _fill_rest(signature: U64, grams: Grams, rows: I64, multipliers: U64) -> None:
    """Give each bin of these documents that is still empty the least value under that bin's own hash."""
    which, bins = np.nonzero(signature[rows] == _EMPTY)
    rows = rows[which]
    counts = grams.counts[rows]
    begins = np.cumsum(counts) - counts
    first_gram = np.cumsum(grams.counts) - grams.counts
    index = np.arange(int(counts.sum())) + np.repeat(first_gram[rows] - begins, counts)
    values = grams.hashes[index] * np.repeat(multipliers[bins], counts)
    values |= ~(_EMPTY >> _TAG_BITS)
    signature[rows, bins] = np.minimum.reduceat(values, begins)
