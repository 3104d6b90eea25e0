"""A run whose model Mixtral's class computes, trained by the real trainer, and its export by the real command."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.converting import converted
from tests.helpers.distributed import run_ranks
from tests.helpers.hf_parity import one_process
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve

MIXTRAL: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "max_position_embeddings": 256,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "num_query_groups": 2,
    "num_layers": 2,
    "num_experts": (4,),
    "expert_interval": 1,
    "mlp_type": "standard",
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "init_method_std": 0.15,
    "eval_interval": 2,
    "eval_iters": 1,
    "train_iters": 2,
}


def trained(folder: Path, data: Path, **flags: Any) -> Path:
    """A run's directory with one checkpoint of two steps."""
    run_ranks(1, train_curve, tiny_run(**data_flags(data), **{**MIXTRAL, **flags}, save=str(folder)))
    return folder


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """Process groups of this process alone."""
    with one_process():
        yield


@pytest.fixture(scope="session")
def mixtral_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """860 ids in an embedding of 896 rows; float32."""
    return trained(tmp_path_factory.mktemp("hf") / "mixtral", tiny_data)


@pytest.fixture(scope="session")
def pyramid_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """GELU, LayerNorm, learned positions, residual experts, 4 and 8 of them: no class of transformers is exact."""
    run = tiny_run(
        **data_flags(tiny_data),
        init_method_std=0.15,
        train_iters=2,
        max_position_embeddings=256,
        save=str(tmp_path_factory.mktemp("hf") / "pyramid"),
    )
    run_ranks(1, train_curve, run)
    assert run.checkpoint.save is not None
    return Path(run.checkpoint.save)


@pytest.fixture(scope="session")
def exported(mixtral_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("hf") / "exported"
    flags = ("--license", "apache-2.0", "--workers", 1)
    return folder, converted("to-hf", "--load", mixtral_run, "--output", folder, *flags)


@pytest.fixture(scope="session")
def imported(exported: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The exported folder as a run again, and what the command printed."""
    folder = tmp_path_factory.mktemp("hf") / "imported"
    return folder, converted("from-hf", "--hf", exported[0], "--save", folder, "--workers", 1)
