"""Refinements trained under the bare question: the learner's gradient against losses written out in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import Completion, Problem, RolloutGroup, Scored
from igrpo.learner.batching import training_samples
from tests.learner.test_learner import fresh_accelerate, gradients, learner  # noqa: F401
from tests.support.tiny import tiny_llama

MODEL, REFERENCE = tiny_llama(), tiny_llama(1)
Row = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], float, float]
"""Prompt, completion, log-probabilities of the sampler or (), advantage, weight."""


def ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(5, 280, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def log_probs(model, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:  # (T,)
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7  # the temperature
    return logits.double().log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def some_group(number: int, advantages: tuple[float, ...]) -> RolloutGroup:
    """Sampled behind the draft by the model itself, up to a sampler's small errors."""
    question = ids(4 + number, number)
    with_draft = (*question[:-1], *ids(6, 50 + number), question[-1])

    def scored(prompt: tuple[int, ...], length: int, seed: int) -> Scored:
        tokens = ids(length, seed)
        noise = 0.05 * torch.randn(length, generator=torch.Generator().manual_seed(seed))
        logps = (log_probs(MODEL, prompt, tokens) + noise).tolist()
        return Scored(Completion(tokens, tuple(logps), "t", "stop", 0), {"accuracy": 0.0}, 0.0)

    drafts = tuple(scored(question, 3 + i, 100 * number + i) for i in range(2))
    refinements = tuple(scored(with_draft, 2 + 3 * i, 100 * number + 10 + i) for i in range(len(advantages)))
    return RolloutGroup(
        Problem(number, "q", "a"), drafts, 0, with_draft, refinements, advantages, False, question, (1.0, -1.0)
    )


GROUPS = [some_group(1, (1.0, -0.5, 0.25)), some_group(2, (-1.5, 2.0, 0.75))]


def rows(context: str, ratio: str, drafts: bool) -> list[Row]:
    made: list[Row] = []
    for group in GROUPS:
        for scored, advantage in zip(group.refinements, group.advantages, strict=True):
            tokens, sampled = scored.completion.token_ids, scored.completion.logprobs
            weight = 0.5 if context == "both" else 1.0
            if context in ("draft", "both"):
                made.append((group.prompt_ids, tokens, sampled, advantage, weight))
            if context in ("bare", "both"):
                known = sampled if ratio == "behaviour" else ()
                made.append((group.draft_prompt_ids, tokens, known, advantage, weight))
        if drafts:
            for scored, advantage in zip(group.drafts, group.draft_advantages, strict=True):
                made.append(
                    (group.draft_prompt_ids, scored.completion.token_ids, scored.completion.logprobs, advantage, 1.0)
                )
    return made


def by_hand(made: list[Row], loss_type: str, cap: float, beta: float, old: list[torch.Tensor] | None) -> Callable:
    """The loss of a double-precision model, sequence by sequence; ``cap`` bounds a token's sampler ratio."""
    reference = copy.deepcopy(REFERENCE).double()

    def loss(model) -> torch.Tensor:
        total, sequences, tokens = 0.0, sum(row[4] for row in made), sum(row[4] * len(row[1]) for row in made)
        for i, (prompt, completion, sampled, advantage, weight) in enumerate(made):
            logps = log_probs(model, prompt, completion)
            before = logps.detach() if old is None else old[i]
            ratio = (logps - before).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            if sampled:
                surrogate = surrogate * (before - torch.tensor(sampled).double()).exp().clamp(max=cap)
            with torch.no_grad():
                away = log_probs(reference, prompt, completion)
            away = away - logps
            per_token = beta * (away.exp() - away - 1) * ratio - surrogate
            per_sequence = per_token.mean() / sequences if loss_type == "grpo" else per_token.sum() / tokens
            total = total + weight * per_sequence
        return total

    return loss


FORMS = {"packed": (True, True), "padded": (False, True), "alone": (False, False)}
CASES = [
    # context, ratio, drafts, loss_type, form, shared_prefix, beta
    ("draft", "bare", False, "grpo", "packed", True, 0.0),
    ("bare", "bare", False, "grpo", "packed", True, 0.0),
    ("bare", "bare", False, "grpo", "packed", False, 0.0),
    ("bare", "bare", False, "grpo", "padded", True, 0.0),
    ("bare", "behaviour", False, "grpo", "packed", True, 0.0),
    ("bare", "behaviour", False, "dapo", "alone", True, 0.1),
    ("bare", "bare", True, "grpo", "packed", True, 0.1),
    ("bare", "behaviour", True, "dapo", "padded", True, 0.0),
    ("both", "bare", False, "dapo", "packed", True, 0.1),
    ("both", "behaviour", False, "grpo", "padded", True, 0.0),
    ("both", "bare", True, "grpo", "packed", True, 0.1),
    ("both", "behaviour", True, "dapo", "packed", False, 0.1),
]


@pytest.mark.parametrize(("context", "ratio", "drafts", "loss_type", "form", "shared", "beta"), CASES)
def test_the_gradient_is_that_of_the_loss_written_out(context, ratio, drafts, loss_type, form, shared, beta):
    made = learner(
        MODEL, reference=copy.deepcopy(REFERENCE), refinement_context=context, bare_importance_ratio=ratio,
        train_on_drafts=drafts, loss_type=loss_type, shared_prefix=shared, beta=beta, per_device_train_batch_size=3,
        gradient_accumulation_steps=4, vllm_importance_sampling_correction=True, max_grad_norm=0.0,
        vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=1.02, num_generations=3,
    )  # fmt: skip
    made.packs, made.pads = FORMS[form]
    metrics, gradient = gradients(made, training_samples(GROUPS, made.config))
    exact = copy.deepcopy(MODEL).double()
    loss = by_hand(rows(context, ratio, drafts), loss_type, 1.02, beta, None)(exact)
    loss.backward()
    loss = loss.detach()
    wanted = torch.cat([p.grad.flatten() for p in exact.parameters()])
    assert wanted.abs().max() > 1e-3
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-4
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-4, abs=1e-6)
    # Engine and learner agree up to the noise, whatever the other context makes of the tokens.
    seen = metrics.get("sampling/sampling_logp_difference/mean")
    assert seen is None if context == "bare" and not drafts else 0.01 < seen < 0.08
    assert ("bare/logp_gap" in metrics) == (context != "draft")
    assert (seen is None and ratio == "bare") == ("sampling/importance_sampling_ratio/mean" not in metrics)


def test_further_iterations_hold_the_ratio_against_the_bare_prompt_of_the_first():
    """Two steps of plain SGD, large enough to leave the clip range, against the same by hand."""
    made = learner(
        MODEL, refinement_context="bare", num_iterations=2, optim="sgd", learning_rate=0.5, num_generations=3,
        per_device_train_batch_size=6, gradient_accumulation_steps=1, vllm_importance_sampling_correction=True,
        max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    metrics = made.train_on(training_samples(GROUPS, made.config))
    exact, data = copy.deepcopy(MODEL).double(), rows("bare", "bare", False)
    with torch.no_grad():
        old = [log_probs(exact, prompt, completion) for prompt, completion, *_ in data]
    for _ in range(2):
        exact.zero_grad()
        by_hand(data, "grpo", 1.0, 0.0, old)(exact).backward()
        with torch.no_grad():
            for p in exact.parameters():
                p -= 0.5 * p.grad
    assert metrics["clip_ratio/region_mean"] > 0.0
    for p, q, before in zip(made.unwrapped.parameters(), exact.parameters(), MODEL.parameters(), strict=True):
        moved = float((q - before).norm())
        assert float((p - q).norm()) < 1e-3 * moved + 1e-6


def test_samples_of_each_context():
    def of(**settings) -> list:
        options = {"num_generations": 3, "per_device_train_batch_size": 3, **settings}
        return training_samples([copied], TrainConfig(model_name_or_path="m", dataset_name="d", **options))

    group = GROUPS[0]
    copied = replace(group, copies=(False, True, False))
    behind, question = group.prompt_ids, group.draft_prompt_ids
    assert [(s.prompt_ids, s.masked, s.weight) for s in of()] == [(behind, False, 1.0)] * 3
    bare = of(refinement_context="bare")
    assert [(s.prompt_ids, s.masked, s.weight) for s in bare] == [(question, m, 1.0) for m in copied.copies]
    assert all(s.sampling_logprobs[0] != s.sampling_logprobs[0] for s in bare)
    held = of(refinement_context="bare", bare_importance_ratio="behaviour")
    assert [s.sampling_logprobs for s in held] == [s.completion.logprobs for s in group.refinements]
    both = of(refinement_context="both", train_on_drafts=True)
    assert [s.prompt_ids for s in both] == [behind] * 3 + [question] * 5
    assert [s.weight for s in both] == [0.5] * 6 + [1.0] * 2 and [s.masked for s in both] == [
        False, False, False, *copied.copies, False, False,
    ]  # fmt: skip
    alone = replace(group, prompt_ids=question, chosen=None)  # no draft was shown: nothing is off its policy
    (*_, last) = [
        training_samples(
            [alone], TrainConfig(model_name_or_path="m", dataset_name="d", refinement_context=c, refine_only="dead")
        )
        for c in ("bare", "both")
    ]
    assert [(s.prompt_ids, s.weight, s.behaviour_logprobs) for s in last] == [(question, 1.0, None)] * 3
    flat = replace(copied, advantages=(0.0,) * 3)
    options = {"num_generations": 3, "per_device_train_batch_size": 3, "zero_variance": "drop"}
    config = TrainConfig(model_name_or_path="m", dataset_name="d", refinement_context="both", **options)
    assert training_samples([flat], config) == []
