"""`IGRPOTrainer`: real generation and rewards; drafts first, one of them shown to the whole group, on every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integrations.test_trl import GROUP, TIMES, folder, process_state, settings  # noqa: F401

trl = pytest.importorskip("trl")
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from transformers import PrinterCallback  # noqa: E402

from igrpo.integrations.trl import DEFAULT_DRAFT_TEMPLATE, IGRPOTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:TRL currently supports vLLM")
ROOT = Path(__file__).resolve().parents[2]


class Watched(IGRPOTrainer):
    """Writes down what each stage generated from, what rewards were given, and which rows they came with."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.stages: list[dict] = []
        super().__init__(*args, **kwargs)

    def _generate(self, prompts: list) -> tuple:
        out = super()._generate(prompts)
        self.stages.append({"prompts": list(prompts), "completion_ids": out[1], "texts": out[3]})
        return out

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list) -> Any:
        scores = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        scored = self._bare_prompts if self._bare_prompts is not None else prompts
        self.stages[-1] |= {"judged": scored, "columns": sorted(inputs[0]), "scores": scores.tolist()}
        return scores


def digits(prompts: list, completions: list, solution: list[int], completion_ids: list, **_: Any) -> list[float]:
    """Depends on the reference column, on the prompt and on the text, so a mix-up of rows changes the choice."""
    assert all("draft" not in str(prompt) for prompt in prompts)
    return [float((sum(ids) + len(str(p))) % s) for p, ids, s in zip(prompts, completion_ids, solution, strict=True)]


def run(folder: str, conversational: bool = False, **overrides: Any) -> Watched:  # noqa: F811
    from datasets import Dataset

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    own = {k: overrides.pop(k) for k in ("num_drafts", "draft_selection", "draft_max_tokens") if k in overrides}
    prompts: list = [f"question {i}" for i in range(8)]
    if conversational:
        prompts = [[{"role": "system", "content": "Be short."}, {"role": "user", "content": p}] for p in prompts]
    data = Dataset.from_dict({"prompt": prompts, "solution": [7, 11, 13, 5] * 2})
    engine = overrides.pop("engine", None)
    args = settings(folder, **{"max_steps": 2, "loss_type": "grpo", **overrides})
    trainer = Watched(folder, digits, args, data, eval_dataset=data, **own)
    trainer.remove_callback(PrinterCallback)
    if engine is not None:
        trainer.use_vllm, trainer._last_loaded_step, trainer.vllm_generation = True, -1, engine
        engine.trainer = trainer
    trainer.train()
    return trainer


def content(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize(("num_drafts", "selection"), [(3, "best"), (6, "worst")])
def test_refinements_see_the_chosen_draft_and_rewards_see_the_question(folder, conversational, num_drafts, selection):  # noqa: F811
    trainer = run(folder, conversational, num_drafts=num_drafts, draft_selection=selection)
    assert len(trainer.stages) == 4  # two steps of two stages
    for first, second in (trainer.stages[:2], trainer.stages[2:]):
        assert len(first["prompts"]) == 2 * num_drafts and len(second["prompts"]) == 2 * GROUP
        assert first["columns"] == second["columns"] == ["prompt", "solution"]
        for p in range(2):
            drafts = slice(p * num_drafts, (p + 1) * num_drafts)
            question = first["prompts"][drafts][0]
            assert first["prompts"][drafts] == [question] * num_drafts
            rewards = [row[0] for row in first["scores"][drafts]]
            assert len(set(rewards)) > 1
            wanted = max(rewards) if selection == "best" else min(rewards)
            text = trainer.processing_class.decode(
                first["completion_ids"][drafts][rewards.index(wanted)], skip_special_tokens=True
            )
            before, after = DEFAULT_DRAFT_TEMPLATE.split("{draft}")
            group = slice(p * GROUP, (p + 1) * GROUP)
            assert {content(x) for x in second["prompts"][group]} == {content(question) + before + text + after}
            assert second["judged"][group] == [question] * GROUP
            if conversational:
                assert all(x[:-1] == question[:-1] for x in second["prompts"][group])
    log = trainer.state.log_history[0]
    rewards = [row[0] for row in trainer.stages[0]["scores"]]
    assert log["draft/reward"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-6)
    assert log["draft/rewards/digits/mean"] == pytest.approx(log["draft/reward"], rel=1e-6)
    assert log["draft/chosen_reward"] > log["draft/reward"] or selection == "worst"
    assert log["reward"] == pytest.approx(sum(row[0] for row in trainer.stages[1]["scores"]) / (2 * GROUP))
    lengths = [len(ids) for ids in trainer.stages[0]["completion_ids"]]
    assert log["draft/mean_length"] == pytest.approx(sum(lengths) / len(lengths))


def test_a_draft_that_nobody_could_judge_is_never_the_best():
    nan = float("nan")
    known = {"args": SimpleNamespace(seed=0), "state": SimpleNamespace(global_step=0)}
    trainer = SimpleNamespace(draft_selection="best", **known)
    assert IGRPOTrainer._choose(trainer, [nan, -2.0, -1.0, -1.0], 0) == 2
    assert IGRPOTrainer._choose(trainer, [nan, nan], 0) == 0
    trainer.draft_selection = "worst"
    assert IGRPOTrainer._choose(trainer, [nan, 2.0, 1.0, 1.0], 0) == 2


def test_evaluation_is_single_shot_from_the_bare_prompt(folder):  # noqa: F811
    trainer = run(folder, max_steps=1, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8)
    evaluated = trainer.stages[2:]
    assert len(evaluated) == 4 and all("draft" not in p for stage in evaluated for p in stage["prompts"])
    assert any("eval_reward" in log for log in trainer.state.log_history)


def test_a_draft_that_does_not_fit_loses_its_beginning_never_the_question(folder):  # noqa: F811
    trainer = run(folder, max_steps=1, num_drafts=2, draft_max_tokens=3)
    text = trainer.processing_class.decode([40, 41, 42, 43, 44, 45], skip_special_tokens=True)
    assert f"<draft>\n{text[-3:]}\n</draft>" in trainer._refinement_prompt("question", [40, 41, 42, 43, 44, 45])
    blocks = [{"role": "user", "content": [{"type": "text", "text": "question"}]}]
    assert [x["text"][:8] for x in trainer._append(blocks, "17")[-1]["content"]] == ["question", "\n\nAn ear"]
    trainer.draft_max_tokens = None
    long = trainer._refinement_prompt("question", list(range(40, 90)) * 24)
    ids = trainer.processing_class(text=long)["input_ids"]
    limit = trainer.model.config.max_position_embeddings - trainer.max_completion_length
    assert limit - 3 <= len(ids) <= limit and long.startswith("question\n\nAn earlier draft")


class HuggingFaceEngine:
    """What `VLLMGeneration` is to the trainer, on a copy of the weights that only a push renews."""

    def __init__(self, *, enable_sleep_mode: bool):
        self.mode, self.enable_sleep_mode = "colocate", enable_sleep_mode
        self.model: Any = None
        self.pushes = self.generations = 0
        self.llm = SimpleNamespace(wake_up=self.wake_up)
        self._llm_weights_sleeping, self.cache_awake = enable_sleep_mode, not enable_sleep_mode

    def wake_up(self, tags: list[str]) -> None:
        self.cache_awake = self.cache_awake or "kv_cache" in tags

    def sync_weights(self) -> None:
        import copy

        self.pushes += 1
        self.model = copy.deepcopy(self.trainer.accelerator.unwrap_model(self.trainer.model)).eval()
        self._llm_weights_sleeping = False

    def generate(self, prompts: list, images: Any, num_generations: int, profiler: Any = None) -> tuple:
        if self.enable_sleep_mode and self._llm_weights_sleeping:
            self.sync_weights()
        if self.enable_sleep_mode:
            self.wake_up(["kv_cache"])
        assert self.cache_awake and not self._llm_weights_sleeping
        for mine, theirs in zip(self.model.parameters(), self.trainer.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)  # never stale
        self.generations += 1
        ids = [
            self.model.generate(torch.tensor([p]), max_new_tokens=8, do_sample=True, pad_token_id=0)[0, len(p) :]
            for p in prompts
        ]
        if self.enable_sleep_mode:
            self._llm_weights_sleeping, self.cache_awake, self.model = True, False, None
        completion_ids = [x.tolist() for x in ids]
        return prompts, completion_ids, [[[-5.0]] * len(x) for x in completion_ids], None


@pytest.mark.parametrize("sleep", [False, True])
def test_one_weight_push_serves_both_stages(folder, sleep):  # noqa: F811
    engine = HuggingFaceEngine(enable_sleep_mode=sleep)
    trainer = run(folder, max_steps=3, engine=engine, num_drafts=2)
    assert (engine.pushes, engine.generations, len(trainer.stages)) == (3, 6, 6)
    assert engine.enable_sleep_mode is sleep


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"draft_template": "no place"}, "must hold {draft} exactly once"),
        ({"draft_selection": "shortest"}, "choose one of best, random, worst"),
        ({"num_drafts": 0}, "num_drafts=0 does not divide"),
        ({"rollout_func": lambda prompts, trainer: {}}, "leave out rollout_func"),
    ],
)
def test_what_cannot_work_is_refused_at_once(folder, arguments, words):  # noqa: F811
    from datasets import Dataset

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    data = Dataset.from_dict({"prompt": ["q"], "solution": [2]})
    with pytest.raises(ValueError, match=words):
        IGRPOTrainer(folder, digits, settings(folder), data, **arguments)


def test_groups_that_span_two_processes_share_their_draft(folder, tmp_path):  # noqa: F811
    """And the fused trainer's figures are TRL's on two processes, and its gradients those of unsharded weights."""
    output = tmp_path / "seen"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "tests.integrations.trl_on_ranks", folder, str(output),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads(Path(f"{output}.{rank}").read_text(encoding="utf-8")) for rank in range(2)]
    assert all(rank["processes"] == 2 for rank in ranks)
    assert all("each holds 2 completions, 2/4 prompts" in rank["refused"] for rank in ranks)
    for log, fused in zip(ranks[0]["GRPOTrainer"], ranks[0]["FusedGRPOTrainer"], strict=True):
        assert log.keys() == fused.keys()
        for name in log.keys() - TIMES:
            assert fused[name] == pytest.approx(log[name], rel=2e-4, abs=2e-5), name
    for rank in ranks:
        assert rank["sharded"] == pytest.approx(rank["whole"], rel=1e-4) and min(rank["whole"].values()) != 0.0
    stages = [rank["stages"] for rank in ranks]
    assert len(stages[0]) == len(stages[1]) == 6
    for step in range(3):
        firsts, seconds = ([s[2 * step + stage] for s in stages] for stage in (0, 1))
        assert [len(first["prompts"]) for first in firsts] == [1, 1]  # two drafts of one prompt, one per process
        assert firsts[0]["prompts"] == firsts[1]["prompts"]
        assert firsts[0]["scores"] == firsts[1]["scores"]
        rewards = [row[0] for row in firsts[0]["scores"]]
        chosen = firsts[rewards.index(max(rewards))]["texts"][0]
        shown = seconds[0]["prompts"] + seconds[1]["prompts"]
        assert len(shown) == GROUP and len(set(shown)) == 1 and f"<draft>\n{chosen}\n</draft>" in shown[0]
    assert any(len({tuple(first["completion_ids"][0]) for first in pair}) == 2 for pair in _drafts(stages))


def _drafts(stages: list[list[dict]]) -> list[list[dict]]:
    return [[s[2 * step] for s in stages] for step in range(3)]
