"""Every primitive is its own inverse, whatever the shapes: there and back no bit changes, from either side, and a slice
that is put together alone is the slice of the whole."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_moe.checkpoint.convert.blocks import (
    Block,
    Box,
    Side,
    cut_rows,
    only_ours,
    only_theirs,
    place,
    rename,
    scaled,
    shift,
    split_qkv,
    split_rows,
    turned,
    whole,
)
from megatron_moe.checkpoint.convert.coverage import check_coverage
from megatron_moe.checkpoint.convert.engine import Targets, assemble, target_infos
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.config.base import UserError
from tests.helpers.tensors import MemorySource

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
length = st.integers(1, 5)
lengths = st.lists(length, max_size=2).map(tuple)
powers = st.sampled_from((0.25, 0.5, 2.0, 8.0))


@dataclass
class Map:
    """Blocks, and what they must make of our tensors, said in torch's own words."""

    blocks: list[Block]
    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]


def numbers(*shape: int) -> Tensor:
    """Distinct ones, so that a wrong place is seen."""
    return torch.randperm(max(1, torch.Size(shape).numel())).reshape(shape).float() / 4 + 1


@st.composite
def renamed(draw: Callable[..., int]) -> Map:
    shape = draw(st.lists(length, max_size=3).map(tuple))  # type: ignore[call-overload]
    tensor = numbers(*shape)
    return Map(rename("a", "b", shape), {"a": tensor}, {"b": tensor})


@st.composite
def transposed(draw: Callable[..., int]) -> Map:
    shape = (*draw(lengths), draw(length), draw(length))  # type: ignore[misc]
    tensor = numbers(*shape)
    return Map(rename("a", "b", shape, transposed=True), {"a": tensor}, {"b": tensor.transpose(-2, -1).contiguous()})


@st.composite
def turned_map(draw: Callable[..., int]) -> Map:
    """Two matrices of ours side by side in one of theirs that lies the other way round."""
    first, second, width = draw(length), draw(length), draw(length)
    tensors = {"a": numbers(first, width), "b": numbers(second, width) + 100}
    blocks = rename("a", "c", (first, width)) + shift(rename("b", "c", (second, width)), "theirs", "c", 0, first)
    return Map(turned(blocks), tensors, {"c": torch.cat(list(tensors.values())).t().contiguous()})


@st.composite
def scaled_map(draw: Callable[..., float]) -> Map:
    factor, second = draw(powers), draw(powers)
    tensor = numbers(3, 2)
    blocks = scaled(rename("a", "b", (3, 2), scale=factor), second)
    return Map(blocks, {"a": tensor}, {"b": tensor * factor * second})


@st.composite
def rows(draw: Callable[..., int]) -> Map:
    counts = draw(st.lists(length, min_size=1, max_size=4))
    rest: tuple[int, ...] = draw(lengths)  # type: ignore[assignment]
    tensor = numbers(sum(counts), *rest)  # type: ignore[arg-type]
    names = [f"b{index}" for index in range(len(counts))]  # type: ignore[arg-type]
    parts = dict(zip(names, tensor.split(counts), strict=True))  # type: ignore[no-untyped-call]
    return Map(split_rows("a", names, counts, rest), {"a": tensor}, parts)  # type: ignore[arg-type]


@st.composite
def qkv(draw: Callable[..., int]) -> Map:
    groups, per_group, head = draw(length), draw(length), draw(length)
    rest: tuple[int, ...] = draw(st.sampled_from(((), (3,))))  # type: ignore[assignment]
    tensor = numbers(groups * (per_group + 2) * head, *rest)
    by_group = tensor.view(groups, per_group + 2, head, *rest)
    theirs = {
        "q": by_group[:, :per_group].reshape(-1, *rest),
        "k": by_group[:, per_group].reshape(-1, *rest),
        "v": by_group[:, per_group + 1].reshape(-1, *rest),
    }
    return Map(split_qkv("a", ("q", "k", "v"), groups, per_group, head, rest), {"a": tensor}, theirs)


@st.composite
def padded(draw: Callable[..., int]) -> Map:
    kept, more = draw(length), draw(st.integers(0, 3))
    rest: tuple[int, ...] = draw(lengths)  # type: ignore[assignment]
    tensor = numbers(kept + more, *rest)
    tensor[kept:] = 0
    return Map(cut_rows("a", "b", kept + more, kept, rest), {"a": tensor}, {"b": tensor[:kept].clone()})


@st.composite
def experts(draw: Callable[..., int]) -> Map:
    """Stacked and fused on our side, one by one on theirs: place, shift and split together."""
    count, width, hidden = draw(length), draw(length), draw(length)
    tensor = numbers(count, 2 * width, hidden)
    blocks, theirs = [], {}
    for expert in range(count):
        gate = rename("x", f"{expert}.gate", (width, hidden))
        up = shift(rename("x", f"{expert}.up", (width, hidden)), "ours", "x", axis=0, offset=width)
        blocks += place([*gate, *up], "ours", "a", expert)
        theirs |= {f"{expert}.gate": tensor[expert, :width], f"{expert}.up": tensor[expert, width:]}
    return Map(blocks, {"a": tensor}, {name: value.contiguous() for name, value in theirs.items()})


@st.composite
def stacked_transposed(draw: Callable[..., int]) -> Map:
    """Theirs stacked and transposed, ours one by one."""
    count, width, hidden = draw(length), draw(length), draw(length)
    tensor = numbers(count, width, hidden)
    blocks: list[Block] = []
    for index in range(count):
        blocks += place(rename(f"a{index}", "x", (hidden, width), transposed=True), "theirs", "b", index)
    return Map(blocks, {f"a{index}": tensor[index].t().contiguous() for index in range(count)}, {"b": tensor})


@st.composite
def one_sided(draw: Callable[..., int]) -> Map:
    shape: tuple[int, ...] = draw(lengths)  # type: ignore[assignment]
    fill = draw(st.sampled_from((0.0, 1.0, -2.5)))
    blocks = [*only_ours("a", shape, fill), *only_theirs("b", shape, fill), *rename("c", "c", (2,))]
    both = numbers(2)
    return Map(blocks, {"a": torch.full(shape, fill), "c": both}, {"b": torch.full(shape, fill), "c": both})


@st.composite
def box_of(draw: Callable[..., int], name: str, shape: tuple[int, ...]) -> Box:
    start = tuple(draw(st.integers(0, size - 1)) for size in shape)
    size = tuple(draw(st.integers(1, whole - begin)) for whole, begin in zip(shape, start, strict=True))
    return Box(name, start, size)


ANY = st.one_of(
    renamed(),
    transposed(),
    turned_map(),
    scaled_map(),
    rows(),
    qkv(),
    padded(),
    experts(),
    stacked_transposed(),
    one_sided(),
)


def convert(blocks: list[Block], side: Side, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    source, targets = MemorySource(tensors), Targets(blocks, side)
    infos = target_infos(blocks, side, source.infos)
    return {name: assemble(targets, whole(name, info.shape), source, info.dtype) for name, info in infos.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


@given(ANY, st.sampled_from(DTYPES))
def test_a_map_goes_there_and_back(example: Map, dtype: torch.dtype) -> None:
    ours = {name: tensor.to(dtype) for name, tensor in example.ours.items()}
    theirs = {name: tensor.to(dtype) for name, tensor in example.theirs.items()}
    check_coverage(example.blocks, MemorySource(ours).infos, MemorySource(theirs).infos)
    assert_same(convert(example.blocks, "theirs", ours), theirs)
    assert_same(convert(example.blocks, "ours", theirs), ours)


@given(ANY, st.data())
def test_a_slice_is_the_slice_of_the_whole(example: Map, data: st.DataObject) -> None:
    sides: list[tuple[Side, dict[str, Tensor], dict[str, Tensor]]] = [
        ("ours", example.ours, example.theirs),
        ("theirs", example.theirs, example.ours),
    ]
    for side, tensors, origin in sides:
        name = data.draw(st.sampled_from(sorted(tensors)))
        box = data.draw(box_of(name, tuple(tensors[name].shape)))
        source = MemorySource(origin)
        result = assemble(Targets(example.blocks, side), box, source, torch.float32)
        assert torch.equal(result, tensors[name][box.slices])
        assert source.numbers_read <= box.numel


@given(ANY, st.data())
def test_a_map_with_a_block_too_few_or_too_many_is_found(example: Map, data: st.DataObject) -> None:
    ours, theirs = MemorySource(example.ours).infos, MemorySource(example.theirs).infos
    index = data.draw(st.integers(0, len(example.blocks) - 1))
    less = example.blocks[:index] + example.blocks[index + 1 :]
    with pytest.raises(UserError):
        check_coverage(less, ours, theirs)
    with pytest.raises(UserError, match=r"covered 2 times|covers it 2 times"):
        check_coverage([*example.blocks, example.blocks[index]], ours, theirs)


def test_coverage_names_the_tensor_and_the_place() -> None:
    blocks = split_rows("a", ("b", "c"), (3, 4), (2,))
    shapes = {"b": (3, 2), "c": (4, 2)}
    with pytest.raises(UserError, match=r"their files: lacks c, which"):
        check_coverage(blocks, {"a": (7, 2)}, {"b": (3, 2)})
    with pytest.raises(UserError, match=r"FOLDER: holds d, which"):
        check_coverage(blocks, {"a": (7, 2)}, shapes | {"d": (1,)}, theirs_in="FOLDER")
    with pytest.raises(UserError, match=r"our model: a has the shape \[8, 2\]; this configuration needs \[7, 2\]"):
        check_coverage(blocks, {"a": (8, 2)}, shapes)
    apart = [blocks[0], Block(Box("a", (4, 0), (4, 2)), whole("c", (4, 2)))]
    with pytest.raises(UserError, match=r"a\[3:4, 0:2\]: is covered by nothing"):
        check_coverage(apart, {"a": (8, 2)}, shapes)
    with pytest.raises(UserError, match="the map says that they are the same"):
        check_coverage([Block(whole("a", (2, 3)), whole("b", (3, 2)))], {"a": (2, 3)}, {"b": (3, 2)})


def test_coverage_of_many_blocks_takes_moments() -> None:
    """As many as a model with a thousand experts has in a hundred layers would take minutes pair by pair."""
    blocks: list[Block] = []
    theirs: dict[str, TensorInfo] = {}
    for layer in range(25):
        for expert in range(1000):
            names = [f"{layer}.{expert}.{part}" for part in ("gate", "up")]
            blocks += place(split_rows("x", names, (8, 8), (4,)), "ours", f"{layer}", expert)
            theirs |= dict.fromkeys(names, TensorInfo((8, 4), torch.float32))
    check_coverage(blocks, {f"{layer}": (1000, 16, 4) for layer in range(25)}, theirs)
