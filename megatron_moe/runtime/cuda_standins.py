"""CPU stand-ins for the CUDA objects that megatron-core creates unconditionally: streams, events, factories.

`cpu.py` installs them. On a CPU every operation is synchronous, so a stream that does nothing is a correct stream.
"""

from types import ModuleType, TracebackType
from typing import Any

import torch

CPU = torch.device("cpu")


class CpuEvent:
    """Stand-in for `torch.cuda.Event`: everything recorded has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept and ignore CUDA's options (enable_timing, blocking, external)."""

    def record(self, stream: "CpuStream | None" = None) -> None:
        """Nothing to record."""

    def wait(self, stream: "CpuStream | None" = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Everything is done."""
        return True


class CpuStream:
    """Stand-in for `torch.cuda.Stream`, and for the context manager `torch.cuda.stream(...)`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept and ignore CUDA's options (device, priority)."""

    def wait_stream(self, stream: "CpuStream") -> None:
        """Nothing to wait for."""

    def wait_event(self, event: CpuEvent) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """An event that is done; megatron-core's dispatcher waits on what this returns."""
        return event or CpuEvent()

    def __enter__(self) -> "CpuStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


DEFAULT_STREAM = CpuStream()


def current_stream(device: Any = None) -> CpuStream:
    """The one stream there is, so that `stream != torch.cuda.current_stream()` reads False."""
    return DEFAULT_STREAM


def stream_context(stream: CpuStream | None) -> CpuStream:
    """Stand-in for `torch.cuda.stream`."""
    return stream or DEFAULT_STREAM


def get_cpu_rng_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    """State of the default CPU generator, which plays the part of the GPU's."""
    return torch.get_rng_state()


def set_cpu_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    """Set the default CPU generator."""
    torch.set_rng_state(new_state)


def manual_seed(seed: int) -> None:
    """Stand-in for `torch.cuda.manual_seed`."""
    torch.manual_seed(seed)


class TorchOnCpu(ModuleType):
    """`torch` as an upstream module sees it: factories called with `device="cuda"` answer with CPU tensors.

    It replaces the name `torch` inside the few upstream modules that hard-code the device, so nothing outside them
    is touched; every other attribute is torch's own. A `TorchFunctionMode` would be shorter, but is not active in
    the recompute that autograd runs in the backward pass.
    """

    FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "empty_like", "zeros_like", "ones_like", "arange")

    def __init__(self) -> None:
        super().__init__("torch")
        for name in self.FACTORIES:
            self.__dict__[name] = self._on_cpu(getattr(torch, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def _on_cpu(factory: Any) -> Any:
        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
                kwargs["device"] = CPU
            # Page-locked memory needs a driver.
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        on_cpu.__name__ = factory.__name__
        return on_cpu


def tensor_type_as_cuda(tensor: torch.Tensor, dtype: Any = None, non_blocking: bool = False) -> Any:
    """Stand-in for `Tensor.type`: the name of a CPU tensor's type reads as that of the CUDA type.

    megatron-core's optimizers branch on strings such as 'torch.cuda.FloatTensor'. With a dtype it converts, as
    torch's own method does.
    """
    if dtype is None:
        return ORIGINAL_TENSOR_TYPE(tensor).replace("torch.", "torch.cuda.", 1)
    return ORIGINAL_TENSOR_TYPE(tensor, dtype, non_blocking)


ORIGINAL_TENSOR_TYPE = torch.Tensor.type


def tensor_to_cpu(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Stand-in for `Tensor.cuda`: the tensor is where it belongs."""
    return tensor


def module_to_cpu(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Stand-in for `Module.cuda`."""
    return module


def splits_to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`maybe_move_tensor_to_cpu` for tensors that are on the CPU already.

    Upstream converts to numpy only what comes from a GPU; the split sizes of an all-to-all must be numbers.
    """
    if torch.is_tensor(tensor) and as_numpy:
        return tensor.numpy()
    return tensor
