"""The fused-linear operations of `impl="triton"`: chunks of every size give the truth, and the matmuls are as few as
promised."""

from dataclasses import replace

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, linear_selective_log_softmax, lm_head
from tests.kernels.oracle import assert_close_to_truth, linear_loss_and_grads, loss_and_grad

V, H = 11, 6
CONFIGS = {
    "token": {},
    "everything": {"loss_type": "dapo", "beta": 0.1, "entropy_coef": 0.1, "final_logit_softcapping": 5.0},
    "sequence": {"importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "top_entropy": {"top_entropy_quantile": 0.6},
}


@pytest.fixture
def head(device):
    """Hidden states (4, 8, H), weight and bias whose logits have the scale of a model's."""
    generator = torch.Generator().manual_seed(5)
    shapes = (4, 8, H), (V, H), (V,)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(device).requires_grad_() for s in shapes]


def on_policy(inputs, head, config):
    """`inputs` with every log-prob moved so that its distance from the head's policy is what it was from the logits."""

    def log_probs(x):
        return x.log_softmax(-1).gather(-1, inputs.completion_ids[..., None]).squeeze(-1)

    hidden, weight, bias = (x.detach() for x in head)
    logits = hidden @ weight.t() + bias
    if config.final_logit_softcapping is not None:
        logits = config.final_logit_softcapping * (logits / config.final_logit_softcapping).tanh()
    shift = log_probs(logits) - log_probs(inputs.logits)
    names = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
    return replace(inputs, **{name: getattr(inputs, name) + shift for name in names})


def rows_multiplied(monkeypatch):
    """Counts of rows that went through the forward matmul and through the two of the gradient."""
    counts = {"logits": 0, "gradient": 0}
    logits, to_weight = lm_head.LmHead.logits, lm_head.LmHead.to_weight

    def counted_logits(self, rows, place):
        counts["logits"] += place.stop - place.start
        return logits(self, rows, place)

    def counted_gradient(self, rows, grad_logits):
        counts["gradient"] += grad_logits.shape[0]
        return to_weight(self, rows, grad_logits)

    monkeypatch.setattr(lm_head.LmHead, "logits", counted_logits)
    monkeypatch.setattr(lm_head.LmHead, "to_weight", counted_gradient)
    return counts


@pytest.mark.parametrize("chunk_rows", [1000, 11, 5], ids=lambda n: f"chunk{n}")
@pytest.mark.parametrize("options", list(CONFIGS))
def test_gradients_do_not_depend_on_the_chunks(small_inputs, head, monkeypatch, options, chunk_rows):
    """5 rows split every sequence, 11 hold one or two, 1000 hold them all. On a GPU halves are on two streams."""
    monkeypatch.setitem(lm_head.HALF_ROWS, head[0].device.type, 4)
    monkeypatch.setitem(lm_head.CHUNK_BYTES, head[0].device.type, chunk_rows * V * 8)
    config = GRPOLossConfig(**CONFIGS[options])
    inputs = on_policy(small_inputs(config.importance_sampling_level), head, config)
    truth, true_grads = linear_loss_and_grads(*head, inputs, config, impl="torch", num_items_in_batch=17)
    out, grads = linear_loss_and_grads(*head, inputs, config, impl="triton", num_items_in_batch=17)
    for name, grad, true_grad in zip(("hidden", "weight", "bias"), grads, true_grads, strict=True):
        assert true_grad.abs().max() > 1e-4
        assert_close_to_truth(name, grad, true_grad, rtol=1e-12)
    assert_close_to_truth("loss", out.loss, truth.loss, rtol=1e-12)
    assert_close_to_truth("logps", out.per_token_logps, truth.per_token_logps, rtol=1e-13)
    assert_close_to_truth("entropy", out.entropy, truth.entropy, rtol=1e-13)


@pytest.mark.parametrize(
    ("options", "chunk_rows", "forward_passes"),
    [("token", 5, 1), ("sequence", 11, 1), ("sequence", 3, 2), ("top_entropy", 11, 2), ("top_entropy", 1000, 1)],
)
def test_matmul_work(small_inputs, head, monkeypatch, options, chunk_rows, forward_passes):
    """6·n·H·V FLOP is one pass forward and one of the gradient's two products; masked rows take part in none."""
    monkeypatch.setitem(lm_head.CHUNK_BYTES, head[0].device.type, chunk_rows * V * 8)
    config = GRPOLossConfig(**CONFIGS[options])
    inputs = on_policy(small_inputs(config.importance_sampling_level), head, config)
    inputs = replace(inputs, advantages=torch.tensor([1.0, 0.0, -1.0, 0.5], device=inputs.advantages.device).double())
    counts = rows_multiplied(monkeypatch)
    _, grads = linear_loss_and_grads(*head, inputs, config, impl="triton")
    lengths = inputs.completion_mask.sum(-1)
    silent = int(lengths[1])  # A = 0: reported, so measured once, but no gradient
    contributing = int(lengths.sum()) - silent
    again = contributing
    if options != "token" and not head[0].is_cuda:  # looking for coefficients of 0 (clipped) is free there
        again = int((grads[0] != 0).any(-1).sum())
    assert counts == {"logits": contributing + (forward_passes - 1) * again + silent, "gradient": again}


def test_frozen_parts_get_no_gradient(small_inputs, head):
    config = GRPOLossConfig()
    inputs = on_policy(small_inputs(), head, config)
    frozen = [head[0], head[1].detach(), head[2].detach()]
    _, grads = linear_loss_and_grads(*frozen, inputs, config, impl="triton")
    _, expected = linear_loss_and_grads(*head, inputs, config, impl="torch")
    assert grads[1] is None and grads[2] is None
    assert_close_to_truth("hidden", grads[0], expected[0], rtol=1e-12)


def test_weight_gradient_accumulates_in_fp32(small_inputs, head, monkeypatch):
    """bf16 inputs in 32 chunks of one row: rounding dW after each chunk would show."""
    config = GRPOLossConfig(beta=0.1)
    inputs = on_policy(small_inputs(), head, config).to(torch.float32)
    narrow = [x.detach().bfloat16().requires_grad_() for x in head]
    monkeypatch.setitem(lm_head.CHUNK_BYTES, head[0].device.type, 10**6)
    _, whole = linear_loss_and_grads(*narrow, inputs, config, impl="triton")
    monkeypatch.setitem(lm_head.CHUNK_BYTES, head[0].device.type, 1)
    _, chunked = linear_loss_and_grads(*narrow, inputs, config, impl="triton")
    assert whole[1].dtype == torch.bfloat16
    assert_close_to_truth("weight", chunked[1], whole[1].double(), rtol=2.0**-8)


def test_autocast_decides_the_matmul(small_inputs, head):
    config = GRPOLossConfig()
    inputs = on_policy(small_inputs(), head, config).to(torch.float32)
    wide = [x.detach().float().requires_grad_() for x in head]
    narrow = [x.detach().bfloat16().requires_grad_() for x in head]
    with torch.autocast(wide[0].device.type, dtype=torch.bfloat16):
        out, grads = linear_loss_and_grads(*wide, inputs, config, impl="triton")
    expected, _ = linear_loss_and_grads(*narrow, inputs, config, impl="triton")
    assert torch.equal(out.per_token_logps, expected.per_token_logps)
    assert [grad.dtype for grad in grads] == [torch.float32] * 3


@pytest.mark.parametrize("return_entropy", [False, True])
def test_log_probs_of_hidden_states(small_inputs, head, monkeypatch, return_entropy):
    monkeypatch.setitem(lm_head.CHUNK_BYTES, head[0].device.type, 7 * V * 8)
    inputs, results = small_inputs(), []
    divisor = {"temperature": 0.7}
    if return_entropy:
        divisor = {"temperatures": torch.linspace(0.3, 3.0, 32, device=head[0].device).view(8, 4).t()}
    for impl in ("torch", "triton"):
        leaves = [x.detach().clone().requires_grad_() for x in head]
        out = linear_selective_log_softmax(
            leaves[0],
            leaves[1],
            inputs.completion_ids,
            lm_head_bias=leaves[2],
            **divisor,
            final_logit_softcapping=9.0,
            row_mask=inputs.completion_mask,
            return_entropy=return_entropy,
            impl=impl,
        )
        logps, entropy = out if return_entropy else (out, torch.zeros((), device=out.device))
        (logps.sin().sum() + entropy.cos().sum()).backward()
        results.append([logps, entropy, *(x.grad for x in leaves)])
    for name, truth, actual in zip(("logps", "entropy", "hidden", "weight", "bias"), *results, strict=True):
        assert_close_to_truth(name, actual, truth, rtol=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_fp32_logits_of_narrow_inputs(small_inputs, head, level):
    """On CUDA the matmul multiplies 16 bits into 32 and dlogits are narrow again; elsewhere everything is widened."""
    config = GRPOLossConfig(importance_sampling_level=level, epsilon=0.9, epsilon_high=9.0)
    narrow = [(4 * x.detach()).bfloat16().requires_grad_() for x in head]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    inputs = on_policy(small_inputs(level), wide, config)
    inputs = replace(inputs, advantages=torch.tensor([1.0, 0.0, -1.0, 0.5], device=inputs.advantages.device).double())
    truth, true_grads = linear_loss_and_grads(*wide, inputs, config, impl="torch")
    out, grads = linear_loss_and_grads(
        *narrow, inputs.to(torch.float32), config, impl="triton", fp32_logits=True, compute_metrics=False
    )
    kept = inputs.completion_mask & (inputs.advantages != 0)[:, None]
    assert out.metrics == {} and (out.per_token_logps[~kept] == 0).all()
    assert_close_to_truth("logps", out.per_token_logps[kept], truth.per_token_logps[kept], rtol=2e-5)
    for name, grad, true_grad in zip(("hidden", "weight", "bias"), grads, true_grads, strict=True):
        assert_close_to_truth(name, grad, true_grad, rtol=2.0**-6)


def test_a_teacher_beside_the_kernels(small_inputs, head, device):
    """In place and not, logits and linear: the columns that a teacher touches are written once more."""
    config = GRPOLossConfig("dapo", distillation_weight=0.4, distillation_alpha=0.5, entropy_coef=0.1)
    inputs = on_policy(small_inputs(), head, config)
    logps, ids = (inputs.logits + 1.0).flip(1).log_softmax(-1).topk(3)
    taught = {"teacher_topk_ids": ids, "teacher_topk_logps": logps}
    truth, true_grads = linear_loss_and_grads(*head, inputs, config, impl="torch", **taught)
    out, grads = linear_loss_and_grads(*head, inputs, config, impl="triton", **taught)
    assert_close_to_truth("loss", out.loss, truth.loss, rtol=1e-11)
    for x, y in zip(grads, true_grads, strict=True):
        assert_close_to_truth("gradient", x, y, rtol=1e-10)
    truth, true_grad = loss_and_grad(inputs, config, impl="torch", **taught)
    for inplace in (True, False):
        out, grad = loss_and_grad(inputs, config, impl="triton", inplace=inplace, **taught)
        assert_close_to_truth("loss", out.loss, truth.loss, rtol=1e-11)
        assert_close_to_truth("gradient", grad, true_grad, rtol=1e-10)
