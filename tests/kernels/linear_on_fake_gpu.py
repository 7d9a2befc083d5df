"""What `linear_grpo_loss` asks of a GPU that is not there; `tests/plan/trace_checks.py` runs it and sees one."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from igrpo_kernels import GRPOLossConfig, linear_grpo_loss, lm_head
from igrpo_kernels.side_stream import SideStream

H, V = 256, 4096
NAMES = {"mm": "product", "addmm": "product", "token_loss_": "loss", "row_statistics": "statistics",
         "row_gradient_": "gradient"}  # fmt: skip


class Launches(TorchDispatchMode):
    """What the device is given: (stream, operator, rows of the result), without views and allocations."""

    def __init__(self):
        super().__init__()
        self.calls, self.stream = [], "main"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        touched = [x for x in tree_leaves((out, args)) if isinstance(x, torch.Tensor)]
        on_gpu = any(x.device.type == "cuda" for x in touched)
        if on_gpu and func.namespace != "prim" and not func.is_view and "empty" not in name and name != "detach":
            rows = next((x.shape[0] for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.dim()), None)
            self.calls.append((self.stream, NAMES.get(name, name), rows))
        return out


def call(trace, name, rows, config=None, backward=True, **given):
    """Launches, peak beyond the inputs and host waits of one call on `rows` tokens in sequences of 256."""
    gpu, bf16 = torch.device("cuda", 0), torch.bfloat16
    hidden = torch.empty(rows, H, device=gpu, dtype=bf16, requires_grad=True)
    weight = torch.empty(V, H, device=gpu, dtype=bf16, requires_grad=True)
    ids = torch.empty(rows, device=gpu, dtype=torch.int64)
    advantages, old = torch.empty(rows // 256, device=gpu), torch.empty(rows, device=gpu)
    cu_seqlens = torch.empty(rows // 256 + 1, device=gpu, dtype=torch.int64)
    given = {key: torch.empty(rows, device=gpu) if value is True else value for key, value in given.items()}
    launches, start = Launches(), SideStream.start

    def beside(self, work):
        launches.stream = "side"
        try:
            return start(self, work)
        finally:
            launches.stream = "main"

    SideStream.start = beside
    try:
        with trace.phase(name) as phase, launches:
            before = trace.current
            out = linear_grpo_loss(
                hidden, weight, ids, advantages, old_per_token_logps=old, cu_seqlens=cu_seqlens, impl="triton",
                config=config or GRPOLossConfig(entropy_coef=0.01), **given,
            )  # fmt: skip
            if backward:
                out.loss.backward()
    finally:
        SideStream.start = start
    return {"launches": launches.calls, "peak": phase.peak - before, "waits": sum(phase.waits.values())}


def checks(trace):
    """Buffers of 4,096 rows; dW in bf16 saves memory for 256 rows more."""
    kept = lm_head.CHUNK_BYTES["cuda"]
    lm_head.CHUNK_BYTES["cuda"] = 4096 * V * 2
    gspo = GRPOLossConfig(importance_sampling_level="sequence")
    try:
        return {
            "one chunk": call(trace, "one", 4096 + 256),
            "two chunks": call(trace, "two", 8192),
            "three chunks": call(trace, "three", 3 * 4096),
            "small": call(trace, "small", 1024),
            "gspo": call(trace, "gspo", 4096, gspo),
            "gspo, lengths": call(trace, "lengths", 8192, gspo, lengths=[256] * 32),
            "no gradient": call(trace, "none", 4096, backward=False),
            "mask": call(trace, "mask", 4096, completion_mask=True),
            "no metrics": call(trace, "metrics", 4096, compute_metrics=False),
        }
    finally:
        lm_head.CHUNK_BYTES["cuda"] = kept
