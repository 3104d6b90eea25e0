"""One comparison for all tests of a worker: references are trained once."""

from pathlib import Path

import pytest

from tests.helpers.equivalence import Comparison


@pytest.fixture(scope="session")
def comparison(tiny_data: Path) -> Comparison:
    """On the tiny data."""
    return Comparison(tiny_data)
