"""The policy that sees a right draft teaches the one that does not: the learner's gradient against a loss written out
in fp64 on the whole model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import RolloutGroup
from igrpo.learner.batching import contributing, training_samples
from igrpo.rollout.algorithm import two_stage
from igrpo.rollout.prompts import PromptBuilder
from igrpo.settings import ConfigError
from tests.learner.test_bare_refinements import FORMS, GROUPS, MODEL, ids
from tests.learner.test_learner import fresh_accelerate, gradients, learner  # noqa: F401
from tests.rollout.test_rollout import PROBLEMS, TOKENIZER, drafts

TOP_K, WHOLE = 7, 10_000


def taught(group: RolloutGroup, right: tuple[int, ...]) -> RolloutGroup:
    prompts = tuple((*group.draft_prompt_ids[:-1], *ids(5 + i, 70 + i), group.draft_prompt_ids[-1]) for i in right)
    return replace(group, demonstrations=right, teacher_prompts=prompts)


# Both drafts right, the second one first; only the first right; none.
SOME = [taught(GROUPS[0], (1, 0)), taught(GROUPS[1], (0,)), replace(GROUPS[1], advantages=(0.0, 0.0, 0.0))]
# refine_only: dead: no draft was shown, the group answered the question; its rewards are all equal.
ANSWERED = replace(SOME[0], chosen=None, prompt_ids=SOME[0].draft_prompt_ids, advantages=(0.0, 0.0, 0.0))


def rows(groups, context: str, drafts: bool):
    """(prompt, completion, advantage, teacher's prompt or None, weight)."""
    made = []
    for group in groups:
        first, other, *_ = (*group.teacher_prompts, None, None)
        weight = 0.5 if context == "both" and group.chosen is not None else 1.0
        for scored, advantage in zip(group.refinements, group.advantages, strict=True):
            tokens = scored.completion.token_ids
            if group.chosen is None:
                made.append((group.prompt_ids, tokens, advantage, first, 1.0))
                continue
            if context != "bare":
                made.append((group.prompt_ids, tokens, advantage, None, weight))
            if context != "draft":
                made.append((group.draft_prompt_ids, tokens, advantage, first, weight))
        for i, scored in enumerate(group.drafts if drafts else ()):
            teacher = other if group.demonstrations[:1] == (i,) else first
            made.append((group.draft_prompt_ids, scored.completion.token_ids, group.draft_advantages[i], teacher, 1.0))
    return made


def log_p(model, prompt, completion) -> torch.Tensor:  # (T, V)
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return (logits / 0.7).log_softmax(-1)


def divergence(policy: torch.Tensor, teacher: torch.Tensor, k: int, alpha: float) -> torch.Tensor:
    """(T,) forward or reverse, over the teacher's k likeliest tokens and one bucket."""
    top = teacher.topk(min(k, teacher.shape[-1]), -1)
    p, t = (torch.cat([x, (1 - x.sum(-1, keepdim=True)).clamp(min=1e-7)], -1)
            for x in (policy.gather(-1, top.indices).exp(), top.values.exp()))  # fmt: skip
    return (t * (t / p).log()).sum(-1) if alpha == 0 else (p * (p / t).log()).sum(-1)


def by_hand(model, made, loss_type: str, w: float, alpha: float, k: int, teaching=None) -> tuple[torch.Tensor, float]:
    """The loss, and the mean divergence per token that has a teacher; the model teaches itself unless another does."""
    sequences, tokens = sum(row[4] for row in made), sum(len(row[1]) * row[4] for row in made)
    total, drawn, count = 0.0, 0.0, 0
    for prompt, completion, advantage, teacher, weight in made:
        policy = log_p(model, prompt, completion)
        own = policy.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        per_token = -(1 - w) * advantage * (own - own.detach()).exp()
        if teacher is not None:
            with torch.no_grad():
                target = log_p(teaching or model, teacher, completion)
            found = divergence(policy, target, k, alpha)
            per_token = per_token + w * found
            drawn, count = drawn + float(found.detach().sum()), count + len(completion)
        total = total + weight * (per_token.mean() / sequences if loss_type == "grpo" else per_token.sum() / tokens)
    return total, drawn / max(count, 1)


CASES = [
    # context, drafts, dead, loss_type, form, shared_prefix, w, alpha, k
    ("draft", True, False, "grpo", "packed", True, 0.3, 1.0, TOP_K),
    ("draft", True, True, "dapo", "packed", True, 1.0, 0.0, WHOLE),
    ("bare", False, False, "dapo", "padded", True, 0.5, 1.0, TOP_K),
    ("bare", True, False, "grpo", "alone", True, 1.0, 1.0, WHOLE),
    ("both", True, True, "grpo", "packed", False, 0.6, 0.0, TOP_K),
]


@pytest.mark.parametrize(("context", "drafts", "dead", "loss_type", "form", "shared", "w", "alpha", "k"), CASES)
def test_the_gradient_is_that_of_the_loss_written_out(context, drafts, dead, loss_type, form, shared, w, alpha, k):
    groups = [ANSWERED, *SOME] if dead else SOME
    made = learner(
        MODEL, refinement_context=context, train_on_drafts=drafts, refine_only="dead" if dead else "all",
        loss_type=loss_type, shared_prefix=shared, per_device_train_batch_size=3, gradient_accumulation_steps=4,
        num_generations=3, max_grad_norm=0.0, distillation_weight=w, distillation_alpha=alpha, distillation_topk=k,
    )  # fmt: skip
    made.packs, made.pads = FORMS[form]
    metrics, gradient = gradients(made, training_samples(groups, made.config))
    exact = copy.deepcopy(MODEL).double()
    loss, mean = by_hand(exact, rows(groups, context, drafts), loss_type, w, alpha, k)
    loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in exact.parameters()])
    assert wanted.abs().max() > 1e-3 and mean > 1e-3
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-4
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    assert metrics["self_distillation/distillation_loss"] == pytest.approx(mean, rel=1e-4)


RATES = {"live": 1.0, "base": 0.0, "ema": 0.25}
"""What the policy's weights count for in the teacher's, after each update."""


@pytest.mark.parametrize("kind", RATES)
def test_further_iterations_have_the_teacher_that_is_asked_for(kind):
    options = {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    made = learner(
        MODEL, train_on_drafts=True, num_iterations=3, num_generations=3, per_device_train_batch_size=12,
        distillation_weight=1.0, distillation_alpha=0.0, distillation_topk=TOP_K, teacher_model_kind=kind,
        teacher_update_rate=0.25, reference=copy.deepcopy(MODEL) if kind == "base" else None, **options,
    )  # fmt: skip
    made.train_on(training_samples(SOME, made.config))
    exact = copy.deepcopy(MODEL).double()
    teacher = copy.deepcopy(exact)
    for _ in range(3):
        exact.zero_grad()
        by_hand(exact, rows(SOME, "draft", True), "grpo", 1.0, 0.0, TOP_K, teacher)[0].backward()
        with torch.no_grad():
            for p, t in zip(exact.parameters(), teacher.parameters(), strict=True):
                p -= 0.3 * p.grad
                t += RATES[kind] * (p - t)
    for mine, other in zip(made.unwrapped.parameters(), exact.parameters(), strict=True):
        assert float((mine.double() - other).abs().max()) < 1e-5


def test_what_has_no_gradient_is_left_out_and_what_is_taught_is_not():
    options = {"num_generations": 3, "per_device_train_batch_size": 6, "distillation_weight": 0.5}
    config = learner(MODEL, train_on_drafts=True, **options).config
    some = training_samples([ANSWERED], config)
    assert len(contributing(some, config)) == len(some) == 5  # refinements without an advantage, and drafts with one
    drops = replace(config, zero_variance="drop")
    assert len(training_samples([ANSWERED], drops)) == 5
    alone = replace(config, distillation_weight=1.0)
    some = training_samples(SOME, alone)
    kept = contributing(some, alone)
    assert 0 < len(kept) < len(some) and all(s.teacher_prompt_ids for s in kept)
    shown = SOME[1].drafts[0].completion.token_ids  # the only right draft: nobody teaches it
    assert shown not in [s.completion_ids for s in kept]


def test_a_teacher_sees_a_right_draft_and_never_the_one_it_teaches():
    settings = {"system_prompt": None, "draft_template": " [{draft}]", "num_drafts": 3, "num_generations": 2}
    settings |= {"model_name_or_path": "m", "dataset_name": "d", "train_on_drafts": True, "distillation_weight": 0.5}
    cases = [
        (drafts((0, 1), (0, 0), (0.5, 0)), {}, ()),
        (drafts((0, 1), (1, 0), (0, 0)), {}, (1,)),
        (drafts((1, 0), (1, 0), (1, 1)), {}, (2, 0)),  # the best comes first
        (drafts((1, 0), (1, 0), (0, 9)), {"draft_selection": "best"}, (0, 1)),  # the best is wrong
        (drafts((1, 1), (0, 0), (1, 0)), {"draft_selection": "worst", "refine_only": "dead"}, (0, 2)),
        (drafts((1, 1), (1, 1), (1, 1)), {"distillation_weight": 0.0}, ()),
    ]
    for scored, more, right in cases:
        config = TrainConfig(**settings | more)
        builder = PromptBuilder(TOKENIZER, config)
        coroutine = two_stage(PROBLEMS[0], 1, builder, config)
        coroutine.send(None)
        coroutine.send(tuple(scored))
        with pytest.raises(StopIteration) as end:
            coroutine.send(tuple(scored[:2]))
        group = replace(end.value.value, draft_advantages=(0.0,) * 3)
        assert group.demonstrations == right
        prompts = [builder.with_draft(builder.parts(PROBLEMS[0]), scored[i].completion.token_ids)[0] for i in right]
        assert list(group.teacher_prompts) == prompts
        mine = [s.teacher_prompt_ids for s in training_samples([group], config)[-3:]]
        first, other, *_ = (*prompts, (), ())
        assert mine == [other if right[:1] == (i,) else first for i in range(3)]


def test_an_average_is_of_adapters_where_they_train_and_goes_on_from_a_checkpoint(tmp_path):
    options = {"num_generations": 3, "per_device_train_batch_size": 12, "lr_scheduler_type": "constant"}
    options |= {"train_on_drafts": True, "use_peft": True, "lora_dropout": 0.0, "learning_rate": 0.1}
    options |= {"distillation_weight": 1.0, "teacher_model_kind": "ema", "teacher_update_rate": 0.25}

    def averaged(made) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in made.average.weights.items()}

    made = learner(MODEL, **options)
    first = averaged(made)
    assert len(first) == sum(p.requires_grad for p in made.policy.parameters()) < len(list(made.policy.parameters()))
    made.train_on(training_samples(SOME, made.config))
    kept, own = averaged(made), {n: p.detach().clone() for n, p in made.policy.named_parameters()}
    for name, was in first.items():
        torch.testing.assert_close(kept[name], was + 0.25 * (own[name] - was))
    assert any(not torch.equal(kept[name], own[name]) for name in kept)
    made.save(tmp_path, TOKENIZER, {})
    metrics = made.train_on(training_samples(SOME, made.config))

    other = learner(MODEL, **options)
    other.load(tmp_path)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in averaged(other).items())
    again = other.train_on(training_samples(SOME, other.config))
    assert again == {**metrics, **{name: again[name] for name in metrics if "seconds" in name}}
    assert all(torch.equal(p, q) for p, q in zip(made.policy.parameters(), other.policy.parameters(), strict=True))

    (tmp_path / "state" / "teacher" / "model.safetensors").unlink()
    (tmp_path / "state" / "teacher").rmdir()
    with pytest.raises(ConfigError, match="has no average of the weights, which teacher_model_kind: ema goes on from"):
        other.load(tmp_path)
