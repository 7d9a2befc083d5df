"""On the CPU the memory of a gradient is handed out again, and only once nobody holds it any more."""

import gc
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from igrpo_kernels import GRPOLossConfig, available_impls, grpo_loss, linear_grpo_loss, selective_log_softmax

REASON = available_impls()["cpu"]
pytestmark = pytest.mark.skipif(REASON != "available", reason=REASON)

ROOT = Path(__file__).resolve().parents[2]
V = 50_000
MIB = 2**20
CXX = shutil.which(os.environ.get("CXX", "c++"))


@pytest.fixture(autouse=True)
def nothing_kept_before_and_after(monkeypatch):
    monkeypatch.delenv("IGRPO_CPU_KEEP_MIB", raising=False)
    gc.collect()
    torch.ops.igrpo.cpu_keep_at_most(0)
    yield
    torch.ops.igrpo.cpu_keep_at_most(0)


def kept_bytes() -> int:
    return torch.ops.igrpo.cpu_keep_at_most(2**62)


def problem(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (1, rows, V), ids (1, rows), advantages (1, rows)."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, rows, V, generator=g).to(dtype)
    return logits, torch.randint(V, (1, rows), generator=g), torch.randn(1, rows, generator=g)


def gradient(rows: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0, loss: str = "token") -> Tensor:
    """dloss/dlogits of an out-of-place call, (1, rows, V)."""
    logits, ids, advantages = problem(rows, dtype, seed)
    logits.requires_grad_()
    if loss == "logps":
        selective_log_softmax(logits, ids, impl="cpu").backward(advantages)
    else:
        level = "sequence" if loss == "gspo" else "token"
        config = GRPOLossConfig(importance_sampling_level=level)
        grpo_loss(logits, ids, advantages, config=config, impl="cpu").loss.backward()
    return logits.grad


@pytest.mark.parametrize("loss", ["token", "gspo", "logps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_free_gradient_is_the_next_one_to_the_bit(dtype, loss, monkeypatch):
    rows = 32
    monkeypatch.setenv("IGRPO_CPU_KEEP_MIB", "0")
    fresh = [gradient(rows, dtype, seed, loss) for seed in range(2)]
    assert kept_bytes() == 0
    monkeypatch.delenv("IGRPO_CPU_KEEP_MIB")
    first = gradient(rows, dtype, 0, loss)
    torch.testing.assert_close(first, fresh[0], rtol=0, atol=0)
    place = first.data_ptr()
    del first
    assert kept_bytes() == rows * V * dtype.itemsize
    second = gradient(rows, dtype, 1, loss)
    assert second.data_ptr() == place and kept_bytes() == 0
    torch.testing.assert_close(second, fresh[1], rtol=0, atol=0)


def test_a_masked_row_of_kept_memory_is_zero():
    """Every element is written, so nothing of the gradient before shows."""
    gradient(16)
    logits, ids, advantages = problem(16)
    mask = torch.arange(16)[None] % 2
    grpo_loss(logits.requires_grad_(), ids, advantages, completion_mask=mask, impl="cpu").loss.backward()
    assert (logits.grad[0, ::2] == 0).all() and (logits.grad[0, 1::2] != 0).any(-1).all()


@pytest.mark.parametrize("linear", [None, torch.float32, torch.bfloat16], ids=str)
def test_the_steady_state_takes_no_fresh_pages(linear):
    """Of logits, 61 MiB; from hidden states: dW of 97 or 49 MiB, and logits of 24 or 12."""
    if linear is None:
        logits, ids, advantages = problem(320)
        leaves = [logits.requires_grad_()]
    else:
        _, ids, advantages = problem(128)
        leaves = [torch.randn(1, 128, 512).to(linear).requires_grad_(), torch.randn(V, 512).to(linear).requires_grad_()]

    def call() -> int:
        for leaf in leaves:
            leaf.grad = None
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        (grpo_loss if linear is None else linear_grpo_loss)(*leaves, ids, advantages, impl="cpu").loss.backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults = [call() for _ in range(6)]
    assert sorted(faults[2:])[1] < 20, faults  # fresh memory: some 500 with pages of 2 MiB, 15,000 without


HOLDERS: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda g: g,
    "a view": lambda g: g[0, 3:5, ::7],
    "a detached view": lambda g: g.detach().view(-1)[-1:],
    "its storage": lambda g: g.untyped_storage(),
    "numpy": lambda g: g.numpy()[0, -1],
    "another dtype's view": lambda g: g.view(torch.int32)[0, 1],
    "a graph's saved tensor": lambda g: (torch.ones_like(g, requires_grad=True) * g).sum(),
    "DLPack": lambda g: torch.from_dlpack(g.detach())[0, 2],
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_somebody_holds_is_never_handed_out(holder):
    held = HOLDERS[holder](grad := gradient())
    place, bits = grad.data_ptr(), grad.clone()
    look = torch.as_strided(grad, grad.shape, grad.stride())
    del grad
    others = [gradient(seed=seed) for seed in (1, 2)]
    assert place not in [g.data_ptr() for g in others]
    torch.testing.assert_close(look, bits, rtol=0, atol=0)
    del look, others
    more = [gradient(seed=seed) for seed in (3, 4)]  # now `held` alone holds it
    assert place not in [g.data_ptr() for g in more]
    del held, more
    assert place in [g.data_ptr() for g in [gradient(), gradient(), gradient()]]


def test_hooks_accumulation_and_a_first_backward_later():
    logits, ids, advantages = problem(16)
    expected = [gradient(seed=0), gradient(seed=0) * -2]
    seen: list[Tensor] = []
    logits.requires_grad_().register_hook(seen.append)
    waiting = [grpo_loss(logits, ids, a, impl="cpu").loss for a in (advantages, advantages * -2)]
    gradient(seed=5)  # between forward and backward
    waiting[0].backward(retain_graph=True)
    gradient(seed=6)
    waiting[1].backward()
    del waiting
    gradient(seed=7)
    for got, wanted in zip([*seen, logits.grad], [*expected, expected[0] + expected[1]], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def test_threads_keep_their_own():
    expected = {(seed, rows): gradient(rows, seed=seed) for seed in (0, 1) for rows in (12, 16)}
    wrong: list[tuple[int, int]] = []

    def work(seed: int) -> None:
        for turn in range(12):
            rows = (12, 16)[turn % 2]
            if not torch.equal(gradient(rows, seed=seed), expected[seed, rows]):
                wrong.append((seed, turn))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 0 < kept_bytes() <= 4 * 16 * V * 4


FORKS = """
import os
import torch
from tests.kernels.test_kept_gradients import problem

torch.set_num_threads(1)
logits, ids, advantages = problem(16)
stats = torch.ops.igrpo.row_stats(logits, ids[0], None, 1.0, 0.0, 1.0)
arguments = (logits, ids[0], None, *stats, advantages[0], None, 1.0, 0.0, 1.0)
mine = torch.ops.igrpo.row_grad(*arguments)
bits = mine.clone()
torch.ops.igrpo.row_grad(*arguments)  # one that is free
child = os.fork()
if child == 0:
    right = torch.equal(torch.ops.igrpo.row_grad(*arguments), bits)
    mine.zero_()
    os._exit(0 if right else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(mine, bits) and torch.equal(torch.ops.igrpo.row_grad(*arguments), bits)
"""


def test_a_forked_child_does_not_touch_its_parents_gradient():
    """In a program that never had a second thread: a child of one that had waits for threads it does not have."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FORKS], cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 0


def test_no_more_is_kept_than_allowed(monkeypatch):
    size = 16 * V * 4  # 3.05 MiB
    monkeypatch.setenv("IGRPO_CPU_KEEP_MIB", "7")
    several = [gradient(seed=seed) for seed in range(4)]
    assert kept_bytes() == 0
    del several
    assert kept_bytes() == 2 * size
    monkeypatch.setenv("IGRPO_CPU_KEEP_MIB", "3")  # less than one: the next call lets go of what was kept
    torch.ops.igrpo.cpu_keep_at_most(3 * MIB)
    gradient()
    assert kept_bytes() == 0
    monkeypatch.delenv("IGRPO_CPU_KEEP_MIB")
    for rows in range(16, 24):  # growing lengths replace a block instead of adding one
        gradient(rows)
    assert kept_bytes() == 23 * V * 4
    gradient(11)  # less than half of it: has its own
    assert kept_bytes() == (23 + 11) * V * 4
    gradient(1)  # below 2 MiB malloc itself is quick
    assert kept_bytes() == (23 + 11) * V * 4
    assert torch.ops.igrpo.cpu_keep_at_most(0) == 0


def test_a_gradient_goes_to_another_process_and_outlives_inference_mode():
    with torch.inference_mode():
        logits, ids, advantages = problem(16)
        stats = torch.ops.igrpo.row_stats(logits, ids[0], None, 1.0, 0.0, 1.0)
        torch.ops.igrpo.row_grad(logits, ids[0], None, *stats, advantages[0], None, 1.0, 0.0, 1.0)
    grad = gradient()  # on memory that was kept in inference mode
    assert not grad.is_inference()
    bits = grad.clone()
    grad.share_memory_()
    gradient(seed=1)
    assert torch.equal(grad, bits) and grad.is_shared()
    assert torch.equal(grad.mul_(2), bits * 2)


@pytest.mark.parametrize("text", ["abc", "2G", "-1", "7 ", "1e3", str(2**43), "9" * 30])
def test_a_limit_that_is_no_number_of_mib_is_refused(text, monkeypatch):
    grad = gradient()
    monkeypatch.setenv("IGRPO_CPU_KEEP_MIB", text)
    with pytest.raises(RuntimeError, match=f"IGRPO_CPU_KEEP_MIB={text} is not a number of MiB; write a whole number"):
        gradient()
    size = grad.nbytes
    del grad  # as the limit was when it was made
    assert kept_bytes() == size


WHILE_THE_LOCK_IS_TAKEN = """
#include <cstdio>
#include <thread>
#include "cpu/kept.h"

igrpo::cpu::Kept<struct Block> *all;
bool asked = false;

struct Block {  // moved while the lock is taken
  Block() = default;
  Block(Block&&) { ask(); }
  Block& operator=(Block&&) { return *this; }
  static void ask() {
    if (all == nullptr || asked) return;
    asked = true;
    std::thread([] { std::printf("%d ", static_cast<int>(all->keep_at_most(0))); }).join();
  }
};

int main() {
  igrpo::cpu::Kept<Block> kept;
  kept.give_back(Block(), 8, 8);
  all = &kept;
  const bool found = kept.take(8, 8).has_value();
  std::printf("%d %d", found, static_cast<int>(kept.keep_at_most(0)));
}
"""


@pytest.mark.skipif(CXX is None, reason="there is no C++ compiler")
def test_nobody_waits_for_the_lock(tmp_path):
    """Least of all a forked child: in its copy the lock of another thread would never open."""
    (tmp_path / "taken.cpp").write_text(WHILE_THE_LOCK_IS_TAKEN)
    command = [CXX, "-std=c++20", "-pthread", f"-I{ROOT / 'csrc'}", "taken.cpp", "-o", "taken"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "taken"], capture_output=True, text=True, timeout=30)
    assert done.stdout == "-1 1 0"
