"""GRPO loss forward + backward on a CPU: this package's C++ op against eager PyTorch and torch.compile, one process.

    python benchmarks/bench_cpu_op.py [--rounds 5] [--json FILE]

Every contender does the same work: token-level clipped GRPO loss, its gradient with respect to the logits, and the
mean entropy as a metric; `no entropy` leaves the last out, which only the rivals can save anything by. Contenders take
turns within a round, so that a busy machine slows all of them; the time reported is the median round. Correctness
first: a contender whose loss or gradient disagrees with fp64 PyTorch is not timed.
"""

import argparse
import json
import os
import platform
import statistics
import time

import torch

from igrpo_kernels import GRPOLossConfig, grpo_loss

SHAPES = ((384, 49_152), (128, 151_936))  # rows, V: SmolLM2 and Qwen2.5 vocabularies, about 20 million logits each
SEQUENCES = 4
EPSILON = 0.2


def rival_loss(logits, ids, advantages, old, entropy):
    """What a careful user writes: fp32 log-softmax, clipped surrogate, mean over tokens."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    logps = log_p.gather(-1, ids[..., None]).squeeze(-1)
    ratio = torch.exp(logps - old)
    a = advantages[:, None]
    loss = -torch.min(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a).mean()
    if not entropy:
        return loss, None
    with torch.no_grad():
        return loss, -(log_p.exp() * log_p).sum(-1).mean()


def ours(logits, ids, advantages, old, inplace):
    out = grpo_loss(logits, ids, advantages, old_per_token_logps=old, config=GRPOLossConfig(epsilon=EPSILON),
                    impl="cpu", inplace=inplace)  # fmt: skip
    return out.loss, out.metrics["entropy"]


def contenders():
    compiled = torch.compile(rival_loss, dynamic=False)
    return {
        "eager": lambda *x: rival_loss(*x, True),
        "eager, no entropy": lambda *x: rival_loss(*x, False),
        "torch.compile": lambda *x: compiled(*x, True),
        "torch.compile, no entropy": lambda *x: compiled(*x, False),
        "cpu op": lambda *x: ours(*x, False),
        "cpu op, in place": lambda *x: ours(*x, True),
    }


def inputs(rows, vocab, dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (SEQUENCES, rows // SEQUENCES)
    logits = (2 * torch.randn(*shape, vocab, generator=generator)).to(dtype)
    ids = torch.randint(vocab, shape, generator=generator)
    logps = torch.log_softmax(logits.float(), -1).gather(-1, ids[..., None]).squeeze(-1)
    old = logps + 0.2 * torch.randn(shape, generator=generator)  # both sides of the clip range
    return logits, ids, torch.tensor([-1.0, -0.5, 0.5, 1.0]), old


def once(run, logits, *rest):
    """Seconds of loss + backward, the loss and the gradient. The leaf is a fresh copy, made outside the clock."""
    leaf = logits.clone().requires_grad_()
    start = time.perf_counter()
    loss, _ = run(leaf, *rest)
    loss.backward()
    return time.perf_counter() - start, loss.item(), leaf.grad


def check(name, run, data):
    """Loss and gradient of a few rows against fp64 PyTorch."""
    logits, ids, advantages, old = data[0][:, :2].clone(), data[1][:, :2], data[2], data[3][:, :2]
    truth = once(lambda *x: rival_loss(*x, False), logits.double(), ids, advantages.double(), old.double())
    # torch.compile would compile again for this shape; its eager twin is checked instead.
    _, loss, grad = once(contenders()["eager"] if "compile" in name else run, logits, ids, advantages, old)
    tolerance = 2e-5 if logits.dtype == torch.float32 else 4e-3
    assert abs(loss - truth[1]) <= 2e-5 * abs(truth[1]) + 1e-6, name
    error = (grad.double() - truth[2]).abs().max() / truth[2].abs().max()
    assert error <= tolerance, f"{name}: gradient error {error:.1e}"


def measure(rows, vocab, dtype, rounds):
    data = inputs(rows, vocab, dtype)
    runs = contenders()
    for name, run in runs.items():
        check(name, run, data)
    for _ in range(2):  # compile, and let the machine find its memory
        for run in runs.values():
            once(run, *data)
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(once(run, *data)[0])
    return {name: statistics.median(values) for name, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the figures here")
    arguments = parser.parse_args()
    threads, capability = torch.get_num_threads(), None
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        for rows, vocab in SHAPES:
            figures = measure(rows, vocab, dtype, arguments.rounds)
            capability = torch.ops.igrpo.cpu_capability()
            name = str(dtype).removeprefix("torch.")
            print(f"\n{name}, {rows} x {vocab}, {threads} threads, {capability}")
            print(f"{'':28}{'ms':>9}{'ns/logit':>10}{'x cpu op':>10}")
            for contender, value in figures.items():
                ratio = value / figures["cpu op"]
                print(f"{contender:28}{1e3 * value:9.1f}{1e9 * value / rows / vocab:10.2f}{ratio:10.2f}")
            records.append({"dtype": name, "rows": rows, "vocab": vocab, "seconds": figures})
    if arguments.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        report = {"machine": machine, "threads": threads, "capability": capability, "torch": torch.__version__}
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({**report, "records": records}, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
