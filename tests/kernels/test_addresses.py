"""More than 2^31 logits, more than 65,535 rows: 64-bit addresses and grids, without the memory.

Rows are views far apart in storage that the system commits page by page, so that only touched pages exist.
"""

from pathlib import Path

import pytest
import torch

from igrpo_kernels import grpo_loss, selective_log_softmax
from tests.kernels.oracle import IMPLS, assert_close_to_truth

pytestmark = pytest.mark.parametrize("impl", IMPLS)
V = 64


def distant_rows(count: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """(count, V) of noise whose last row starts beyond element 2^31."""
    stride = 2**31 // (count - 1) + 8
    elements = stride * (count - 1) + V
    storage = torch.UntypedStorage(elements * dtype.itemsize, device=device)
    return torch.tensor([], dtype=dtype, device=device).set_(storage, 0, (count, V), (stride, 1))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_more_than_2_to_the_31_elements_apart(impl, inplace):
    before = resident_bytes()
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 1, V, generator=generator).bfloat16()
    logits = distant_rows(3, torch.bfloat16)[:, None]
    assert logits.stride(0) * 2 > 2**31
    logits.copy_(values)
    ids = torch.tensor([[3], [0], [63]])
    results = []
    for x in (values, logits):
        x = x.requires_grad_()
        out = grpo_loss(x * 1.0 if x is values else x, ids, torch.tensor([1.0, -1.0, 2.0]), impl=impl, inplace=inplace)
        results.append((out.loss, out.per_token_logps, torch.autograd.grad(out.loss, x)[0]))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert results[0][2].abs().max() > 0.1
    if inplace and impl != "torch":
        torch.testing.assert_close(logits.detach(), results[0][2], rtol=0, atol=0)
    assert resident_bytes() - before < 2**30  # of 4 GiB of addresses


# Interpreted, 70,000 programs take minutes; test_triton_compile.py looks at the grid.
@pytest.mark.applies(lambda x: x["impl"] != "triton", otherwise="minutes")
def test_more_rows_than_a_grid_dimension_holds(impl):
    """70,000 rows; those that are masked are not read, so their pages never exist."""
    count = 70_000
    logits, kept = distant_rows(count, torch.bfloat16), torch.tensor([0, 65_535, 65_536, 69_999])
    if impl == "torch":  # it widens all rows
        logits = torch.zeros(count, V, dtype=torch.bfloat16)
    logits[kept] = torch.randn(4, V, generator=torch.Generator().manual_seed(1)).bfloat16()
    mask = torch.zeros(1, count, dtype=torch.bool)
    mask[0, kept] = True
    ids = torch.arange(count)[None] % V
    leaf = logits[None].requires_grad_()
    out = grpo_loss(leaf, ids, torch.ones(1), completion_mask=mask, impl=impl)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    small = logits.detach()[kept][None].double().requires_grad_()
    expected = grpo_loss(small, ids[:, kept], torch.ones(1), impl="torch")
    (small_grad,) = torch.autograd.grad(expected.loss, small)
    assert_close_to_truth("logps", out.per_token_logps[0, kept], expected.per_token_logps[0], rtol=2e-6)
    assert_close_to_truth("gradient", grad[0, kept], small_grad[0], rtol=2**-8)
    assert (grad[0, ~mask[0]] == 0).all()


def test_log_probs_of_distant_rows(impl):
    logits = distant_rows(2, torch.float32)
    values = torch.randn(2, V, generator=torch.Generator().manual_seed(2))
    logits.copy_(values)
    results = [
        selective_log_softmax(x, torch.tensor([5, 60]), return_entropy=True, impl=impl) for x in (values, logits)
    ]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
