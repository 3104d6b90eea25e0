"""The comparison is able to fail: each fault put into the trainer on purpose is found, by what should find it."""

import pytest

from tests.helpers.equivalence import Comparison
from tests.helpers.equivalence_faults import FAULTS, what_is_found


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str, comparison: Comparison) -> None:
    found = what_is_found(name, comparison)
    assert any(FAULTS[name].found_by in failure for failure in found), found
