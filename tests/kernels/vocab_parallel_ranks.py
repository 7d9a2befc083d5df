"""One rank of `test_vocab_parallel.py`: each case against the one-rank truth; prints {case: "ok" or the error}.

    TRITON_INTERPRET=1 python -m tests.kernels.vocab_parallel_ranks RANK STORE_FILE

Three gloo processes. Cases of two ranks use a group of the first two, as tensor parallelism inside a larger job does.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from igrpo_kernels import (
    GRPOLossConfig,
    SamplingMask,
    available_impls,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    lm_head,
    selective_log_softmax,
)
from igrpo_kernels.integrations import verl
from tests.kernels.oracle import assert_close_to_truth, boundary_inputs, packed

B, T, V, H = 4, 8, 12, 6
SIZES = {2: (7, 5), 3: (2, 9, 1)}  # columns of each rank
DTYPES = {"torch": torch.float64, "triton": torch.float64, "cpu": torch.float32}
RTOL = {"torch": 1e-12, "triton": 1e-11, "cpu": 2e-5}
CONFIGS = {
    "token": GRPOLossConfig(),
    "everything": GRPOLossConfig(
        loss_type="dapo", beta=0.1, entropy_coef=0.1, temperature=0.7, logit_scale=1.3, final_logit_softcapping=5.0
    ),
    "sequence": GRPOLossConfig(importance_sampling_level="sequence", beta=0.1),
    "taught": GRPOLossConfig(distillation_weight=0.4, distillation_alpha=0.3, entropy_coef=0.1, temperature=0.7),
}


class Ranks:
    """A group of processes and what this one holds of the vocabulary."""

    def __init__(self, world: int):
        self.group = dist.new_group(list(range(world)))
        self.member = dist.get_rank() < world
        if self.member:
            first = sum(SIZES[world][: dist.get_rank()])
            self.columns = slice(first, first + SIZES[world][dist.get_rank()])


def inputs_and_head(impl: str, config: GRPOLossConfig):
    level = config.importance_sampling_level
    inputs = boundary_inputs(B=B, T=T, V=V, level=level, config=GRPOLossConfig(importance_sampling_level=level))
    generator = torch.Generator().manual_seed(5)
    hidden, weight, bias = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((B, T, H), (V, H), (V,))
    )
    assert {int(inputs.completion_ids.min()), int(inputs.completion_ids.max())} == {0, V - 1}  # first and last shard
    return inputs, [x.to(DTYPES[impl]) for x in (hidden, weight, bias)]


def close(impl: str, name: str, actual: torch.Tensor, truth: torch.Tensor) -> None:
    assert_close_to_truth(name, actual, truth, rtol=RTOL[impl], atol=1e-6 if impl == "cpu" else 1e-14)


def same_output(impl: str, out, truth) -> None:
    close(impl, "loss", out.loss, truth.loss)
    close(impl, "logps", out.per_token_logps, truth.per_token_logps)
    close(impl, "entropy", out.entropy, truth.entropy)
    assert out.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        close(impl, name, out.metrics[name], value)


def kept_sets(inputs) -> SamplingMask:
    """The token's own id and two more: on this rank, on others, on all."""
    rows = inputs.completion_ids.flatten().tolist()
    return SamplingMask.from_lists([[a, (a + i) % V, (a + 5 * i) % V] for i, a in enumerate(rows)])


def teacher(inputs, config: GRPOLossConfig) -> dict[str, torch.Tensor]:
    """Three entries per token, on all ranks; none where it is not asked for."""
    if not config.distillation_weight:
        return {}
    logps, ids = (0.5 * inputs.logits.flip(-1) + inputs.logits).log_softmax(-1).topk(3)
    return {"teacher_topk_ids": ids, "teacher_topk_logps": logps}


def loss_case(
    ranks: Ranks, impl: str, name: str, layout: str = "padded", inplace: bool = False, kept: bool = False
) -> None:
    config = CONFIGS[name]
    inputs, _ = inputs_and_head(impl, config)
    inputs = packed(inputs) if layout == "packed" else inputs
    mask = kept_sets(inputs) if kept else None
    taught = teacher(inputs, config)
    call = partial(grpo_loss, config=config, num_items_in_batch=17, sampling_mask=mask, **taught)
    whole = inputs.logits.clone().requires_grad_()
    truth = call(whole, inputs.completion_ids, inputs.advantages, impl="torch", **inputs.keywords(config))
    truth.loss.backward()
    mine = inputs.to(DTYPES[impl])
    shard = mine.logits[..., ranks.columns].clone().requires_grad_()
    keywords = {**mine.keywords(config), "impl": impl, "inplace": inplace, "process_group": ranks.group}
    out = call(shard * 1.0, mine.completion_ids, mine.advantages, **keywords)
    (2.0 * out.loss).backward()
    same_output(impl, out, truth)
    close(impl, "gradient", shard.grad, 2.0 * whole.grad[..., ranks.columns])


def log_probs_case(ranks: Ranks, impl: str) -> None:
    """With padding columns on the last rank, which a view leaves out, and banned ids that empty a whole shard."""
    inputs, _ = inputs_and_head(impl, CONFIGS["token"])
    logits = inputs.logits.clone()
    logits[1, :, : SIZES[dist.get_world_size(ranks.group)][0]] = -torch.inf
    index = inputs.completion_ids.clone()
    index[1] = V - 1
    whole = logits.clone().requires_grad_()
    shard = torch.full((B, T, V + 3), torch.nan, dtype=DTYPES[impl])  # 3 padding columns
    shard[..., : ranks.columns.stop - ranks.columns.start] = logits[..., ranks.columns]
    shard.requires_grad_()
    view = shard[..., : ranks.columns.stop - ranks.columns.start]
    options = {"temperatures": torch.linspace(0.3, 3.0, B * T).view(B, T), "return_entropy": True}
    truth = selective_log_softmax(whole, index, impl="torch", **options)
    keywords = {"impl": impl, "process_group": ranks.group, **options}
    actual = selective_log_softmax(view, index, **keywords)
    for name, a, b in zip(("logps", "entropy"), actual, truth, strict=True):
        close(impl, name, a, b)
    (truth[0].sin().sum() + truth[1].cos().sum()).backward()
    (actual[0].sin().sum() + actual[1].cos().sum()).backward()
    close(impl, "gradient", shard.grad[..., : ranks.columns.stop - ranks.columns.start], whole.grad[..., ranks.columns])
    other = view.detach().clone()
    if dist.get_rank(ranks.group) == 0:  # beside a banned shard that has the target: one that hides a NaN
        other[2] = -torch.inf
        other[2, :, 1] = torch.nan
    logps, entropy = selective_log_softmax(other, torch.zeros_like(index), **keywords)
    assert (logps[1] == -torch.inf).all() and entropy[1].isfinite().all(), (logps[1], entropy[1])
    assert logps[2].isnan().all() and entropy[2].isnan().all(), (logps[2], entropy[2])


def linear_case(
    ranks: Ranks, impl: str, name: str, chunk_rows: int = 1000, frozen: bool = False, kept: bool = False
) -> None:
    config = CONFIGS[name]
    inputs, head = inputs_and_head(impl, config)
    inputs = replace(inputs, advantages=inputs.advantages * torch.tensor([1.0, 0.0, 1.0, 1.0]))
    mask = kept_sets(inputs) if kept else None
    taught = teacher(inputs, config)
    call = partial(linear_grpo_loss, config=config, num_items_in_batch=17, sampling_mask=mask, **taught)
    leaves = [x.double().clone().requires_grad_() for x in head]
    truth = call(
        *leaves[:2], inputs.completion_ids, inputs.advantages, lm_head_bias=leaves[2], impl="torch",
        **inputs.keywords(config),
    )  # fmt: skip
    truth.loss.backward()
    before = lm_head.CHUNK_BYTES["cpu"]
    lm_head.CHUNK_BYTES["cpu"] = chunk_rows * max(SIZES[dist.get_world_size(ranks.group)]) * DTYPES[impl].itemsize
    try:
        mine = inputs.to(DTYPES[impl])
        parts = [head[0].clone(), *(x[ranks.columns].clone() for x in head[1:])]
        hidden, weight, bias = (x.requires_grad_(i == 0 or not frozen) for i, x in enumerate(parts))
        out = call(
            hidden, weight, mine.completion_ids, mine.advantages, lm_head_bias=bias, impl=impl,
            process_group=ranks.group, **mine.keywords(config),
        )  # fmt: skip
        out.loss.backward()
    finally:
        lm_head.CHUNK_BYTES["cpu"] = before
    same_output(impl, out, truth)
    close(impl, "dX", hidden.grad, leaves[0].grad)
    if frozen:
        assert weight.grad is None and bias.grad is None
        return
    close(impl, "dW", weight.grad, leaves[1].grad[ranks.columns])
    close(impl, "db", bias.grad, leaves[2].grad[ranks.columns])


def linear_log_probs_case(ranks: Ranks, impl: str) -> None:
    inputs, head = inputs_and_head(impl, CONFIGS["token"])
    results = []
    for columns, group, dtype, name in (
        (slice(None), None, torch.float64, "torch"),
        (ranks.columns, ranks.group, DTYPES[impl], impl),
    ):
        leaves = [head[0].to(dtype).clone(), *(x[columns].to(dtype).clone() for x in head[1:])]
        leaves = [x.requires_grad_() for x in leaves]
        logps, entropy = linear_selective_log_softmax(
            *leaves[:2], inputs.completion_ids, lm_head_bias=leaves[2], final_logit_softcapping=9.0,
            row_mask=inputs.completion_mask, return_entropy=True, impl=name, process_group=group,
            temperatures=torch.linspace(0.3, 3.0, B * T).view(B, T),
        )  # fmt: skip
        (logps.sin().sum() + entropy.cos().sum()).backward()
        results.append((logps, entropy, *(x.grad for x in leaves)))
    truth, actual = results
    for i, name in enumerate(("logps", "entropy", "dX")):
        close(impl, name, actual[i], truth[i])
    for i, name in ((3, "dW"), (4, "db")):
        close(impl, name, actual[i], truth[i][ranks.columns])


def bad_target_case(ranks: Ranks, impl: str) -> None:
    """An id beyond this rank's columns is another rank's; beyond all of them it is an error on every rank."""
    logits = torch.zeros(2, ranks.columns.stop - ranks.columns.start, dtype=DTYPES[impl])
    try:
        selective_log_softmax(logits, torch.tensor([0, V]), impl=impl, process_group=ranks.group)
    except ValueError as error:
        assert f"[0, {V})" in str(error)
    else:
        raise AssertionError("an id outside the whole vocabulary was accepted")


def one_gather_case(ranks: Ranks, impl: str) -> None:
    """Collectives of a loss and its backward: shard sizes, and one gather of four numbers per row."""
    calls, gather, reduce = [], dist.all_gather, dist.all_reduce
    dist.all_gather = lambda parts, x, group: (calls.append(tuple(x.shape)), gather(parts, x, group=group))[1]
    dist.all_reduce = lambda x, group: (calls.append("sum"), reduce(x, group=group))[1]
    try:
        loss_case(ranks, impl, "sequence")
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    assert calls == [(1,), (4, B * T)], calls


class _SequenceParallel(torch.autograd.Function):
    """Megatron's gather in front of verl's call: each rank has its part of the tokens, whose gradients are summed."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.rows = group, x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.rows)[dist.get_rank(ctx.group)], None


def verl_case(ranks: Ranks, impl: str) -> None:
    """verl's `linear_cross_entropy` under sequence and tensor parallelism, at the ranks' own sizes of vocabulary."""
    inputs, (hidden, weight, _) = inputs_and_head(impl, CONFIGS["token"])
    ids, world, rank = inputs.completion_ids, dist.get_world_size(ranks.group), dist.get_rank(ranks.group)
    whole = [x.double().clone().requires_grad_() for x in (hidden.reshape(-1, H), weight)]
    truth = linear_selective_log_softmax(*whole, ids.reshape(-1), temperature=0.7, return_entropy=True, impl="torch")
    rows = hidden.reshape(world, -1, H)[rank].clone().requires_grad_()
    shard = weight[ranks.columns].clone().requires_grad_()
    gathered = _SequenceParallel.apply(rows, ranks.group).view(B, T, H)
    actual = verl.linear_cross_entropy(gathered, shard, ids, 0.7, "none", ranks.group)
    for logps, entropy in (truth, actual):
        (logps.sin().sum() + entropy.cos().sum()).backward()
    for name, a, b in zip(("logps", "entropy"), actual, truth, strict=True):
        close(impl, name, a, b)
    close(impl, "dX", rows.grad, whole[0].grad.view(world, -1, H)[rank])
    close(impl, "dW", shard.grad, whole[1].grad[ranks.columns])


def cases() -> dict[str, tuple[int, Callable[[Ranks], None]]]:
    """Name -> (ranks, check)."""
    found = {}
    for impl in ("torch", "cpu", "triton"):
        two = {
            "everything": partial(loss_case, impl=impl, name="everything"),
            "log_probs": partial(log_probs_case, impl=impl),
            "linear sequence": partial(linear_case, impl=impl, name="sequence", chunk_rows=5),
            "linear log_probs": partial(linear_log_probs_case, impl=impl),
            "taught": partial(loss_case, impl=impl, name="taught"),
        }
        three = {
            "sequence packed": partial(loss_case, impl=impl, name="sequence", layout="packed"),
            "linear everything": partial(linear_case, impl=impl, name="everything", chunk_rows=11),
            "kept": partial(loss_case, impl=impl, name="everything", layout="packed", kept=True),
            "linear kept": partial(linear_case, impl=impl, name="sequence", chunk_rows=5, kept=True),
            "linear taught": partial(linear_case, impl=impl, name="taught", chunk_rows=5),
        }
        if impl != "triton":  # interpreted: the same Python around other kernels
            two |= {
                "token in place": partial(loss_case, impl=impl, name="token", inplace=True),
                "linear token": partial(linear_case, impl=impl, name="token"),
                "linear frozen": partial(linear_case, impl=impl, name="token", frozen=True),
                "bad target": partial(bad_target_case, impl=impl),
            }
            three["log_probs"] = partial(log_probs_case, impl=impl)
        if impl == "cpu":  # what "auto" takes here
            two["verl"] = partial(verl_case, impl=impl)
        if impl != "torch":  # the reference gathers the logits themselves
            two["one gather"] = partial(one_gather_case, impl=impl)
        for world, checks in ((2, two), (3, three)):
            found |= {f"{impl} {world} {name}": (world, check) for name, check in checks.items()}
    return found


def main() -> None:
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    groups = {world: Ranks(world) for world in SIZES}
    results = {}
    for name, (world, check) in cases().items():
        if available_impls()[name.split()[0]] != "available":
            results[name] = f"skip: {available_impls()[name.split()[0]]}"
        elif groups[world].member:
            try:
                check(groups[world])
                results[name] = "ok"
            except Exception as error:  # reported by the test, case by case
                results[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
