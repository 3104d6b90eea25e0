"""Exact and near deduplication, and decontamination, of documents in shards.

The stages, each a function over files that can run on another machine with a shared folder:
1. per shard: `Signer` and `signature_writer` make a signature file beside the shard's documents;
2. `match_exact`, and `match_band` per band: pairs of documents alike;
3. `decide`: clusters, of which the first document is kept; one drop file per shard (`read_drops`).
`Decontaminator` needs no stages: it looks at one batch of documents at a time.
"""

from megatron_moe.data.dedup.config import Decontamination, NearDedup, s_curve
from megatron_moe.data.dedup.decide import EXACT, NEAR, DedupReport, Drops, decide, drop_path, read_drops
from megatron_moe.data.dedup.decontaminate import Contamination, Decontaminator
from megatron_moe.data.dedup.match import DEFAULT_MEMORY, match_band, match_exact
from megatron_moe.data.dedup.signatures import (
    Signatures,
    SignatureWriter,
    Signer,
    estimated_jaccard,
    read_signatures,
    signature_writer,
)

__all__ = [
    "DEFAULT_MEMORY",
    "EXACT",
    "NEAR",
    "Contamination",
    "Decontamination",
    "Decontaminator",
    "DedupReport",
    "Drops",
    "NearDedup",
    "SignatureWriter",
    "Signatures",
    "Signer",
    "decide",
    "drop_path",
    "estimated_jaccard",
    "match_band",
    "match_exact",
    "read_drops",
    "read_signatures",
    "s_curve",
    "signature_writer",
]
