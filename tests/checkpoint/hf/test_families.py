"""Each family against the class of transformers that it stands for: the same logits, both ways."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_moe.checkpoint.hf.families.mixtral import FAMILY as MIXTRAL
from tests.helpers.hf_parity import TOLERANCE, export, moe_like, one_process


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_process():
        yield


def test_mixtral(tmp_path: Path) -> None:
    run = moe_like()
    assert MIXTRAL.why_not(run) is None
    result = export(MIXTRAL, run, tmp_path / "hf")
    print(result.difference, result.size)
    assert result.difference <= TOLERANCE
