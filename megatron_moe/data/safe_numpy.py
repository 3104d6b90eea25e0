"""A look at a `.npy` file before it is loaded: no objects in it, and as many bytes as it announces.

megatron-core loads its sample indices with allow_pickle=True (megatron/core/datasets/gpt_dataset.py,
`_build_document_sample_shuffle_indices`), so an array of objects in the cache folder would run code. No torch.
"""

import io
import math
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

# numpy itself refuses longer headers.
_LONGEST_HEADER = 1 << 16


def check_array_file(path: Path) -> None:
    """Refuse a file that holds anything but plain integers.

    Raises:
        ValueError: it holds something else, or fewer or more bytes than its header says.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        head = io.BytesIO(stream.read(_LONGEST_HEADER))
    try:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(head)]
        shape, _, dtype = read(head)
    except Exception as error:
        # numpy evaluates the header as a Python literal, which can fail in many ways.
        raise ValueError(f"{path.name} is no array of numbers") from error
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(f"{path.name} holds {str(dtype)[:40]}, not integers")
    needed = math.prod(shape) * dtype.itemsize
    held = path.stat().st_size - head.tell()
    if any(length < 0 for length in shape) or needed != held:
        raise ValueError(f"{path.name} holds {held} bytes, its header announces {needed}")
