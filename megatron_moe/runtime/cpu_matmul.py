"""fp32 matrix products on a CPU, where torch's choice of library leaves half of the processor unused.

torch gives fp32 products to MKL, which on a processor that is not Intel's never takes AVX-512. oneDNN, which is part
of torch and computes its bf16 products, does: 2.2 times the rate on an AMD EPYC of the Zen 5 family, in full fp32
(only the order of the additions differs). torch has no switch for it (`aten/src/ATen/native/LinearAlgebra.cpp:
addmm_impl_cpu_` asks `use_mkldnn_matmul`, which for fp32 only says yes to products with rounded inputs), so the CPU
kernels of the few operators that end in such a product are replaced. Everything above them, autograd included, stays.

Relies on `torch.ops.mkldnn._linear_pointwise` (`aten/src/ATen/native/mkldnn/Linear.cpp`), the operator that
torch.compile puts in place of linear layers, and on `torch.library`; `tests/runtime/test_cpu_matmul.py` holds both.
"""

import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# oneDNN keeps the code that it makes for every shape of a product; each expert's share of the tokens is a shape of its
# own, so that its default of 1,024 is too few for a handful of MoE layers (measured: a tenth of a step's time).
CACHE_FLAG, CACHE_ENTRIES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", 4096
# Multiplications below which the call itself costs more than is won.
SMALLEST = 1 << 16

_library: torch.library.Library | None = None


@functools.cache
def pays_here() -> bool:
    """Whether this is a processor on which oneDNN is the faster: AVX-512, and not Intel's.

    A rule, not a measurement: ranks and later runs on the same machine must add in the same order.
    """
    if platform.machine() != "x86_64" or not torch.backends.mkldnn.is_available():
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "GenuineIntel" not in _vendor()


def _vendor() -> str:
    facts = Path("/proc/cpuinfo")
    if not facts.is_file():
        return platform.processor()
    lines = facts.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def install() -> bool:
    """Give fp32 products to oneDNN where that pays; says whether they are given to it. A second call does nothing.

    Everywhere oneDNN, which has the bf16 products anyway, is let keep more shapes; it reads that at its first product.
    """
    global _library
    os.environ.setdefault(CACHE_FLAG, str(CACHE_ENTRIES))
    if _library is None and pays_here():
        library = torch.library.Library("aten", "IMPL")
        for name, replace in _REPLACEMENTS.items():
            original = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, functools.partial(replace, original.call_boxed), "CPU", with_keyset=True)
        _library = library
    return is_installed()


def uninstall() -> None:
    """Put torch's own kernels back."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


def is_installed() -> bool:
    """Whether fp32 products go to oneDNN in this process."""
    return _library is not None


def _fits(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype is torch.float32
        and right.dtype is torch.float32
        and left.shape[1] == right.shape[0]
        and left.shape[0] * left.shape[1] * right.shape[1] >= SMALLEST
    )


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[M, K] x [K, N]; the operator takes the right side as a linear layer's weight, [N, K], in any layout."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(left, right.t(), None, "none", [], "")
    return product


def _mm(original: Callable[..., Tensor], keys: Any, left: Tensor, right: Tensor) -> Tensor:
    return _product(left, right) if _fits(left, right) else original(keys, left, right)


def _mm_out(original: Callable[..., Tensor], keys: Any, left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    if not _fits(left, right) or out.shape != (left.shape[0], right.shape[1]) or out.dtype is not torch.float32:
        return original(keys, left, right, out=out)
    return out.copy_(_product(left, right))


def _addmm_(
    original: Callable[..., Tensor],
    keys: Any,
    into: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    if beta != 1 or not _fits(left, right) or into.shape != (left.shape[0], right.shape[1]):
        return original(keys, into, left, right, beta=beta, alpha=alpha)
    return into.add_(_product(left, right), alpha=alpha)


_REPLACEMENTS: dict[str, Callable[..., Tensor]] = {"mm": _mm, "mm.out": _mm_out, "addmm_": _addmm_}
