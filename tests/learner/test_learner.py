"""One optimiser step: any split into micro-batches gives the gradient of one big batch, and skipping is exact."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import TrainingSample
from igrpo.learner.learner import Learner
from igrpo.learner.policy import loss_config
from igrpo.settings import ConfigError
from igrpo_kernels.losses import LOSSES
from tests.support.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def learner(model=None, reference=None, context=None, **settings) -> Learner:
    AcceleratorState._reset_state(True)
    options = {
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-2, "num_generations": 4,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "warmup_steps": 0,
        "max_completion_length": 16, "vllm_importance_sampling_correction": False, **settings,
    }  # fmt: skip
    config = TrainConfig(model_name_or_path="m", dataset_name="d", **options)
    made = Learner(copy.deepcopy(model or tiny_llama()), reference, config, pad_token_id=0, context=context)
    made.set_schedule(10)
    return made


def some_samples(seed: int = 0) -> list[TrainingSample]:
    generator = torch.Generator().manual_seed(seed)
    advantages = [1.0, -1.0, 0.0, 2.0, 0.0, -0.5, 1.5, -2.0]
    samples = []
    for i, advantage in enumerate(advantages):
        prompt = torch.randint(5, 280, (3 + 2 * i,), generator=generator).tolist()
        completion = torch.randint(5, 280, (1 + (5 * i) % 11,), generator=generator).tolist()
        logprobs = (-4.0 + torch.randn(len(completion), generator=generator)).tolist()
        samples.append(
            TrainingSample(tuple(prompt), tuple(completion), tuple(logprobs), advantage, positive=i % 3 == 1)
        )
    pairs = [sum(len(s.completion_ids) for s in samples[i : i + 2]) for i in range(0, 8, 2)]
    return [replace(s, prompt_length=pairs[i // 2], opens_prompt=i % 2 == 0) for i, s in enumerate(samples)]


def gradients(made: Learner, samples) -> tuple[dict[str, float], torch.Tensor]:
    metrics = made.train_on(samples)
    return metrics, torch.cat([p.grad.flatten() for p in made.policy.parameters()])


ADDING_UP = {name: {"loss_type": name} for name, loss in LOSSES.items() if loss.term.couples != "batch"}
ADDING_UP["dro"]["dro_beta"] = 0.1
ADDING_UP |= {
    f"{name} with all around it": {
        "loss_type": name, "kl_tau": 0.1, "positive_example_nll_weight": 0.3, "entropy_coef": 0.1,
        "rollout_rs": "token_k2", "rollout_rs_threshold": "2.0",
    } for name in ("grpo", "prompt_mean")
}  # fmt: skip


ADDING_UP["prime-rl's default"] = {"loss_type": "dppo_tv", "epsilon": 1e-3, "kl_tau": 1e-3, "bypass_mode": True}


def test_the_likelihood_term_is_a_mean_over_the_positive_tokens():
    """Whatever the loss divides by, and without an advantage."""
    samples = [replace(s, advantage=0.0) for s in some_samples()]
    for loss_type in ("grpo", "dapo"):
        made = learner(loss_type=loss_type, positive_example_nll_weight=0.3, temperature=1.0, max_grad_norm=0.0)
        good = [s for s in samples if s.positive]
        logps = [x for s in good for x in made.score((*s.prompt_ids, *s.completion_ids))[-len(s.completion_ids) :]]
        metrics, gradient = gradients(made, samples)
        assert metrics["loss"] == pytest.approx(-0.3 * sum(logps) / len(logps), rel=1e-5) and gradient.any()


def test_the_sampler_as_the_old_policy():
    """The ratio is against the sampler: its log-probabilities decide the clip, with a single iteration, too."""
    samples = some_samples()
    clipped = [replace(s, sampling_logprobs=tuple(x - 9.0 for x in s.sampling_logprobs)) for s in samples]
    settings = {"bypass_mode": True, "max_grad_norm": 0.0}
    _, open_ = gradients(learner(**settings), samples)
    _, shut = gradients(learner(**settings), [s for s in clipped if s.advantage > 0])
    assert open_.abs().max() > 1e-4 and not shut.any()  # every ratio is above the clip
    again = learner(**settings, num_iterations=2)
    again._log_probs = None  # no pass of its own is needed
    again.train_on(samples)
    for other in (
        {"vllm_importance_sampling_correction": True},
        {"rollout_rs": "token_k2", "rollout_rs_threshold": "1"},
    ):
        with pytest.raises(ConfigError, match=f"bypass_mode: .*{next(iter(other))}: (false|null)"):
            learner(**settings, **other)


@pytest.mark.parametrize("settings", ADDING_UP.values(), ids=ADDING_UP)
def test_micro_batches_add_up_to_one_big_batch(settings):
    samples = some_samples()
    whole, big = gradients(learner(**settings, per_device_train_batch_size=8, max_grad_norm=0.0), samples)
    split, small = gradients(learner(**settings, per_device_train_batch_size=2, max_grad_norm=0.0), samples)
    assert whole["loss"] == pytest.approx(split["loss"], rel=1e-5, abs=1e-7)
    assert big.abs().max() > 1e-4
    torch.testing.assert_close(small, big, rtol=1e-4, atol=1e-6 * float(big.abs().max()))


def test_skipping_zero_advantages_changes_no_gradient():
    """beta tiny enough to vanish, but not zero, makes the learner keep every sample."""
    samples = some_samples()
    skipped, gradient = gradients(learner(max_grad_norm=0.0), samples)
    kept, reference_gradient = gradients(learner(reference=tiny_llama(), beta=1e-12, max_grad_norm=0.0), samples)
    assert (skipped["learner/sequences"], skipped["learner/sequences_skipped"]) == (6.0, 2.0)
    assert kept["learner/sequences_skipped"] == 0.0
    assert skipped["loss"] == pytest.approx(kept["loss"], abs=1e-7)
    # The kept rows change the order of sums in the matmuls, nothing else.
    torch.testing.assert_close(gradient, reference_gradient, rtol=1e-4, atol=2e-6 * float(gradient.abs().max()))


def test_a_step_raises_the_probability_of_what_was_good():
    samples = [
        TrainingSample((5, 6, 7), (20, 21), (-5.0, -5.0), 1.0),
        TrainingSample((5, 6, 7), (30, 31), (-5.0, -5.0), -1.0),
    ]
    made = learner(per_device_train_batch_size=4, loss_type="grpo")
    good, bad = ((5, 6, 7, 20, 21), (5, 6, 7, 30, 31))
    before = sum(made.score(good)[-2:]) - sum(made.score(bad)[-2:])
    made.train_on(samples)
    assert sum(made.score(good)[-2:]) - sum(made.score(bad)[-2:]) > before + 0.1


def test_a_step_without_any_gradient_is_still_a_step():
    made = learner()
    first = made.train_on(some_samples())
    weights = [p.detach().clone() for p in made.policy.parameters()]
    metrics = made.train_on([s for s in some_samples() if s.advantage == 0.0])
    assert metrics["loss"] == 0.0 and metrics["grad_norm"] == 0.0 and metrics["learner/sequences"] == 0.0
    assert made.scheduler.last_epoch == 2 and first["learning_rate"] > metrics["learning_rate"]
    moved = [not torch.equal(a, b) for a, b in zip(weights, made.policy.parameters(), strict=True)]
    assert all(moved)  # AdamW's momentum goes on, as it does when TRL computes the zero gradient


def test_a_broken_gradient_leaves_the_weights_alone():
    made = learner()
    weights = [p.detach().clone() for p in made.policy.parameters()]
    broken = [TrainingSample(s.prompt_ids, s.completion_ids, s.sampling_logprobs, float("nan")) for s in some_samples()]
    assert made.train_on(broken)["learner/skipped_steps"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(weights, made.policy.parameters(), strict=True))


def test_clipping_and_the_reported_norm():
    made = learner(max_grad_norm=0.01)
    metrics, gradient = gradients(made, some_samples())
    assert metrics["grad_norm"] > 0.01
    assert float(gradient.norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("use_peft", [False, True])
def test_weights_read_in_the_midst_of_a_step_cost_it_no_gradient(use_peft):
    """An engine that dies beside a learner step is mended while it goes on."""
    made, again = (
        torch.manual_seed(0) and learner(use_peft=use_peft, lora_dropout=0.0, per_device_train_batch_size=2)
        for _ in range(2)
    )
    undisturbed = made.train_on(some_samples())
    source = again.adapter_tensors if use_peft else again.named_tensors
    disturbed = again.train_on(some_samples(), lambda done, total: [*source()] and None)
    assert disturbed["grad_norm"] == pytest.approx(undisturbed["grad_norm"], rel=1e-6) and disturbed["grad_norm"]
    again.placement.drop_gradients()
    assert all(p.grad is None for p in again.policy.parameters())


def test_several_steps_on_one_rollout_use_the_log_probs_from_before_the_first():
    made = learner(num_iterations=3, learning_rate=0.05)
    metrics = made.train_on(some_samples())
    assert made.scheduler.last_epoch == 3
    # Only against frozen old log-probs does the ratio leave 1, and large steps push it out of the clip range.
    assert metrics["clip_ratio/region_mean"] > 0.0


def test_the_kl_term_pulls_towards_the_reference():
    made = learner(tiny_llama(1), reference=tiny_llama(0), beta=0.5)
    metrics = made.train_on(some_samples())
    assert metrics["kl"] > 0.0 and metrics["loss"] > 0.0


def test_agreement_with_the_sampler_is_reported_in_nats():
    made = learner()
    exact = [
        TrainingSample(s.prompt_ids, s.completion_ids, tuple(_tempered(made, s)), s.advantage) for s in some_samples()
    ]
    off = [
        TrainingSample(s.prompt_ids, s.completion_ids, tuple(x + 0.25 for x in s.sampling_logprobs), s.advantage)
        for s in exact
    ]
    name = "sampling/sampling_logp_difference"
    weights = copy.deepcopy(made.policy.state_dict())
    assert made.train_on(exact)[f"{name}/max"] < 1e-4
    made.policy.load_state_dict(weights)
    shifted = made.train_on(off)
    assert shifted[f"{name}/mean"] == pytest.approx(0.25, abs=1e-4)
    assert shifted[f"{name}/max"] == pytest.approx(0.25, abs=1e-3)


@torch.no_grad()
def _tempered(made: Learner, s: TrainingSample) -> list[float]:
    ids = torch.tensor([[*s.prompt_ids, *s.completion_ids]])
    logits = made.unwrapped(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1] / made.config.temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(s.prompt_ids) :, None])[:, 0].tolist()


def test_bf16_computes_in_bf16_and_keeps_fp32_masters():
    made = learner(bf16=True, learning_rate=1e-6)
    before = [p.detach().clone() for p in made.policy.parameters()]
    made.train_on(some_samples())
    assert all(p.dtype == torch.float32 for p in made.policy.parameters())
    changed = [bool((a != b).any()) for a, b in zip(before, made.policy.parameters(), strict=True)]
    assert all(changed)  # a step of 1e-6 would vanish in bf16 weights
    assert all(t.dtype == torch.bfloat16 for _, t in made.named_tensors())


def test_tied_embeddings_are_sent_once():
    names = [name for name, _ in learner().named_tensors()]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert len(names) == len(set(names))


def test_the_fused_optimiser_steps_as_the_plain_one():
    weights = []
    for optim in ("adamw_torch", "adamw_torch_fused"):
        made = learner(optim=optim, weight_decay=0.1)
        made.train_on(some_samples())
        weights.append(torch.cat([p.detach().flatten() for p in made.policy.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)


def test_other_optimisers_by_their_names():
    assert learner(optim="rmsprop").train_on(some_samples())["grad_norm"] > 0.0
    with pytest.raises(ConfigError, match=r"optim: adamw_9bit.*adamw_torch_fused"):
        learner(optim="adamw_9bit")


@pytest.mark.applies(find_spec("bitsandbytes") is None, otherwise="bitsandbytes is installed")
def test_an_optimiser_whose_package_is_missing_says_so():
    with pytest.raises(ConfigError, match=r"optim: paged_adamw_8bit cannot be had here.*bitsandbytes"):
        learner(optim="paged_adamw_8bit")


def test_adapters_train_and_are_merged_for_the_engine():
    base = tiny_llama()
    before = dict(copy.deepcopy(base).named_parameters())
    made = learner(base, use_peft=True, lora_r=4, lora_alpha=8, lora_dropout=0.5, beta=0.04, learning_rate=0.05)
    trained = [name for name, p in made.policy.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    first = made.train_on(some_samples())
    # The reference is the model without its adapters, which the first step has not moved yet; dropout stays out of it.
    assert first["kl"] == pytest.approx(0.0, abs=1e-5) and first["grad_norm"] > 0.0
    assert made.train_on(some_samples())["kl"] > 0.0
    merged = {name: tensor.clone() for name, tensor in made.named_tensors()}
    assert merged.keys() == before.keys()
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert changed == {name for name in before if "_proj" in name}
    plain = tiny_llama()
    plain.load_state_dict(merged, strict=False)
    ids = [5, 6, 7, 8, 9]
    with torch.no_grad():
        logps = plain(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logps.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert made.score(ids) == pytest.approx(expected, abs=1e-4)  # without dropout


def test_a_layer_name_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="lora_target_modules"):
        learner(use_peft=True, lora_target_modules=["no_such_proj"])


def test_settings_that_exclude_each_other_name_both_keys():
    config = TrainConfig(model_name_or_path="m", dataset_name="d", loss_type="vespo")
    with pytest.raises(ConfigError, match=r"vllm_importance_sampling_mode.*vespo"):
        loss_config(config)
    with pytest.raises(ConfigError, match="lr_scheduler"):
        learner(lr_scheduler_type="sawtooth")


def test_a_padding_token_outside_the_vocabulary_pads_all_the_same():
    made = Learner(tiny_llama(), None, learner().config, pad_token_id=9_999)
    made.set_schedule(10)
    made.packs = False
    assert made.train_on(some_samples())["grad_norm"] == pytest.approx(learner().train_on(some_samples())["grad_norm"])


def test_all_processes_take_the_form_that_suits_each(monkeypatch):
    """Or they would plan other micro-batches than each other."""
    others = iter(["its kernel failed"])
    monkeypatch.setattr(Learner, "gather", lambda self, one: [one, next(others, None)])
    made = learner()
    assert not made.packs and made.pads and next(others, None) is None


def test_a_checkpoint_gathers_each_weight_once(tmp_path, monkeypatch):
    made, asked = learner(), []
    made.set_schedule(1)
    whole = made.placement.whole
    monkeypatch.setattr(made.placement, "whole", lambda tensor, dtype=None: asked.append(1) or whole(tensor, dtype))
    made.save(tmp_path, tiny_tokenizer(), {})
    assert len(asked) == len(load_file(tmp_path / "model.safetensors"))
