"""The two stages against an engine that finishes requests in any order and a reward pool that answers late."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import Completion, Kept, Problem, Scored
from igrpo.engines import EngineError, Request, Result
from igrpo.rollout.advantage import group_advantages
from igrpo.rollout.algorithm import select_draft, select_more, two_stage
from igrpo.rollout.prompts import PromptBuilder
from igrpo.rollout.rollout import Rollout
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class ShuffledEngine:
    """Holds requests and finishes a random few per poll; every sampled id is unique, so nothing can be mixed up."""

    def __init__(self, seed: int):
        self.random, self.waiting, self.sent, self.version = random.Random(seed), [], [], 3
        self.seeds, self.next_id, self.corrupt, self.jump_on_refinements = [], 0, False, False
        self.stuck = None
        self.aborted, self.drafts_open_at_first_refinement, self.most_sequences = [], None, 0

    def seed(self, seed: int) -> None:
        self.seeds.append(seed)

    def submit(self, request: Request) -> None:
        refinement = request.request_id.startswith("refinement")
        if refinement and self.drafts_open_at_first_refinement is None:
            self.drafts_open_at_first_refinement = len(self.waiting)
        self.waiting.append(request)
        self.sent.append(request)
        self.most_sequences = max(self.most_sequences, sum(r.n for r in self.waiting))
        if refinement and self.jump_on_refinements:
            self.version += 1

    def abort(self, request_ids) -> None:
        self.aborted += request_ids
        self.waiting = [r for r in self.waiting if r.request_id not in request_ids]

    def poll(self) -> list[Result]:
        self.random.shuffle(self.waiting)
        refining = [r for r in self.waiting if r.request_id.startswith("refinement")]
        stuck = [r for r in refining if self.stuck and self.stuck in TOKENIZER.decode(r.prompt_ids)]
        able = [r for r in self.waiting if r not in stuck]
        finished = [able.pop() for _ in range(self.random.randint(0, min(2, len(able))))]
        self.waiting = able + stuck
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

    def __init__(self):
        self.score = lambda number: float(number % 7)

    def submit(self, problem, completions, prompt, prompt_suffix=""):
        return LateScores(completions, self.score)


class LateScores:
    def __init__(self, completions, score):
        self.completions, self.score, self.asked = completions, score, 0

    def done(self) -> bool:
        self.asked += 1
        return self.asked >= 3

    def result(self) -> tuple[Scored, ...]:
        scores = [self.score(int(c.text)) for c in self.completions]
        return tuple(Scored(c, {"accuracy": s}, s) for c, s in zip(self.completions, scores, strict=True))


def make(seed: int = 0, **settings) -> tuple[Rollout, ShuffledEngine]:
    config = TrainConfig(
        model_name_or_path="m", dataset_name="d", system_prompt=None, draft_template=" [{draft}]",
        max_completion_length=8, **settings,
    )  # fmt: skip
    engine = ShuffledEngine(seed)
    return Rollout(engine, LatePool(), PromptBuilder(TOKENIZER, config), TOKENIZER, config), engine


PROBLEMS = [Problem(i, f"Q{i}", "0") for i in range(6)]


def test_the_algorithm_needs_no_engine():
    settings = {"system_prompt": None, "draft_template": " [{draft}]", "num_drafts": 3, "num_generations": 2}
    config = TrainConfig(model_name_or_path="m", dataset_name="d", **settings)
    coroutine = two_stage(PROBLEMS[0], 1, PromptBuilder(TOKENIZER, config), config)
    wanted = coroutine.send(None)
    assert (wanted.stage, wanted.n, wanted.prompt_ids) == ("draft", 3, wanted.question.bare)
    completions = [Completion((*TOKENIZER.encode(f"{i}"), 1), (-1.0, -1.0), f"{i}", "stop", 0) for i in (4, 6, 5)]
    scored = LateScores(completions, float).result()
    wanted = coroutine.send(scored)
    assert (wanted.stage, wanted.n) == ("refinement", 2) and "Q0 [6]" in TOKENIZER.decode(wanted.prompt_ids)
    with pytest.raises(StopIteration) as end:
        coroutine.send(scored[:2])
    group = end.value.value
    assert (group.drafts, group.chosen, group.refinements) == (scored, 1, scored[:2])
    assert (group.prompt_ids, group.draft_prompt_ids) == (wanted.prompt_ids, wanted.question.bare)


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
    assert stages(engine) == ["draft"] * 12 + ["refinement"] * 6
    refined = [r.request_id for r in engine.sent[12:]]
    assert refined != sorted(refined)  # in the order in which drafts came in
    assert engine.drafts_open_at_first_refinement > 0

    rollout, engine = make(seed=4, num_drafts=2, num_generations=2, rollout_schedule="barrier")
    rollout.run(PROBLEMS, step=1)
    refined = [r.request_id for r in engine.sent[12:]]
    assert refined == sorted(refined) and engine.drafts_open_at_first_refinement == 0


def stages(engine) -> list[str]:
    return [r.request_id.partition("/")[0] for r in engine.sent]


def test_one_request_per_group_shares_its_prompt_and_drafts_go_alone():
    rollout, engine = make(num_drafts=5, num_generations=2)
    rollout.run(PROBLEMS[:1], step=1)
    *drafts, refinements = engine.sent
    assert [d.n for d in drafts] == [1] * 5 and refinements.n == 2
    # The question is a prefix of both, so the engine's cache serves it.
    assert refinements.prompt_ids[: len(drafts[0].prompt_ids) - 2] == drafts[0].prompt_ids[:-2]


def test_the_first_draft_with_the_highest_reward_ends_its_problems_first_stage():
    rollout, engine = make(seed=1, num_drafts=4, num_generations=2, early_stop_drafts=True, early_stop_reward=6.0)
    groups, _ = rollout.run(PROBLEMS, step=1)
    short = [g for g in groups if len(g.drafts) < 4]
    assert short
    for g in short:
        assert g.drafts[g.chosen].reward == 6.0 and [d.reward for d in g.drafts].count(6.0) == 1
    assert engine.aborted and not engine.waiting


def test_groups_without_an_advantage_make_room_for_substitutes():
    rollout, _ = make(seed=3, num_drafts=2, num_generations=2, zero_variance="resample")
    rollout.pump.rewards.score = lambda number: float(number // 3 % 2)  # many groups are all-equal
    substitutes = [Problem(i, f"Q{i}", "0") for i in range(6, 12)]
    left = iter(substitutes)
    groups, stats = rollout.run(PROBLEMS, step=1, substitutes=left)
    unused = list(left)
    assert stats.discarded and not any(g.contributes for g in stats.discarded)
    assert len(groups) == 6 and len(stats.discarded) == len(substitutes) - len(unused)
    assert all(g.contributes for g in groups) or not unused
    rows = [g.problem.index for g in (*groups, *stats.discarded)]
    assert sorted(rows) == list(range(12 - len(unused)))


def test_the_learner_step_runs_beside_drafts_and_its_errors_come_through():
    rollout, engine = make(num_drafts=2, num_generations=2, draft_policy_lag=1)
    rollout.run(PROBLEMS[:3], step=1, ahead=PROBLEMS[3:])
    drafted = []

    def learner_step() -> str:
        deadline = time.monotonic() + 20
        while not all(flow.ready for flow in rollout._flows) and time.monotonic() < deadline:
            time.sleep(0.001)
        drafted.append(all(flow.ready for flow in rollout._flows))
        return "done"

    assert rollout.during(learner_step) == "done"
    assert drafted == [True]  # finished while the learner's thread was at work
    with pytest.raises(ZeroDivisionError):
        rollout.during(lambda: 1 / 0)
    engine.version = 4
    groups, _ = rollout.run(PROBLEMS[3:], step=2)
    assert {d.completion.version for g in groups for d in g.drafts} == {3}
    assert {r.completion.version for g in groups for r in g.refinements} == {4}


def test_other_problems_than_those_drafted_ahead_are_refused():
    rollout, _ = make(num_drafts=2, num_generations=2, draft_policy_lag=1)
    rollout.run(PROBLEMS[:2], step=1, ahead=PROBLEMS[2:4])
    with pytest.raises(ValueError, match="other problems"):
        rollout.run(PROBLEMS[4:], step=2)


def test_a_group_of_two_policies_is_refused():
    rollout, engine = make(num_drafts=2, num_generations=2)
    engine.jump_on_refinements = True
    with pytest.raises(EngineError, match="mixes two policies"):
        rollout.run(PROBLEMS, step=1)


def test_drafts_ahead_leave_the_slots_to_this_step():
    rollout, engine = make(num_drafts=2, num_generations=2, draft_policy_lag=1, vllm_max_num_seqs=5)
    rollout.run(PROBLEMS[:2], step=1, ahead=PROBLEMS[2:])
    order = [r.request_id.split("/")[:2] for r in engine.sent]
    # 2 problems x 2 refinements to come fill 4 of 5 slots beside any draft of theirs.
    assert ["refinement", "1"] in order[: order.index(["draft", "2"])]
    rollout.finish()
    assert engine.most_sequences == 5


def test_grpo_is_the_same_program_without_the_first_stage():
    rollout, engine = make(algorithm="grpo", num_generations=4)
    groups, stats = rollout.run(PROBLEMS, step=1)
    assert set(stages(engine)) == {"refinement"}
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
    with pytest.raises(EngineError, match="would see another context"):
        rollout.run(PROBLEMS, step=1)


def test_each_step_samples_anew_and_repeats_on_resume():
    rollout, engine = make()
    for step in (1, 2, 1):
        rollout.run(PROBLEMS[:1], step)
    assert engine.seeds[0] == engine.seeds[2] != engine.seeds[1]


def test_processes_draw_different_random_numbers():
    """All of them once seeded their engine alike at every step, so equal prompts got equal completions."""
    seeds = []
    for rank in range(3):
        rollout, engine = make()
        rollout.rank = rank
        rollout.run(PROBLEMS[:1], step=1)
        seeds += engine.seeds
    assert len(set(seeds)) == 3


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


def test_several_drafts_are_shown_in_the_order_they_were_sampled_in():
    settings = {"system_prompt": None, "draft_template": " [{draft}]", "num_drafts": 4, "num_generations": 2}
    settings |= {"show_drafts": 2, "draft_separator": " | ", "model_name_or_path": "m", "dataset_name": "d"}
    completions = [Completion((*TOKENIZER.encode(f"{i}"), 1), (-1.0, -1.0), f"{i}", "stop", 0) for i in (4, 6, 5, 6)]
    scored = LateScores(completions, float).result()
    for selection, shown in (("best", (1, 3)), ("worst", (0, 2))):
        config = TrainConfig(draft_selection=selection, **settings)
        coroutine = two_stage(PROBLEMS[0], 1, PromptBuilder(TOKENIZER, config), config)
        coroutine.send(None)
        wanted = coroutine.send(scored)
        texts = " | ".join(completions[i].text for i in shown)
        assert f"Q0 [{texts}]" in TOKENIZER.decode(wanted.prompt_ids)
        with pytest.raises(StopIteration) as end:
            coroutine.send(scored[:2])
        assert end.value.value.shown == shown and end.value.value.chosen in shown
    config = TrainConfig(draft_selection="random", **settings)
    drawn = {select_more(scored, select_draft(scored, config, step, 0), config, step, 0) for step in range(60)}
    assert (
        len(drawn) == 6
        and select_more(scored[:1], 0, config, 1, 0) == (0,)
        and select_more([], None, config, 1, 0) == ()
    )
    assert select_more(scored, 1, TrainConfig(**{**settings, "show_drafts": 4}), 1, 0) == (0, 1, 2, 3)


def test_only_groups_without_a_right_draft_are_refined():
    settings = {"system_prompt": None, "draft_template": " [{draft}]", "num_drafts": 2, "num_generations": 2}
    config = TrainConfig(model_name_or_path="m", dataset_name="d", refine_only="dead", **settings)
    for scored, chosen in ((drafts((0, 0), (0, 1)), 1), (drafts((0, 1), (1, 0)), None), (drafts((0.5, 0), (0, 0)), 0)):
        coroutine = two_stage(PROBLEMS[0], 1, PromptBuilder(TOKENIZER, config), config)
        bare = coroutine.send(None).prompt_ids
        wanted = coroutine.send(tuple(scored))
        assert (wanted.stage, wanted.n, wanted.prompt_ids == bare) == ("refinement", 2, chosen is None)
        with pytest.raises(StopIteration) as end:
            coroutine.send(tuple(scored))
        assert end.value.value.chosen == chosen and end.value.value.prompt_ids == wanted.prompt_ids


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


def test_batch_scaled_advantages_count_the_rewards_of_all_processes():
    """docs/algorithm.md: a step is the same for any split; each process once divided by its own deviation."""
    rollout, _ = make(num_generations=2, scale_rewards="batch")
    elsewhere = [[0.0, 100.0], [50.0, 60.0]]
    rollout.gather = lambda mine: [mine, elsewhere]
    groups, _ = rollout.run(PROBLEMS[:3], step=1)
    mine = [[s.reward for s in g.refinements] for g in groups]
    assert [g.advantages for g in groups] == group_advantages([*mine, *elsewhere], "batch")[:3]
    assert any(g.contributes for g in groups)


def test_saved_drafts_of_another_process_are_not_taken_later():
    """A checkpoint holds those of all processes. A row that comes to this one in a later step has newer weights."""
    settings = {"draft_policy_lag": 1, "num_drafts": 2, "num_generations": 2}
    first, engine = make(**settings)
    first.run(PROBLEMS[:2], step=1, ahead=PROBLEMS[2:4])
    first.finish()
    for flow in first._flows:
        for i, (draft,) in flow.scored.items():
            flow.scored[i] = (replace(draft, completion=replace(draft.completion, kept=Kept.of([[5, 7]]))),)
    saved = first.state_dict()
    drafts = [[d["completion"] for _, _, scored in one["answers"] for d in scored] for one in saved]
    assert {draft["kept"] for some in drafts for draft in some} == {None}
    rollout, engine = make(seed=1, **settings)
    rollout.load_state_dict(saved)
    engine.version = 1
    (group,), _ = rollout.run([PROBLEMS[2]], step=2)  # the other process has PROBLEMS[3]
    assert [d.completion.text for d in group.drafts] == [draft["text"] for draft in drafts[0]]
    engine.version = 50
    (group,), _ = rollout.run([PROBLEMS[3]], step=51)
    assert {draft.completion.version for draft in group.drafts} == {50}
    alone, engine = make(seed=1, algorithm="grpo", num_generations=2)
    alone.load_state_dict(saved)
    (group,), _ = alone.run([PROBLEMS[2]], step=2)
    assert group.drafts == () and group.prompt_ids == group.draft_prompt_ids
