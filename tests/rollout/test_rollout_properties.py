"""Whole runs of the scheduler under every setting, with an engine that finishes in any order, stalls and dies.

The engine is made up because order and failure are what is tested; ``test_engines.py`` has the real one.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from statistics import fmean
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from igrpo.config.train_config import TrainConfig
from igrpo.data.feed import ProblemFeed
from igrpo.data.sources import ProblemSampler
from igrpo.data_types import Problem, Scored
from igrpo.engines import EngineError, Request, Result
from igrpo.rollout.algorithm import select_draft
from igrpo.rollout.prompts import PromptBuilder
from igrpo.rollout.rollout import Rollout
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS, HIGHEST = 7, 2.0
PROBLEMS = [Problem(i, f"Q{i}", "0") for i in range(ROWS)]


class RestlessEngine:
    """Finishes a random few requests per poll, some only after pushes, stalls, and dies if told to."""

    numbers = iter(range(10**9))
    sampled_from: ClassVar[dict[str, tuple[int, ...]]] = {}
    """Of this engine and those it takes the place of: a resumed run may have the completions of both."""

    def __init__(self, rng: random.Random, version: int, dies_after: int | None, slots: int | None):
        self.rng, self.version, self.dies_after, self.slots = rng, version, dies_after, slots
        self.waiting: dict[str, Request] = {}
        self.begun: dict[str, int] = {}
        self.until: dict[str, int] = {}

    def seed(self, seed: int) -> None: ...

    def submit(self, request: Request) -> None:
        assert request.request_id not in self.waiting
        self.waiting[request.request_id], self.begun[request.request_id] = request, self.version
        self.until[request.request_id] = self.version + (self.rng.randint(1, 5) if self.rng.random() < 0.2 else 0)
        assert self.slots is None or sum(r.n for r in self.waiting.values()) <= self.slots

    def abort(self, request_ids) -> None:
        for name in request_ids:
            self.waiting.pop(name, None)

    def poll(self) -> list[Result]:
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after < 0:
                raise EngineError("the engine died")
        if self.rng.random() < 0.3:
            return []
        names = [name for name in self.waiting if self.until[name] <= self.version]
        if not names and self.rng.random() < 0.2:  # a step that waits for a long one gets it
            names = list(self.waiting)
        self.rng.shuffle(names)
        return [self._result(self.waiting.pop(n)) for n in names[: self.rng.randint(0, 4)]]

    def _result(self, r: Request) -> Result:
        ids = tuple((*TOKENIZER.encode(f"{next(self.numbers)}"), 1) for _ in range(r.n))
        logprobs = tuple((-0.5,) * len(x) for x in ids)
        self.sampled_from |= {TOKENIZER.decode(x, skip_special_tokens=True): r.prompt_ids for x in ids}
        begun = self.begun.pop(r.request_id)
        # One token of the weights it began with, the others of the newest.
        runs = tuple(((begun, 1), (self.version, len(x) - 1)) for x in ids) if begun != self.version else ()
        return Result(r.request_id, r.prompt_ids, ids, logprobs, ("stop",) * r.n, self.version, 0, versions=runs)


class RandomPool:
    """Scores 0, 1 or 2, fixed by the text; each answer takes a random number of questions."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def submit(self, problem, completions, prompt, prompt_suffix=""):
        return RandomScores(completions, self.rng.randint(0, 4))


class RandomScores:
    def __init__(self, completions, patience):
        self.completions, self.patience = completions, patience

    def done(self) -> bool:
        self.patience -= 1
        return self.patience < 0

    def result(self) -> tuple[Scored, ...]:
        scores = [float(random.Random(c.text).randint(0, 2)) for c in self.completions]
        return tuple(Scored(c, {"accuracy": s}, s) for c, s in zip(self.completions, scores, strict=True))


@pytest.fixture(autouse=True, scope="module")
def a_quick_learner():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("igrpo.rollout.rollout.IDLE_SECONDS", 1e-4)
        yield


class Run:
    """The loop of ``igrpo.train`` around the real scheduler and feed, with weights that are only a version number."""

    def __init__(self, config: TrainConfig, rng: random.Random, steps: int, dies_after: int | None, state=None):
        self.config, self.rng, self.steps = config, rng, steps
        self.step = state["step"] if state else 0
        # An idle engine gets a whole group.
        slots = max(config.vllm_max_num_seqs, config.num_generations) if config.policy_lag else None
        self.engine = RestlessEngine(rng, self.step, dies_after, slots)
        self.rollout = Rollout(self.engine, RandomPool(rng), PromptBuilder(TOKENIZER, config), TOKENIZER, config)
        self.feed = ProblemFeed(PROBLEMS, ProblemSampler(ROWS, config.seed, True), config)
        if state:
            self.feed.load_state_dict(state["feed"])
            self.rollout.load_state_dict(state["drafts"])

    def one_step(self) -> list:
        batch = self.feed.take(left=self.steps - self.step - 1)
        substitutes = iter(batch.substitutes)
        groups, stats = self.rollout.run(batch.problems, self.step + 1, ahead=batch.ahead, substitutes=substitutes)
        self.feed.give_back(len(batch.substitutes) - len(list(substitutes)))
        assert len(groups) == self.config.prompts_per_step and stats.version == self.step
        assert len(self.rollout._flows) == len(batch.ahead)
        if self.config.full_determinism and not batch.substitutes:
            assert not stats.dropped and [g.problem for g in groups] == list(batch.problems)
        for group in (*groups, *stats.discarded):
            self.check(group)
        texts = [s.completion.text for g in (*groups, *stats.discarded) for s in (*g.drafts, *g.refinements)]
        assert len(set(texts)) == len(texts)
        against_drafts = self.config.refinement_baseline == "drafts"
        if not (against_drafts and self.config.scale_rewards == "batch"):  # a batch of equal rewards has none either
            assert all(g.contributes or not batch.substitutes or self._exhausted(batch, stats) for g in groups)
        for group in stats.discarded:
            rewards = [s.reward for s in group.refinements]
            assert set(rewards) == {fmean(d.reward for d in group.drafts) if against_drafts else rewards[0]}
        self.rollout.during(lambda: time.sleep(self.rng.random() * 0.001))
        if self.config.full_determinism:
            self.rollout.finish()
        self.step += 1
        self.engine.version = self.step
        return [g.problem.index for g in (*groups, *stats.discarded)]

    def _exhausted(self, batch, stats) -> bool:
        return self.config.zero_variance != "resample" or len(stats.discarded) == len(batch.substitutes)

    def check(self, group) -> None:
        config = self.config
        n = config.drafts_per_prompt
        perfect = sum(d.reward == HIGHEST for d in group.drafts)
        if config.early_stop_drafts:
            assert perfect <= 1 and (len(group.drafts) == n or perfect == 1)
        else:
            assert len(group.drafts) == n
        assert len(group.refinements) == len(group.advantages) == config.num_generations
        # No token that is trained on is older than the lag allows, and with lag 0 they are of the newest weights.
        assert all(self.step - config.policy_lag <= r.completion.oldest <= self.step for r in group.refinements)
        assert all(sum(n for _, n in r.completion.runs) == len(r.completion.token_ids) for r in group.refinements)
        if config.train_on_drafts:
            assert all(self.step - config.policy_lag <= d.completion.oldest for d in group.drafts)
        if not config.policy_lag:
            assert all(self.step - config.draft_policy_lag <= d.completion.version <= self.step for d in group.drafts)
        text = TOKENIZER.decode(group.prompt_ids)
        assert all(self.engine.sampled_from[r.completion.text] == group.prompt_ids for r in group.refinements)
        if n and not (config.policy_lag and config.draft_selection == "random"):  # drawn for the step it began for
            assert group.chosen == select_draft(group.drafts, config, self.step + 1, group.problem.index)
        if group.chosen is not None:
            assert f"Q{group.problem.index} [{group.drafts[group.chosen].completion.text}]" in text
        else:
            assert "[" not in text

    def state_dict(self) -> dict:
        drafts = self.rollout.state_dict()
        return {"step": self.step, "feed": self.feed.state_dict([one["row"] for one in drafts]), "drafts": drafts}


CONFIGS = st.fixed_dictionaries(
    {
        "algorithm": st.sampled_from(["igrpo", "igrpo", "grpo"]),
        "num_drafts": st.integers(1, 4),
        "num_generations": st.integers(2, 3),
        "gradient_accumulation_steps": st.integers(1, 4),
        "draft_policy_lag": st.integers(0, 1),
        "policy_lag": st.sampled_from([0, 0, 1, 2, 3]),
        "train_on_drafts": st.booleans(),
        "early_stop_drafts": st.booleans(),
        "draft_selection": st.sampled_from(["best", "worst", "random", "none"]),
        "rollout_schedule": st.sampled_from(["streaming", "barrier"]),
        "zero_variance": st.sampled_from(["keep", "resample"]),
        "scale_rewards": st.sampled_from(["group", "batch", "none"]),
        "refinement_baseline": st.sampled_from(["refinements", "drafts"]),
        "advantage_estimator": st.sampled_from(["grpo", "grpo", "rloo", "maxrl", "pass_at_k"]),
        "full_determinism": st.booleans(),
        "vllm_max_num_seqs": st.sampled_from([1, 4, 64]),
        "seed": st.integers(0, 3),
    }
)


def config_of(values: dict) -> TrainConfig:
    values = dict(values)
    if values["policy_lag"]:
        values["draft_policy_lag"] = 0
    if values["draft_policy_lag"] or values["policy_lag"]:
        values["rollout_schedule"] = "streaming"
    if values["algorithm"] == "grpo" or values["num_drafts"] < 2 or values["draft_policy_lag"]:
        values["train_on_drafts"] = False
    if values["train_on_drafts"]:
        values["early_stop_drafts"] = False
        if values["advantage_estimator"] == "pass_at_k":
            values["advantage_estimator"] = "grpo"
    if values["early_stop_drafts"]:
        values["draft_selection"] = "best"
    if (
        values["algorithm"] == "grpo"
        or values["early_stop_drafts"]
        or values["scale_rewards"] == "group"
        or values["advantage_estimator"] != "grpo"
    ):
        values["refinement_baseline"] = "refinements"
    return TrainConfig(
        model_name_or_path="m", dataset_name="d", system_prompt=None, draft_template=" [{draft}]",
        max_completion_length=8, early_stop_reward=HIGHEST, per_device_train_batch_size=values["num_generations"],
        **values,
    )  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    values=CONFIGS,
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 6),
    deaths=st.lists(st.integers(0, 60), max_size=3),
    save_every=st.integers(1, 2),
)
def test_every_problem_once_whatever_the_engine_does(values, seed, steps, deaths, save_every):
    """Runs ``steps`` steps; each death of the engine goes back to the last save, as a restarted run does."""
    config, rng = config_of(values), random.Random(seed)
    deaths, state, saved_rows, rows = list(deaths), None, [], []
    run = Run(config, rng, steps, deaths.pop() if deaths else None)
    while run.step < steps:
        try:
            rows += run.one_step()
            if run.step % save_every == 0:
                state, saved_rows = run.state_dict(), list(rows)
        except EngineError:
            rows = list(saved_rows)
            run = Run(config, rng, steps, deaths.pop() if deaths else None, state)
    assert not run.engine.waiting and not run.rollout.pump.running and not run.rollout._flows
    # The rows used are a beginning of the sampler's order: none lost, none twice before all others had their turn.
    order = ProblemSampler(ROWS, config.seed, True).next_batch(len(rows))
    assert Counter(rows) == Counter(order)
    if config.zero_variance == "keep":
        assert len(rows) == steps * config.prompts_per_step
