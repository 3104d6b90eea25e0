"""Documents to token ids: text files in, Megatron `.bin`/`.idx` pairs out, by any number of processes.

job.py          what to do with every document, and the totals of a run
tasks.py        the pieces the input is divided into
lines.py, parquet.py, read.py   reading a piece
encode.py       texts to ids, lengths and counts
work.py         a worker: a piece to a finished part
workspace.py    the folder of finished parts
assemble.py     parts to pairs or shards
run.py          all of it
report.py       PREFIX.report.json
verify.py       pairs against their input
merge.py        pairs to one pair
lengths.py      lengths and packing
counts.py       how often each id occurs
show.py         a pair for a person to read
commands.py     the command lines
"""

from megatron_moe.data.preprocess.job import Preprocessing, PreprocessReport, Totals
from megatron_moe.data.preprocess.run import preprocess

__all__ = ["PreprocessReport", "Preprocessing", "Totals", "preprocess"]
