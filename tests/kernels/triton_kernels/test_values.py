"""Loss, metrics, log-probs, entropy and gradient of `impl="triton"` against the fp64 reference.

The grid, and why it is not the full product: the kernels take fp64 as well, and in fp64 a wrong term shows at 1e-12
where rounding cannot hide it, so the equations are tested there: every loss type and level with nothing and with
everything switched on, and each option alone on the two levels of one loss (an option's code does not depend on the
loss type). Rounding is tested per dtype on one configuration with every term, sizes per kernel on rows of noise.
"""

from dataclasses import replace

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, grpo_loss, selective_log_softmax
from igrpo_kernels.losses import LOSSES, SEQUENCE_MEAN, Loss, Term
from igrpo_kernels.triton_rows import TRITON
from tests.kernels.oracle import LOSS_LEVELS, REQUIRED, assert_close_to_truth, loss_and_grad, packed

OPTIONS = {
    "k1": {"beta": 0.3, "kl_estimator": "k1"},
    "k2": {"beta": 0.3, "kl_estimator": "k2"},
    "k3": {"beta": 0.3},
    "k3-uncorrected": {"beta": 0.3, "use_bias_correction_kl": False},
    "delta": {"delta": 1.25},
    "dual_clip": {"dual_clip": 1.2},
    "token_truncate": {"importance_sampling_mode": "token_truncate", "importance_sampling_clip_max": 1.1},
    "token_mask": {"importance_sampling_mode": "token_mask", "importance_sampling_clip_min": 0.9},
    "sequence_truncate": {"importance_sampling_mode": "sequence_truncate", "importance_sampling_clip_max": 1.1},
    "sequence_mask": {"importance_sampling_mode": "sequence_mask", "importance_sampling_clip_max": 1.1},
    "opsm": {"off_policy_mask_threshold": 0.02},
    "entropy_bonus": {"entropy_coef": 0.2},
    "top_entropy": {"top_entropy_quantile": 0.6, "entropy_coef": 0.2},
    "logits": {"temperature": 0.7, "logit_scale": 1.3, "final_logit_softcapping": 5.0},
    "kl_tau": {"kl_tau": 0.3, "importance_sampling_mode": "token_mask", "importance_sampling_clip_min": 0.9},
    "seq-mask-tis": {"importance_sampling_mode": "seq-mask-tis", "importance_sampling_clip_min": 0.95},
    "rejection": {"rollout_rs": "token_k2,seq_max_k3", "rollout_rs_threshold": "0.05,0.3", "kl_tau": 0.2,
                  "importance_sampling_mode": "token_truncate", "importance_sampling_clip_max": 1.1},
}  # fmt: skip
EVERYTHING = {**OPTIONS["k3"], **OPTIONS["token_mask"], **OPTIONS["entropy_bonus"], **OPTIONS["logits"]}


def compare(inputs, config, tensors=None, **keywords):
    """Both implementations in fp64: equal to rounding; returns the triton result."""
    truth, true_grad = loss_and_grad(inputs, config, impl="torch", num_items_in_batch=17, **tensors or {})
    out, grad = loss_and_grad(inputs, config, impl="triton", num_items_in_batch=17, **tensors or {}, **keywords)
    assert true_grad.abs().max() > 1e-4, "an all-zero gradient would pass"
    assert_close_to_truth("grad", grad, true_grad, rtol=1e-12)
    assert_close_to_truth("loss", out.loss, truth.loss, rtol=1e-12, atol=1e-15)
    assert_close_to_truth("logps", out.per_token_logps, truth.per_token_logps, rtol=1e-13)
    assert_close_to_truth("entropy", out.entropy, truth.entropy, rtol=1e-13)
    assert out.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        assert_close_to_truth(name, out.metrics[name], value, rtol=1e-11, atol=1e-15)
    assert torch.all(grad[inputs.completion_mask == 0] == 0) if inputs.completion_mask is not None else True
    return out, grad


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(("loss_type", "level"), LOSS_LEVELS)
def test_every_loss(small_inputs, loss_type, level, options):
    options = {**REQUIRED.get(loss_type, {}), **options}
    config = GRPOLossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=9, **options)
    compare(small_inputs(level), config)


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_option(small_inputs, level, options):
    compare(small_inputs(level), GRPOLossConfig(importance_sampling_level=level, **OPTIONS[options]))


@pytest.mark.parametrize("loss_type", ["dppo_tv", "topr", "dro", "clip_cov"])
def test_weights_of_tokens(small_inputs, loss_type):
    """Beside kl_tau and a rejection; some are 0."""
    inputs = small_inputs()
    config = GRPOLossConfig(loss_type, **REQUIRED.get(loss_type, {}), **OPTIONS["rejection"], beta=0.1)
    n = inputs.completion_ids.numel()
    weights = torch.linspace(-1, 1, n, dtype=torch.float64).view(inputs.completion_ids.shape)
    weights = weights.masked_fill(torch.arange(n).view(weights.shape) % 5 == 0, 0.0)
    compare(inputs, config, {"loss_weights": weights, "nll_weights": weights.flip(-1) / 50})


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_every_row_has_its_own_temperature(small_inputs, level, cap):
    """NaN where masked."""
    inputs = small_inputs(level)
    temperatures = torch.linspace(0.7, 1.4, 32, dtype=torch.float64, device=inputs.logits.device).view(8, 4).t()
    temperatures = temperatures.masked_fill(~inputs.completion_mask, torch.nan)
    options = {**OPTIONS["k3"], **OPTIONS["token_mask"], **OPTIONS["entropy_bonus"], "logit_scale": 1.3}
    config = GRPOLossConfig(importance_sampling_level=level, final_logit_softcapping=cap, **options)
    compare(inputs, config, {"temperatures": temperatures})
    compare(inputs, config, {"temperatures": temperatures}, inplace=True)


def test_inputs_reach_every_branch(small_inputs):
    """What makes the tests above able to fail: clipped on both sides, unclipped and masked tokens all occur."""
    inputs = small_inputs()
    out, grad = loss_and_grad(inputs, GRPOLossConfig(), impl="triton")
    zero = (grad == 0).all(-1)
    assert out.metrics["clip_ratio/low_mean"] > 0.03 and out.metrics["clip_ratio/high_mean"] > 0.03
    assert zero[inputs.completion_mask].any() and (~zero).any() and (~inputs.completion_mask).any()


def test_one_pass_only_where_coefficients_are_local(small_inputs):
    batch = type("Batch", (), {"old_per_token_logps": None, "sampling_per_token_logps": torch.zeros(1)})
    assert TRITON.fits_one_pass(batch, GRPOLossConfig(**EVERYTHING, kl_tau=0.1))
    given = type("Batch", (), {"old_per_token_logps": torch.zeros(1), "sampling_per_token_logps": torch.zeros(1)})
    for options in (OPTIONS["rejection"], OPTIONS["seq-mask-tis"], {"loss_type": "dro", "dro_beta": 1.0}):
        assert TRITON.fits_one_pass(given, GRPOLossConfig(**options))
    for options in (
        OPTIONS["rejection"],
        OPTIONS["seq-mask-tis"],
        OPTIONS["sequence_mask"],
        OPTIONS["opsm"],
        OPTIONS["top_entropy"],
        {"loss_type": "vespo"},
    ):
        assert not TRITON.fits_one_pass(batch, GRPOLossConfig(**options))


@pytest.mark.parametrize(("loss_type", "threshold"), [("dppo_tv", 2e-3), ("dppo_kl", 2e-4)])
def test_thresholds_that_split_the_tokens(small_inputs, loss_type, threshold):
    inputs = small_inputs()
    config = GRPOLossConfig(loss_type, epsilon=threshold, epsilon_high=2 * threshold, delta=1.2, beta=0.1)
    out, _ = compare(inputs, config)
    assert out.metrics["clip_ratio/low_mean"] > 0.03 and out.metrics["clip_ratio/high_mean"] > 0.03
    compare(inputs, GRPOLossConfig("cispo_two_sided", epsilon=0.1, epsilon_high=0.05))


def test_a_policy_term_that_the_kernel_does_not_know_is_refused(small_inputs, monkeypatch):
    term = Term("made_up", lambda x, config: -x.weight * x.advantages, (), one_pass=True)
    monkeypatch.setitem(LOSSES, "made_up", Loss(term, SEQUENCE_MEAN))
    with pytest.raises(Exception, match="does not know this policy term"):
        loss_and_grad(small_inputs(), GRPOLossConfig("made_up"), impl="triton")


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_without_old_log_probs_the_policy_corrects_against_itself(small_inputs, loss_type, mode):
    config = GRPOLossConfig(loss_type=loss_type, importance_sampling_mode=mode, beta=0.1)
    inputs = small_inputs()
    keywords = {"old_per_token_logps": None, "num_items_in_batch": 17}
    truth, true_grad = loss_and_grad(inputs, config, impl="torch", **keywords)
    out, grad = loss_and_grad(inputs, config, impl="triton", **keywords)
    assert_close_to_truth("grad", grad, true_grad, rtol=1e-12)
    assert_close_to_truth("loss", out.loss, truth.loss, rtol=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_per_token_advantages(small_inputs, level):
    inputs = small_inputs(level)
    sign = torch.where(torch.arange(8, device=inputs.advantages.device) % 3 == 0, -1.0, 1.0)
    compare(
        replace(inputs, advantages=inputs.advantages[:, None] * sign), GRPOLossConfig(importance_sampling_level=level)
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_packed_equals_truth(small_inputs, level):
    compare(packed(small_inputs(level)), GRPOLossConfig(importance_sampling_level=level, **EVERYTHING))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_in_place_writes_the_same_gradient_into_the_logits(small_inputs, level):
    config = GRPOLossConfig(importance_sampling_level=level, **EVERYTHING)
    inputs = small_inputs(level)
    _, expected = loss_and_grad(inputs, config, impl="triton")
    _, grad = loss_and_grad(inputs, config, impl="triton", inplace=True)
    assert torch.equal(grad, expected)


BF16_ULP, FP16_ULP = 2.0**-7, 2.0**-10  # distance of neighbours relative to the smaller one, at most


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("dtype", "ulp"), [(torch.float32, 0.0), (torch.bfloat16, BF16_ULP), (torch.float16, FP16_ULP)], ids=str
)
def test_rounding(small_inputs, level, dtype, ulp):
    """fp32: loss and gradient to 2e-5. Narrow logits: each stored gradient within one ulp of the true one."""
    config = GRPOLossConfig(importance_sampling_level=level, **EVERYTHING)
    inputs = small_inputs(level, dtype)
    truth, true_grad = loss_and_grad(inputs.to(torch.float64), config, impl="torch")
    out, grad = loss_and_grad(inputs, config, impl="triton")
    assert grad.dtype == dtype and out.loss.dtype == torch.float32
    assert_close_to_truth("loss", out.loss, truth.loss, rtol=2e-5)
    assert_close_to_truth("logps", out.per_token_logps, truth.per_token_logps, rtol=1e-6)
    error = (grad.double() - true_grad).abs()
    subnormal = 2.0**-24 if dtype == torch.float16 else 0.0
    allowed = ulp * true_grad.abs() + 2e-6 * true_grad.abs().max() + subnormal
    assert torch.all(error <= allowed), f"{(error - allowed).max()}"


# Rows are few because the interpreter takes milliseconds per step; the last one is masked and must not be read.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [1, 2, 63, 507, 49152, 128256, 151936])
def test_vocabulary_sizes(device, V, dtype):
    generator = torch.Generator().manual_seed(V)
    logits = (3.0 * torch.randn(1, 3, V, generator=generator)).to(dtype)
    logits[0, 0, V // 2 :] -= 1.0  # halves differ, so that a tile read twice or not at all moves the sums
    index = torch.tensor([[V - 1, 0, 0]])
    mask = torch.tensor([[1, 1, 0]])
    truth = logits.double().requires_grad_()
    logits[0, 2] = torch.nan
    true_logps, true_entropy = selective_log_softmax(truth, index, return_entropy=True, impl="torch")
    logits = logits.to(device).requires_grad_()
    config = GRPOLossConfig(loss_type="dapo", entropy_coef=0.3)
    keywords = {"config": config, "num_items_in_batch": 2, "impl": "triton"}
    out = grpo_loss(logits, index.to(device), torch.ones(1, device=device), completion_mask=mask.to(device), **keywords)
    out.loss.backward()
    expected = -true_logps[0, :2].sum() / 2 - 0.3 * true_entropy[0, :2].sum() / 2  # ratio 1: dloss/dl = -1/2
    (true_grad,) = torch.autograd.grad(expected, truth)
    assert_close_to_truth("logps", out.per_token_logps[0, :2].cpu(), true_logps[0, :2], rtol=2e-6, atol=1e-7)
    assert_close_to_truth("entropy", out.entropy[0, :2].cpu(), true_entropy[0, :2], rtol=2e-6, atol=1e-7)
    assert torch.all(logits.grad[0, 2] == 0)
    error = (logits.grad[0, :2].cpu().double() - true_grad[0, :2]).abs()
    ulp = BF16_ULP if dtype == torch.bfloat16 else 0.0
    assert torch.all(error <= ulp * true_grad[0, :2].abs() + 2e-6 * true_grad.abs().max())


@pytest.mark.parametrize("V", [63, 507, 49152])
def test_log_probs_and_entropy_are_both_differentiable(device, V):
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(2, V, generator=generator)
    logits[0, 5:9] = -torch.inf  # banned tokens: probability 0, gradient 0
    index = torch.tensor([3, V - 1])
    results = []
    for x, impl in ((logits.double(), "torch"), (logits, "triton")):
        x = x.to(device).requires_grad_()
        logps, entropy = selective_log_softmax(x, index.to(device), temperature=0.7, return_entropy=True, impl=impl)
        (logps.sin().sum() + (2 * entropy).sum()).backward()
        results.append((logps, entropy, x.grad))
    for name, truth, actual in zip(("logps", "entropy", "grad"), *results, strict=True):
        assert_close_to_truth(name, actual, truth, rtol=3e-6)
    assert torch.all(results[1][2][0, 5:9] == 0)


def view_with_a_prompt(x):
    full = x.new_full((x.shape[0], 4 + x.shape[1], x.shape[2]), torch.nan)
    full[:, 3:-1] = x
    return full, lambda full: full[:, -x.shape[1] - 1 : -1]


def transposed_batch(x):
    return x.transpose(0, 1).contiguous(), lambda full: full.transpose(0, 1)


def every_second_column(x):
    return x.repeat_interleave(2, -1), lambda full: full[..., ::2]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("layout", [view_with_a_prompt, transposed_batch, every_second_column])
@pytest.mark.parametrize("inplace", [False, True])
def test_strided_logits(small_inputs, layout, level, inplace):
    config, inputs = GRPOLossConfig(importance_sampling_level=level), small_inputs(level)
    _, expected = loss_and_grad(inputs, config, impl="torch")
    storage, view = layout(inputs.logits)
    leaf = storage.requires_grad_()
    logits = view(leaf * 1.0)
    out = grpo_loss(
        logits,
        inputs.completion_ids,
        inputs.advantages,
        config=config,
        impl="triton",
        inplace=inplace,
        **inputs.keywords(config),
    )
    out.loss.backward()
    assert_close_to_truth("grad", view(leaf.grad), expected, rtol=1e-12)
    assert not leaf.grad.isnan().any()


def test_any_number_of_leading_dimensions(device):
    logits = torch.randn(2, 2, 2, 9, dtype=torch.float64, device=device)
    index = torch.randint(9, (2, 2, 2), device=device)
    for x, i in ((logits, index), (logits[0, 0, 0], index[0, 0, 0]), (logits[:0], index[:0])):
        expected = selective_log_softmax(x, i, impl="torch")
        assert_close_to_truth("logps", selective_log_softmax(x, i, impl="triton"), expected, rtol=1e-14)


def test_token_ids_of_any_stride(device):
    logits = torch.randn(3, 9, dtype=torch.float64, device=device)
    index = torch.tensor([4, 0, 8, 0, 2, 0], device=device)[::2]
    expected = selective_log_softmax(logits, index, impl="torch")
    assert_close_to_truth("logps", selective_log_softmax(logits, index, impl="triton"), expected, rtol=1e-14)
