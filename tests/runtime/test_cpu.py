"""The CPU runtime: what it replaces is there, is replaced only when asked, and does what it claims."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.config.base import UserError
from megatron_moe.runtime import cuda_standins as standins
from megatron_moe.runtime import replace
from megatron_moe.runtime.replace import Replacement
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained, assemble, assert_close, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run


def every_replacement() -> list[Replacement]:
    from megatron_moe import torchrun
    from megatron_moe.checkpoint import flat_states, safe_reader, save
    from megatron_moe.moe import expert_bias
    from megatron_moe.runtime import cpu

    several = [*safe_reader.REPLACEMENTS, *save.REPLACEMENTS, *flat_states.REPLACEMENTS]
    return [*cpu.replacements(), *several, expert_bias.REPLACEMENT, torchrun.stopped_is_final()]


def test_the_list_above_is_complete() -> None:
    """Every module that replaces something is asked: the count of `REPLACEMENT = ` in the sources."""
    import megatron_moe

    sources = [path.read_text(encoding="utf-8") for path in Path(megatron_moe.__file__).parent.rglob("*.py")]
    assert sum(source.count("\nREPLACEMENT = ") for source in sources) == 1
    assert sum(source.count("\nREPLACEMENTS = ") for source in sources) == 3, (
        "those of flat_states, safe_reader and save"
    )


def test_every_replaced_symbol_exists_upstream() -> None:
    """If this fails, megatron-core or torch has moved something: read the reason and find its new place."""
    assert replace.missing(every_replacement()) == []


def test_every_replacement_says_why_and_none_is_made_twice() -> None:
    names = [replacement.name for replacement in every_replacement()]
    assert len(set(names)) == len(names)
    assert all(replacement.reason for replacement in every_replacement())


def test_modules_with_a_hard_coded_device_have_one() -> None:
    """A module that no longer says "cuda" need not be in the list."""
    import importlib
    import inspect

    from megatron_moe.runtime import cpu

    for name in cpu.MODULES_WITH_HARD_CODED_DEVICE:
        source = inspect.getsource(importlib.import_module(name))
        assert "cuda" in source.replace("torch.cuda", ""), name


@pytest.mark.parametrize(
    "moved",
    [
        Replacement("megatron.core.utils", "no_such_function", None, "test"),
        Replacement("megatron.core.no_such_module", "function", None, "test"),
        Replacement("torch.nn:NoSuchClass", "cuda", None, "test"),
    ],
)
def test_a_moved_symbol_is_one_clear_message_and_nothing_is_touched(moved: Replacement) -> None:
    before = torch.numel
    harmless = Replacement("torch", "numel", "replaced", "test")
    assert replace.missing([harmless, moved]) == [moved.name]
    with pytest.raises(UserError) as caught:
        replace.apply([harmless, moved])
    assert moved.name in str(caught.value)
    assert "megatron-core>=0.19,<0.20" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.numel is before


IMPORT_EVERYTHING = """
import importlib, pkgutil, torch
names = [name for name in dir(torch.cuda) if not name.startswith("__")]
before = {name: getattr(torch.cuda, name) for name in names}
methods = (torch.Tensor.cuda, torch.Tensor.type, torch.nn.Module.cuda)
import megatron_moe
count = 0
for module in pkgutil.walk_packages(megatron_moe.__path__, "megatron_moe."):
    importlib.import_module(module.name)
    count += 1
changed = [name for name in names if getattr(torch.cuda, name) is not before[name]]
assert not changed, changed
assert methods == (torch.Tensor.cuda, torch.Tensor.type, torch.nn.Module.cuda)
import megatron.core.tensor_parallel.random as tracker
assert tracker._set_cuda_rng_state.__module__ == tracker.__name__
from megatron_moe.runtime import cpu
assert not cpu.is_installed()
assert not torch.distributed.is_initialized()
print(count)
"""


def test_importing_the_package_installs_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_EVERYTHING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 40


def install_twice() -> list[bool]:
    from megatron_moe.runtime import cpu

    assert not cpu.is_installed()
    cpu.install()
    first = {entry.name: getattr(entry.owner(), entry.attribute) for entry in cpu.replacements()}
    cpu.install()
    second = {entry.name: getattr(entry.owner(), entry.attribute) for entry in cpu.replacements()}
    return [cpu.is_installed(), all(first[name] is second[name] for name in first)]


def test_installing_is_idempotent() -> None:
    assert run_ranks(1, install_twice)[0] == [True, True]


def use_installed() -> dict[str, Any]:
    """What upstream does with CUDA, on the CPU."""
    from megatron.core.transformer.utils import get_default_causal_mask

    from megatron_moe.runtime import cpu

    cpu.install()
    stream = torch.cuda.Stream(priority=-1)
    event = torch.cuda.Event(enable_timing=True)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream) as entered:
        recorded = stream.record_event()
        assert stream.record_event(event) is event
    with torch.cuda.stream(None):
        event.record()
    event.wait()
    event.synchronize()
    torch.cuda.synchronize()
    torch.cuda.current_stream().wait_event(recorded)
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    drawn = [torch.rand(3)]
    torch.cuda.set_rng_state(state)
    drawn.append(torch.rand(3))
    module = torch.nn.Linear(2, 2)
    x = torch.ones(2)
    return {
        "entered": entered is stream,
        "event": isinstance(recorded, torch.cuda.Event) and event.query(),
        "same stream": torch.cuda.current_stream() is torch.cuda.current_stream(0),
        "rng": torch.equal(*drawn),
        "device": str(torch.cuda.current_device()),
        "count": torch.cuda.device_count(),
        "cuda": torch.cuda.is_available(),
        "mask": str(get_default_causal_mask(3).device),
        "moved": x.cuda() is x and module.cuda(0) is module,
        "type": x.type(),
        "half": x.type(torch.half).type(),
    }


def test_standins_do_what_upstream_asks_of_them() -> None:
    result = run_ranks(1, use_installed)[0]
    assert result == {
        "entered": True,
        "event": True,
        "same stream": True,
        "rng": True,
        "device": "cpu",
        "count": 1,
        "cuda": False,
        "mask": "cpu",
        "moved": True,
        "type": "torch.cuda.FloatTensor",
        "half": "torch.cuda.HalfTensor",
    }


@pytest.mark.parametrize("factory", standins.TorchOnCpu.FACTORIES)
def test_factories_answer_on_the_cpu(factory: str) -> None:
    view = standins.TorchOnCpu()
    arguments: dict[str, tuple[Any, ...]] = {"full": ((2,), 1.0), "tensor": ([1.0],)}
    given = arguments.get(factory, (torch.ones(2),) if factory.endswith("_like") else (2,))
    for device in ("cuda", "cuda:1", torch.device("cuda", 0), "cpu"):
        assert getattr(view, factory)(*given, device=device).device.type == "cpu"
    assert getattr(view, factory)(*given, device="meta").device.type == "meta"
    assert getattr(view, factory)(*given).device.type == "cpu"


def test_the_rest_of_torch_shows_through() -> None:
    view = standins.TorchOnCpu()
    assert view.float32 is torch.float32
    assert view.nn is torch.nn
    assert view.cuda is torch.cuda
    with pytest.raises(AttributeError):
        _ = view.no_such_name


def test_split_sizes_become_numbers() -> None:
    sizes = torch.tensor([1, 2])
    assert isinstance(standins.splits_to_numpy(sizes, as_numpy=True), np.ndarray)
    assert standins.splits_to_numpy(sizes) is sizes
    assert standins.splits_to_numpy(None, as_numpy=True) is None


def draw_masks() -> dict[str, Any]:
    from megatron.core import tensor_parallel

    from megatron_moe.runtime.distributed import start
    from megatron_moe.runtime.seeds import set_seeds

    start(tiny_run(tensor_model_parallel_size=2).parallel)
    set_seeds(3)
    tracker = tensor_parallel.get_cuda_rng_tracker()

    def mask() -> list[bool]:
        return (torch.nn.functional.dropout(torch.ones(64), 0.5) == 0).tolist()

    plain = [mask()]
    with tracker.fork():
        forked = [mask()]
    plain.append(mask())
    with tracker.fork():
        forked.append(mask())
    set_seeds(3)
    undisturbed = [mask(), mask()]
    return {"plain": plain, "forked": forked, "undisturbed": undisturbed}


def test_tracker_forks_the_generator() -> None:
    first, second = run_ranks(2, draw_masks)
    assert first["plain"] == second["plain"], "outside a fork tensor-parallel ranks draw the same"
    assert first["forked"][0] != second["forked"][0], "inside a fork they draw differently"
    assert first["forked"][0] != first["forked"][1], "a fork goes on where the last one stopped"
    assert first["plain"] == first["undisturbed"], "a fork does not move the generator outside it"


DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "clip_grad": 0.0, "moe_router_topk": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
EVERYTHING = {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp", "moe")}


@pytest.mark.parametrize("ranks", [1, 2])
def test_recompute_draws_the_same_dropout(ranks: int, tiny_data: Path) -> None:
    """Losses of three steps and the last gradients. Another mask shows as 1e-2; gradients that meet at one tensor are
    added in another order, which moves the last place."""
    flags = data_flags(tiny_data) | DROPOUT | {"tensor_model_parallel_size": ranks}
    kept: list[Trained] = run_ranks(ranks, train_and_gather, tiny_run(**flags))
    quiet: list[Trained] = run_ranks(ranks, train_and_gather, tiny_run(**flags | {"hidden_dropout": 0.0}))
    assert quiet[0].losses != kept[0].losses, "dropout must do something"
    for recompute in (FULL, EVERYTHING):
        redone: list[Trained] = run_ranks(ranks, train_and_gather, tiny_run(**flags, **recompute))
        for again, first in zip(redone, kept, strict=True):
            assert again.losses[0] == first.losses[0]
            assert again.losses == pytest.approx(first.losses, rel=2e-6)
            assert again.grad_norms == pytest.approx(first.grad_norms, rel=1e-5)
        assert_close(assemble([rank.gradients for rank in redone]), assemble([rank.gradients for rank in kept]), 1e-4)
