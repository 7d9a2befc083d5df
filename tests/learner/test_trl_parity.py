"""Three rollout batches through TRL 1.16's real GRPOTrainer and through our learner: same losses, same weights.

Both sides get the same prompts, completions, sampling log-probs and rewards. TRL does everything else itself in a plain
`train()`: advantages, old and reference log-probs, sampler ratios, loss, clipping, AdamW, schedule. Only its generation
is replaced, through its own `rollout_func`, and with the sampler correction on, the vLLM engine it would start.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import Completion, Problem, RolloutGroup, Scored
from igrpo.learner import batching
from igrpo.learner.learner import Learner
from igrpo.models.loading import load_policy
from igrpo.rollout.advantage import group_advantages
from tests.support.tiny import save_tiny

trl = pytest.importorskip("trl")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"parity is with TRL 1.16, found {trl.__version__}", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'", "ignore:TRL currently supports vLLM")

STEPS, PROMPTS, GROUP = 3, 3, 4
MAX_LENGTH, END, VOCAB = 10, 1, 288

# Both sides know every key by this name. Adam's epsilon is far above float32 noise in the gradients (1e-9) and far
# below the gradients: with the default 1e-8, weights whose gradient is noise would take noisy steps of full size.
SETTINGS: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "seed": 3,
    "num_generations": GROUP, "max_completion_length": MAX_LENGTH, "temperature": 0.7,
    "per_device_train_batch_size": PROMPTS * GROUP, "gradient_accumulation_steps": 1, "num_iterations": 1,
    "learning_rate": 1e-3, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "adam_epsilon": 1e-5, "max_grad_norm": 1.0, "scale_rewards": "none", "loss_type": "grpo",
    "vllm_importance_sampling_correction": False,
}  # fmt: skip
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
TWO_MICRO_BATCHES = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": PROMPTS * GROUP // 2}
# On the first step on a rollout every ratio is 1, and centred advantages make the plain GRPO loss exactly 0: from the
# second step on the ratios, the clipping and the loss say something.
TWO_ITERATIONS = {"num_iterations": 2}

LOSS_REL, LOSS_ABS = 2e-5, 2e-5  # absolute: a loss is a sum of terms of size 1 to 10 that nearly cancel
NORM_REL = 5e-5
WEIGHTS_REL = 1e-4  # of the distance the weights went

Data = list[list[RolloutGroup]]


@dataclass(frozen=True)
class Run:
    logs: list[dict[str, float]]
    """One per rollout batch."""
    weights: torch.Tensor
    """All of them, flat, after the last step."""


@pytest.fixture(scope="module", autouse=True)
def imported_trl() -> Iterator[None]:
    """The trainer collects garbage in every run; with vLLM's modules to walk, that takes longer than the run itself."""
    from trl import GRPOTrainer  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def clean_state(imported_trl: None) -> Iterator[None]:
    """Accelerate's state is process-wide and TRL reseeds everything: no other test may notice."""
    environment = dict(os.environ)
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    reset_accelerate()
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)
    os.environ.clear()
    os.environ.update(environment)


def reset_accelerate() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def initial(folder: str) -> torch.Tensor:
    return flat_weights(load_policy(folder, our_config(folder)))


@pytest.fixture(scope="module")
def data(folder: str) -> Data:
    """Per batch: ragged lengths, completions of one token and cut ones, and a group whose rewards are all equal."""
    rng = random.Random(5)
    model = load_policy(folder, our_config(folder))
    rewards_P_G = [[1.0, 0.0, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 1.0, 0.0]]
    lengths_P_G = [[3, MAX_LENGTH, 1, 8], [2, 7, MAX_LENGTH, 4], [MAX_LENGTH, 5, 9, 6]]
    batches: Data = []
    for step in range(STEPS):
        groups = []
        for p in range(PROMPTS):
            row = step * PROMPTS + p
            prompt_ids = tuple(rng.randrange(5, VOCAB) for _ in range(2 + 2 * p + step))
            completions = [made_up_completion(model, prompt_ids, length, rng) for length in lengths_P_G[p]]
            rewards = rng.sample(rewards_P_G[p], GROUP)
            scored = tuple(Scored(c, {"given": r}, r) for c, r in zip(completions, rewards, strict=True))
            groups.append(RolloutGroup(Problem(row, str(row), ""), (), None, prompt_ids, scored, (0.0,) * GROUP))
        batches.append(groups)
    return batches


@torch.no_grad()
def made_up_completion(model: Any, prompt_ids: tuple[int, ...], length: int, rng: random.Random) -> Completion:
    """Random ids; the initial policy's log-probs plus noise, so that sampler ratios fall on both sides of a cap."""
    cut = length == MAX_LENGTH
    ids = [rng.randrange(5, VOCAB) for _ in range(length)]
    if not cut:
        ids[-1] = END
    logits = model(torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 : -1] / SETTINGS["temperature"]
    exact = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
    noisy = tuple(x + rng.gauss(0.0, 0.5) for x in exact)
    return Completion(tuple(ids), noisy, text="", finish_reason="length" if cut else "stop", version=0)


def trl_run(folder: str, data: Data, **overrides: Any) -> Run:
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    settings = {**SETTINGS, **overrides}
    iterations = settings["num_iterations"]
    groups = {group.problem.prompt: group for batch in data for group in batch}
    rewards = {(p, s.completion.token_ids): s.reward for p, group in groups.items() for s in group.refinements}

    def rollout(prompts: list[str], trainer: Any) -> dict[str, list]:
        chosen = [groups[prompt].refinements[i % GROUP].completion for i, prompt in enumerate(prompts)]
        return {
            "prompt_ids": [list(groups[prompt].prompt_ids) for prompt in prompts],
            "completion_ids": [list(completion.token_ids) for completion in chosen],
            "logprobs": [list(completion.logprobs) for completion in chosen],
        }

    def given(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [rewards[prompt, tuple(ids)] for prompt, ids in zip(prompts, completion_ids, strict=True)]

    reset_accelerate()
    args = GRPOConfig(
        output_dir=f"{folder}-trl", max_steps=STEPS * iterations, optim="adamw_torch", logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, shuffle_dataset=False, **settings,
    )  # fmt: skip
    dataset = Dataset.from_dict({"prompt": list(groups)})
    trainer = GRPOTrainer(folder, given, args, dataset, rollout_func=rollout)
    trainer.remove_callback(PrinterCallback)
    if settings["vllm_importance_sampling_correction"]:
        # TRL corrects only what vLLM sampled; switched on here because the constructor would start an engine.
        trainer.use_vllm, trainer._last_loaded_step = True, -1
        trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    batches = [steps[i : i + iterations] for i in range(0, len(steps), iterations)]
    return Run([mean_log(batch) for batch in batches], flat_weights(trainer.model))


def mean_log(steps: list[dict[str, float]]) -> dict[str, float]:
    """The optimiser steps on one rollout batch as the learner reports them: means, and the last learning rate."""
    means = {name: fmean(log[name] for log in steps) for name in ("loss", "grad_norm", "kl") if name in steps[0]}
    return {**means, "learning_rate": steps[-1]["learning_rate"]}


def our_config(folder: str, **overrides: Any) -> TrainConfig:
    settings = {**SETTINGS, **overrides}
    return TrainConfig(model_name_or_path=folder, dataset_name="unused", algorithm="grpo", **settings)


def our_run(folder: str, data: Data, *, std_epsilon: float = 0.0, **overrides: Any) -> Run:
    config = our_config(folder, **overrides)
    reset_accelerate()
    reference = load_policy(folder, config) if config.beta > 0 else None
    learner = Learner(load_policy(folder, config), reference, config, pad_token_id=0)
    learner.set_schedule(STEPS * config.num_iterations)
    logs = []
    for batch in data:
        advantages_P_G = our_advantages(batch, config.scale_rewards, std_epsilon)
        groups = [replace(group, advantages=row) for group, row in zip(batch, advantages_P_G, strict=True)]
        logs.append(learner.train_on(batching.training_samples(groups, config)))
    return Run(logs, flat_weights(learner.unwrapped))


def our_advantages(batch: list[RolloutGroup], scale: str, std_epsilon: float) -> list[tuple[float, ...]]:
    """With ``std_epsilon``, what adding it to the standard deviation would make of them."""
    rewards_P_G = [[scored.reward for scored in group.refinements] for group in batch]
    advantages_P_G = group_advantages(rewards_P_G, scale)
    if not std_epsilon:
        return advantages_P_G
    rewards = torch.tensor(rewards_P_G)
    stds_P = rewards.std(dim=1) if scale == "group" else rewards.std().expand(PROMPTS)
    shrunk_P = (stds_P / (stds_P + std_epsilon)).tolist()
    return [tuple(a * shrunk for a in row) for row, shrunk in zip(advantages_P_G, shrunk_P, strict=True)]


def flat_weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in sorted(model.named_parameters())])


def assert_same(ours: Run, theirs: Run, initial: torch.Tensor, *, norm_rel: float = NORM_REL) -> None:
    assert len(ours.logs) == len(theirs.logs) == STEPS
    for mine, other in zip(ours.logs, theirs.logs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=LOSS_REL, abs=LOSS_ABS)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=norm_rel, abs=1e-9)
        assert mine["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-12)
    moved = float((theirs.weights - initial).norm())
    assert moved > 0.05  # ten thousand times float32's resolution of these weights, so the next line means something
    assert float((ours.weights - theirs.weights).norm()) <= WEIGHTS_REL * moved


# Every pair of (mask_truncated_completions, micro-batches, iterations) once.
@pytest.mark.parametrize(
    ("mask_truncated", "micro_batches", "iterations"), [(False, 1, 1), (False, 2, 2), (True, 1, 2), (True, 2, 1)]
)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type(folder, data, initial, loss_type, mask_truncated, micro_batches, iterations):
    settings = {
        "loss_type": loss_type, "mask_truncated_completions": mask_truncated, "num_iterations": iterations
    }  # fmt: skip
    split = TWO_MICRO_BATCHES if micro_batches == 2 else {}
    ours = our_run(folder, data, **settings, **split)
    # BNPO's mean over tokens: TRL averages the means of the micro-batches, so its loss depends on the split. Ours is
    # the mean over the step's tokens whatever the split, hence what TRL has in one micro-batch.
    theirs = trl_run(folder, data, **settings, **({} if loss_type == "bnpo" else split))
    assert_same(ours, theirs, initial)


VARIANTS: dict[str, dict[str, Any]] = {
    "kl": {"beta": 0.04},
    "kl, two iterations": {"beta": 0.04, **TWO_ITERATIONS},
    "kl, two micro-batches": {"beta": 0.04, "mask_truncated_completions": True, **TWO_MICRO_BATCHES},
    "kl without bias correction": {"beta": 0.04, "use_bias_correction_kl": False},
    "gspo": {"importance_sampling_level": "sequence", **TWO_ITERATIONS},
    "gspo, narrow clip": {
        "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, **TWO_ITERATIONS,
        **TWO_MICRO_BATCHES,
    },
    "luspo as published": {"loss_type": "luspo", "importance_sampling_level": "sequence", **TWO_ITERATIONS},
    "dapo, clip higher, two-sided": {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.3, **TWO_ITERATIONS},
    "cispo with its usual bound": {"loss_type": "cispo", "epsilon_high": 5.0, **TWO_ITERATIONS},
    "off-policy mask": {"off_policy_mask_threshold": 0.05, **TWO_ITERATIONS},
    "temperature 1": {"temperature": 1.0, **TWO_ITERATIONS},
    "temperature 1.3": {"temperature": 1.3, **TWO_ITERATIONS},
    "linear schedule": {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {}},
    "warm-up steps": {"warmup_steps": 1},
    "warm-up share": {"warmup_steps": 0.5, **TWO_ITERATIONS},
    "no clipping": {"max_grad_norm": 0.0},
    "hard clipping": {"max_grad_norm": 0.1},
    "other betas": {"adam_beta1": 0.8, "adam_beta2": 0.95},
    "entropy bonus, cut completions": {"entropy_coef": 0.05, "mask_truncated_completions": True, **TWO_ITERATIONS},
    "no weight decay on norms": {"weight_decay": 0.5},
    "top entropy": {"top_entropy_quantile": 0.4, "mask_truncated_completions": True},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(folder, data, initial, name):
    ours, theirs = our_run(folder, data, **VARIANTS[name]), trl_run(folder, data, **VARIANTS[name])
    assert_same(ours, theirs, initial)
    if "kl" in theirs.logs[0] and VARIANTS[name].get("gradient_accumulation_steps", 1) == 1:
        for mine, other in zip(ours.logs, theirs.logs, strict=True):
            assert mine["kl"] == pytest.approx(other["kl"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_entropy_bonus_is_the_mean_over_the_steps_tokens(folder, data, initial, loss_type):
    """TRL averages the micro-batches' means, so here too its value depends on the split and ours is its unsplit one."""
    settings = {"loss_type": loss_type, "entropy_coef": 0.05, "mask_truncated_completions": True}
    theirs = trl_run(folder, data, **settings)
    assert_same(our_run(folder, data, **settings, **TWO_MICRO_BATCHES), theirs, initial)


SAMPLER_RATIOS: dict[str, dict[str, Any]] = {
    "defaults": {},  # sequence_mask, cap 3
    "sequence_truncate": {"vllm_importance_sampling_clip_max": 1.5, **TWO_MICRO_BATCHES},
    "token_mask": {"vllm_importance_sampling_clip_max": 1.5, "loss_type": "dapo", **TWO_MICRO_BATCHES},
    "token_truncate": {"vllm_importance_sampling_clip_max": 1.2, "vllm_importance_sampling_clip_min": 0.8},
    "token_truncate, vespo": {"loss_type": "vespo", "vllm_importance_sampling_clip_max": 1.2},
}


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("name", SAMPLER_RATIOS)
def test_sampler_correction(folder, data, initial, name, iterations):
    settings = {"vllm_importance_sampling_correction": True, "num_iterations": iterations, **SAMPLER_RATIOS[name]}
    if name != "defaults":
        settings["vllm_importance_sampling_mode"] = name.partition(",")[0]
    ours = our_run(folder, data, **settings)
    assert_same(ours, trl_run(folder, data, **settings), initial)
    low = min(log["sampling/importance_sampling_ratio/min"] for log in ours.logs)
    high = max(log["sampling/importance_sampling_ratio/max"] for log in ours.logs)
    cap = settings.get("vllm_importance_sampling_clip_max", 3.0)
    if "truncate" in name:
        assert low < 1.0 and high == pytest.approx(cap)
    else:
        assert low == 0.0 and 1.0 < high < cap  # what exceeds the cap is left out


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_scaled_rewards_differ_only_by_the_constant_trl_adds_to_the_deviation(folder, data, initial, scale):
    """TRL divides by std + 1e-4, we by std: advantages differ by 1e-4/std, 2e-4 at most here (std >= 0.43), and so do
    gradients; AdamW mostly undoes it in the weights. With TRL's constant put into ours, the rest agrees as tightly as
    without scaling, so nothing else differs."""
    theirs = trl_run(folder, data, scale_rewards=scale)
    exact, same_constant = (our_run(folder, data, scale_rewards=scale, std_epsilon=e) for e in (0.0, 1e-4))
    assert_same(same_constant, theirs, initial)
    assert_same(exact, theirs, initial, norm_rel=3e-4)
    assert all(a["grad_norm"] > b["grad_norm"] * (1 + 1e-4) for a, b in zip(exact.logs, theirs.logs, strict=True))


def test_a_batch_without_any_signal(folder, data, initial):
    """All groups all-equal: both take the step, on AdamW's momentum alone."""
    silent = [replace(g, refinements=tuple(replace(s, reward=0.5) for s in g.refinements)) for g in data[1]]
    batches = [data[0], silent, data[2]]
    ours = our_run(folder, batches)
    assert_same(ours, trl_run(folder, batches), initial)
    assert ours.logs[1]["loss"] == ours.logs[1]["grad_norm"] == 0.0


def test_the_inputs_reach_what_they_are_meant_to_reach(folder, data):
    logs = our_run(folder, data, **TWO_ITERATIONS).logs
    assert all(log["learner/sequences_skipped"] == GROUP for log in logs)  # the all-equal group is not computed
    assert all(0.1 < log["clip_ratio/region_mean"] < 0.9 and abs(log["loss"]) > 1e-3 for log in logs)
    cut = [s.completion.truncated for batch in data for group in batch for s in group.refinements if s.reward != 0.25]
    assert 0 < sum(cut) < len(cut)  # cut completions in groups that train
