"""What a caller is told: both keys of an impossible pair, the shapes that do not fit, what to write instead."""

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

import igrpo_kernels
from igrpo_kernels import (
    GRPOLossConfig,
    available_impls,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
)
from igrpo_kernels.impls import ENVIRONMENT_VARIABLE
from igrpo_kernels.losses import IMPORTANCE_SAMPLING_MODES


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        *[({"delta": 2.0, "loss_type": t}, ("delta", "loss_type")) for t in ("cispo", "sapo", "vespo")],
        *[({"dual_clip": 3.0, "loss_type": t}, ("dual_clip", "loss_type")) for t in ("cispo", "sapo", "vespo")],
        ({"delta": 2.0, "dual_clip": 3.0}, ("delta", "dual_clip")),
        (
            {"loss_type": "vespo", "importance_sampling_level": "sequence"},
            ("loss_type", "importance_sampling_level"),
        ),
        *[
            ({"loss_type": "vespo", "importance_sampling_mode": m}, ("loss_type", "importance_sampling_mode"))
            for m in ("sequence_mask", "sequence_truncate")
        ],
        ({"loss_type": "dr_grpo"}, ("loss_type", "max_completion_length")),
        (
            {"importance_sampling_clip_min": 3.0, "importance_sampling_clip_max": 3.0},
            ("importance_sampling_clip_min", "importance_sampling_clip_max"),
        ),
        *[
            (
                {"importance_sampling_mode": m, "importance_sampling_clip_max": None},
                ("importance_sampling_mode", "importance_sampling_clip_max"),
            )
            for m in IMPORTANCE_SAMPLING_MODES
        ],
    ],
)
def test_an_impossible_pair_names_both_keys(values, keys):
    with pytest.raises(ValueError) as error:
        GRPOLossConfig(**values)
    for key in keys:
        assert key in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_type", "ppo"),
        ("importance_sampling_level", "batch"),
        ("importance_sampling_mode", "truncate"),
        ("kl_estimator", "k4"),
        ("use_bias_correction_kl", "yes"),
        ("epsilon", -0.1),
        ("epsilon", None),
        ("epsilon_high", -0.1),
        ("delta", 0.0),
        ("dual_clip", 1.0),
        ("beta", -0.04),
        ("beta", math.nan),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", None),
        ("temperature", math.inf),
        ("entropy_coef", "0.1"),
        ("top_entropy_quantile", 1.1),
        ("top_entropy_quantile", -0.1),
        ("off_policy_mask_threshold", math.nan),
        ("importance_sampling_clip_min", -1.0),
        ("importance_sampling_clip_max", 0.0),
        ("max_completion_length", 0),
        ("sapo_temperature_pos", 0.0),
        ("sapo_temperature_neg", -1.0),
        ("vespo_k_pos", -1.0),
        ("vespo_lambda_pos", -1.0),
        ("vespo_k_neg", -1.0),
        ("vespo_lambda_neg", -1.0),
        ("logit_scale", 0.0),
        ("distillation_weight", 1.5),
        ("distillation_alpha", -0.1),
        ("final_logit_softcapping", 0.0),
    ],
)
def test_a_value_out_of_range_names_key_and_value(name, value):
    with pytest.raises(ValueError, match=name) as error:
        GRPOLossConfig(**{name: value})
    assert repr(value) in str(error.value)


def test_defaults_are_trl_s():
    trl_names = {
        "importance_sampling_clip_min": "vllm_importance_sampling_clip_min",
        "importance_sampling_clip_max": "vllm_importance_sampling_clip_max",
    }
    ours_alone = {
        "dual_clip", "kl_estimator", "logit_scale", "final_logit_softcapping", "dro_beta", "clip_cov_ratio",
        "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef", "kl_tau", "rollout_rs", "rollout_rs_threshold",
    }  # fmt: skip
    different = {"distillation_weight", "loss_type", "importance_sampling_mode", "max_completion_length"}
    grpo_config = pytest.importorskip("trl.trainer.grpo_config").GRPOConfig
    sdpo_config = pytest.importorskip("trl.experimental.sdpo").SDPOConfig
    defaults = {f.name: f.default for config in (sdpo_config, grpo_config) for f in fields(config)}
    for field in fields(GRPOLossConfig):
        if field.name not in ours_alone | different:
            assert field.default == defaults[trl_names.get(field.name, field.name)], field.name


def test_a_config_is_frozen_and_comparable():
    config = GRPOLossConfig(beta=0.1)
    with pytest.raises(FrozenInstanceError):
        config.beta = 0.2
    assert config == replace(GRPOLossConfig(), beta=0.1) and hash(config) == hash(GRPOLossConfig(beta=0.1))


LOGITS, IDS, ADVANTAGES = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2)
ROWS, ROW_IDS, CU = torch.zeros(6, 5), torch.zeros(6, dtype=torch.long), torch.tensor([0, 2, 6])


@pytest.mark.parametrize(
    ("args", "keywords", "message"),
    [
        ((torch.zeros(2, 4, 5), IDS, ADVANTAGES), {}, r"\(2, 4, 5\).*\(2, 3\).*logits\[:, :-1\]"),
        ((torch.zeros(2, 5), IDS, ADVANTAGES), {}, r"\(2, 5\).*\(2, 3\)"),
        ((torch.zeros(2, 3, 0), IDS, ADVANTAGES), {}, r"\(2, 3, 0\)"),
        ((LOGITS.long(), IDS, ADVANTAGES), {}, r"logits must be a floating-point tensor, got torch.int64"),
        ((LOGITS, IDS.float(), ADVANTAGES), {}, r"completion_ids must be int32 or int64, got torch.float32"),
        ((LOGITS, IDS, torch.zeros(3)), {}, r"advantages has shape \(3,\).*\(2,\).*\(2, 3\)"),
        ((LOGITS, IDS, torch.zeros(2, 1)), {}, r"advantages has shape \(2, 1\)"),
        ((LOGITS, IDS, ADVANTAGES.long()), {}, r"advantages must be a floating-point tensor"),
        ((LOGITS, IDS, ADVANTAGES), {"completion_mask": torch.ones(2, 4)}, r"completion_mask.*\(2, 4\).*\(2, 3\)"),
        ((LOGITS, IDS, ADVANTAGES), {"completion_mask": torch.full((2, 3), 0.5)}, r"completion_mask.*only 0 and 1"),
        (
            (LOGITS, IDS, ADVANTAGES),
            {"completion_mask": torch.full((2, 3), math.nan)},
            r"completion_mask.*only 0 and 1",
        ),
        ((LOGITS, IDS, ADVANTAGES), {"old_per_token_logps": torch.zeros(2)}, r"old_per_token_logps.*\(2,\).*\(2, 3\)"),
        ((LOGITS, IDS, ADVANTAGES), {"old_per_token_logps": IDS}, r"old_per_token_logps must be a floating-point"),
        ((LOGITS, IDS, ADVANTAGES), {"ref_per_token_logps": torch.zeros(3, 2)}, r"ref_per_token_logps.*\(3, 2\)"),
        ((LOGITS, IDS, ADVANTAGES), {"sampling_per_token_logps": torch.zeros(6)}, r"sampling_per_token_logps.*\(6,\)"),
        ((LOGITS, IDS, ADVANTAGES), {"num_items_in_batch": torch.ones(2)}, r"num_items_in_batch.*\(2,\)"),
        ((LOGITS, IDS, ADVANTAGES), {"cu_seqlens": CU}, r"\(2, 3\).*completion_ids\.reshape\(-1\)"),
        ((ROWS, ROW_IDS, ADVANTAGES), {}, r"\(6,\).*cu_seqlens \(S\+1,\)"),
        ((ROWS, ROW_IDS, ADVANTAGES), {"cu_seqlens": torch.tensor([0, 2, 5])}, r"rise from 0 to n=6.*from 0 to 5"),
        ((ROWS, ROW_IDS, ADVANTAGES), {"cu_seqlens": torch.tensor([1, 2, 6])}, r"rise from 0 to n=6.*from 1 to 6"),
        ((ROWS, ROW_IDS, torch.zeros(3)), {"cu_seqlens": torch.tensor([0, 4, 2, 6])}, r"must rise"),
        ((ROWS, ROW_IDS, ADVANTAGES), {"cu_seqlens": CU.float()}, r"cu_seqlens.*torch.float32"),
        ((ROWS, ROW_IDS, ADVANTAGES), {"cu_seqlens": CU[None]}, r"cu_seqlens.*\(1, 3\)"),
        ((LOGITS, IDS, ADVANTAGES), {"config": GRPOLossConfig(beta=0.1)}, r"beta=0.1 needs ref_per_token_logps"),
        (
            (LOGITS, IDS, ADVANTAGES),
            {"config": GRPOLossConfig(importance_sampling_mode="token_mask")},
            r"importance_sampling_mode='token_mask' needs sampling_per_token_logps",
        ),
        ((LOGITS, IDS.to("meta"), ADVANTAGES), {}, r"advantages is on cpu but completion_ids is on meta"),
        ((LOGITS.to("meta"), IDS, ADVANTAGES), {}, r"token ids are on cpu but the model output is on meta"),
    ],
)
def test_inputs_that_do_not_fit(args, keywords, message):
    with pytest.raises(ValueError, match=message):
        grpo_loss(*args, **keywords)


@pytest.mark.parametrize(
    ("hidden", "weight", "bias", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(5, 3), None, r"lm_head_weight.*\(5, 3\).*\(2, 3, 4\).*\(V, 4\)"),
        (torch.zeros(2, 3, 4), torch.zeros(4, 5), None, r"lm_head_weight.*\(4, 5\)"),
        (torch.zeros(2, 4, 4), torch.zeros(5, 4), None, r"hidden_states.*\(2, 4, 4\).*hidden_states\[:, :-1\]"),
        (torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(4), r"lm_head_bias.*\(4,\).*\(5,\)"),
        (torch.zeros(2, 3, 4), torch.zeros(5, 4, device="meta"), None, r"lm_head_weight is on meta.*cpu"),
    ],
)
def test_linear_inputs_that_do_not_fit(hidden, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(hidden, weight, IDS, ADVANTAGES, lm_head_bias=bias)
    with pytest.raises(ValueError, match=message):
        linear_selective_log_softmax(hidden, weight, IDS, lm_head_bias=bias)


def test_log_prob_functions_check_their_scalars():
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            selective_log_softmax(LOGITS, IDS, temperature=temperature)
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        linear_selective_log_softmax(torch.zeros(6, 4), torch.zeros(5, 4), ROW_IDS, final_logit_softcapping=0.0)
    with pytest.raises(ValueError, match="logit_scale"):
        linear_selective_log_softmax(torch.zeros(6, 4), torch.zeros(5, 4), ROW_IDS, logit_scale=0.0)
    with pytest.raises(ValueError, match=r"row_mask.*\(2, 3\).*\(6,\)"):
        linear_selective_log_softmax(torch.zeros(6, 4), torch.zeros(5, 4), ROW_IDS, row_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="int32 or int64"):
        selective_log_softmax(LOGITS, IDS.bool())


def test_implementations_say_why_they_are_missing(monkeypatch):
    reasons = available_impls()
    assert set(reasons) == {"torch", "triton", "cuda", "cpu"} and reasons["torch"] == "available"
    for name, reason in reasons.items():
        if reason != "available":
            with pytest.raises(RuntimeError) as error:
                grpo_loss(LOGITS, IDS, ADVANTAGES, impl=name)
            why = str(error.value).removeprefix(f"impl={name!r} is not available: ")
            assert why != str(error.value) and ("impl='torch'" in why or "`" in why)  # another choice, or a command
    with pytest.raises(ValueError, match=r"'fast'.*'torch'"):
        grpo_loss(LOGITS, IDS, ADVANTAGES, impl="fast")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE}='fast'"):
        grpo_loss(LOGITS, IDS, ADVANTAGES)
    grpo_loss(LOGITS, IDS, ADVANTAGES, impl="torch")  # the variable replaces "auto" only
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    grpo_loss(LOGITS, IDS, ADVANTAGES)


def test_public_names():
    assert set(igrpo_kernels.__all__) == {
        "GRPOLossConfig",
        "GRPOLossOutput",
        "SamplingMask",
        "available_impls",
        "grpo_loss",
        "linear_grpo_loss",
        "linear_selective_log_softmax",
        "linear_topk_log_softmax",
        "selective_log_softmax",
    }


def test_importing_needs_only_torch_and_starts_nothing():
    code = (
        "import sys\n"
        "for name in ('triton', 'trl', 'transformers', 'accelerate', 'vllm', 'numpy'): sys.modules[name] = None\n"
        "import igrpo_kernels, torch\n"
        "x = torch.zeros(1, 2, 3, requires_grad=True)\n"
        "igrpo_kernels.grpo_loss(x, torch.zeros(1, 2, dtype=torch.long), torch.ones(1), impl='torch').loss.backward()\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not any(name == 'igrpo' or name.startswith('igrpo.') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
