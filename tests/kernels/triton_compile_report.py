"""Compiles every Triton kernel for one CUDA architecture without a GPU, through the package's own launches.

    python -m tests.kernels.triton_compile_report 90      prints one JSON object

A stand-in driver answers Triton's questions with that architecture and drops the launches; dispatch, specialisation,
caching and compilation down to the machine code are Triton's own. So the report shows what a GPU would run (registers,
shared memory, stack, which is where spills go), and which launches would compile again.
"""

import json
import sys
from itertools import product

import torch
import triton

from benchmarks.machine_code import resources
from benchmarks.sass_kernels import CompileOnlyDriver
from igrpo_kernels import GRPOLossConfig, fused_linear_autograd, fused_loss
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.triton_rows import TRITON

V, H = 1024, 64  # the widest tile of every kernel needs V >= 16,384; a second pass uses it

VARIANTS = {  # every kernel and every compile-time choice that changes its inner loops
    "plain": {},
    "everything": {
        "beta": 0.1,
        "entropy_coef": 0.1,
        "importance_sampling_mode": "token_mask",
        "final_logit_softcapping": 30.0,
    },
    "cispo": {"loss_type": "cispo", "beta": 0.1, "kl_estimator": "k1", "importance_sampling_mode": "token_truncate"},
    "sapo": {"loss_type": "sapo", "beta": 0.1, "kl_estimator": "k2", "use_bias_correction_kl": False},
    "vespo": {"loss_type": "vespo", "importance_sampling_mode": "token_truncate", "off_policy_mask_threshold": 0.1},
    "gmpo": {"loss_type": "gmpo", "beta": 0.1, "importance_sampling_mode": "seq-mask-tis"},
    "seq-mask-tis": {"importance_sampling_mode": "seq-mask-tis"},
    "weights": {"loss_type": "dro", "dro_beta": 0.1, "kl_tau": 0.1, "entropy_coef": 0.1},
    "rejects": {"rollout_rs": "token_k2,seq_mean_k1", "rollout_rs_threshold": 2.0, "entropy_coef": 0.1, "beta": 0.1},
    "clip_cov": {"loss_type": "clip_cov", "beta": 0.1, "entropy_coef": 0.1, "top_entropy_quantile": 0.2},
    "kl_cov": {"loss_type": "kl_cov", "importance_sampling_mode": "token_mask"},
    "sequence": {"importance_sampling_level": "sequence", "entropy_coef": 0.1},
    "sequence softcap": {"importance_sampling_level": "sequence", "final_logit_softcapping": 30.0, "entropy_coef": 0.1},
}


def call(
    config: GRPOLossConfig,
    *,
    B: int,
    T: int,
    V: int = V,
    dtype=torch.bfloat16,
    view: bool = False,
    inplace: bool = False,
) -> None:
    """One loss and its backward; the numbers that come out are meaningless."""
    logits = torch.zeros(B, T + 3, V, dtype=dtype, requires_grad=True) * 1.0
    logits = logits[:, -T - 1 : -1] if view else logits[:, :T].contiguous()
    rows = torch.zeros(B, T)
    given = {name: rows for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")}
    weights = {"loss_weights": torch.ones(B), "nll_weights": rows} if config.kl_tau else {}
    batch, launched = (
        TokenBatch.build(
            torch.zeros(B, T, dtype=torch.int64), torch.ones(B), dtype=torch.float32, tables=tables, **given, **weights
        )
        for tables in (None, TRITON.tables(logits.device))
    )  # the launched one holds what its memory held, so it must not decide which rows are left out
    fused_loss.grpo_loss(TRITON, logits, launched, config, None, inplace=inplace)[0].backward()
    hidden = torch.zeros(B * T, H, dtype=dtype, requires_grad=True)
    weight = torch.zeros(V, H, dtype=dtype, requires_grad=True)
    fused_linear_autograd.linear_grpo_loss(TRITON, hidden, weight, None, batch, config, None)[0].backward()


def call_with_fp32_logits(config: GRPOLossConfig) -> None:
    """The kernels of `fp32_logits` on CUDA: fp32 in, bf16 out, which no call on CPU tensors chooses."""
    n, width = 6, 16384
    rows = torch.zeros(1, n)
    batch = TokenBatch.build(torch.zeros(1, n, dtype=torch.int64), torch.ones(1), dtype=torch.float32)
    logits, out = torch.zeros(n, width), torch.zeros(n, width, dtype=torch.bfloat16)
    TRITON.token_loss(logits, out, TRITON.coefficient_inputs(batch, config, None), config)
    stats = TRITON.statistics(logits, batch.index, None, config.logit_transform)
    TRITON.gradient(logits, out, batch.index, None, stats, rows[0], rows[0], config.logit_transform)


def compile_everything() -> None:
    """Every variant for narrow and wide rows of every dtype."""
    call_with_fp32_logits(GRPOLossConfig())
    call_with_fp32_logits(GRPOLossConfig(final_logit_softcapping=30.0, entropy_coef=0.1))
    for options, (width, dtype) in product(
        VARIANTS.values(),
        [(V, torch.bfloat16), (16384, torch.bfloat16), (16384, torch.float32), (1021, torch.bfloat16)],
    ):
        if width == 16384 or options in (VARIANTS["plain"], VARIANTS["sequence"]):
            call(GRPOLossConfig(**options), B=2, T=3, V=width, dtype=dtype)


def vary_what_changes_between_steps() -> None:
    """Lengths, batch sizes, views, temperatures, coefficients: nothing here may compile."""
    for options, (B, T) in product(VARIANTS.values(), [(1, 1), (1, 16), (16, 1), (4, 17), (3, 33)]):
        for view in (False, True):
            call(GRPOLossConfig(**options), B=B, T=T, V=16384, view=view, inplace=view)
    for options in VARIANTS.values():
        for numbers in (
            {"temperature": 0.5, "epsilon": 0.0, "epsilon_high": 1.0},
            {"temperature": 16.0, "epsilon": 1.0, "logit_scale": 2.0},
            {"temperature": 2, "epsilon": 1, "importance_sampling_clip_max": 16},
        ):
            call(GRPOLossConfig(**{**options, **numbers}), B=2, T=3, V=16384)
        beta = {"beta": 1.0} if "beta" in options else {}
        bonus = {"entropy_coef": 16.0} if "entropy_coef" in options else {}
        call(GRPOLossConfig(**{**options, **beta, **bonus}), B=2, T=3, V=16384)


def main() -> None:
    # What a dropped launch leaves in fresh memory is NaN, not garbage, by which the CPU would leave out rows.
    torch.use_deterministic_algorithms(True)
    driver = CompileOnlyDriver(int(sys.argv[1]))
    triton.runtime.driver.set_active(driver)
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, compile, **_: compiled.append((fn.name, compile["key"]))
    compile_everything()
    first = len(compiled)
    if "--count" in sys.argv:
        vary_what_changes_between_steps()
        call(GRPOLossConfig(), B=1, T=70_000, V=1024)
    kernels = []
    from igrpo_kernels import (
        triton_batch,
        triton_grpo_loss,
        triton_logprobs,
        triton_objective_kernels,
        triton_ops,
        triton_row_weights,
        triton_selection,
    )

    for function in (
        triton_logprobs.row_statistics_kernel,
        triton_logprobs.row_gradient_kernel,
        triton_grpo_loss.token_loss_kernel,
        triton_ops.scale_kernel,
        triton_batch.batch_kernel,
        triton_row_weights.row_weights_kernel,
        triton_objective_kernels.objective_kernel,
        triton_objective_kernels.finish_kernel,
        triton_selection.top_entropy_kernel,
        triton_selection.covariance_kernel,
    ):
        for kernel in function.device_caches[0][0].values():
            ptx = kernel.asm["ptx"]
            kernels.append(
                {
                    "name": function.__name__,
                    "warps": kernel.metadata.num_warps,
                    "wide_loads": "ld.global.v4.b32" in ptx,
                    "rounds_to_nearest": "cvt.rn.bf16" in ptx,
                    **next(iter(resources(kernel.asm["cubin"]).values())),
                }
            )
    report = {
        "capability": driver.target.arch,
        "compiled_first": first,
        "compiled_later": [name for name, _ in compiled[first:]],
        "grids_beyond_x": [grid for grid in driver.grids if grid[1:] != (1, 1)],
        "largest_grid": max(grid[0] for grid in driver.grids),
        "kernels": kernels,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
