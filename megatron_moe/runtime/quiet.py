"""Silences third-party warnings that a user can do nothing about. Entry points call it before other imports."""

import logging
import os
import warnings

UNACTIONABLE = (
    # megatron-core announces at import which optional GPU packages it did not find; `doctor` reports them properly.
    (r".*Apex is not installed.*", UserWarning),
    (r".*Transformer Engine.* is not installed.*", UserWarning),
    (r".*transformer_engine.*", ImportWarning),
    (r".*fused_weight_gradient_mlp_cuda.*", UserWarning),
    (r".*pynvml.*", FutureWarning),
)


def silence_third_party_warnings() -> None:
    """Filter known noise by message; everything else still shows."""
    for message, category in UNACTIONABLE:
        warnings.filterwarnings("ignore", message=message, category=category)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
