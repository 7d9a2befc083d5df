"""One model on all benchmarks: engine up, every missing problem sampled and recorded, engine down."""

from __future__ import annotations

import logging
import random
import re
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from igrpo.config.unused import check_hardware
from igrpo.engines import Sampling, start_engine
from igrpo.engines.config import EngineConfig
from igrpo.engines.layout import visible_gpus, with_own_gpus
from igrpo.environments.setup import start_environment
from igrpo.eval import sampling as sampler
from igrpo.eval.benchmarks import Benchmark
from igrpo.eval.config import EvalConfig
from igrpo.eval.evaluated import EvaluatedModel
from igrpo.eval.records import Records, make_record, open_folder, weights_stamp
from igrpo.eval.summary import make_row
from igrpo.eval.two_stage import RULES, chosen_drafts
from igrpo.machine import this_machine
from igrpo.models.loading import context_limit, load_policy, load_tokenizer, stop_token_ids, vocabulary
from igrpo.models.saved_format import saved_tensors
from igrpo.report.benchmarks import SINGLE_SHOT, Row
from igrpo.rewards.columns import check_columns
from igrpo.rewards.setup import start_rewards
from igrpo.rewards.workers.pool import RewardPool
from igrpo.rewards.workers.tally import check_tallies
from igrpo.rollout.metrics import correctness_reward
from igrpo.rollout.prompts import PromptBuilder
from igrpo.rollout.pump import Call
from igrpo.rollout.turns import turns_of
from igrpo.run.lock import locked
from igrpo.run.output_folder import refused
from igrpo.settings import ConfigError
from igrpo.settings.section import default_of, field_types
from igrpo.terminal import printable

logger = logging.getLogger(__name__)

FREE_SETTINGS = {
    "model_name_or_path", "attn_implementation", "gradient_checkpointing", "activation_offloading", "use_peft",
    "bnb_4bit_quant_type", "use_bnb_nested_quant",
    "temperature", "algorithm", "num_drafts", "draft_selection", "reward_funcs", "reward_weights", "reward_timeout",
    "reward_workers", "reward_memory_gib", "reward_env", "stop_on_reward_failure", "early_stop_reward",
    "judge_base_url", "judge_api_key_env", "judge_timeout", "judge_max_retries", "judge_max_concurrency", "judge_cache",
}  # fmt: skip
"""Besides the engine's: they change no completion and no score, or the records themselves tell them."""
KEPT_SETTINGS = [
    "seed", "use_vllm", "bf16", "model_revision", "vllm_quantization", "vllm_engine_args",
    *(key for key in field_types(EvalConfig) if key not in field_types(EngineConfig) and key not in FREE_SETTINGS),
]  # fmt: skip
"""What must be the same for an evaluation to be continued."""
PLAIN_LINE_SECONDS = 10.0


class EvaluationRun:
    """Everything that one model needs; ``stack`` takes it down.

    Raises:
        ConfigError: a context that is too short, reward functions that do not load, another evaluation in the folder.
    """

    def __init__(
        self,
        model: EvaluatedModel,
        config: EvalConfig,
        benchmarks: Sequence[Benchmark],
        rules: Sequence[str],
        folder: Path,
        stack: ExitStack,
    ):
        self.model, self.config, self.benchmarks, self.rules = model, config, benchmarks, rules
        self.folder = folder / re.sub(r"[^\w.-]+", "--", model.name.strip("./~"))
        check_hardware(config, this_machine(config.use_cpu).device == "cpu")
        self.tokenizer = load_tokenizer(model.path, config)
        if (environment := start_environment(config)) is not None:
            stack.enter_context(environment)
            self.benchmarks = [replace(b, problems=environment.observed(b.problems)) for b in benchmarks]
        self.environment, schemas = environment, environment.schemas if environment else ()
        self.prompts = PromptBuilder(self.tokenizer, config, vocab_size=vocabulary(model.path, config), schemas=schemas)
        self.length = self._context()
        self.prompts.max_model_length = self.length
        self.sampling = Sampling(
            config.eval_temperature, config.max_completion_length, config.top_p, config.top_k, config.min_p
        )
        self._check_n()
        self._stack = stack
        self._pools: dict[tuple[Any, Any], RewardPool] = {}
        for benchmark in self.benchmarks:
            check_columns(self._pool(benchmark).functions, benchmark.problems, config.has_environment)
        settings = {"model": model.name, "weights": weights_stamp(model.path)}
        settings |= {key: getattr(config, key) for key in KEPT_SETTINGS}
        if rules:
            settings["num_drafts"] = config.num_drafts
        with refused(str(self.folder)):
            open_folder(self.folder, settings, {f.name: default_of(f) for f in fields(EvalConfig)})
            stack.enter_context(locked(self.folder))
        self._engine: Any = None

    def rows(self) -> list[Row]:
        """Samples what is missing; one row for the single shot and one per two-stage rule."""
        single, staged = {}, {rule: {} for rule in self.rules}
        for benchmark in self.benchmarks:
            records = self._single_shot(benchmark)
            single[benchmark.name] = records.of(benchmark.problems)
            for rule in self.rules:
                staged[rule][benchmark.name] = self._two_stage(benchmark, records, rule).of(benchmark.problems)
        rows = [make_row(self.model.name, SINGLE_SHOT, single, self.config.seed)]
        for rule, by_benchmark in staged.items():
            mode = RULES[rule].format(N=self.config.num_drafts)
            rows.append(make_row(self.model.name, mode, by_benchmark, self.config.seed))
        return rows

    def _single_shot(self, benchmark: Benchmark) -> Records:
        path = self.folder / f"{benchmark.name}.jsonl"
        records = Records(path, benchmark.problems, benchmark.n, self._names(benchmark))
        missing = records.missing(benchmark.problems)
        tasks = [sampler.bare_task(problem, self.prompts, benchmark.n, self.sampling) for problem in missing]
        self._sample(benchmark, tasks, records, benchmark.name, {})
        return records

    def _two_stage(self, benchmark: Benchmark, singles: Records, rule: str) -> Records:
        N, judged_by = self._drafts(rule), self._judge(benchmark)
        path = self.folder / f"{benchmark.name}.two_stage-{rule}.jsonl"
        records = Records(path, benchmark.problems, benchmark.n // N, self._names(benchmark))
        missing = records.missing(benchmark.problems)
        if any("token_ids" not in singles.by_row[p.index]["completions"][0] for p in missing):
            raise ConfigError(
                f"two_stage: {singles.path} was made without --two_stage and holds no token ids to refine; write "
                "another --output_dir"
            )
        tasks, chosen = [], {}
        for problem in missing:
            record, question = singles.by_row[problem.index], self.prompts.parts(problem)
            drafts = chosen_drafts(record, rule, N, judged_by, question.prompt_suffix)
            chosen[problem.index] = drafts = [(i, record["completions"][i]) for i in drafts]
            shown = [(draft["token_ids"], [draft.get("spans", ())]) for _, draft in drafts]
            asked = [self.prompts.with_draft(question, ids, spans=spans)[0] for ids, spans in shown]
            tasks.append(sampler.task(problem, question, asked, 1, self.sampling))
        self._sample(benchmark, tasks, records, f"{benchmark.name}, two-stage {rule}", chosen)
        return records

    def _sample(
        self, benchmark: Benchmark, tasks: Sequence[Call], records: Records, label: str, chosen: dict[int, Any]
    ) -> None:
        if not tasks:
            return
        engine, judged_by = self._started_engine(), self._judge(benchmark)
        # Where one stream of random numbers serves all requests, problems that an interrupted run left over must not
        # get the numbers that others already had. A request seeded by its name has the same again.
        on_gpu = this_machine(self.config.use_cpu).device != "cpu"
        by_name = self.config.use_vllm and (self.config.vllm_mode == "server" or on_gpu)
        first = 0 if by_name else tasks[0].problem.index
        engine.seed(random.Random(f"{self.config.seed}/{label}/{first}").getrandbits(31))
        pool, unsaved = self._pool(benchmark), []
        turns = turns_of(self.environment, self.prompts, pool.functions)
        done = sampler.sample(engine, pool, self.tokenizer, tasks, sampler.window(self.config), turns)
        pool.tallies()
        ticker = _Ticker(f"{self.model.name} on {label}", len(records.by_row), len(tasks))
        with ticker.progress:
            for problem, scored in done:
                record = make_record(problem, scored, judged_by, with_ids=bool(self.rules) and not chosen)
                if chosen:
                    drafts = chosen[problem.index]
                    record["drafts"] = [index for index, _ in drafts]
                    record["draft_score"] = sum(d["rewards"][judged_by] or 0.0 for _, d in drafts) / len(drafts)
                unsaved.append(record)
                if not (self.config.stop_on_reward_failure and pool.failing()):  # or they would count as wrong answers
                    for record in unsaved:
                        records.add(record)
                    unsaved.clear()
                ticker.step(sum(len(s.completion.token_ids) for s in scored))
        records.rewrite()
        tallies = pool.tallies()
        if unsaved:
            check_tallies([tallies], benchmark.name)
        for name, tally in tallies.items():
            if tally.failed:
                logger.warning(
                    "%s: the reward function %s failed on %d of %d completions, which count as %s", benchmark.name,
                    name, tally.failed, tally.failed + tally.scored, self.config.reward_error_value,
                )  # fmt: skip

    def _started_engine(self) -> Any:
        if self._engine is None:
            stop_ids = stop_token_ids(self.model.path, self.tokenizer, self.config)
            placed = with_own_gpus(self.config, visible_gpus(self.config.use_cpu))
            self._engine = start_engine(self.model.path, placed, self.length, stop_ids, self.config.seed)
            self._stack.callback(self._engine.close)
            if self._engine.version != 0:  # servers that were running hold the weights of whoever pushed last
                model = load_policy(self.model.path, self.config)
                dtype = torch.bfloat16 if self.config.bf16 else torch.float32
                self._engine.push_weights(lambda: saved_tensors(model, dtype), 0)
        return self._engine

    def _context(self) -> int:
        """Tokens for the longest question, draft and completion; no question is left out or cut."""
        parts = [(p, b.name, self.prompts.parts(p)) for b in self.benchmarks for p in b.problems]
        limit = self.config.vllm_max_model_length or context_limit(self.model.path, self.config)
        longest = max(self.prompts.longest_refinement(part) for _, _, part in parts)
        problem, name, tightest = max(parts, key=lambda entry: self.prompts.shortest_context(entry[2]))
        needed = self.prompts.shortest_context(tightest)
        if limit is not None and needed > limit:
            room = limit - needed + self.config.max_completion_length
            raise ConfigError(
                f"max_completion_length: row {problem.index} of {name} leaves {max(room, 0)} of the model's {limit} "
                f"tokens for the completion, not {self.config.max_completion_length}; write --max_completion_length "
                f"{room} or less"
            )
        return min(longest, limit or longest)

    def _check_n(self) -> None:
        for rule in self.rules:
            for benchmark in self.benchmarks:
                if benchmark.n < self._drafts(rule):
                    raise ConfigError(
                        f"n: {benchmark.n} completions of {benchmark.name} make no trial of {self._drafts(rule)} "
                        "drafts; raise --n or lower --num_drafts"
                    )

    def _drafts(self, rule: str) -> int:
        return 1 if rule == "first" else self.config.num_drafts

    def _judge(self, benchmark: Benchmark) -> str:
        return correctness_reward(self._config(benchmark))

    def _names(self, benchmark: Benchmark) -> list[str]:
        return [function.name for function in self._pool(benchmark).functions]

    def _pool(self, benchmark: Benchmark) -> RewardPool:
        if (key := (benchmark.reward_funcs, benchmark.reward_weights)) not in self._pools:
            self._pools[key] = self._stack.enter_context(start_rewards(self._config(benchmark)))
        return self._pools[key]

    def _config(self, benchmark: Benchmark) -> EvalConfig:
        weights = benchmark.reward_weights and list(benchmark.reward_weights)
        return replace(self.config, reward_funcs=list(benchmark.reward_funcs), reward_weights=weights)


class _Ticker:
    """A bar in a terminal, a plain line now and then anywhere else."""

    def __init__(self, label: str, done: int, total: int):
        self.label, self.done, self.total, self.tokens = printable(label, 200), 0, total, 0
        self.live = sys.stdout.isatty()
        self.started = self.said = time.monotonic()
        if done:
            print(f"{self.label}: {done} problems are already done", flush=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=Console(file=sys.stdout), disable=not self.live)
        self.bar = self.progress.add_task(self.label, total=total)

    def step(self, tokens: int) -> None:
        self.done, self.tokens = self.done + 1, self.tokens + tokens
        self.progress.advance(self.bar)
        now = time.monotonic()
        if not self.live and (now - self.said >= PLAIN_LINE_SECONDS or self.done == self.total):
            self.said, seconds = now, max(now - self.started, 1e-9)
            left = seconds / self.done * (self.total - self.done)
            print(
                f"{self.label}: {self.done}/{self.total} problems  tok/s {self.tokens / seconds:.0f}  ETA {left:.0f} s",
                flush=True,
            )
