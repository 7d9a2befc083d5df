"""The same numbers as TRL 1.16's own `GRPOTrainer._compute_loss`, loss, gradient and metrics.

The real method runs on a trainer made without its constructor: only the model call is replaced, by log-probs and
entropies of given logits, and accelerate by a single process. The sampler ratio, which TRL computes while generating,
is computed here in TRL's (B, T) / (B, 1) form.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, linear_selective_log_softmax, selective_log_softmax
from igrpo_kernels.losses import LOSSES
from tests.kernels.oracle import boundary_inputs, loss_and_grad, packed

trl = pytest.importorskip("trl")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"parity is with TRL 1.16, found {trl.__version__}", allow_module_level=True)

LEVELS = [
    (name, level)
    for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")  # TRL's
    for level in LOSSES[name].term.levels[:2]
]
MAX_COMPLETION_LENGTH = 31
NUM_ITEMS = 77.0
SAPO_TEMPERATURE_NEG = 1.125  # exact in fp32, to which TRL rounds the default 1.05 even in an fp64 computation


@pytest.fixture(scope="module")
def grpo_trainer_class():
    from trl import GRPOTrainer

    return GRPOTrainer


class SingleProcess:
    """The parts of accelerate.Accelerator that the loss touches."""

    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    def reduce(self, x, reduction):
        return x

    def pad_across_processes(self, x, dim, pad_index):
        return x


def trl_loss(trainer_class, inputs, config, *, num_items=NUM_ITEMS):
    """(loss, gradient of the logits, metrics) of TRL for one micro-batch without gradient accumulation."""
    logits = inputs.logits.detach().clone().requires_grad_()
    trainer = make_trainer(trainer_class, config)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: trl_logps(logits, inputs, config)
    batch = {
        "prompt_ids": torch.zeros(inputs.completion_ids.shape[0], 1, dtype=torch.long),
        "prompt_mask": torch.ones(inputs.completion_ids.shape[0], 1, dtype=torch.long),
        "completion_ids": inputs.completion_ids,
        "completion_mask": inputs.completion_mask.long(),
        "advantages": inputs.advantages,
        "num_items_in_batch": torch.tensor(num_items),
        "old_per_token_logps": inputs.old_per_token_logps,
        "ref_per_token_logps": inputs.ref_per_token_logps,
    }
    if config.importance_sampling_mode is not None or config.off_policy_mask_threshold is not None:
        batch["sampling_per_token_logps"] = inputs.sampling_per_token_logps
    if config.importance_sampling_mode is not None:
        batch["importance_sampling_ratio"] = trl_sampler_ratio(inputs, config)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), logits.grad, {name: values[0] for name, values in trainer._metrics["train"].items()}


def make_trainer(trainer_class, config):
    trainer = object.__new__(trainer_class)
    trainer.args = SimpleNamespace(
        use_bias_correction_kl=config.use_bias_correction_kl,
        delta=config.delta,
        sapo_temperature_pos=config.sapo_temperature_pos,
        sapo_temperature_neg=config.sapo_temperature_neg,
        vespo_k_pos=config.vespo_k_pos,
        vespo_lambda_pos=config.vespo_lambda_pos,
        vespo_k_neg=config.vespo_k_neg,
        vespo_lambda_neg=config.vespo_lambda_neg,
        steps_per_generation=1,
    )
    trainer.accelerator = SingleProcess()
    trainer.model = SimpleNamespace(training=True)
    trainer.current_gradient_accumulation_steps = 1
    trainer.loss_type = config.loss_type
    trainer.importance_sampling_level = config.importance_sampling_level
    trainer.epsilon_low = config.epsilon
    trainer.epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    trainer.beta = config.beta
    trainer.top_entropy_quantile = config.top_entropy_quantile
    trainer.off_policy_mask_threshold = config.off_policy_mask_threshold
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = config.importance_sampling_mode is not None
    trainer.max_completion_length = config.max_completion_length
    trainer.entropy_coef = config.entropy_coef
    trainer._entropy_bonus_enabled = config.entropy_coef != 0.0
    trainer.use_adaptive_entropy = trainer.aux_loss_enabled = False
    trainer._metrics = {"train": defaultdict(list)}
    return trainer


def trl_logps(logits, inputs, config):
    """TRL's own materialised log-prob and entropy functions, at the padded positions too."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logps, entropy = selective_log_softmax_and_entropy(logits, inputs.completion_ids, temperature=config.temperature)
    return logps, entropy, None


def trl_sampler_ratio(inputs, config):
    level, action = config.importance_sampling_mode.split("_")
    difference = (inputs.old_per_token_logps - inputs.sampling_per_token_logps) * inputs.completion_mask
    difference = difference.nan_to_num(nan=0.0)
    ratio = (difference.sum(-1, keepdim=True) if level == "sequence" else difference).exp()
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    if action == "truncate":
        return ratio.clamp(min=low, max=high)
    low, high = (float("-inf") if low is None else low), (float("inf") if high is None else high)
    return ratio * ((ratio >= low) & (ratio <= high))


OPTIONS = {
    "plain": {},
    "kl": {"beta": 0.2},
    "kl without correction": {"beta": 0.2, "use_bias_correction_kl": False},
    "delta": {"delta": 1.25},
    "delta below clip": {"delta": 1.1},
    "opsm": {"off_policy_mask_threshold": 0.0},
    "entropy bonus": {"entropy_coef": 0.05},
    "top entropy": {"top_entropy_quantile": 0.35},
    "token truncate": {"importance_sampling_mode": "token_truncate", "importance_sampling_clip_max": 1.2},
    "token mask": {
        "importance_sampling_mode": "token_mask",
        "importance_sampling_clip_min": 0.8,
        "importance_sampling_clip_max": 1.3,
    },
    "sequence truncate": {
        "importance_sampling_mode": "sequence_truncate",
        "importance_sampling_clip_min": 0.5,
        "importance_sampling_clip_max": 2.0,
    },
    "sequence mask": {"importance_sampling_mode": "sequence_mask", "importance_sampling_clip_max": 1.5},
    "everything": {
        "beta": 0.2,
        "off_policy_mask_threshold": 0.01,
        "entropy_coef": 0.05,
        "top_entropy_quantile": 0.7,
        "importance_sampling_mode": "token_truncate",
        "importance_sampling_clip_max": 1.5,
        "temperature": 0.8,
    },
}


def legal_configs():
    for loss_type, level in LEVELS:
        for name, options in OPTIONS.items():
            keywords = dict(options, loss_type=loss_type, importance_sampling_level=level, epsilon_high=0.28)
            if loss_type == "cispo":
                keywords["epsilon_high"] = 1.2
            keywords["max_completion_length"] = MAX_COMPLETION_LENGTH
            keywords["sapo_temperature_neg"] = SAPO_TEMPERATURE_NEG
            try:
                yield pytest.param(GRPOLossConfig(**keywords), id=f"{loss_type}-{level}-{name.replace(' ', '_')}")
            except ValueError:
                continue  # refused here: delta without a clipped surrogate, vespo with sequence corrections


@pytest.mark.parametrize("config", legal_configs())
def test_loss_gradient_and_metrics(config, grpo_trainer_class):
    inputs = boundary_inputs(level=config.importance_sampling_level)
    expected = trl_loss(grpo_trainer_class, inputs, config)
    compare(config, inputs, expected, rtol=1e-9)
    compare(config, packed(inputs), expected, rtol=1e-9, padded=inputs)


@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
def test_in_fp32(loss_type, level, grpo_trainer_class):
    config = GRPOLossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.1,
        epsilon_high=1.2 if loss_type == "cispo" else 0.28,
        entropy_coef=0.01,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
    inputs = boundary_inputs(level=level, seed=2).to(torch.float32)
    compare(config, inputs, trl_loss(grpo_trainer_class, inputs, config), rtol=2e-5)


def test_per_token_advantages(grpo_trainer_class):
    inputs = boundary_inputs()
    advantages = torch.randn(inputs.completion_ids.shape, generator=torch.Generator().manual_seed(7)).double()
    for level in ("token", "sequence"):
        config = GRPOLossConfig(loss_type="dapo", importance_sampling_level=level, off_policy_mask_threshold=0.0)
        inputs = replace(inputs, advantages=advantages)
        compare(config, inputs, trl_loss(grpo_trainer_class, inputs, config), rtol=1e-9)


def test_an_empty_sequence_counts_in_the_mean_over_sequences(grpo_trainer_class):
    inputs = boundary_inputs()
    mask = inputs.completion_mask.clone()
    mask[2] = False
    inputs = replace(inputs, completion_mask=mask)
    # On the sequence level TRL counts the empty sequence's ratio of 1 as clipped where it lies outside the band.
    for loss_type, level, delta in [*((*pair, None) for pair in LEVELS), ("cispo", "sequence", None),
                                    ("grpo", "sequence", 0.5)]:  # fmt: skip
        config = GRPOLossConfig(
            loss_type=loss_type,
            importance_sampling_level=level,
            delta=delta,
            importance_sampling_mode="token_truncate",
            max_completion_length=MAX_COMPLETION_LENGTH,
            sapo_temperature_neg=SAPO_TEMPERATURE_NEG,
        )
        compare(config, inputs, trl_loss(grpo_trainer_class, inputs, config), rtol=1e-9)


@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
def test_zero_advantages(loss_type, level, grpo_trainer_class):
    inputs = boundary_inputs(level=level)
    inputs = replace(inputs, advantages=inputs.advantages * (torch.arange(8) % 3 > 0))
    config = GRPOLossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        off_policy_mask_threshold=-1.0,
        max_completion_length=MAX_COMPLETION_LENGTH,
        sapo_temperature_neg=SAPO_TEMPERATURE_NEG,
    )
    compare(config, inputs, trl_loss(grpo_trainer_class, inputs, config), rtol=1e-9)


def test_vespo_limits_each_token_before_the_sequence(grpo_trainer_class):
    inputs = boundary_inputs()
    old = inputs.old_per_token_logps.clone()
    old[:, 0] += 30.0  # log-ratios of about -30 and +20: -10 in all, but 0 once the first is limited to -20
    old[:, 1] -= 20.0
    inputs, config = replace(inputs, old_per_token_logps=old), GRPOLossConfig(loss_type="vespo")
    compare(config, inputs, trl_loss(grpo_trainer_class, inputs, config), rtol=1e-9)


def test_vespo_drops_a_sequence_with_an_unknown_old_log_prob(grpo_trainer_class):
    inputs = boundary_inputs()
    old = inputs.old_per_token_logps.clone()
    old[2, 1] = float("nan")
    inputs, config = replace(inputs, old_per_token_logps=old), GRPOLossConfig(loss_type="vespo")
    expected = trl_loss(grpo_trainer_class, inputs, config)
    assert expected[0].isfinite() and (expected[1][2] == 0).all()
    compare(config, inputs, expected, rtol=1e-9)


def test_unscored_sampler_tokens(grpo_trainer_class):
    inputs = boundary_inputs()
    sampling = inputs.sampling_per_token_logps.clone()
    sampling[:, ::3] = float("nan")
    inputs = replace(inputs, sampling_per_token_logps=sampling)
    config = GRPOLossConfig(importance_sampling_mode="token_mask", off_policy_mask_threshold=0.0)
    compare(config, inputs, trl_loss(grpo_trainer_class, inputs, config), rtol=1e-9)


def test_chunked_log_probs_and_entropy_of_the_lm_head():
    from trl.kernels import ChunkedLogProbFunction

    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((40, 16), (301, 16), (301,))]
    index = torch.randint(301, (40,), generator=generator)
    upstream = torch.randn(2, 40, generator=generator)
    theirs = ChunkedLogProbFunction.apply(*leaves, index, 0.7, 64, 5.0, 1.5, ("entropy",))
    ours = linear_selective_log_softmax(
        leaves[0],
        leaves[1],
        index,
        lm_head_bias=leaves[2],
        temperature=0.7,
        final_logit_softcapping=5.0,
        logit_scale=1.5,
        return_entropy=True,
        impl="torch",
    )
    torch.testing.assert_close(ours, theirs[:2], rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad((theirs[0] * upstream[0] + theirs[1] * upstream[1]).sum(), leaves)
    actual = torch.autograd.grad((ours[0] * upstream[0] + ours[1] * upstream[1]).sum(), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def compare(config, inputs, expected, *, rtol, padded=None):
    loss, grad, metrics = expected
    out, actual_grad = loss_and_grad(inputs, config, num_items_in_batch=NUM_ITEMS)
    torch.testing.assert_close(out.loss.detach(), loss, rtol=rtol, atol=rtol * 1e-2)
    if padded is not None:
        grad = grad[padded.completion_mask]
    torch.testing.assert_close(actual_grad, grad, rtol=rtol, atol=rtol * grad.abs().max().item())
    for name, value in metrics.items():
        if name != "entropy_coef":  # the coefficient itself, which the caller knows
            assert out.metrics[name].item() == pytest.approx(value, rel=max(rtol, 1e-6), abs=1e-9), name


def test_log_probs_match_without_a_trainer():
    from trl.trainer.utils import entropy_from_logits
    from trl.trainer.utils import selective_log_softmax as trl_selective_log_softmax

    inputs = boundary_inputs()
    logps, entropy = selective_log_softmax(inputs.logits, inputs.completion_ids, return_entropy=True, impl="torch")
    torch.testing.assert_close(logps, trl_selective_log_softmax(inputs.logits, inputs.completion_ids))
    torch.testing.assert_close(entropy, entropy_from_logits(inputs.logits))
