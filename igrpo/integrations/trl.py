"""`IGRPOTrainer`: drafts before refinements, on TRL's own generation, rewards and batches.

TRL lays a step's rows out as P groups of G equal prompts, cut into equal shares for the W processes, so a group may
span two of them. Stage 1 keeps that layout with N in place of G: of all P·N drafts, number k answers prompt k // N, and
process r makes those from r·P·N/W up to (r+1)·P·N/W, whose prompts are among its own rows. Rewards and drafts are
gathered, so every process sees the same P·N scores and picks the same draft: the members of a group share their prompt
wherever they are.
"""

import bisect
import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from igrpo.rollout.algorithm import choose
from igrpo.rollout.config import DEFAULT_DRAFT_TEMPLATE
from igrpo_kernels.integrations.trl import FusedGRPOTrainer
from igrpo_kernels.model_logits import text_config

SELECTIONS = ("best", "random", "worst")


class IGRPOTrainer(FusedGRPOTrainer):
    """iGRPO (arXiv 2602.09000) on TRL's trainer: N drafts per prompt, the best one shown, G refinements trained on.

    Takes the arguments of `FusedGRPOTrainer`, plus the following. `num_generations` is G. Evaluation stays single-shot
    from the bare prompt. Reward functions get the same columns in both stages, and the bare prompt.

    Args:
        num_drafts: N; None = `num_generations`.
        draft_template: what is put after the user's last turn; `{draft}` stands for the draft's text.
        draft_selection: "best" (first of the highest weighted reward), or the controls "worst" and "random".
        draft_max_tokens: show at most so many tokens of the draft, its end. None = as many as leave room for the
            completion in `vllm_max_model_length`, or in the model's `max_position_embeddings`.

    Raises:
        ValueError: `rollout_func`, `tools` or environments (they own the generation), images, a draft count that
            does not divide over the processes, a template without `{draft}`.

    Example:
        >>> trainer = IGRPOTrainer(model, accuracy, args=GRPOConfig(num_generations=4, ...), train_dataset=data,
        ...                        num_drafts=4)
    """

    def __init__(
        self,
        *args: Any,
        num_drafts: int | None = None,
        draft_template: str = DEFAULT_DRAFT_TEMPLATE,
        draft_selection: str = "best",
        draft_max_tokens: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.num_drafts = self.num_generations if num_drafts is None else num_drafts
        self.draft_template, self.draft_selection = draft_template, draft_selection
        self.draft_max_tokens = draft_max_tokens
        self._bare_prompts: list | None = None
        if self.rollout_func is not None or self.tools or getattr(self, "environment_factories", None):
            raise ValueError("IGRPOTrainer generates in two stages itself: leave out rollout_func, tools, environments")
        if draft_template.count("{draft}") != 1:
            raise ValueError(f"draft_template={draft_template!r} must hold {{draft}} exactly once")
        if draft_selection not in SELECTIONS:
            raise ValueError(f"draft_selection={draft_selection!r} is unknown; choose one of {', '.join(SELECTIONS)}")
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        if self.num_drafts < 1 or rows * self.num_drafts % self.num_generations:
            raise ValueError(
                f"num_drafts={self.num_drafts} does not divide over the processes: each holds {rows} completions, "
                f"{rows}/{self.num_generations} prompts; make num_drafts a multiple of the denominator, or "
                "per_device_train_batch_size * steps_per_generation one of num_generations"
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        if "image" in inputs[0] or "images" in inputs[0]:
            raise ValueError("IGRPOTrainer works on text; remove the image columns or use FusedGRPOTrainer")
        refined = self._with_drafts(inputs)
        self._bare_prompts = [row["prompt"] for row in inputs]
        try:
            return super()._generate_and_score_completions(refined)
        finally:
            self._bare_prompts = None

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list):
        """Rewards judge an answer to the question, so they get the question in both stages."""
        prompts = prompts if self._bare_prompts is None else self._bare_prompts
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _with_drafts(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Stage 1. The rows of this process, each prompt with the draft chosen for its group."""
        n, g, rank = self.num_drafts, self.num_generations, self.accelerator.process_index
        first_row, first_draft = rank * len(inputs), rank * len(inputs) * n // g
        # draft k answers prompt k // n, whose first row here is its group's first or, if that is elsewhere, row 0
        rows = [inputs[max(k // n * g - first_row, 0)] for k in range(first_draft, first_draft + len(inputs) * n // g)]
        prompts = [row["prompt"] for row in rows]
        draft_ids, drafts = self._sample_drafts(prompts)
        scores = self._calculate_rewards(rows, prompts, drafts, draft_ids)  # (P·N, functions), of all processes
        rewards = (scores * self.reward_weights.to(scores.device)).nansum(dim=1)
        rewards[scores.isnan().all(dim=1)] = torch.nan  # no function could judge it: not 0, and never the best
        reward_P_N = rewards.view(-1, n).tolist()
        chosen_P = [self._choose(rewards, p) for p, rewards in enumerate(reward_P_N)]
        self._log_drafts(scores, reward_P_N, chosen_P)
        everyones = self._gather(draft_ids)  # P·N
        refined = {}
        for p, row in {(first_row + i) // g: row for i, row in enumerate(inputs)}.items():
            refined[p] = self._refinement_prompt(row["prompt"], everyones[p * n + chosen_P[p]])
        return [{**row, "prompt": refined[(first_row + i) // g]} for i, row in enumerate(inputs)]

    def _sample_drafts(self, prompts: list) -> tuple[list[list[int]], list]:
        """Ids and completions as reward functions get them. What TRL logs about them goes under `draft/`."""
        g, self.num_generations = self.num_generations, self.num_drafts
        kept, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        try:
            with self._kept_awake():
                _, draft_ids, _, drafts, *_ = self._generate(prompts)
        finally:
            self.num_generations = g
            measured, self._metrics["train"] = self._metrics["train"], kept
        for name, values in measured.items():
            if name.startswith("completions/"):
                kept[f"draft/{name.removeprefix('completions/')}"].extend(values)
        return draft_ids, drafts

    @contextlib.contextmanager
    def _kept_awake(self) -> Iterator[None]:
        """One weight push for both stages.

        With `vllm_enable_sleep_mode`, TRL puts its engine to sleep after each generation, which discards the weights,
        and pushes them again before the next. Between the two stages the engine stays awake instead.
        """
        engine = self.vllm_generation if self.use_vllm else None
        if engine is None or engine.mode != "colocate" or not engine.enable_sleep_mode:
            yield
            return
        if self.state.global_step != self._last_loaded_step or engine._llm_weights_sleeping:
            engine.sync_weights()  # wakes the weights
            self._last_loaded_step = self.state.global_step
        engine.llm.wake_up(tags=["kv_cache"])
        engine.enable_sleep_mode = False
        try:
            yield
        finally:
            engine.enable_sleep_mode = True

    def _choose(self, rewards: Sequence[float], prompt: int) -> int:
        """Index of the draft to show. `random` depends on the seed, the step and the prompt."""
        scores = [None if math.isnan(reward) else (reward,) for reward in rewards]
        return choose(scores, self.draft_selection, f"{self.args.seed}/{self.state.global_step}/{prompt}")

    def _refinement_prompt(self, prompt: Any, draft_ids: list[int]) -> Any:
        """The prompt with the draft's text behind its last turn; the draft loses its beginning if it must."""
        ids = draft_ids if self.draft_max_tokens is None else draft_ids[-self.draft_max_tokens :]
        limit = self._longest_prompt()

        def without(dropped: int) -> Any:
            return self._append(prompt, self.processing_class.decode(ids[dropped:], skip_special_tokens=True))

        def fits(dropped: int) -> bool:
            return len(self._tokenize_prompts([without(dropped)])[0][0]) <= limit

        return without(bisect.bisect_left(range(len(ids)), True, key=fits))

    def _append(self, prompt: Any, draft: str) -> Any:
        before, after = self.draft_template.split("{draft}")
        addition = before + draft + after
        if isinstance(prompt, str):
            return prompt + addition
        content = prompt[-1]["content"]
        addition = addition if isinstance(content, str) else [{"type": "text", "text": addition}]
        return [*prompt[:-1], {**prompt[-1], "content": content + addition}]

    def _longest_prompt(self) -> float:
        limits = [self.args.vllm_max_model_length if self.use_vllm else None]
        limits.append(getattr(text_config(self.model.config), "max_position_embeddings", None))
        return min((limit for limit in limits if limit), default=float("inf")) - self.max_completion_length

    def _gather(self, local: list) -> list:
        if self.accelerator.num_processes == 1:
            return local
        shares: list = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(shares, local)
        return [item for share in shares for item in share]

    def _log_drafts(
        self,
        scores: torch.Tensor,  # (P·N, functions)
        reward_P_N: list[list[float]],
        chosen_P: list[int],
    ) -> None:
        """The same on every process; what reward functions logged about drafts goes under `draft/`, too."""
        log = self._metrics["train"]
        for name, mean in zip(self.reward_func_names, torch.nanmean(scores, dim=0).tolist(), strict=True):
            log[f"draft/rewards/{name}/mean"].append(mean)
        rewards = torch.tensor(reward_P_N)
        log["draft/reward"].append(rewards.nanmean().item())
        log["draft/chosen_reward"].append(rewards.gather(1, torch.tensor(chosen_P)[:, None]).nanmean().item())
        self._pending_extra_logs.clear()  # columns of the completions table, which holds refinements
        for name in list(self._pending_metrics):
            self._pending_metrics[f"draft/{name}"] = self._pending_metrics.pop(name)
