"""The two stages against an engine that finishes requests in any order and a reward pool that answers late."""

from __future__ import annotations

import random

import pytest

from igrpo.config import TrainConfig
from igrpo.engines import EngineError, Request, Result
from igrpo.prompts import PromptBuilder
from igrpo.rollout import Rollout, select_draft
from igrpo.types import Completion, Problem, Scored
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class ShuffledEngine:
    """Holds requests and finishes a random few per poll; every sampled id is unique, so nothing can be mixed up."""

    def __init__(self, seed: int):
        self.random, self.waiting, self.sent, self.version = random.Random(seed), [], [], 3
        self.seeds, self.next_id, self.corrupt = [], 0, False

    def seed(self, seed: int) -> None:
        self.seeds.append(seed)

    def submit(self, request: Request) -> None:
        self.waiting.append(request)
        self.sent.append(request)

    def poll(self) -> list[Result]:
        self.random.shuffle(self.waiting)
        finished = [self.waiting.pop() for _ in range(self.random.randint(0, min(2, len(self.waiting))))]
        return [self._result(r) for r in finished]

    def _result(self, r: Request) -> Result:
        ids = []
        for _ in range(r.n):
            self.next_id += 1
            ids.append((*TOKENIZER.encode(f"{self.next_id}"), 1))
        prompt = r.prompt_ids[1:] if self.corrupt else r.prompt_ids
        logprobs = tuple((-0.5,) * len(x) for x in ids)
        return Result(r.request_id, prompt, tuple(ids), logprobs, ("stop",) * r.n, self.version, 2)


class LatePool:
    """Scores a completion by its number modulo 7; answers only when asked for the third time."""

    def submit(self, problem, completions, prompt):
        return LateScores(completions)


class LateScores:
    def __init__(self, completions):
        self.completions, self.asked = completions, 0

    def done(self) -> bool:
        self.asked += 1
        return self.asked >= 3

    def result(self) -> tuple[Scored, ...]:
        return tuple(Scored(c, {"accuracy": float(int(c.text) % 7)}, float(int(c.text) % 7)) for c in self.completions)


def make(seed: int = 0, **settings) -> tuple[Rollout, ShuffledEngine]:
    config = TrainConfig(
        model_name_or_path="m", dataset_name="d", system_prompt=None, draft_template=" [{draft}]",
        max_completion_length=8, **settings,
    )  # fmt: skip
    engine = ShuffledEngine(seed)
    return Rollout(engine, LatePool(), PromptBuilder(TOKENIZER, config), TOKENIZER, config), engine


PROBLEMS = [Problem(i, f"Q{i}", "0") for i in range(6)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_problem_gets_its_own_best_draft_in_any_order_of_events(seed, deterministic):
    rollout, _ = make(seed, num_drafts=3, num_generations=2, full_determinism=deterministic)
    groups, stats = rollout.run(PROBLEMS, step=1)
    assert [g.problem for g in groups] == PROBLEMS
    for g in groups:
        scores = [d.reward for d in g.drafts]
        assert len(g.drafts) == 3 and len(g.refinements) == 2
        assert g.chosen == scores.index(max(scores))
        draft = g.drafts[g.chosen].completion
        text = TOKENIZER.decode(g.prompt_ids)
        assert f"Q{g.problem.index} [{draft.text}]" in text
        assert all(s.completion.version == 3 for s in (*g.drafts, *g.refinements))
    texts = [s.completion.text for g in groups for s in (*g.drafts, *g.refinements)]
    assert len(set(texts)) == 6 * 5  # nothing lost, nothing twice
    assert stats.draft_tokens + stats.refinement_tokens == sum(
        len(s.completion.token_ids) for g in groups for s in (*g.drafts, *g.refinements)
    )


def test_refinements_go_out_before_the_last_draft_is_in():
    rollout, engine = make(seed=4, num_drafts=2, num_generations=2)
    rollout.run(PROBLEMS, step=1)
    stages = [r.request_id.partition("/")[0] for r in engine.sent]
    assert stages[:6] == ["drafts"] * 6 and stages[6:] == ["refinements"] * 6
    # With a barrier all refinements would be submitted in one go, in the order of the problems.
    assert [r.request_id for r in engine.sent[6:]] != [f"refinements/{i}" for i in range(6)]


def test_one_request_per_group_shares_its_prompt():
    rollout, engine = make(num_drafts=5, num_generations=2)
    rollout.run(PROBLEMS[:1], step=1)
    drafts, refinements = engine.sent
    assert (drafts.n, refinements.n) == (5, 2)
    assert refinements.prompt_ids[: len(drafts.prompt_ids) - 2] == drafts.prompt_ids[:-2]  # the question is a prefix


def test_grpo_is_the_same_program_without_the_first_stage():
    rollout, engine = make(algorithm="grpo", num_generations=4)
    groups, stats = rollout.run(PROBLEMS, step=1)
    assert {r.request_id.partition("/")[0] for r in engine.sent} == {"refinements"}
    assert all(g.drafts == () and g.chosen is None and len(g.refinements) == 4 for g in groups)
    assert stats.draft_tokens == 0
    assert groups[0].prompt_ids == rollout.prompts.parts(PROBLEMS[0]).bare


def test_control_without_a_draft_in_the_prompt():
    rollout, _ = make(draft_selection="none", num_generations=2)
    (group,), _ = rollout.run(PROBLEMS[:1], step=1)
    assert len(group.drafts) == 4 and group.chosen is None
    assert group.prompt_ids == rollout.prompts.parts(PROBLEMS[0]).bare


def test_advantages_are_of_the_refinements_alone():
    rollout, _ = make(num_drafts=4, num_generations=2)
    groups, _ = rollout.run(PROBLEMS, step=1)
    for g in groups:
        a, b = (s.reward for s in g.refinements)
        expected = (0.0, 0.0) if a == b else ((2**-0.5, -(2**-0.5)) if a > b else (-(2**-0.5), 2**-0.5))
        assert g.advantages == pytest.approx(expected)


def test_an_engine_that_read_other_ids_is_stopped():
    rollout, engine = make()
    engine.corrupt = True
    with pytest.raises(EngineError, match="the learner would train on another context"):
        rollout.run(PROBLEMS, step=1)


def test_each_step_samples_anew_and_repeats_on_resume():
    rollout, engine = make()
    for step in (1, 2, 1):
        rollout.run(PROBLEMS[:1], step)
    assert engine.seeds[0] == engine.seeds[2] != engine.seeds[1]


def drafts(*rewards: tuple[float, float]) -> list[Scored]:
    completion = Completion((5,), (-1.0,), "x", "stop", 0)
    return [Scored(completion, {"accuracy": acc, "format": fmt}, acc + fmt) for acc, fmt in rewards]


def choose(scored, **settings) -> int | None:
    return select_draft(scored, TrainConfig(model_name_or_path="m", dataset_name="d", **settings), step=1, row=0)


def test_ties_go_to_the_first_draft():
    tied = drafts((0, 0), (1, 0), (0, 1), (1, 0))
    assert choose(tied) == 1
    assert choose(tied, draft_selection="worst") == 0
    assert choose(drafts((0, 0), (0, 0))) == 0  # all wrong: still one is shown


def test_accuracy_first_prefers_right_over_well_formed():
    scored = drafts((0, 1), (1, 0), (1, 1), (1, 1))
    assert choose(scored[:2]) == 0 and choose(scored[:2], draft_selection_score="accuracy_first") == 1
    assert choose(scored, draft_selection_score="accuracy_first") == 2


def test_the_random_control_is_fixed_by_seed_step_and_row():
    scored = drafts(*[(0, 0)] * 16)
    config = TrainConfig(model_name_or_path="m", dataset_name="d", draft_selection="random")
    picks = {select_draft(scored, config, step, row) for step in range(20) for row in range(5)}
    assert len(picks) > 8
    assert choose(scored, draft_selection="random") == choose(scored, draft_selection="random")
