"""The CUDA kernels' arithmetic and ordering, run on the CPU: blocks as threads, CUDA threads as fibers in them.

`cuda_emulator/` stands in for CUDA's headers and for the copy engine; the device code is the very source that nvcc
compiles. It shows wrong indices, missing barriers and copies used too early. It shows neither the memory model of a GPU
nor speed, and its exp is the C library's.
"""

import ctypes
import os
import re
import shutil
import subprocess
from ctypes import POINTER, c_bool, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, compiled_rows, selective_log_softmax
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.objective import objective_and_row_gradients
from tests.kernels.oracle import assert_close_to_truth, boundary_inputs, row_temperatures

ROWS = compiled_rows.CompiledRows("cuda")
ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).parent / "cuda_emulator"
CXX = shutil.which(os.environ.get("CXX", "c++"))
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RTOL = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}

pytestmark = pytest.mark.skipif(CXX is None, reason="there is no C++ compiler")


class Transform(ctypes.Structure):
    _fields_ = [(name, c_float) for name in ("logit_scale", "softcap", "temperature")]


class Objective(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in ("policy", "kl", "bias_corrected_kl")] + [
        (name, c_float)
        for name in ("low", "high", "delta", "dual", "beta", "sapo_pos", "sapo_neg", "kl_tau", "dro_beta")
    ]


class Rows(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("logits", "grad", "index", "mask", "temperatures")),
        *((name, c_int64) for name in ("n", "vocab", "inner", "x_outer", "x_inner", "y_outer", "y_inner")),
        ("dtype", c_int32),
        ("transform", Transform),
    ]


class RowStats(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("logps", "entropy", "norm")]


class RowGradients(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("logps", "entropy")]


class TokenConstants(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_void_p)
            for name in ("advantages", "loss_weight", "old", "ref", "sampler", "grad_entropy", "centre", "nll", "out")
        ),
        ("objective", Objective),
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The device code as a library: the project's sources with the copy engine and dynamic shared memory replaced."""
    work = tmp_path_factory.mktemp("emulated")
    shutil.copytree(ROOT / "csrc", work / "csrc")
    for replaced in ("bulk_copy.cuh", "fast_math.cuh"):
        shutil.copy(EMULATOR / replaced, work / "csrc" / "cuda")
    replaced = 0
    for path in (work / "csrc" / "cuda").glob("*_kernel.cuh"):
        pattern = r"extern __shared__ (?:__align__\(128\) )?uint4 (\w+)\[\];"
        source, count = re.subn(pattern, r"uint4* \1 = emulator::dynamic_shared();", path.read_text())
        path.write_text(source)
        replaced += count
    assert replaced == 2
    command = [CXX, "-std=c++20", "-O2", "-fPIC", "-shared", "-w", "-pthread", "-U_FORTIFY_SOURCE", f"-I{EMULATOR}"]
    command += [f"-I{work / 'csrc' / 'cuda'}", str(EMULATOR / "kernels.cpp"), "-o", str(work / "emulated.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    library = ctypes.CDLL(str(work / "emulated.so"))
    library.configure.argtypes = [c_bool, c_bool]
    return library


def pointer(x):
    return None if x is None else x.data_ptr()


class Launch:
    """The structs of one launch over (outer, inner, V) logits; outputs start as NaN."""

    def __init__(self, logits, index, mask=None, *, inplace=False, config=None, temperatures=None):
        config = config or GRPOLossConfig()
        n = logits.shape[0] * logits.shape[1]
        self.grad = logits if inplace else torch.full(logits.shape, float("nan"), dtype=logits.dtype)
        self.logps, self.entropy, self.coefficient = (torch.full((n,), float("nan")) for _ in range(3))
        self.norm = torch.full((2, n), float("nan"))
        transform = Transform(config.logit_scale, config.final_logit_softcapping or 0.0, config.temperature)
        strides = (*logits.stride()[:2], *self.grad.stride()[:2])
        self.rows = Rows(
            logits.data_ptr(), self.grad.data_ptr(), index.data_ptr(), pointer(mask), pointer(temperatures),
            n, logits.shape[2], logits.shape[1], *strides, DTYPES[logits.dtype], transform,
        )  # fmt: skip
        self.stats = RowStats(self.logps.data_ptr(), self.entropy.data_ptr(), self.norm.data_ptr())
        self.kept = (logits, index, mask, temperatures)

    def constants(self, batch, config):
        numbers = compiled_rows.objective_numbers(config)
        constants = ROWS.coefficient_inputs(batch, config, None)
        self.tensors = [
            batch.advantages.contiguous(),
            constants[3],
            batch.old_per_token_logps,
            batch.ref_per_token_logps if config.beta else None,
            *constants[6:-1],
        ]
        objective = Objective(*(int(x) for x in numbers[:3]), *numbers[3:])
        return TokenConstants(*map(pointer, self.tensors), self.coefficient.data_ptr(), objective)


def token_loss_cases():
    yield "two_pass", lambda k, *a: k.run_resident(*a, 3, 0)
    yield "resident", lambda k, *a: k.run_resident(*a, 3, 1)
    for size, buffers in ((1, 2), (2, 3), (4, 2), (8, 4)):
        yield f"cluster{size}x{buffers}", lambda k, *a, s=size, b=buffers: k.run_cluster(*a, 3, s, b)


PLANS = dict(token_loss_cases())
LONG_PLANS = {  # for 75 slots: A100's shared memory and registers hold all of them, or registers and 2 slots do not
    "on_chip": lambda k, *a: k.run_resident(*a, 2, 40),
    "rest_twice": lambda k, *a: k.run_resident(*a, 2, 2),
}
TOKEN_LOSS_CASES = [
    *((torch.bfloat16, 5003, mode) for mode in ("eager", "lazy", "reversed", "lazy reversed")),
    (torch.float32, 1500, "lazy reversed"),  # the order of events does not depend on the dtype
]


def misaligned(logits, offset):
    """The same values, rows starting `offset` elements after a 16-byte boundary and an odd number apart."""
    B, T, V = logits.shape
    storage = torch.full((B * T * (V + 3) + 64,), float("nan"), dtype=logits.dtype)
    start = (-storage.data_ptr() // logits.element_size()) % 16 + offset
    view = storage[start:].as_strided((B, T, V), (T * (V + 3), V + 3, 1), start)
    return view.copy_(logits)


def check_token_loss(kernels, plan, logits, inputs, config, *, inplace=False, temperatures=None, **extra):
    B, T, _ = logits.shape
    batch = TokenBatch.build(
        inputs.completion_ids, inputs.advantages.float(), dtype=torch.float32, **inputs.keywords(config) | extra
    )
    mask = batch.mask.view(B, T)
    raw = logits.masked_fill(~mask[..., None], float("nan"))
    work = torch.as_strided(logits, logits.shape, logits.stride()).copy_(raw)  # masked rows: NaN, must not be read
    launch = Launch(work, batch.index, batch.mask, inplace=inplace, config=config, temperatures=temperatures)
    constants = launch.constants(batch, config)
    run = (PLANS | LONG_PLANS)[plan]
    run(kernels, *(ctypes.byref(x) for x in (launch.rows, launch.stats, constants)))

    leaf = torch.where(mask[..., None], raw, 0.0).double().requires_grad_()
    keywords = {"temperature": config.temperature, "return_entropy": True, "impl": "torch"}
    if temperatures is not None:
        keywords |= {"temperature": 1.0, "temperatures": temperatures.nan_to_num(1.0).view(B, T)}
    if config.final_logit_softcapping is None:
        logps, entropy = selective_log_softmax(leaf * config.logit_scale, batch.index.view(B, T), **keywords)
    else:
        cap = config.final_logit_softcapping
        z = cap * torch.tanh(leaf * config.logit_scale / cap)
        logps, entropy = selective_log_softmax(z, batch.index.view(B, T), **keywords)
    _, _, g, h = objective_and_row_gradients(launch.logps, launch.entropy, batch, config, None)
    torch.testing.assert_close(launch.coefficient, g, rtol=1e-5, atol=1e-7)
    total = (g.view(B, T) * logps).sum() + (0.0 if h is None else (h.view(B, T) * entropy).sum())
    truth = torch.autograd.grad(total, leaf)[0]
    flat = batch.mask
    assert_close_to_truth("log-probs", launch.logps[flat], logps.reshape(-1)[flat], rtol=1e-6, atol=1e-6)
    assert_close_to_truth("entropy", launch.entropy[flat], entropy.reshape(-1)[flat], rtol=1e-6, atol=1e-6)
    assert (launch.logps[~flat] == 0).all() and (launch.entropy[~flat] == 0).all()
    # A single logit's distance from itself is a rounding error, not 0.
    atol = 1e-7 if logits.shape[-1] == 1 else 0.0
    assert_close_to_truth("gradient", launch.grad, truth * mask[..., None], rtol=RTOL[logits.dtype], atol=atol)
    assert (launch.grad[~mask] == 0).all()


@pytest.mark.parametrize(("dtype", "V", "mode"), TOKEN_LOSS_CASES)
@pytest.mark.parametrize("plan", PLANS)
def test_token_loss(kernels, plan, dtype, V, mode):
    kernels.configure("lazy" in mode, "reversed" in mode)
    config = GRPOLossConfig(beta=0.1, entropy_coef=0.02, temperature=0.8)
    inputs = boundary_inputs(B=2, T=12, V=V, config=GRPOLossConfig(epsilon=0.05)).to(torch.float32)
    offset = {"eager": 0, "lazy": 1, "reversed": 3, "lazy reversed": 5}[mode]
    logits = misaligned(inputs.logits.to(dtype), offset)
    own = row_temperatures(inputs.completion_mask) if "reversed" in mode else None
    check_token_loss(kernels, plan, logits, inputs, config, inplace=True, temperatures=own)
    if mode == "eager":
        check_token_loss(kernels, "resident" if "cluster" in plan else plan, logits, inputs, config)


@pytest.mark.parametrize("plan", ["two_pass", "resident", "cluster2x3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_loss_with_a_softcap_out_of_place(kernels, plan, dtype):
    kernels.configure(True, False)
    config = GRPOLossConfig(loss_type="sapo", logit_scale=-0.5, final_logit_softcapping=4.0, entropy_coef=0.05)
    inputs = boundary_inputs(B=2, T=12, V=520, config=GRPOLossConfig(epsilon=0.05)).to(torch.float32)
    own, logits = row_temperatures(inputs.completion_mask), inputs.logits.to(dtype).contiguous()
    check_token_loss(kernels, plan, logits, inputs, config, temperatures=own)


@pytest.mark.parametrize(("loss_type", "threshold"), [("dppo_tv", 1e-3), ("dppo_kl", 1e-4), ("cispo_two_sided", 0.1)])
def test_token_loss_of_other_policy_terms(kernels, loss_type, threshold):
    kernels.configure(True, False)
    config = GRPOLossConfig(loss_type, epsilon=threshold, epsilon_high=2 * threshold, beta=0.1)
    inputs = boundary_inputs(B=2, T=12, V=37, config=GRPOLossConfig(epsilon=0.05)).to(torch.float32)
    check_token_loss(kernels, "two_pass", inputs.logits.contiguous(), inputs, config)


@pytest.mark.parametrize("name", ["dppo_tv", "topr", "dro"])
def test_token_loss_with_what_stands_around_it(kernels, name):
    """Every input of a row's coefficient: sampler, rejection, kl_tau, and weights, of which some are 0."""
    kernels.configure(True, False)
    keys = {"rollout_rs": "token_k2", "rollout_rs_threshold": 0.05, "importance_sampling_mode": "seq-mask-tis"}
    config = GRPOLossConfig(name, kl_tau=0.3, beta=0.1, dro_beta=0.4 if name == "dro" else None, **keys)
    inputs = boundary_inputs(B=2, T=12, V=37, config=GRPOLossConfig(epsilon=0.05)).to(torch.float32)
    weights = torch.linspace(-1, 1, 24).view(2, 12).masked_fill(torch.arange(24).view(2, 12) % 5 == 0, 0.0)
    extra = {"loss_weights": weights, "nll_weights": weights.flip(1) / 50}
    for plan in ("two_pass", "cluster2x3"):
        check_token_loss(kernels, plan, inputs.logits.clone(), inputs, config, **extra)


@pytest.mark.parametrize("plan", LONG_PLANS)
def test_rows_of_a_real_vocabulary(kernels, plan):
    kernels.configure(True, False)
    config = GRPOLossConfig(epsilon=0.05)
    inputs = boundary_inputs(B=2, T=4, V=151_936, seed=1, config=config).to(torch.float32)
    check_token_loss(kernels, plan, misaligned(inputs.logits.bfloat16(), 3), inputs, config, inplace=True)


@pytest.mark.parametrize("V", [1, 2, 7, 8, 9, 600])
@pytest.mark.parametrize("plan", ["two_pass", "resident", "cluster4x2"])
def test_short_rows_and_empty_slices(kernels, plan, V):
    kernels.configure(True, True)
    inputs = boundary_inputs(B=4, T=6, V=V, config=GRPOLossConfig(epsilon=0.05)).to(torch.float32)
    check_token_loss(kernels, plan, misaligned(inputs.logits.bfloat16(), 1), inputs, GRPOLossConfig(), inplace=True)


@pytest.mark.parametrize("plan", PLANS)
def test_bad_targets_and_rows_of_minus_infinity(kernels, plan):
    kernels.configure(True, False)
    logits = torch.randn(1, 6, 100)
    logits[0, 2], logits[0, 3, 50:] = -float("inf"), -float("inf")
    index = torch.tensor([5, 100, 0, 1, -1, 99])
    launch = Launch(logits, index)
    batch = TokenBatch.build(torch.zeros(1, 6, dtype=torch.long), torch.ones(1), dtype=torch.float32)
    constants = launch.constants(batch, GRPOLossConfig())
    PLANS[plan](kernels, *(ctypes.byref(x) for x in (launch.rows, launch.stats, constants)))
    assert (
        launch.logps.isnan().tolist()
        == launch.grad[0].isnan().all(-1).tolist()
        == [False, True, True, False, True, False]
    )
    assert (launch.grad[0, 3, 50:] == 0).all() and not launch.grad[0, 3].isnan().any()
    assert launch.norm[0, 2] == -float("inf")  # by which process_group= knows an empty shard


@pytest.mark.parametrize("scale", [1.0, -2.0])
@pytest.mark.parametrize(("dtype", "V"), [(torch.bfloat16, 1000), (torch.float32, 5), (torch.float32, 1000)])
@pytest.mark.parametrize("plan", PLANS)
def test_a_nan_poisons_its_row_whatever_stands_beside_it(kernels, plan, dtype, V, scale):
    """Whole granules of NaN, and one NaN beside nothing but -inf or the lowest number: of its thread or of the row."""
    kernels.configure(True, False)
    x = torch.randn(1, 7, V, generator=torch.Generator().manual_seed(0))
    nan = float("nan")
    x[0, 0, :4], x[0, 1, -1], x[0, 2, V // 2] = nan, nan, nan
    x[0, 0, 8:16] = nan
    x[0, 3], x[0, 4] = -float("inf"), torch.finfo(dtype).min
    x[0, 3, 1], x[0, 4, 1] = nan, nan
    x[0, 5, 1:] = -float("inf")
    x[0, 5, 3] = nan
    logits = misaligned((x * (1.0 if scale > 0 else -1.0)).to(dtype), 3)
    config, index = GRPOLossConfig(logit_scale=scale), torch.full((7,), 4)
    launch = Launch(logits, index, inplace=True, config=config)
    batch = TokenBatch.build(index.view(1, 7), torch.ones(1), dtype=torch.float32)
    constants = launch.constants(batch, config)
    PLANS[plan](kernels, *(ctypes.byref(x) for x in (launch.rows, launch.stats, constants)))
    bad = [True] * 6 + [False]
    assert launch.logps.isnan().tolist() == launch.entropy.isnan().tolist() == bad
    assert launch.grad[0].isnan().all(-1).tolist() == launch.grad[0].isnan().any(-1).tolist() == bad
    assert launch.norm[0, 3] != -float("inf")  # not an empty shard


def run_plan(kernels, plan, logits, index, config, old=None):
    """One token-level loss with advantage 1 over (1, n, V) logits, and the fp64 answers of the reference."""
    n = index.numel()
    launch = Launch(logits, index, config=config)
    batch = TokenBatch.build(index.clamp(0).view(1, n), torch.ones(1), dtype=torch.float32, old_per_token_logps=old)
    constants = launch.constants(batch, config)
    PLANS[plan](kernels, *(ctypes.byref(x) for x in (launch.rows, launch.stats, constants)))
    leaf = (logits.double() * config.logit_scale).requires_grad_()
    logps, entropy = selective_log_softmax(
        leaf, index.view(1, n), temperature=config.temperature, return_entropy=True, impl="torch"
    )
    weight = launch.coefficient.double().nan_to_num() * config.logit_scale
    truth = torch.autograd.grad((weight * logps.view(-1).nan_to_num()).sum(), leaf)[0]
    return launch, logps.detach().view(-1), entropy.detach().view(-1), truth


@pytest.mark.parametrize("scale", [1.0, -2.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", ["resident", "cluster2x3"])
def test_infinite_and_extreme_logits(kernels, plan, dtype, scale):
    """-inf and the lowest finite number are probability 0, a row of that number alone is uniform; +inf and NaN are NaN.

    With a negative scale the signs change places."""
    kernels.configure(True, False)
    sign = 1.0 if scale > 0 else -1.0
    low, inf = torch.finfo(dtype).min, float("inf")
    x = torch.randn(1, 6, 300, generator=torch.Generator().manual_seed(0))
    x[0, 0, 7:200] = -inf
    x[0, 1, 7:] = low
    x[0, 2] = low
    x[0, 3, 11], x[0, 4, 11] = inf, float("nan")
    x[0, 5] = x[0, 5] / 30 + 1000.0  # differences far below the logits, as large as half precision still has them
    logits = (sign * x).to(dtype)
    index = torch.tensor([3, 2, 9, 0, 0, 299])
    launch, logps, entropy, truth = run_plan(kernels, plan, logits, index, GRPOLossConfig(logit_scale=scale))
    bad = [False, False, False, True, True, False]
    assert launch.logps.isnan().tolist() == launch.entropy.isnan().tolist() == bad
    assert launch.grad[0].isnan().all(-1).tolist() == bad
    good = ~torch.tensor(bad)
    # fp32 keeps a product of 1,000 to 6e-5.
    atol = torch.tensor([1e-6, 1e-6, 1e-6, 0, 0, 3e-4 * abs(scale)])[good]
    assert ((launch.logps.double() - logps)[good].abs() <= atol + 1e-6 * logps[good].abs()).all()
    assert ((launch.entropy.double() - entropy)[good].abs() <= atol + 1e-6 * entropy[good].abs()).all()
    assert_close_to_truth("gradient", launch.grad[0, good], truth[0, good], rtol=max(RTOL[dtype], 3e-4 * abs(scale)))
    assert (launch.grad[0, 0, 7:200] == 0).all() and (launch.grad[0, 1, 7:] == 0).all()


@pytest.mark.parametrize("plan", ["resident", "cluster2x3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_flushed_to_zero(kernels, plan, dtype):
    """Probabilities below 2^-126 of the largest are 0, and so are gradients below 2^-126; nothing above is."""
    kernels.configure(True, False)
    x = torch.zeros(1, 1, 64)
    x[0, 0, 1:] = -(torch.arange(63) + 40.0)  # down to e^-102
    logits = x.to(dtype)
    launch, _, _, truth = run_plan(kernels, plan, logits, torch.tensor([0]), GRPOLossConfig())
    grad, smallest = launch.grad[0, 0].double(), 2.0**-126
    kept = truth[0, 0].abs() > 1.01 * smallest
    assert 10 < int((~kept).sum()) < 60 and (grad[~kept] == 0).all()
    relative = 2e-5 if dtype == torch.float32 else 2**-8
    assert ((grad - truth[0, 0])[kept][1:].abs() <= relative * truth[0, 0][kept][1:].abs()).all()


@pytest.mark.parametrize("mode", ["forward", "reversed"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_then_gradient(kernels, dtype, cap, inplace, mode):
    kernels.configure(False, mode == "reversed")
    generator = torch.Generator().manual_seed(0)
    logits = misaligned((3 * torch.randn(2, 3, 1500, generator=generator)).to(dtype), 3)
    index, mask = torch.randint(1500, (6,), generator=generator), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    original = logits.clone()
    g, h = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    g[1] = h[1] = h[4] = 0.0
    own, config = None if mode == "forward" else row_temperatures(mask), GRPOLossConfig(final_logit_softcapping=cap)
    launch = Launch(logits, index, mask, inplace=inplace, config=config, temperatures=own)
    kernels.run_row_stats(ctypes.byref(launch.rows), ctypes.byref(launch.stats), 4)
    row_gradients = RowGradients(g.data_ptr(), h.data_ptr())
    kernels.run_row_grad(ctypes.byref(launch.rows), ctypes.byref(launch.stats), ctypes.byref(row_gradients), 4)
    leaf = original.double().requires_grad_()
    z = leaf if cap is None else cap * torch.tanh(leaf / cap)
    z = z if own is None else z / own.nan_to_num(1.0).view(2, 3, 1)
    logps, entropy = selective_log_softmax(z, index.view(2, 3), return_entropy=True, impl="torch")
    truth = torch.autograd.grad(((g * logps.view(-1) + h * entropy.view(-1)) * mask).sum(), leaf)[0]
    assert_close_to_truth("log-probs", launch.logps, logps.view(-1) * mask, rtol=1e-6)
    assert_close_to_truth("entropy", launch.entropy, entropy.view(-1) * mask, rtol=1e-6)
    assert_close_to_truth("gradient", launch.grad, truth, rtol=RTOL[dtype])
    assert inplace or torch.equal(logits, original)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_scale(kernels, factor):
    kernels.configure(False, False)
    logits = misaligned(torch.randn(2, 3, 77).bfloat16(), 1)
    expected = logits * factor
    launch = Launch(logits, torch.zeros(6, dtype=torch.long), inplace=True)
    kernels.run_scale.argtypes = [c_void_p, POINTER(c_float), ctypes.c_uint]
    kernels.run_scale(ctypes.byref(launch.rows), ctypes.byref(c_float(factor)), 2)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
