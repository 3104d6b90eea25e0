"""Which layer has how many experts."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.base import ConfigError
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layout import ExpertLayout, expert_layout


def _layout(layers: int, **flags: object) -> ExpertLayout:
    return expert_layout(ModelConfig(num_layers=layers), MoEConfig(**flags))  # type: ignore[arg-type]


def test_dense_model() -> None:
    layout = _layout(3)
    assert layout.experts_per_layer == (0, 0, 0)
    assert layout.moe_layers == ()
    assert layout.max_experts == 0
    assert layout.describe() == "dense"


def test_one_count_for_all() -> None:
    layout = _layout(4, num_experts=(8,))
    assert layout.experts_per_layer == (8, 8, 8, 8)


def test_pai_16b() -> None:
    layout = _layout(24, num_experts=(32,) * 10 + (64, 64), expert_interval=2)
    assert layout.moe_layers == tuple(range(2, 25, 2))
    assert layout.num_moe_layers == 12
    assert layout.counts == (32,) * 10 + (64, 64)
    assert layout.total_experts == 448
    assert layout.max_experts == 64
    assert (layout.experts_in(1), layout.experts_in(2), layout.experts_in(24)) == (0, 32, 64)
    assert layout.describe() == "2,4,...,20: 32 experts; 22,24: 64 experts"


def test_interval_that_does_not_divide_the_layers() -> None:
    """The MoS student: 21 layers, every second one a MoE layer, hence ten of them."""
    layout = _layout(21, num_experts=(64,) * 8 + (128, 128), expert_interval=2)
    assert layout.moe_layers[-1] == 20
    assert layout.num_moe_layers == 10


def test_explicit_pattern() -> None:
    assert _layout(4, num_experts=(4, 8), moe_layer_freq=(1, 0, 0, 1)).experts_per_layer == (4, 0, 0, 8)


def test_takes_a_run() -> None:
    run = RunConfig(model=ModelConfig(num_layers=2), moe=MoEConfig(num_experts=(4,)))
    assert expert_layout(run) == expert_layout(run.model, run.moe)
    with pytest.raises(TypeError, match="RunConfig"):
        expert_layout(run.model)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"num_experts": (4, 8), "expert_interval": 2},
            "--num-experts 4 8: must be one count, or 3 counts for the MoE layers 2, 4, 6; got 2",
        ),
        ({"num_experts": (4,), "expert_interval": 7}, "--expert-interval 7: must be at most --num-layers 6"),
        (
            {"num_experts": (4,), "moe_layer_freq": (0, 1)},
            "--moe-layer-freq 0 1: must be one 0 .* 6 layers.*got 2",
        ),
        (
            {"num_experts": (4,), "moe_layer_freq": (0, 0, 2, 0, 0, 1)},
            "--moe-layer-freq 0 0 2 0 0 1: must be",
        ),
        ({"num_experts": (4,), "moe_layer_freq": (0,) * 6}, "with at least one 1"),
    ],
)
def test_illegal_layouts(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _layout(6, **flags)


def test_pattern_and_interval_together() -> None:
    with pytest.raises(ConfigError, match="--moe-layer-freq and --expert-interval 2: give one of them"):
        MoEConfig(num_experts=(4,), moe_layer_freq=(0, 1), expert_interval=2)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_expert_parallel_size_that_fits(size: int) -> None:
    _layout(4, num_experts=(4, 8), expert_interval=2).check_expert_parallel(size)


@pytest.mark.parametrize(
    ("counts", "size", "message"),
    [
        ((6, 6, 8), 8, "--expert-model-parallel-size 8: must be a divisor .* every layer; layers 2, 4 have 6"),
        ((4, 6, 8), 4, "layer 4 has 6"),
        ((4, 2, 8), 6, "layer 2 has 4"),
    ],
)
def test_expert_parallel_size_that_does_not(counts: tuple[int, ...], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _layout(6, num_experts=counts, expert_interval=2).check_expert_parallel(size)


def test_experts_of_a_rank() -> None:
    layout = _layout(8, num_experts=(2, 4, 4, 8), expert_interval=2)
    assert [layout.degree(number, 4) for number in layout.moe_layers] == [2, 4, 4, 4]
    spread = "2: 1 of 2 experts, in 2 copies; 4,6: 1 of 4 experts; 8: 2 of 8 experts"
    assert layout.describe_spread(4) == spread
    assert layout.has_copies(4)
    assert not layout.has_copies(2)


def test_expert_parallel_without_experts() -> None:
    _layout(2).check_expert_parallel(1)
    with pytest.raises(ConfigError, match="--expert-model-parallel-size 2: needs --num-experts"):
        _layout(2).check_expert_parallel(2)


def test_layer_out_of_range() -> None:
    with pytest.raises(IndexError, match="layer 0 of 2"):
        _layout(2).experts_in(0)


@given(layers=st.integers(1, 40), interval=st.integers(1, 8), data=st.data())
def test_layout_keeps_every_count(layers: int, interval: int, data: st.DataObject) -> None:
    """Any list of the right length comes back as `counts`, at the layers that the interval says."""
    moe_layers = [number for number in range(1, layers + 1) if number % interval == 0]
    if not moe_layers:
        with pytest.raises(ConfigError):
            _layout(layers, num_experts=(2,), expert_interval=interval)
        return
    counts = tuple(data.draw(st.lists(st.integers(1, 9), min_size=len(moe_layers), max_size=len(moe_layers))))
    layout = _layout(layers, num_experts=counts, expert_interval=interval)
    expected = counts * len(moe_layers) if len(counts) == 1 else counts
    assert layout.counts == expected
    assert list(layout.moe_layers) == moe_layers
    assert sum(layout.experts_per_layer) == sum(expected) == layout.total_experts


@pytest.mark.parametrize("module", ["moe.layout", "model.parameters", "model.dry_run", "config.flags"])
def test_needs_no_torch(module: str) -> None:
    code = f"import sys, megatron_moe.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
