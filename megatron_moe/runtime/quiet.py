"""Silences third-party warnings that a user can do nothing about. Entry points call it before other imports."""

import logging
import os
import warnings

UNACTIONABLE = (
    # megatron-core announces at import which optional GPU packages it did not find; `doctor` reports them properly.
    (r".*Apex is not installed.*", UserWarning),
    (r".*Transformer Engine and Apex are not installed.*", UserWarning),
    # Experts may have fewer tensor-parallel ranks than the rest of the model.
    (r".*`sequence_parallel` is set to `True`, but tensor model parallel size is.*", UserWarning),
    (r".*is experimental and still under active development.*", UserWarning),
    # Set on CUDA by runtime/distributed.py before the first kernel; meaningless on a CPU.
    (r".*CUDA_DEVICE_MAX_CONNECTIONS.*", UserWarning),
    (r".*full scope is deprecated.*", UserWarning),
    (r".*fused_weight_gradient_mlp_cuda.*", UserWarning),
    (r".*pynvml.*", FutureWarning),
    # For training only; generation and scoring run without sequence parallelism.
    (r".*for training, sequence parallelism must be used.*", UserWarning),
    # megatron-core reads checkpoints through these parts of torch.distributed.checkpoint.
    (r".*assuming the intent is to load in a single process.*", UserWarning),
    (r".*The argument order of load has been changed.*", UserWarning),
    (r".*we are deprecating ShardedTensor.*", FutureWarning),
)


def silence_third_party_warnings() -> None:
    """Filter known noise by message; everything else still shows."""
    for message, category in UNACTIONABLE:
        warnings.filterwarnings("ignore", message=message, category=category)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
