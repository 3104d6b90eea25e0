"""Says whether a run can train here: what is installed, what works when tried, which backend each part uses.

`examine` makes a `Report`; `megatron_moe.doctor` prints it. That torch or megatron-core is missing is one of
the answers, so neither is imported before it was looked for.
"""

import importlib
import importlib.metadata
import importlib.util
import logging
import platform
import re
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "absent", "warning", "error"]

PYTHON_RANGE = ((3, 12), None)
TORCH_RANGE = ((2, 10), None)
MEGATRON_RANGE = ((0, 19), (0, 20))
# Distribution name -> module name of everything else a run imports.
REQUIRED_LIBRARIES = {
    "sentencepiece": "sentencepiece",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "pyyaml": "yaml",
    "tqdm": "tqdm",
    # megatron-core saves checkpoints with it, but does not ask for it.
    "psutil": "psutil",
}
BUILD_APEX = (
    "optional; build it from source: git clone https://github.com/NVIDIA/apex && cd apex && "
    'pip install -v --no-build-isolation --config-settings "--build-option=--cpp_ext --cuda_ext" .'
)
# What an import of a broken native library raises: a missing symbol, a missing file, an unsupported device.
IMPORT_FAILURES = (ImportError, OSError, RuntimeError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Finding:
    """What was found about one library or ability. An `error` means that nothing can be trained here."""

    name: str
    state: State
    detail: str
    advice: str | None = None


@dataclass(frozen=True)
class Backend:
    """What one part of the model would run on, and why."""

    part: str
    backend: str
    why: str


@dataclass(frozen=True)
class Report:
    """Everything `doctor` knows."""

    device: str
    findings: tuple[Finding, ...]
    backends: tuple[Backend, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why training cannot run here; empty when it can."""
        return tuple(f"{each.name}: {each.detail}" for each in self.findings if each.state == "error")

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {"can_train": not self.reasons, "reasons": list(self.reasons), **asdict(self)}


def examine() -> Report:
    """Look at everything, in the order in which one thing needs another."""
    findings = [check_python(), check_torch()]
    has_torch = findings[-1].state != "error"
    device = "none"
    if has_torch:
        device_finding = check_device()
        device = "cuda" if device_finding.state == "ok" else "cpu"
        findings += [device_finding, check_collectives(device)]
        findings += [check_megatron_core()]
    findings += [check_library(name, module) for name, module in REQUIRED_LIBRARIES.items()]
    findings += [check_tensorboard(), check_apex(), check_transformer_engine(device)]
    if has_torch:
        findings += [check_triton(device), check_grouped_mm(device)]
    can_train = all(each.state != "error" for each in findings)
    return Report(device, tuple(findings), choose_backends(device, findings) if can_train else ())


def check_python() -> Finding:
    """The interpreter's version; megatron-core 0.19 needs 3.12."""
    version = platform.python_version()
    if not _within(version, PYTHON_RANGE):
        return Finding("Python", "error", f"{version}, needs >= 3.12", "install Python 3.12, then: make venv")
    return Finding("Python", "ok", f"{version} ({sys.executable})")


def check_torch() -> Finding:
    """torch, what it was built for, and whether its version is new enough."""
    install = "pip install 'torch>=2.10'"
    if importlib.util.find_spec("torch") is None:
        return Finding("torch", "error", "not installed", install)
    try:
        import torch
    except IMPORT_FAILURES as error:
        return Finding("torch", "error", f"cannot be imported: {_one_line(error)}", install)
    if not _within(torch.__version__, TORCH_RANGE):
        return Finding("torch", "error", f"{torch.__version__}, needs >= 2.10", install)
    if torch.version.cuda is None:
        return Finding("torch", "ok", f"{torch.__version__}, built without CUDA")
    built_for = " ".join(dict.fromkeys(re.findall(r"sm_\d+[a-z]?", torch.__config__.show())))
    return Finding("torch", "ok", f"{torch.__version__}, built for CUDA {torch.version.cuda} ({built_for})")


def check_device() -> Finding:
    """The GPUs torch sees, and whether it was compiled for them; `absent` means the CPU is used."""
    import torch

    if not torch.cuda.is_available():
        reason = "torch was built without CUDA" if torch.version.cuda is None else "torch sees no GPU or no driver"
        return Finding("GPU", "absent", f"{reason}; the CPU is used ({torch.get_num_threads()} threads)")
    properties = torch.cuda.get_device_properties(0)
    kind = f"sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
    detail = f"{torch.cuda.device_count()} x {properties.name} ({kind})"
    try:
        torch.ones(8, device="cuda").sum().item()
    except RuntimeError as error:
        advice = "install a torch that is built for this GPU and driver"
        return Finding("GPU", "error", f"{detail}: cannot be used: {_one_line(error)}", advice)
    return Finding("GPU", "ok", detail)


def check_collectives(device: str) -> Finding:
    """gloo and NCCL: the one that the device needs must be there."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return Finding("collectives", "error", "this torch was built without torch.distributed", "use another build")
    has_gloo, has_nccl = dist.is_gloo_available(), dist.is_nccl_available()
    nccl = "NCCL " + ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "no NCCL"
    detail = f"{'gloo' if has_gloo else 'no gloo'}, {nccl}"
    missing = not (has_nccl if device == "cuda" else has_gloo)
    return Finding(
        "collectives", "error" if missing else "ok", detail, "use another build of torch" if missing else None
    )


def check_megatron_core() -> Finding:
    """megatron-core's version, and that the parts used here can be imported."""
    name, install = "megatron-core", "pip install 'megatron-core>=0.19,<0.20'"
    if _find("megatron.core") is None:
        return Finding(name, "error", "not installed", install)
    try:
        version = _version(name) or _import_quietly("megatron.core.package_info").__shortversion__
        if not _within(version, MEGATRON_RANGE):
            return Finding(name, "error", f"{version}, needs >= 0.19 and < 0.20", install)
        for module in ("models.gpt", "transformer.moe.moe_layer", "optimizer"):
            _import_quietly(f"megatron.core.{module}")
    except IMPORT_FAILURES as error:
        return Finding(name, "error", f"cannot be imported: {_one_line(error)}", install)
    return Finding(name, "ok", f"{version} (within >= 0.19, < 0.20)")


def check_library(distribution: str, module: str) -> Finding:
    """One of the plain libraries that every run imports."""
    if _find(module) is None:
        return Finding(distribution, "error", "not installed", f"pip install {distribution}")
    return Finding(distribution, "ok", _version(distribution) or "unknown version")


def check_tensorboard() -> Finding:
    """TensorBoard, which a run can do without."""
    if _find("tensorboard") is None:
        return Finding("tensorboard", "warning", "not installed: give --no-tensorboard", "pip install tensorboard")
    return Finding("tensorboard", "ok", _version("tensorboard") or "unknown version")


def check_apex() -> Finding:
    """NVIDIA Apex, told apart from the PyPI package of that name by what the folder contains.

    Nothing of it is imported: the PyPI package fails at import without its web framework.
    """
    spec = _find("apex")
    if spec is None:
        return Finding("NVIDIA Apex", "absent", "not installed", BUILD_APEX)
    folders = [Path(each) for each in spec.submodule_search_locations or ()]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        where = folders[0] if folders else spec.origin
        detail = f"{where} is not NVIDIA's but another project (PyPI's apex belongs to the Pyramid web toolkit)"
        return Finding("NVIDIA Apex", "warning", detail, f"pip uninstall apex; NVIDIA's is {BUILD_APEX}")
    if _find("amp_C") is None:
        return Finding("NVIDIA Apex", "warning", "installed without its CUDA extensions (no amp_C)", BUILD_APEX)
    return Finding("NVIDIA Apex", "ok", "installed, with its CUDA extensions")


def check_transformer_engine(device: str) -> Finding:
    """Transformer Engine, and that its torch part loads where there is a GPU to use it on."""
    name, install = "Transformer Engine", "optional, needs a GPU: pip install 'megatron_moe[te]'"
    if _find("transformer_engine") is None:
        return Finding(name, "absent", "not installed", install)
    version = _version("transformer-engine") or "unknown version"
    if device != "cuda":
        return Finding(name, "absent", f"{version}, of no use without a GPU")
    try:
        _import_quietly("transformer_engine.pytorch")
    except IMPORT_FAILURES as error:
        return Finding(name, "warning", f"{version}, cannot be imported: {_one_line(error)}", install)
    return Finding(name, "ok", version)


def check_triton(device: str) -> Finding:
    """triton, which torch.compile and some fused kernels need on a GPU."""
    if _find("triton") is None:
        return Finding("triton", "absent", "not installed", "pip install triton" if device == "cuda" else None)
    return Finding(
        "triton",
        "ok",
        (_version("triton") or "unknown version") + ("" if device == "cuda" else ", not used on the CPU"),
    )


# Compute capabilities with a kernel (aten/src/ATen/native/cuda/GroupedBlas.cpp:_grouped_mm_cuda).
GROUPED_KERNELS = (9, 10)


def check_grouped_mm(device: str) -> Finding:
    """Runs torch's grouped matrix product, forward and backward, and compares it with a loop."""
    import torch

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    counts = [3, 0, 5]
    x = torch.randn(sum(counts), 16, device=device, dtype=dtype, requires_grad=True)
    weights = torch.randn(len(counts), 16, 16, device=device, dtype=dtype, requires_grad=True)
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    try:
        grouped = torch.nn.functional.grouped_mm(x, weights, offs=ends)
        actual = (grouped, *torch.autograd.grad(grouped.square().sum(), (x, weights)))
        looped = torch.cat([part @ weight for part, weight in zip(x.split(counts), weights, strict=True)])
        expected = (looped, *torch.autograd.grad(looped.square().sum(), (x, weights)))
    except (RuntimeError, AttributeError) as error:
        return Finding("grouped_mm", "warning", f"does not run: {_one_line(error)}", "pip install -U torch")
    tolerance = 5e-2 if dtype is torch.bfloat16 else 1e-4
    if not all(torch.allclose(a, e, rtol=tolerance, atol=tolerance) for a, e in zip(actual, expected, strict=True)):
        return Finding("grouped_mm", "warning", "runs, but differs from a loop", "pip install -U torch")
    detail = f"forward and backward equal a loop ({str(dtype).removeprefix('torch.')})"
    if device == "cuda" and torch.cuda.get_device_capability()[0] not in GROUPED_KERNELS:
        detail += "; on this card torch's own is a loop as well, which waits for the device"
    return Finding("grouped_mm", "ok", detail)


def choose_backends(device: str, findings: list[Finding]) -> tuple[Backend, ...]:
    """What each part of the model runs on with default flags, and what would change it."""
    from megatron.core.optimizer import Adam

    states = {each.name: each.state for each in findings}
    engine = (
        "Transformer Engine is there: --transformer-impl transformer_engine takes its fused one"
        if states["Transformer Engine"] == "ok"
        else "--transformer-impl local; no Transformer Engine to use here"
    )
    plain, dropout = (sdpa_kernel_name(device, rate) for rate in (0.0, 0.1))
    deep_ep = "installed" if _find("deep_ep") else "not installed"
    plain_torch = Adam.__module__.startswith("torch.")
    collective = "nccl" if device == "cuda" else "gloo"
    return (
        Backend("core attention", f"scaled_dot_product_attention ({plain})", f"with attention dropout: {dropout}"),
        Backend("norms", "torch LayerNorm / RMSNorm", "works with sequence parallelism, needs no Apex"),
        Backend("linear layers", "megatron-core Column/RowParallelLinear", engine),
        Backend(
            "experts",
            "stacked weights, torch grouped_mm" if device == "cuda" else "stacked weights, one expert by one",
            engine,
        ),
        Backend(
            "dispatcher",
            f"alltoall over {collective}",
            f"over several nodes --moe-token-dispatcher-type grouped; flex needs a GPU and DeepEP, which is {deep_ep}",
        ),
        Backend(
            "optimizer",
            "torch AdamW, fused kernel" if plain_torch else f"{Adam.__module__.split('.')[0]} {Adam.__name__}",
            "no FusedAdam of Transformer Engine or Apex" if plain_torch else "as megatron-core found it",
        ),
        Backend("collectives", collective, "there is a GPU" if device == "cuda" else "there is no GPU"),
        *(_cpu_backends() if device == "cpu" else ()),
    )


def _cpu_backends() -> tuple[Backend, ...]:
    from megatron_moe.runtime import allocator, cpu_matmul

    onednn, choice = cpu_matmul.pays_here(), allocator.users_choice()
    keeps = allocator.is_glibc() and choice is None
    return (
        Backend(
            "fp32 products",
            "oneDNN" if onednn else "torch's choice",
            "MKL takes AVX-512 on Intel's processors only" if onednn else "no AVX-512, or Intel's processor: MKL",
        ),
        Backend(
            "step memory",
            "kept for the next step" if keeps else "the allocator's choice",
            "glibc would map and fault it anew" if keeps else f"{choice} is set" if choice else "no glibc",
        ),
    )


def sdpa_kernel_name(device: str, dropout: float) -> str:
    """Which kernel torch takes for causal attention in training, for a common head size."""
    import torch
    from torch.nn.attention import SDPBackend

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query = torch.zeros(1, 2, 128, 64, device=device, dtype=dtype, requires_grad=True)
    # torch has no public way to ask; torch.compile asks the same question with the same function.
    choice = torch._fused_sdp_choice(query, query, query, None, dropout, True)
    return str(SDPBackend(choice).name).lower()


def _find(module: str) -> importlib.machinery.ModuleSpec | None:
    """The module's spec, or None when it or its parent package is missing. Imports parents only."""
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None


def _import_quietly(module: str) -> Any:
    """Import without the warnings about optional packages: this report is where they are told."""
    # torch logs through this one that there is no CUDA when a module with optional CUDA code is imported.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _version(distribution: str) -> str | None:
    """The installed version, or None for a bare folder on the import path."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _within(version: str, limits: tuple[tuple[int, int], tuple[int, int] | None]) -> bool:
    major, minor = (int(part) for part in re.findall(r"\d+", version)[:2])
    lower, upper = limits
    return (major, minor) >= lower and (upper is None or (major, minor) < upper)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
