"""Counts what a call would launch on a GPU, without one: the operators that PyTorch dispatches, and Triton's grids.

    python -m tests.kernels.launches        prints {case: launches} as JSON, forward and backward together

Views and uninitialised memory launch nothing. Copies to the host, which would wait for the device, raise.
"""

import json
from collections.abc import Callable
from dataclasses import replace

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.sass_kernels import CompileOnlyDriver
from igrpo_kernels import GRPOLossConfig, batch, distillation, fused_loss, temperatures
from igrpo_kernels.kept_rows import kernels_for
from igrpo_kernels.triton_rows import TRITON
from igrpo_kernels.types import LogitTransform

B, T, V = 4, 8, 1024
CASES = {
    "plain": {},
    "KL": {"beta": 0.1},
    "entropy bonus": {"entropy_coef": 0.1},
    "token correction": {"importance_sampling_mode": "token_truncate"},
    "sequence correction": {"importance_sampling_mode": "sequence_mask"},
    "DAPO with all of it": {
        "loss_type": "dapo", "beta": 0.1, "entropy_coef": 0.1, "importance_sampling_mode": "token_mask",
    },
    "CISPO": {"loss_type": "cispo"},
    "SAPO": {"loss_type": "sapo"},
    "DPPO": {"loss_type": "dppo_tv"},
    "GSPO": {"importance_sampling_level": "sequence"},
    "GSPO with all of it": {
        "importance_sampling_level": "sequence", "beta": 0.1, "entropy_coef": 0.1,
        "importance_sampling_mode": "sequence_truncate",
    },
    "GSPO-token": {"importance_sampling_level": "sequence_token"},
    "OPSM": {"off_policy_mask_threshold": 0.1},
    "VESPO": {"loss_type": "vespo"},
    "GMPO": {"loss_type": "gmpo"},
    "TOPR": {"loss_type": "topr"},
    "DRO": {"loss_type": "dro", "dro_beta": 0.1},
    "pull to the sampler": {"kl_tau": 0.1},
    "loss and NLL weights": {"weighted": True},
    "seq-mask-tis": {"importance_sampling_mode": "seq-mask-tis"},
    "prompt mean": {"loss_type": "prompt_mean"},
    "rejection": {"rollout_rs": "token_k2,seq_mean_k1", "rollout_rs_threshold": 2.0},
    "rejection, GSPO and a token correction": {
        "rollout_rs": "seq_max_k3", "rollout_rs_threshold": 2.0, "importance_sampling_level": "sequence",
        "importance_sampling_mode": "token_mask",
    },
    "temperatures": {"temperatures": True},
    "teacher and temperatures": {"distillation_weight": 0.5, "temperatures": True},
    "top-entropy quantile": {"top_entropy_quantile": 0.2},
    "top-entropy quantile with all of it": {
        "loss_type": "dapo", "beta": 0.1, "entropy_coef": 0.1, "importance_sampling_mode": "token_mask",
        "top_entropy_quantile": 0.2,
    },
    "Clip-Cov": {"loss_type": "clip_cov"},
    "KL-Cov": {"loss_type": "kl_cov"},
    "KL-Cov of the top entropies": {"loss_type": "kl_cov", "top_entropy_quantile": 0.2},
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operators that compute something."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert "local_scalar_dense" not in name, "the host waits for the device"
        out = function(*args, **(kwargs or {}))
        storages = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        view = made and all(x.untyped_storage().data_ptr() in storages for x in made)
        if not (view and not function._schema.is_mutable) and "empty" not in name and "igrpo_kernels" not in name:
            self.names.append(name)
        return out


def loss_call(options: dict, packed: bool) -> Callable[[], None]:
    """A loss and its backward, whose inputs exist."""
    given = ("weighted", "temperatures")
    config = GRPOLossConfig(**{name: value for name, value in options.items() if name not in given})
    logits = torch.zeros(B, T, V, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.zeros(B, T)
    ids, mask, advantages = torch.zeros(B, T, dtype=torch.int64), torch.ones(B, T, dtype=torch.int64), torch.ones(B)
    offsets = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    asks = (config.importance_sampling_mode, config.off_policy_mask_threshold, config.kl_tau, config.rollout_rs)
    sampling = rows if any(asks) else None
    weights = rows if "weighted" in options else None
    given = {
        "completion_mask": mask, "old_per_token_logps": rows, "sampling_per_token_logps": sampling,
        "ref_per_token_logps": rows if config.beta else None, "loss_weights": weights, "nll_weights": weights,
    }  # fmt: skip
    if packed:
        given = {name: None if x is None else x.view(-1) for name, x in given.items()} | {"cu_seqlens": offsets}

    completion_ids = ids.view(-1) if packed else ids
    own = torch.ones(completion_ids.shape) if "temperatures" in options else None
    best = torch.zeros(*completion_ids.shape, 1, dtype=torch.int64), torch.zeros(*completion_ids.shape, 1)

    def call() -> None:
        made = batch.TokenBatch.build(
            completion_ids, advantages, dtype=torch.float32, tables=TRITON.tables(logits.device),
            **given, prompt_lengths=advantages if config.loss_type == "prompt_mean" else None,
        )  # fmt: skip
        made = temperatures.with_temperatures(made, own, config, completion_ids)
        taught = distillation.Teacher.of(*best, made, config, V)
        kernels, index = kernels_for(TRITON, made.index, None, None, taught)
        x = logits.view(-1, V) if packed else logits
        made = replace(made, index=index, seq_id=ids.view(-1))  # the launch that writes seq_id was dropped
        fused_loss.grpo_loss(kernels, x, made, config, None, inplace=False)[0].backward()

    return call


def log_probs_call() -> None:
    logits, index = torch.empty(B, T, V, dtype=torch.bfloat16, requires_grad=True), torch.empty(B, T).long()
    options = {"return_entropy": True}
    logps, entropy = fused_loss.selective_log_softmax(TRITON, logits, index, LogitTransform(), **options)
    torch.autograd.backward([logps, entropy], [logps.detach(), entropy.detach()])


def main() -> None:
    driver = CompileOnlyDriver(90)
    triton.runtime.driver.set_active(driver)
    for module in (batch, distillation, temperatures):
        module.values_may_be_read = lambda x: False  # as on a GPU
    found = {}
    calls = {name: loss_call(options, False) for name, options in CASES.items()}
    calls |= {f"{name}, packed": loss_call(options, True) for name, options in CASES.items()}
    for name, call in {**calls, "selective_log_softmax": log_probs_call}.items():
        driver.grids.clear()
        with Launches() as launches:
            call()
        found[name] = len(launches.names) + len(driver.grids)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
