"""The loss kernels, ours and the peers', compiled to machine code for architectures that this machine need not have."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch

from igrpo_kernels import GRPOLossConfig

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
V = 151_936
NVCC_FLAGS = ("-std=c++20", "-O3", "-diag-suppress", "177", "-cubin")
NVCC_NAME = {80: "80", 90: "90a", 100: "100a"}
CLUSTER = 8  # blocks that share such a row (launch.cuh: cluster_plan)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel, and what a count needs to know about its launch."""

    cubin: bytes
    function: str  # part of its linker name
    threads: int
    logits: int  # of a row, per block
    blocks_limit: int = 64  # per multiprocessor, where shared memory sets it
    leader: bool = False  # one thread does something for the whole block
    unrolled: int = 0  # logits of a thread that it handles outside loops


@dataclass(frozen=True)
class LossKernels:
    """Kernels that make one loss and its gradient together."""

    name: str
    bytes: int  # of memory traffic per bf16 logit
    kernels: tuple[Kernel, ...]
    variant: str = "plain"
    multiprocessors: dict[int, int] = field(default_factory=dict)  # capability -> used, where not all are


# --- CUDA C++


def nvcc(body: str, capability: int) -> bytes:
    """A source with our kernels in view, compiled as setup.py does."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
        source.write_text(body, encoding="utf-8")
        command = [shutil.which("nvcc") or "nvcc", *NVCC_FLAGS, f"-arch=sm_{NVCC_NAME[capability]}", f"-I{CUDA}"]
        done = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return cubin.read_bytes()


def cuda_constant(file: str, name: str) -> int:
    """An integer constant of our sources."""
    match = re.search(rf"\b{name} = (\d+);", (CUDA / file).read_text(encoding="utf-8"))
    assert match, (file, name)
    return int(match[1])


def cuda_paths(capability: int, variants: Iterable[str] = ("plain", "softcap")) -> list[LossKernels]:
    """The loss that keeps its row on chip, and the pair of kernels of the other losses."""
    on_chip = "cluster" if capability >= 90 else "resident"
    threads = cuda_constant(f"{on_chip}_kernel.cuh", f"k{on_chip.capitalize()}Threads")
    stream = cuda_constant("stream_kernels.cuh", "kStreamThreads")
    logits, limit = (V // CLUSTER, 2) if on_chip == "cluster" else (V, 1)
    found = []
    for variant in variants:
        names = [f"token_loss_{on_chip}_kernel", "row_stats_kernel", "row_grad_kernel"]
        cap = "true" if variant == "softcap" else "false"
        uses = ", ".join(f"(const void*){name}<__nv_bfloat16, {cap}>" for name in names)
        headers = "".join(f'#include "{kind}_kernel{"s" * (kind == "stream")}.cuh"\n' for kind in (on_chip, "stream"))
        cubin = nvcc(f"{headers}using namespace igrpo::cuda;\nconst void* kernels[] = {{{uses}}};\n", capability)
        # Of the granules in registers; with a cap each may be left out, and is counted as if a loop had it.
        held = 8 * cuda_constant("resident_kernel.cuh", "kRegisterGranules")
        unrolled = held if (on_chip, variant) == ("resident", "plain") else 0
        one = Kernel(cubin, names[0], threads, logits, limit, on_chip == "cluster", unrolled)
        two = tuple(Kernel(cubin, name, stream, V) for name in names[1:])
        found.append(LossKernels(f"cuda, {on_chip}", 4, (one,), variant, {90: 128} if on_chip == "cluster" else {}))
        found.append(LossKernels("cuda, two kernels", 6, two, variant))
    return found


# --- Triton


class CompileOnlyDriver:
    """A CUDA device of the given capability that accepts every launch and runs none."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)
        self.grids: list[tuple[int, ...]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 0, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": 100 * 1024},
        )

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def launcher_cls(self, *_):
        return lambda x, y, z, *arguments: self.grids.append((x, y, z))


def launched(capability: int, functions: list, call: Callable[[], object]) -> list[Kernel]:
    """What `call` made of these jitted functions, in their order; its numbers mean nothing."""
    import triton

    triton.runtime.driver.set_active(CompileOnlyDriver(capability))
    for function in functions:
        function.device_caches.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 on its default of fp fusion, which peers leave to it
        call()
    found = []
    for function in functions:
        (kernel,) = function.device_caches[0][0].values()
        block = next((v for k, v in _constants(function, kernel).items() if k.startswith("BLOCK")), V)
        looped = "for " in function.src or "write_gradient" in function.src
        threads = 32 * kernel.metadata.num_warps
        found.append(Kernel(kernel.asm["cubin"], function.__name__, threads, V if looped else block))
    return found


def _constants(function, kernel) -> dict[str, int]:
    """Compile-time arguments by name."""
    return {function.arg_names[index[0]]: value for index, value in kernel.src.constants.items()}


CONFIGS = {
    "plain": GRPOLossConfig(),
    "entropy": GRPOLossConfig(entropy_coef=0.01),
    "softcap": GRPOLossConfig(final_logit_softcapping=30.0),
}


def triton_paths(capability: int, variants: Iterable[str] = tuple(CONFIGS)) -> list[LossKernels]:
    from igrpo_kernels import triton_grpo_loss, triton_logprobs
    from igrpo_kernels.batch import TokenBatch
    from igrpo_kernels.triton_rows import TRITON

    n = 2
    batch = TokenBatch.build(torch.zeros(1, n, dtype=torch.int64), torch.ones(1), dtype=torch.float32)
    found = []
    for variant in variants:
        config = CONFIGS[variant]
        logits, ones = torch.zeros(n, V, dtype=torch.bfloat16), torch.ones(n)

        def loss(config=config, logits=logits):
            TRITON.token_loss(logits, logits, TRITON.coefficient_inputs(batch, config, None), config)

        def two(config=config, logits=logits, ones=ones):
            bonus = ones if config.entropy_coef else None
            stats = TRITON.statistics(logits, batch.index, batch.mask, config.logit_transform)
            transform = config.logit_transform
            TRITON.gradient(logits, logits, batch.index, batch.mask, stats, ones, bonus, transform)

        kernels = [triton_logprobs.row_statistics_kernel, triton_logprobs.row_gradient_kernel]
        one = launched(capability, [triton_grpo_loss.token_loss_kernel], loss)
        found.append(LossKernels("triton, one launch", 6, tuple(one), variant))
        found.append(LossKernels("triton, two kernels", 6, tuple(launched(capability, kernels, two)), variant))
    return found


def liger_path(capability: int) -> LossKernels:
    from liger_kernel.ops import grpo_loss
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    logits = torch.zeros(1, 3, V, dtype=torch.bfloat16, requires_grad=True)

    def call():
        loss, _ = triton_grpo_loss(
            logits, torch.zeros(1, 2), None, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1), temperature=1.0,
            completion_mask=torch.ones(1, 2, dtype=torch.int32), beta=0.0, eps_low=0.2, eps_high=0.2, inplace=True,
            loss_type="grpo", reduce=True,
        )  # fmt: skip
        loss.backward()

    kernels = [grpo_loss._grpo_loss_fwd_kernel, grpo_loss._grpo_loss_bwd_kernel]
    return LossKernels("liger", 6, tuple(launched(capability, kernels, call)))


def trl_path(capability: int) -> LossKernels:
    from trl.kernels import logprob_entropy

    logits = torch.zeros(1, 2, V, dtype=torch.bfloat16, requires_grad=True)

    def call():
        index = torch.zeros(1, 2, dtype=torch.int64)
        logprob_entropy.selective_log_softmax_and_entropy(logits, index, temperature=1.0)[0].sum().backward()

    kernels = [logprob_entropy._forward_kernel, logprob_entropy._backward_kernel]
    return LossKernels("trl", 6, tuple(launched(capability, kernels, call)))


PEERS = {"liger_kernel": liger_path, "trl": trl_path}


def every_path(capability: int) -> list[LossKernels]:
    """Ours, and those of the peers that are installed."""
    peers = [path(capability) for package, path in PEERS.items() if importlib.util.find_spec(package)]
    return [*cuda_paths(capability), *triton_paths(capability), *peers]
