"""The tests every implementation shares, on `impl="triton"`: all of them on a GPU; under the interpreter, which needs
seconds for each 192-row input, only the traps found in peers, on 96 rows."""

from functools import partial

import pytest

from tests.kernels import test_traps
from tests.kernels.oracle import boundary_inputs
from tests.kernels.test_addresses import (
    test_log_probs_of_distant_rows,  # noqa: F401
    test_rows_more_than_2_to_the_31_elements_apart,  # noqa: F401
)
from tests.kernels.test_traps import *  # noqa: F403
from tests.kernels.triton_kernels.conftest import INTERPRETED

if not INTERPRETED:
    from tests.kernels.test_edge_cases import *  # noqa: F403
    from tests.kernels.test_packed_and_strided import *  # noqa: F403

pytestmark = pytest.mark.parametrize("impl", ["triton"])


@pytest.fixture(autouse=INTERPRETED)
def fewer_rows(monkeypatch):
    monkeypatch.setattr(test_traps, "boundary_inputs", partial(boundary_inputs, T=12))
