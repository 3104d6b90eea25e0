"""Plain state dicts of experts in three layouts: names and tensors only."""

from itertools import permutations
from typing import Any

import pytest
import torch

from megatron_moe.config.base import UserError
from megatron_moe.moe.experts.layouts import Layout, convert, load_any_layout

LAYOUTS: tuple[Layout, ...] = ("stacked", "sequential", "te")
STACKED = {
    "linear_fc1.weight": torch.randn(3, 6, 4),
    "linear_fc1.bias": torch.randn(3, 6),
    "linear_fc2.weight": torch.randn(3, 4, 6),
    "linear_fc2.bias": torch.randn(3, 4),
}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_names() -> None:
    sequential, te = convert(STACKED, "sequential"), convert(STACKED, "te")
    assert len(sequential) == len(te) == 12
    assert torch.equal(sequential["local_experts.2.linear_fc1.weight"], STACKED["linear_fc1.weight"][2])
    assert torch.equal(te["linear_fc2.bias1"], STACKED["linear_fc2.bias"][1])


@pytest.mark.parametrize(("first", "second"), list(permutations(LAYOUTS, 2)))
def test_there_and_back(first: Layout, second: Layout) -> None:
    start = convert(STACKED, first)
    # The order of names is not the order of experts: 10 comes before 2.
    shuffled = dict(sorted(start.items(), key=lambda item: item[0][::-1]))
    assert_same(convert(convert(shuffled, second), first), start)


def test_more_than_ten_experts_stay_in_order() -> None:
    many = {"linear_fc1.weight": torch.arange(24.0).reshape(12, 2, 1)}
    for layout in LAYOUTS:
        shuffled = dict(sorted(convert(many, layout).items()))
        assert_same(convert(shuffled, "stacked"), many)


def test_empty_states_of_upstream_are_left_out() -> None:
    extra = {"linear_fc1._extra_state": None, "linear_fc2._extra_state2": None}
    assert_same(convert(STACKED | extra, "stacked"), STACKED)
    sequential = convert(STACKED, "sequential") | {"local_experts.1.linear_fc2._extra_state": None}
    assert_same(convert(sequential, "stacked"), STACKED)


@pytest.mark.parametrize("layout", ["sequential", "te"])
def test_a_missing_expert_is_an_error(layout: Layout) -> None:
    state = convert(STACKED, layout)
    gone = next(key for key in state if "1" in key.replace("fc1", "") and "fc2.weight" in key)
    del state[gone]
    with pytest.raises(UserError, match=r"linear_fc2\.weight of expert 1 is missing; there are 3 experts"):
        convert(state, "stacked")


def test_the_last_expert_missing_of_one_tensor_is_an_error() -> None:
    state = convert(STACKED, "te")
    del state["linear_fc1.bias2"]
    with pytest.raises(UserError, match=r"linear_fc1\.bias of expert 2 is missing"):
        convert(state, "stacked")


def test_mixed_layouts_are_an_error() -> None:
    state = STACKED | {"linear_fc1.weight0": torch.zeros(6, 4)}
    with pytest.raises(UserError, match=r"several layouts at once: .*linear_fc1\.weight0"):
        convert(state, "stacked")


def test_unknown_names_are_an_error() -> None:
    with pytest.raises(UserError, match=r"linear_fc3\.weight: is not a tensor of experts"):
        convert({"linear_fc3.weight": torch.zeros(1)}, "stacked")


class Stacked(torch.nn.Module):
    """Parameters as those of grouped experts."""

    def __init__(self) -> None:
        super().__init__()
        for linear in ("linear_fc1", "linear_fc2"):
            module = torch.nn.Module()
            for name in ("weight", "bias"):
                module.register_parameter(name, torch.nn.Parameter(torch.zeros_like(STACKED[f"{linear}.{name}"])))
            self.add_module(linear, module)
        self._register_load_state_dict_pre_hook(load_any_layout, with_module=True)


def layer_with_experts() -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.add_module("experts", Stacked())
    layer.add_module("router", torch.nn.Linear(2, 2))
    return layer


def state_in(layout: Layout) -> dict[str, Any]:
    router = {"router.weight": torch.ones(2, 2), "router.bias": torch.ones(2)}
    return router | {f"experts.{name}": tensor for name, tensor in convert(STACKED, layout).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_module_loads_every_layout(layout: Layout) -> None:
    layer, state = layer_with_experts(), state_in(layout)
    before = dict(state)
    layer.load_state_dict(state, strict=True)
    assert_same({name: tensor.detach() for name, tensor in layer.experts.state_dict().items()}, STACKED)  # type: ignore[operator, union-attr]
    assert torch.equal(layer.router.weight, torch.ones(2, 2))  # type: ignore[arg-type, union-attr]
    assert state.keys() == before.keys(), "the caller's state was changed"


@pytest.mark.parametrize("layout", ["sequential", "te"])
@pytest.mark.parametrize("change", ["missing", "superfluous", "none"])
def test_a_module_refuses_other_numbers_of_experts(layout: Layout, change: str) -> None:
    layer, state = layer_with_experts(), state_in(layout)
    last = [key for key in state if (".2." in key or key.endswith("2")) and "experts" in key]
    assert len(last) == 4
    if change == "missing":
        for key in last:
            del state[key]
    elif change == "superfluous":
        for key in last:
            state[key.replace(".2.", ".3.") if ".2." in key else key[:-1] + "3"] = state[key].clone()
    else:
        state = {key: value for key, value in state.items() if "experts" not in key}
    wanted = r"Missing key\(s\).*experts" if change == "none" else r"size mismatch for experts\.linear_fc1\.weight"
    with pytest.raises(RuntimeError, match=wanted):
        layer.load_state_dict(state, strict=True)


def test_a_module_names_a_hole() -> None:
    layer, state = layer_with_experts(), state_in("sequential")
    del state["experts.local_experts.1.linear_fc1.weight"]
    with pytest.raises(RuntimeError, match=r"experts\.: linear_fc1\.weight of expert 1 is missing"):
        layer.load_state_dict(state, strict=True)
