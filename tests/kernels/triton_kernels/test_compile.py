"""torch.compile of the public functions on `impl="triton"`."""

import pytest

from tests.kernels.test_torch_compile import (
    test_one_graph_for_every_length,  # noqa: F401
    test_opcheck_of_the_linear_operators,  # noqa: F401
)

pytestmark = pytest.mark.parametrize("impl", ["triton"])
