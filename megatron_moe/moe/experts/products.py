"""Matrix products of rows that are sorted by expert with stacked weights, one matrix for each expert.

A place says which rows go with which matrix. On a GPU it is the end of every expert's rows [E], a tensor of the device:
one `grouped_mm` serves all experts, and in bf16 on compute capability 9.0 and 10.0 nothing is asked of the device (else
torch loops: `aten/src/ATen/native/GroupedMMUtils.h:_grouped_mm_fallback`). On a CPU, where the kernel of `grouped_mm`
is a loop over experts itself, it is the number of one expert: what stands between two of its products then stays in the
cache, and no large tensor is made for it. (4,096 rows on 32 SwiGLU experts of 512 x 1,024, forward and backward on two
cores: 0.6 of the time in fp32, 0.5 in bf16. It also takes sizes that are no multiple of 16 bytes, and fp64.)

Shape legend: R = rows, E = this rank's experts, K = width of a product's input, N = of its output.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

type Place = int | Tensor
"""An expert's number, or where every expert's rows end [E]."""


def blocks(ends_E: Tensor, rows: int) -> Iterator[tuple[slice, int]] | None:
    """The rows of every expert that has any, with its number; None where one product serves all experts."""
    if rows == 0:
        return iter(())
    return _blocks_of_experts(ends_E) if one_by_one(ends_E.device) else None


def one_by_one(device: torch.device) -> bool:
    """Whether experts are computed one after the other."""
    return device.type == "cpu"


def _blocks_of_experts(ends_E: Tensor) -> Iterator[tuple[slice, int]]:
    start = 0
    for expert, stop in enumerate(ends_E.tolist()):
        if stop > start:
            yield slice(start, stop), expert
        start = stop


def product(rows_RK: Tensor, weights_EKN: Tensor, place: Place, out: Tensor | None = None) -> Tensor:
    """Every row times its expert's matrix [R, N]; `out` is for a place that is one expert."""
    if isinstance(place, int):
        return torch.mm(rows_RK, weights_EKN[place], out=out)
    assert out is None
    return F.grouped_mm(rows_RK, weights_EKN, offs=place)


def add_weight_gradient(into_ENK: Tensor, gradient_RN: Tensor, rows_RK: Tensor, place: Place) -> None:
    """Add what these rows say about the weights to `into_ENK`, which may be fp32 where they are half precision.

    A product in half precision is rounded to it before it is added, as that of any other linear layer.
    """
    if not isinstance(place, int):
        into_ENK.add_(F.grouped_mm(gradient_RN.t(), rows_RK, offs=place))
    elif into_ENK.dtype == rows_RK.dtype:
        into_ENK[place].addmm_(gradient_RN.t(), rows_RK)
    else:
        into_ENK[place].add_(torch.mm(gradient_RN.t(), rows_RK))


def of_rows(values_EN: Tensor, place: Place, rows: int) -> Tensor:
    """Each row's expert's values: [R, N], or [N] for one expert."""
    return values_EN[place] if isinstance(place, int) else values_EN[_experts(place, rows)]


def add_sum_of_rows(into_EN: Tensor, gradient_RN: Tensor, place: Place) -> None:
    """Add the sum of every expert's rows to `into_EN`.

    A product with ones and zeros: the same on every run, which adding rows one by one on a GPU is not.
    """
    if isinstance(place, int):
        into_EN[place].add_(gradient_RN.sum(dim=0))
        return
    experts_R = _experts(place, len(gradient_RN))
    chosen_RE = experts_R.unsqueeze(1) == torch.arange(len(place), device=place.device)
    into_EN.add_(chosen_RE.to(gradient_RN.dtype).t() @ gradient_RN)


def _experts(ends_E: Tensor, rows: int) -> Tensor:
    """The expert of every row [R]."""
    return torch.searchsorted(ends_E, torch.arange(rows, device=ends_E.device, dtype=ends_E.dtype), right=True)
